"""Packed rings: the data plane against a driver that knows nothing of it, lap after lap, and rings that are broken."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringplane.dataplane import rules
from ringplane.memory import BadMemory

from .packed import AVAIL, PackedRing
from .rig import (
    FLUSH,
    GUEST_BASE,
    IN,
    INDIRECT,
    NEXT,
    OK,
    OUT,
    PATIENCE,
    SCSI_CMD,
    UNSUPP,
    WRITE,
    Answer,
    Line,
    Rig,
    cuts,
    eventually,
    has_event,
    make,
    need_engine,
    pattern,
    wait_for_event,
)

SIZE = 1 << 20
DISK = pattern(SIZE)

RigFactory = Callable[..., Rig]


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RigFactory]:
    """Makes rigs whose rings are packed, over an image of the content DISK, and closes them."""
    monkeypatch.setattr(Line, "ring_class", PackedRing)
    made: list[Rig] = []

    def factory(**options: object) -> Rig:
        path = tmp_path / f"disk-{len(made)}.img"
        made.append(make(path, DISK, engine=need_engine(request.param), **options))  # type: ignore[arg-type]
        return made[-1]

    yield factory
    for rig in made:
        rig.close()


@pytest.fixture
def line(make_rig: RigFactory) -> Line:
    return make_rig().line().start(size=16)


def test_requests(line: Line) -> None:
    assert line.do(IN, 8, room=4096) == Answer(OK, 4097, DISK[4096:8192])
    assert line.do(OUT, 8, pattern(4096, 1)) == Answer(OK, 1, b"")
    assert line.do(FLUSH) == Answer(OK, 1, b"")
    assert line.do(SCSI_CMD).status == UNSUPP
    assert line.do(IN, 8, room=4096).data == pattern(4096, 1)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("size", [3, 4, 5, 7, 16, 100])
def test_laps(make_rig: RigFactory, size: int, event_idx: bool) -> None:
    """Chains of three descriptors and of one, over the ring's end in every way."""
    line = make_rig().line().start(size=size, event_idx=event_idx)
    for number in range(5 * size):
        direct = None if number % 3 else 0
        sector = number % 64
        assert line.do(IN, sector, room=512, direct=direct) == Answer(OK, 513, DISK[sector * 512 : sector * 512 + 512])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), size=st.sampled_from([7, 16, 33, 128, 256]), event_idx=st.booleans())
def test_any_load_is_like_the_model(make_rig: RigFactory, seed: int, size: int, event_idx: bool) -> None:
    """Batches of requests of all kinds and framings, the queue stopped and started again in between at times.

    The driver sleeps until it is called: a kick or call too few is a hang.
    """
    randomness = random.Random(seed)
    rig = make_rig()
    line = rig.line().start(size=size, event_idx=event_idx)
    model = bytearray(rig.content())
    for _ in range(randomness.randrange(1, 12)):
        rig.guest.free = line.ring.used + 4096
        expected = []
        # No two of a batch touch the same bytes: their order is not told.
        places = randomness.sample(range(32), 16)
        while places and line.ring.has_room(8) and randomness.random() < 0.9:
            kind, sector = randomness.choice([IN, IN, OUT, OUT, FLUSH]), 64 * places.pop()
            count = 512 * randomness.randrange(1, 17)
            direct = randomness.choice([None, 0, 1])
            place = slice(sector * 512, sector * 512 + count)
            if kind == IN:
                framing = [*cuts(count, randomness, 3), 1]
                pending = line.put(IN, sector, room=count, writable=framing, direct=direct)
                expected.append((pending, Answer(OK, count + 1, bytes(model[place]))))
            elif kind == OUT:
                data = randomness.randbytes(count)
                framing = [16, *cuts(count, randomness, 3)]
                expected.append((line.put(OUT, sector, data, readable=framing, direct=direct), Answer(OK, 1, b"")))
                model[place] = data
            else:
                expected.append((line.put(FLUSH, direct=direct), Answer(OK, 1, b"")))
        line.kick()
        line.wait()
        assert [line.answer(pending) for pending, _ in expected] == [answer for _, answer in expected]
        if randomness.random() < 0.3:
            line.resume(base=line.stop())
    assert rig.content() == model


def test_a_base_goes_on_where_the_ring_stopped(line: Line) -> None:
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
    """As user-mode Linux says it; after a lap the same number means what it says."""
    line = make_rig().line()
    line.ring = PackedRing(line.rig.guest, 3)
    line.resume(base=0)
    assert line.do(IN, room=512).status == OK
    assert line.stop() == 0
    line.resume(base=0)
    assert line.do(IN, room=512).status == OK
    assert line.stop() == 1 << 15 | 1 << 31


def test_a_used_ring_at_0_whose_first_descriptor_was_not_used(make_rig: RigFactory) -> None:
    """The third lap began in the middle of a chain; it looks new, if one looks at its first descriptor alone."""
    line = make_rig().line().start(size=4)
    for _ in range(4):
        assert line.do(IN, room=512).status == OK
    assert line.stop() == 0
    line.resume(base=0)
    assert line.do(IN, room=512).status == OK


@pytest.mark.parametrize("base", [16 | 1 << 15, 16 << 16 | 1 << 31, 0x7FFF])
def test_a_base_outside_of_the_ring_is_refused(make_rig: RigFactory, base: int) -> None:
    line = make_rig().line()
    line.ring = PackedRing(line.rig.guest, 16)
    with pytest.raises(BadMemory, match="outside"):
        line.resume(base=base)


# Calls


def test_a_call_that_is_not_wanted_is_not_made(line: Line) -> None:
    line.rig.guest.store16(line.ring.avail + 2, 1)
    line.put(IN, room=512)
    line.kick()
    assert eventually(lambda: bool(line.ring.collect()))
    line.worker.call(lambda: None).result(PATIENCE)
    assert not has_event(line.call_fd)
    line.rig.guest.store16(line.ring.avail + 2, 0)
    line.do(IN, room=512)


def test_the_call_comes_with_the_descriptor_that_was_asked_for(make_rig: RigFactory) -> None:
    line = make_rig().line().start(size=8, event_idx=True)
    calls = []
    # That at place 6, then the one at place 4 of the next lap.
    for wanted in (6 | 1 << 15, 4):
        line.ring.set_used_event(wanted)
        for _ in range(2):
            line.put(IN, room=512, direct=1)
            line.kick()
            assert eventually(lambda: bool(line.ring.collect()))
            line.worker.call(lambda: None).result(PATIENCE)
            calls.append(has_event(line.call_fd))
    # Two descriptors each: places 0, 2; 4, 6.
    assert calls == [False, False, False, False]
    line.ring.set_used_event(2)
    for _ in range(2):
        line.put(IN, room=512, direct=1)
        line.kick()
        assert eventually(lambda: bool(line.ring.collect()))
    line.worker.call(lambda: None).result(PATIENCE)
    assert has_event(line.call_fd)


# Broken rings


def broken(line: Line, rule: int) -> None:
    """The ring is given up with this rule, the driver is told, and another queue of the disk is still served."""
    line.kick()
    wait_for_event(line.queue.err_fd, "the error")
    assert int(line.queue.record["broken"]) == rule
    other = line.rig.line().start()
    assert other.do(IN, room=512).data == DISK[:512]


def descriptors(line: Line, *wanted: tuple[int, int, int, int]) -> None:
    """Write (address, length, id, flags), of which the first becomes available with the next kick."""
    for number, (address, length, identifier, flags) in enumerate(wanted):
        line.rig.guest.write(
            line.ring.desc + 16 * number, struct.pack("<QIHH", address, length, identifier, flags | AVAIL)
        )


def test_a_chain_without_end(line: Line) -> None:
    offset = line.rig.guest.allocate(64)
    descriptors(line, *[(GUEST_BASE + offset, 16, 0, NEXT)] * 16)
    broken(line, rules.LOOP)


def test_an_id_that_the_ring_does_not_have(line: Line) -> None:
    offset = line.rig.guest.allocate(64)
    descriptors(line, (GUEST_BASE + offset, 16, 0, NEXT), (GUEST_BASE + offset, 1, 16, WRITE))
    broken(line, rules.HEAD_RANGE)


def test_an_address_outside_of_memory(line: Line) -> None:
    descriptors(line, (0xDEAD_0000_0000, 16, 0, 0))
    broken(line, rules.ADDRESS)


@pytest.mark.parametrize(
    ("length", "flags", "rule"),
    [
        (0, 0, rules.INDIRECT_LENGTH),
        (17, 0, rules.INDIRECT_LENGTH),
        (16, NEXT, rules.INDIRECT_NEXT),
        (16, 0, rules.INDIRECT_NESTED),
    ],
)
def test_a_bad_indirect_table(line: Line, length: int, flags: int, rule: int) -> None:
    offset = line.rig.guest.allocate(64, 16)
    line.rig.guest.write(offset, struct.pack("<QIHH", GUEST_BASE + offset, 16, 0, INDIRECT))
    descriptors(line, (GUEST_BASE + offset, length, 0, INDIRECT | flags))
    broken(line, rule)


def test_an_indirect_table_that_was_not_negotiated(make_rig: RigFactory) -> None:
    line = make_rig().line().start(size=16, indirect=False)
    line.put(IN, room=512, direct=0)
    broken(line, rules.INDIRECT_NOT_NEGOTIATED)


def test_the_kick_that_is_missing_is_not_needed_while_the_device_is_awake(make_rig: RigFactory) -> None:
    """A device that never sleeps says that it wants no kicks, and serves what comes."""
    line = make_rig(poll_us=None).line().start(size=16)
    assert line.do(IN, room=512).status == OK
    assert eventually(lambda: struct.unpack_from("<H", line.rig.guest.memory, line.ring.used + 2)[0] == 1)
    pending = line.put(IN, room=512)
    line.ring.publish()
    line.wait()
    assert line.answer(pending).status == OK
    os.eventfd_write(line.kick_fd, 1)
