"""Properties only of packed rings: wrap counters in the base, event suppression structs. The rest: test_rings.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.guest_memory.address_space import BadMemory

from .packed_ring import ENABLE, PackedRing, place
from .rig import IN, OK, Line, RigFactory, pattern, rig_factory, take_events

DISK = pattern(1 << 20)


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK) as factory:
        yield factory


@pytest.fixture
def line(make_rig: RigFactory) -> Line:
    return make_rig().line().start(ring_class=PackedRing, size=16)


def test_a_base_resumes_where_the_ring_stopped(line: Line) -> None:
    for _ in range(3):
        line.do(IN, room=512)
    base = line.stop()
    assert base == 9 | 1 << 15 | 9 << 16 | 1 << 31
    line.resume(base=base)
    assert line.do(IN, room=512).status == OK
    for _ in range(4):
        line.do(IN, room=512)
    # 24 descriptors: in the second lap, whose counters are 0.
    assert line.stop() == 8 | 8 << 16


def test_a_new_ring_that_begins_at_0(make_rig: RigFactory) -> None:
    """User-mode Linux uses this base for a new ring; after a lap it is a real position."""
    line = make_rig().line()
    line.ring = PackedRing(line.rig.guest, 3)
    line.resume(base=0)
    assert line.do(IN, room=512).status == OK
    assert line.stop() == 0
    line.resume(base=0)
    assert line.do(IN, room=512).status == OK
    assert line.stop() == 1 << 15 | 1 << 31


def test_a_used_ring_at_0_whose_first_descriptor_was_not_used(make_rig: RigFactory) -> None:
    """The third lap began in the middle of a chain; judged only by its first descriptor, the ring looks new."""
    line = make_rig().line().start(ring_class=PackedRing, size=4)
    for _ in range(4):
        assert line.do(IN, room=512).status == OK
    assert line.stop() == 0
    line.resume(base=0)
    assert line.do(IN, room=512).status == OK


@pytest.mark.parametrize("base", [16 | 1 << 15, 16 << 16 | 1 << 31, 0x7FFF])
def test_a_base_outside_the_ring_is_rejected(make_rig: RigFactory, base: int) -> None:
    line = make_rig().line()
    line.ring = PackedRing(line.rig.guest, 16)
    with pytest.raises(BadMemory, match="outside"):
        line.resume(base=base)


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_a_ring_of_any_size(make_rig: RigFactory, size: int) -> None:
    """Unlike the size of a split ring, it need not be a power of two."""
    line = make_rig().line().start(ring_class=PackedRing, size=size)
    for number in range(2 * size + 1):
        assert line.do(IN, number, room=512, direct=0).data == DISK[number * 512 : number * 512 + 512]
    assert line.stop() == line.ring.base


def test_with_event_idx_a_driver_may_enable_all_calls(make_rig: RigFactory) -> None:
    """It uses the ENABLE flag, as without EVENT_IDX; the descriptor event beside it is then ignored."""
    line = make_rig().line().start(ring_class=PackedRing, size=16, event_idx=True)
    line.rig.guest.store16(line.ring.avail, place(9, 0))
    line.rig.guest.store16(line.ring.avail + 2, ENABLE)
    for number in range(12):
        line.put(IN, number, room=512)
        line.kick()
        line.finish_without_a_call()
        assert take_events(line.call_fd) == 1


def test_a_descriptor_event_without_event_idx_is_ignored(line: Line) -> None:
    """Without EVENT_IDX a driver that requests a descriptor event gets every call."""
    line.ring.set_used_event(place(9, 0))
    for number in range(12):
        line.put(IN, number, room=512)
        line.kick()
        line.finish_without_a_call()
        assert take_events(line.call_fd) == 1
