"""The split ring's indices, entries and notifications in real memory, compared with the specification.

Also invalid indices in the data plane. test_rings.py has the tests of both ring formats.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.dataplane import ring_rules
from ringplane.dataplane.state import QUEUE
from ringplane.virtio import split

from . import model
from .on_structs import on_structs
from .rig import IN, OK, Line, RigFactory, has_event, rig_factory, wait_for_event

u16 = st.integers(0, 65535)
ring_sizes = st.integers(0, 10).map(lambda bits: 1 << bits)
# Most of them a few steps before the wrap-around.
starts = st.one_of(u16, st.integers(65520, 65535))


class Ring:
    """A ring in local memory: the driver accesses it by `struct`, the device by a QUEUE."""

    def __init__(self, size: int, start: int, event_idx: bool) -> None:
        self.size = size
        self.avail = np.zeros(split.avail_bytes(size), np.uint8)
        self.used = np.zeros(split.used_bytes(size), np.uint8)
        self._array = np.zeros(1, QUEUE)
        self.queue = self._array[0]
        self.queue["size"], self.queue["event_idx"] = size, event_idx
        self.queue["avail"], self.queue["used"] = self.avail.ctypes.data, self.used.ctypes.data
        for index in ("last_avail", "seen_avail", "next_used", "signalled_used"):
            self.queue[index] = start
        self.avail_idx = self.used_idx = start
        struct.pack_into("<H", self.avail, 2, start)
        struct.pack_into("<H", self.used, 2, start)

    # Section 2.7.6: le16 flags, le16 idx, le16 ring[size], le16 used_event.

    def expose(self, heads: list[int]) -> None:
        for head in heads:
            struct.pack_into("<H", self.avail, 4 + 2 * (self.avail_idx % self.size), head)
            self.avail_idx = (self.avail_idx + 1) % 65536
        struct.pack_into("<H", self.avail, 2, self.avail_idx)

    def set_no_interrupt(self, wish: bool) -> None:
        struct.pack_into("<H", self.avail, 0, int(wish))

    def set_used_event(self, event: int) -> None:
        struct.pack_into("<H", self.avail, 4 + 2 * self.size, event)

    # Section 2.7.8: le16 flags, le16 idx, {le32 id, le32 len} ring[size], le16 avail_event.

    def used_flags(self) -> int:
        return struct.unpack_from("<H", self.used, 0)[0]

    def published(self) -> int:
        return struct.unpack_from("<H", self.used, 2)[0]

    def used_entry(self, index: int) -> tuple[int, int]:
        return struct.unpack_from("<II", self.used, 4 + 8 * (index % self.size))

    def avail_event(self) -> int:
        return struct.unpack_from("<H", self.used, 4 + 8 * self.size)[0]

    def driver_kicks(self, old: int) -> bool:
        """Whether a driver would kick that moved from `old` to the current index (section 2.7.10)."""
        if self.queue["event_idx"]:
            return model.need_event(self.avail_event(), self.avail_idx, old)
        return not self.used_flags() & 1


available, take_head = on_structs(split.available), on_structs(split.take_head)
put_used, publish_used = on_structs(split.put_used), on_structs(split.publish_used)
enable_kicks, disable_kicks = on_structs(split.enable_kicks), on_structs(split.disable_kicks)
wants_notification = on_structs(split.wants_notification)

rings = st.builds(Ring, ring_sizes, starts, st.booleans())


@given(u16, u16, st.one_of(u16, st.integers(0, 3), st.integers(65533, 65535)))
def test_need_event_is_whether_the_event_lies_between(event: int, old: int, steps: int) -> None:
    new = (old + steps) % 65536
    assert split.need_event(event, new, old) == model.need_event(event, new, old)


def test_need_event_at_the_wrap_around() -> None:
    for old in range(65530, 65536):
        for steps in range(12):
            for event in (*range(65525, 65536), *range(12)):
                new = (old + steps) % 65536
                passed = event in [(old + step) % 65536 for step in range(steps)]
                assert split.need_event(event, new, old) == passed, (event, new, old)


@given(rings, st.data())
def test_heads_are_taken_in_order(ring: Ring, data: st.DataObject) -> None:
    for _ in range(3):
        heads = data.draw(st.lists(u16, max_size=ring.size))
        ring.expose(heads)
        assert available(ring.queue) == len(heads)
        assert [take_head(ring.queue) for _ in heads] == heads
        assert available(ring.queue) == 0
        assert ring.queue["last_avail"] == ring.avail_idx


@given(rings, u16)
def test_available_counts_modulo_2_to_the_16(ring: Ring, jump: int) -> None:
    struct.pack_into("<H", ring.avail, 2, (ring.avail_idx + jump) % 65536)
    assert available(ring.queue) == jump


@given(rings, st.data())
def test_used_entries_are_visible_after_publishing_and_not_before(ring: Ring, data: st.DataObject) -> None:
    u32 = st.integers(0, 2**32 - 1)
    for _ in range(3):
        entries = data.draw(st.lists(st.tuples(u16, u32), max_size=ring.size))
        before = ring.published()
        for head, length in entries:
            put_used(ring.queue, head, length)
        assert ring.published() == before
        publish_used(ring.queue)
        assert ring.published() == (before + len(entries)) % 65536
        assert [ring.used_entry(before + number) for number in range(len(entries))] == entries


@given(ring_sizes, starts, st.data())
def test_with_event_idx_the_driver_is_called_when_its_event_is_passed(
    size: int, start: int, data: st.DataObject
) -> None:
    ring = Ring(size, start, event_idx=True)
    # VIRTQ_AVAIL_F_NO_INTERRUPT has no meaning with EVENT_IDX.
    ring.set_no_interrupt(data.draw(st.booleans()))
    for _ in range(4):
        old = ring.published()
        event = data.draw(st.one_of(u16, st.integers(old - size - 1, old + size + 1))) % 65536
        ring.set_used_event(event)
        done = data.draw(st.integers(0, size))
        for _ in range(done):
            put_used(ring.queue, 0, 0)
        publish_used(ring.queue)
        assert bool(wants_notification(ring.queue)) == model.need_event(event, (old + done) % 65536, old)


@given(ring_sizes, starts, st.lists(st.integers(0, 4), min_size=1, max_size=5), st.data())
def test_one_check_covers_everything_published_since_the_last_one(
    size: int, start: int, batches: list[int], data: st.DataObject
) -> None:
    ring = Ring(size, start, event_idx=True)
    old, event = ring.published(), (start + data.draw(st.integers(-2, 24))) % 65536
    ring.set_used_event(event)
    for batch in batches:
        for _ in range(batch):
            put_used(ring.queue, 0, 0)
        publish_used(ring.queue)
    assert bool(wants_notification(ring.queue)) == model.need_event(event, (old + sum(batches)) % 65536, old)
    assert not wants_notification(ring.queue)


@given(ring_sizes, starts, u16, st.booleans())
def test_without_event_idx_only_the_flag_decides_about_calls(size: int, start: int, event: int, wish: bool) -> None:
    ring = Ring(size, start, event_idx=False)
    ring.set_used_event(event)
    ring.set_no_interrupt(wish)
    put_used(ring.queue, 0, 0)
    publish_used(ring.queue)
    assert bool(wants_notification(ring.queue)) == (not wish)


@given(rings, st.data())
def test_enabled_kicks_come_with_the_next_chain(ring: Ring, data: st.DataObject) -> None:
    ring.expose([0] * data.draw(st.integers(0, ring.size)))
    for _ in range(available(ring.queue)):
        take_head(ring.queue)
    disable_kicks(ring.queue)
    enable_kicks(ring.queue)
    old = ring.avail_idx
    ring.expose([0] * data.draw(st.integers(1, ring.size)))
    assert ring.driver_kicks(old)


@given(rings, st.data())
def test_disabled_kicks_do_not_come(ring: Ring, data: st.DataObject) -> None:
    enable_kicks(ring.queue)
    ring.expose([0])
    disable_kicks(ring.queue)
    take_head(ring.queue)
    old = ring.avail_idx
    ring.expose([0] * data.draw(st.integers(1, ring.size)))
    assert not ring.driver_kicks(old)


@given(rings)
def test_the_device_writes_only_its_own_ring(ring: Ring) -> None:
    ring.expose([0] * ring.size)
    avail = ring.avail.tobytes()
    for _ in range(ring.size):
        put_used(ring.queue, take_head(ring.queue), 1)
    disable_kicks(ring.queue)
    enable_kicks(ring.queue)
    publish_used(ring.queue)
    assert ring.avail.tobytes() == avail


def test_sizes_of_the_three_parts_match_the_specification() -> None:
    # The table of section 2.7: 16 * size, 6 + 2 * size, 6 + 8 * size.
    sizes = (split.desc_bytes(256), split.avail_bytes(256), split.used_bytes(256))
    assert sizes == (16 * 256, 6 + 2 * 256, 6 + 8 * 256)


# Rings that drivers break, served by a worker.


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, bytes(4096)) as factory:
        yield factory


def broken(line: Line, caplog: pytest.LogCaptureFixture) -> str:
    """Kick, wait until the ring breaks, and return the log."""
    caplog.set_level(logging.WARNING)
    line.kick()
    wait_for_event(line.queue.err_fd, "the error event")
    assert not line.queue.record["running"]
    return caplog.text


@pytest.mark.parametrize("jump", [17, 1000, 32768, 65535])
def test_an_available_index_that_jumps(make_rig: RigFactory, caplog: pytest.LogCaptureFixture, jump: int) -> None:
    line = make_rig().line().start(size=16, base=65530)
    line.ring.avail_idx = (65530 + jump) % 65536
    assert ring_rules.MESSAGES[ring_rules.AVAIL_INDEX] in broken(line, caplog)
    assert line.ring.device_used_idx() == 65530


def test_a_bad_head_is_not_parsed_again_after_a_restart(make_rig: RigFactory, caplog: pytest.LogCaptureFixture) -> None:
    line = make_rig().line().start(size=16)
    line.ring.put_available(999)
    broken(line, caplog)
    base = line.stop()
    caplog.clear()
    line.queue.reset()
    line.resume(base=base)
    assert line.do(IN, room=512, direct=0).status == OK
    assert not has_event(line.queue.err_fd)
    assert not caplog.records
