"""Adjacent requests that become one I/O: when this happens, and that each completes as if it were alone."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.block.io import CHANNEL, REFUSED, io_at
from ringplane.block.merge import MERGE_BYTES, MERGE_IOVECS
from ringplane.block.stack import STACK
from ringplane.compiler.units import unit
from ringplane.dataplane.state import MAX_IOVECS
from ringplane.engines.common import complete
from ringplane.native.access import load64, store64, view
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR

from .combinations import EVERY
from .rig import (
    IN,
    IOERR,
    OK,
    OUT,
    PATIENCE,
    Answer,
    Line,
    Pending,
    RigFactory,
    direct_rig,
    fetch_only,
    held,
    pattern,
    rig_factory,
)

SIZE = 4 << 20
DISK = pattern(SIZE)

# A request: kind, sector, bytes.
Wanted = tuple[int, int, int]


@pytest.fixture(params=["aio", "io_uring"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    """Make rigs with images that contain DISK."""
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


def at_once(
    lines: Sequence[Line], wanted: Sequence[tuple[Line, Wanted]], alignment: int = 16
) -> tuple[list[Pending], int]:
    """Have all requests fetched in one turn per line; returns them, completed, and the number of I/Os."""
    worker = lines[0].worker
    engine = worker.engine._engine[0]
    with held(worker):
        before = worker.call(lambda: int(engine["prepared"]))
        requests = [
            line.put(kind, sector, pattern(size, sector), alignment=alignment)
            if kind == OUT
            else line.put(kind, sector, room=size, alignment=alignment)
            for line, (kind, sector, size) in wanted
        ]
        for line in lines:
            line.queue.record["turn"] = 64
            line.kick()
        fetch_only(worker)
        after = worker.call(lambda: int(engine["prepared"]))
    for line in lines:
        line.wait()
    return requests, after.result(PATIENCE) - before.result(PATIENCE)


def on_one(line: Line, *wanted: Wanted, alignment: int = 16) -> tuple[list[Answer], int]:
    requests, count = at_once([line], [(line, one) for one in wanted], alignment)
    return [line.answer(request) for request in requests], count


def expected(kind: int, sector: int, size: int) -> Answer:
    """The answer to the same request alone."""
    return Answer(OK, 1, b"") if kind == OUT else Answer(OK, size + 1, DISK[sector * 512 : sector * 512 + size])


def stream(kind: int, *sizes: int, start: int = 0) -> list[Wanted]:
    """Consecutive requests of these sizes in bytes from a sector on."""
    places = itertools.accumulate(sizes, lambda sector, size: sector + size // 512, initial=start)
    return [(kind, place, size) for place, size in zip(places, sizes, strict=False)]


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize("sizes", [(512, 512), (4096, 8192, 512), (65536,) * 4])
def test_a_stream_becomes_one_io(make_rig: RigFactory, kind: int, sizes: tuple[int, ...]) -> None:
    rig = make_rig()
    wanted = stream(kind, *sizes, start=8)
    answers, count = on_one(rig.line().start(), *wanted)
    assert answers == [expected(*one) for one in wanted]
    assert count == 1
    if kind == OUT:
        written = b"".join(pattern(size, sector) for _, sector, size in wanted)
        assert rig.content() == DISK[:4096] + written + DISK[4096 + len(written) :]


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        pytest.param([(IN, 0, 512), (OUT, 1, 512)], 2, id="kinds"),
        pytest.param([(IN, 0, 512), (IN, 2, 512)], 2, id="gap"),
        pytest.param([(IN, 1, 512), (IN, 0, 512)], 2, id="backwards"),
        pytest.param([(IN, 0, 512), (IN, 0, 512)], 2, id="twice"),
        pytest.param([(IN, 0, 512), (IN, 4, 512), (IN, 1, 512)], 3, id="another between"),
        pytest.param(stream(IN, MERGE_BYTES, 512), 2, id="large"),
        pytest.param(stream(IN, *[MERGE_BYTES // 4] * 10), 3, id="three of the largest"),
    ],
)
def test_requests_that_are_not_adjacent_or_do_not_fit_are_separate_ios(
    make_rig: RigFactory, wanted: list[Wanted], count: int
) -> None:
    answers, ios = on_one(make_rig().line().start(), *wanted)
    assert [answer.status for answer in answers] == [OK] * len(wanted)
    assert ios == count


def test_queues_are_not_mixed(make_rig: RigFactory) -> None:
    rig = make_rig()
    lines = [rig.line().start(), rig.line().start()]
    requests, count = at_once(lines, [(lines[0], (IN, 0, 512)), (lines[1], (IN, 1, 512))])
    assert [line.answer(request).status for line, request in zip(lines, requests, strict=True)] == [OK, OK]
    assert count == 2


def test_the_list_of_buffers_is_limited(make_rig: RigFactory) -> None:
    line = make_rig(guest_size=128 << 20).line().start(size=1024, indirect=True)
    pieces = MERGE_IOVECS // 2
    with held(line.worker):
        requests = [line.put(IN, 2 * n * pieces, room=1024 * pieces, writable=[1024] * pieces + [1]) for n in range(3)]
        line.queue.record["turn"] = 64
        line.kick()
        fetch_only(line.worker)
        ios = line.worker.state.channel.ios
        joined = line.worker.call(lambda: [int(joined) for joined in ios["joined"] if joined >= 0])
    line.wait()
    for number, request in enumerate(requests):
        start = 1024 * number * pieces
        assert line.answer(request) == Answer(OK, 1024 * pieces + 1, DISK[start : start + 1024 * pieces])
    assert len(joined.result(PATIENCE)) == (1 if pieces * 1024 * 2 <= MERGE_BYTES else 0)


def test_buffers_that_a_driver_sends_without_need_leave_no_room(make_rig: RigFactory) -> None:
    """A read with nearly all its room taken by device-readable buffers: an adjacent one must not be written behind it.

    Behind it are the buffers of the next slot, which can be those of another guest.
    """
    rig = make_rig(guest_size=128 << 20)
    line = rig.line().start(size=1024, indirect=True)
    pieces, unneeded = 20, MAX_IOVECS - 1 - 22
    with held(line.worker):
        requests = [
            line.put(
                IN,
                pieces * number,
                bytes(unneeded),
                room=512 * pieces,
                readable=[16, *[1] * unneeded],
                writable=[512] * pieces + [1],
                direct=0,
            )
            for number in range(2)
        ]
        line.queue.record["turn"] = 64
        line.kick()
        fetch_only(line.worker)
        joined = line.worker.call(lambda: int((line.worker.state.channel.ios["joined"] >= 0).sum()))
    line.wait()
    assert joined.result(PATIENCE) == 0
    for number, request in enumerate(requests):
        assert line.answer(request) == expected(IN, pieces * number, 512 * pieces)


def test_a_bad_end_fails_only_its_requests(make_rig: RigFactory) -> None:
    """The merged read is short: the first requests get their data, the others an error."""
    rig = make_rig()
    line = rig.line().start()
    os.truncate(rig.path, 10240)
    answers, count = on_one(line, *stream(IN, 4096, 4096, 4096, 4096))
    assert count == 1
    assert [answer.status for answer in answers] == [OK, OK, IOERR, IOERR]
    assert [answer.data for answer in answers[:2]] == [DISK[:4096], DISK[4096:8192]]
    assert answers[2].used_length == 2048


@unit
def end_all(stack_address, channel_address, first):
    """A source of two int64: the result of each I/O, and how many there were."""
    source, channel = view(stack_address, STACK).source, view(channel_address, CHANNEL)
    slot = first
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        store64(source + 8, load64(source + 8) + 1)
        complete(channel.engine, io.slot, load64(source))
    return 0


@pytest.mark.parametrize(
    ("result", "count"), [(-errno.EIO, 1 + 3), (-errno.ETIMEDOUT, 1), (REFUSED - VIRTIO_BLK_S_IOERR, 1)]
)
def test_a_source_that_has_timed_out_is_not_asked_again(make_rig: RigFactory, result: int, count: int) -> None:
    """Or that has refused: it would only take as long again. Others may have one bad block."""
    line = make_rig().line()
    source = np.array([result, 0])
    record = line.queue.stack._record
    record["source"], record["submit"], record["merges"] = source.ctypes.data, end_all.address(), 1
    line.start()
    answers, _ = on_one(line, *stream(OUT, 512, 512, 512))
    line.stop()
    assert [answer.status for answer in answers] == [IOERR] * 3
    assert source[1] == count


def test_the_parts_of_a_failed_write_are_retried(make_rig: RigFactory) -> None:
    """Each is retried by itself; here all fail, because the file was opened read-only."""
    rig = make_rig()
    line = rig.line()
    fd = os.open(rig.path, os.O_RDONLY)
    line.queue.stack.source.fd = fd
    line.start()
    answers, count = on_one(line, *stream(OUT, 512, 512, 512))
    line.stop()
    os.close(fd)
    assert (count, [answer.status for answer in answers]) == (1, [IOERR] * 3)
    assert rig.content() == DISK


def test_old_bounce_buffers_do_not_matter(make_rig: RigFactory) -> None:
    """A slot's bounce buffer of an earlier unaligned request does not affect a merged one."""
    line = direct_rig(make_rig, slots=2).line().start()
    wanted = stream(IN, 4096, 4096)
    for alignment, count in ((1, 2), (4096, 1)):
        assert on_one(line, *wanted, alignment=alignment) == ([expected(*one) for one in wanted], count)


def test_pinned_memory_is_not_merged(tmp_path: Path) -> None:
    """Registered buffers save more, and only work for I/Os with one buffer."""
    with rig_factory(tmp_path, DISK, engine="io_uring") as make_rig:
        answers, count = on_one(make_rig(pin_memory=True).line().start(), *stream(IN, 4096, 4096, 4096))
    assert answers == [expected(*one) for one in stream(IN, 4096, 4096, 4096)]
    assert count == 3


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 60))
def test_any_mixture_is_served_like_single_requests(make_rig: RigFactory, seed: int, count: int) -> None:
    """Disjoint reads and writes in nearly ascending order, on any type of ring, match the model."""
    randomness = random.Random(seed)
    rig = make_rig()
    sizes = [512 * randomness.choice([1, 1, 2, 8, 64, 130]) for _ in range(count)]
    wanted = [(randomness.choice([IN, IN, OUT]), sector, size) for _, sector, size in stream(IN, *sizes)]
    if randomness.random() < 0.5:
        kind = randomness.choice([IN, OUT])
        wanted = [(kind, sector, size) for _, sector, size in wanted]
    for _ in range(randomness.choice([0, 1, 5])):
        one = randomness.randrange(count - 1)
        wanted[one], wanted[one + 1] = wanted[one + 1], wanted[one]
    answers, _ = on_one(rig.line().start(size=256, **randomness.choice(EVERY)), *wanted)
    assert answers == [expected(*one) for one in wanted]
    content = bytearray(DISK)
    for kind, sector, size in wanted:
        if kind == OUT:
            content[sector * 512 : sector * 512 + size] = pattern(size, sector)
    assert rig.content() == content
