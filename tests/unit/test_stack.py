"""What layers can rely on: an I/O that has ended has its buffers as they were, and can go down again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.block import transfer
from ringplane.block.io import BLOCK_IO
from ringplane.block.layers.delay import DelayPart
from ringplane.block.layers.registry import LAYERS
from ringplane.block.stack import CONTINUE, WAIT, LayerPart
from ringplane.compiler.units import unit
from ringplane.dataplane.request_types import EVERY_DISK, OF_LAYER
from ringplane.native import buffers
from ringplane.native.access import view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import monotonic_ns
from ringplane.native.uio import IOVEC

from .rig import IN, OK, PATIENCE, Answer, Line, RigFactory, eventually, fetch_only, held, pattern, rig_factory

SIZE = 1 << 20
DISK = pattern(SIZE)
HOUR = 3600 * 10**9

# How many I/Os have failed.
RETRY = struct("failed")


@unit
def retry_in_an_hour(layer, channel, io_address):
    retry, io = view(layer, RETRY), view(io_address, BLOCK_IO)
    if io.result == 0:
        return CONTINUE
    retry.failed += 1
    io.upward = 0
    io.due = monotonic_ns() + HOUR
    return WAIT


class RetryPart(LayerPart):
    def __init__(self) -> None:
        self.record = new(RETRY)
        self.state = int(self.record.ctypes.data)
        self.up = retry_in_an_hour.address()


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


def let_time_pass(line: Line) -> None:
    ios = line.worker.state.channel.ios
    line.worker.call(lambda: ios["due"].fill(0)).result(PATIENCE)


@pytest.mark.parametrize("cut", [4096, 8192])
@pytest.mark.parametrize("writable", [[12288, 1], [100, 5000, 7188, 1], [4096, 4096, 4096, 1]])
def test_a_read_that_failed_half_way_is_retried_whole(make_rig: RigFactory, cut: int, writable: list[int]) -> None:
    """The image ends within the range, and is whole again before the retry."""
    retry = RetryPart()
    rig = make_rig(layers=[retry])
    line = rig.line().start()
    os.truncate(rig.path, cut)
    read = line.put(IN, 0, room=12288, writable=writable)
    line.kick()
    assert eventually(lambda: int(retry.record["failed"][0]) == 1)
    line.turn_is_over()
    with open(rig.path, "r+b") as image:
        image.write(DISK)
    let_time_pass(line)
    line.wait()
    assert line.answer(read) == Answer(OK, 12289, DISK[:12288])


@unit
def drop_front(io_address, size):
    transfer.drop_front(view(io_address, BLOCK_IO), size)
    return 0


@unit
def restore(io_address, first, dropped):
    buffers.restore(view(io_address, BLOCK_IO), first, dropped)
    return 0


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    pieces=st.lists(st.integers(1, 60), max_size=6),
)
def test_dropped_bytes_come_back(lengths: list[int], pieces: list[int]) -> None:
    vectors, io = np.zeros(len(lengths), IOVEC), np.zeros(1, BLOCK_IO)
    vectors["len"], vectors["base"] = lengths, np.arange(len(lengths)) * 1000
    first, before = int(vectors.ctypes.data), vectors.copy()
    io["iov"], io["iov_count"] = first, len(lengths)
    dropped = 0
    for piece in pieces:
        # At least one byte is left.
        if dropped + piece < sum(lengths):
            drop_front(int(io.ctypes.data), piece)
            dropped += piece
    left = vectors[len(lengths) - int(io["iov_count"][0]) :]
    assert left["len"].sum() == sum(lengths) - dropped
    if dropped:
        restore(int(io.ctypes.data), first, dropped)
    assert (vectors == before).all()
    assert (int(io["iov"][0]), int(io["iov_count"][0])) == (first, len(lengths))


def test_units_take_the_arguments_that_they_are_called_with() -> None:
    """Neither the checker nor the compiler sees who calls an address."""
    for module in LAYERS:
        for name, count in {"down": 3, "up": 3, "helped": 2, "ready": 2}.items():
            if function := getattr(module, name, None):
                assert function.__wrapped__.__code__.co_argcount == count, f"{module}: {name}"
    for types in (EVERY_DISK, *OF_LAYER.values()):
        for number, (begin, end) in types.items():
            assert begin.__wrapped__.__code__.co_argcount == 3, f"{number}: {begin.name}"
            assert end is None or end.__wrapped__.__code__.co_argcount == 4, f"{number}: {end.name}"


# How many I/Os it has seen.
COUNT = struct("downward", "upward")


@unit
def count_io(layer, channel, io_address):
    count, io = view(layer, COUNT), view(io_address, BLOCK_IO)
    if io.upward:
        count.upward += 1
    else:
        count.downward += 1
    return CONTINUE


class CountPart(LayerPart):
    def __init__(self) -> None:
        self.record = new(COUNT)
        self.state = int(self.record.ctypes.data)
        self.down = self.up = count_io.address()

    @property
    def counted(self) -> tuple[int, int]:
        return int(self.record["downward"][0]), int(self.record["upward"][0])


def insert(line: Line, index: int, part: LayerPart) -> None:
    worker, stack = line.worker, line.queue.stack
    worker.call(lambda: stack.insert(index, part, worker.state.channel.ios, worker.engine)).result(PATIENCE)


@pytest.mark.parametrize(("place", "seen"), [(0, (0, 1)), (1, (1, 1))])
def test_a_layer_is_inserted_beside_one_in_which_an_io_waits(
    make_rig: RigFactory, place: int, seen: tuple[int, int]
) -> None:
    """Above it the I/O has passed already, below it the I/O still has to. It does not wait a second time."""
    count = CountPart()
    line = make_rig(layers=[DelayPart(read=HOUR)]).line().start()
    read = line.put(IN, 0, room=512)
    line.kick()
    assert eventually(lambda: line.queue.in_flight == 1)
    line.turn_is_over()
    insert(line, place, count)
    let_time_pass(line)
    line.wait()
    assert line.answer(read) == Answer(OK, 513, DISK[:512])
    assert count.counted == seen


def test_the_first_layer_is_inserted_while_an_io_is_in_flight(make_rig: RigFactory) -> None:
    """Its slot has a level from an I/O of another disk."""
    count = CountPart()
    line = make_rig().line().start()
    read = line.put(IN, 0, room=512)
    worker, stack, ios = line.worker, line.queue.stack, line.worker.state.channel.ios
    with held(worker):
        line.ring.publish()
        fetch_only(worker)
        worker.call(lambda: ios["level"].fill(3))
        worker.call(lambda: ios["upward"].fill(1))
        worker.call(lambda: stack.insert(0, count, ios, worker.engine))
    line.wait()
    assert line.answer(read) == Answer(OK, 513, DISK[:512])
    assert count.counted == (0, 0)
    assert line.do(IN, 1, room=512) == Answer(OK, 513, DISK[512:1024])
    assert count.counted == (1, 1)
