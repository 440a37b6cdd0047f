"""The data plane as a whole: the real worker, device and queue, driven through guest memory and eventfds."""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.block.bounce_buffers import BOUNCE_BUFFERS
from ringplane.block.image import Image
from ringplane.block.sources.file import FileSource
from ringplane.block.transfer import BOUNCE_SIZE
from ringplane.dataplane.state import KINDS
from ringplane.dataplane.trace_layout import COMPLETE, FETCH
from ringplane.engines.aio import Aio
from ringplane.engines.uring import Uring
from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import MemoryTable, Region
from ringplane.native.aio_abi import IOCB_CMD_FDSYNC
from ringplane.native.fs import RWF_DSYNC
from ringplane.native.io_uring import IORING_OP_FSYNC, SQE
from ringplane.options.image_options import ImageOptions

from .rig import (
    FLUSH,
    GET_ID,
    GUEST_BASE,
    IN,
    IOERR,
    NO_ANSWER,
    OK,
    OUT,
    PATIENCE,
    SCSI_CMD,
    SCSI_CMD_OUT,
    UNSUPP,
    USER_BASE,
    Answer,
    Line,
    Pending,
    Rig,
    RigFactory,
    Ring,
    direct_rig,
    eventually,
    fetch_only,
    has_event,
    held,
    is_mapped,
    make,
    pattern,
    rig_factory,
    wait_for_event,
)

SIZE = 1 << 20
CAPACITY = SIZE // 512
DISK = pattern(SIZE)


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    """Make rigs with images that contain DISK."""
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


@pytest.fixture(params=["aio", "io_uring"])
def make_kernel_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    """The same with the engines that do I/O by the kernel."""
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


@pytest.fixture
def rig(make_rig: RigFactory) -> Rig:
    return make_rig()


@pytest.fixture
def line(rig: Rig) -> Line:
    return rig.line().start()


# Types of requests.


@pytest.mark.parametrize(("sector", "size"), [(0, 512), (8, 4096), (CAPACITY - 1, 512), (0, SIZE)])
def test_read(line: Line, sector: int, size: int) -> None:
    assert line.do(IN, sector, room=size) == Answer(OK, size + 1, DISK[sector * 512 : sector * 512 + size])


@pytest.mark.parametrize(("sector", "size"), [(0, 512), (8, 4096), (CAPACITY - 1, 512), (0, SIZE)])
def test_write(line: Line, sector: int, size: int) -> None:
    data, start = pattern(size, 1), sector * 512
    assert line.do(OUT, sector, data) == Answer(OK, 1, b"")
    assert line.rig.content() == DISK[:start] + data + DISK[start + size :]


def test_flush(line: Line) -> None:
    assert line.do(FLUSH) == Answer(OK, 1, b"")


@pytest.mark.parametrize(
    ("room", "used_length", "data"),
    [
        (20, 21, b"serial-0123456789\0\0\0"),
        (10, 11, b"serial-012"),
        (30, 20, b"serial-0123456789\0\0\0" + bytes([NO_ANSWER] * 10)),
    ],
)
def test_get_id(line: Line, room: int, used_length: int, data: bytes) -> None:
    assert line.do(GET_ID, room=room) == Answer(OK, used_length, data)


def test_get_id_of_20_bytes_has_no_terminating_zero(make_rig: RigFactory) -> None:
    line = make_rig(serial="abcdefghijklmnopqrstuvwxyz").line().start()
    assert line.do(GET_ID, room=20).data == b"abcdefghijklmnopqrst"


@pytest.mark.parametrize("kind", [SCSI_CMD, SCSI_CMD_OUT, 5, 7, 9, 0x7FFF_FFFF])
def test_unknown_types_are_unsupported(line: Line, kind: int) -> None:
    assert line.do(kind) == Answer(UNSUPP, 1, b"")
    # The status does not follow written data directly, so it is not counted.
    assert line.do(kind, room=512) == Answer(UNSUPP, 0, bytes([NO_ANSWER] * 512))
    assert line.do(kind, data=bytes(512)) == Answer(UNSUPP, 1, b"")
    assert line.rig.content() == DISK


def test_the_barrier_bit_is_masked(line: Line) -> None:
    barrier_bit = 0x8000_0000
    assert line.do(IN | barrier_bit, room=512) == Answer(OK, 513, DISK[:512])
    assert line.do(OUT | barrier_bit, 1, bytes(512)) == Answer(OK, 1, b"")
    assert line.do(FLUSH | barrier_bit) == Answer(OK, 1, b"")
    assert line.do(SCSI_CMD | barrier_bit) == Answer(UNSUPP, 1, b"")


def test_requests_without_data_are_completed_at_once(line: Line) -> None:
    assert line.do(IN) == Answer(OK, 1, b"")
    assert line.do(OUT) == Answer(OK, 1, b"")


# Framing.

FRAMINGS = [
    pytest.param([4, 4, 4, 4, 512], [1], id="header 4x4"),
    pytest.param([8, 8, 512], [1], id="header 8+8"),
    pytest.param([528], [1], id="16+512 in one"),
    pytest.param([1] * 16 + [512], [1], id="header of single bytes"),
    pytest.param([15, 2, 511], [1], id="the border inside a descriptor"),
]


@pytest.mark.parametrize(("readable", "writable"), FRAMINGS)
@pytest.mark.parametrize("direct", [None, 0, 1])
def test_framing_of_a_write(line: Line, readable: list[int], writable: list[int], direct: int | None) -> None:
    data = pattern(512, 2)
    assert line.do(OUT, 3, data, readable=readable, writable=writable, direct=direct) == Answer(OK, 1, b"")
    assert line.rig.content() == DISK[:1536] + data + DISK[2048:]


@pytest.mark.parametrize("writable", [[513], [512, 1], [511, 2], [1, 1, 511], [256, 257]])
@pytest.mark.parametrize("direct", [None, 0, 1])
def test_framing_of_a_read(line: Line, writable: list[int], direct: int | None) -> None:
    answer = line.do(IN, 3, room=512, readable=[8, 8], writable=writable, direct=direct)
    assert answer == Answer(OK, 513, DISK[1536:2048])


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def framing_line(request: pytest.FixtureRequest, make_rig: RigFactory) -> Line:
    return (direct_rig(make_rig) if request.param else make_rig()).line().start()


def sizes(total: int) -> st.SearchStrategy[list[int]]:
    """Ways to split `total` bytes into pieces."""
    places = st.lists(st.integers(1, total - 1), max_size=8, unique=True).map(sorted)
    return places.map(lambda cut: [end - start for start, end in zip([0, *cut], [*cut, total], strict=True)])


@given(data=st.data())
@settings(max_examples=60)
def test_any_framing(framing_line: Line, data: st.DataObject) -> None:
    line, rig = framing_line, framing_line.rig
    free = rig.guest.free
    sector, length = data.draw(st.integers(0, CAPACITY - 8)), 512 * data.draw(st.integers(1, 8))
    start = sector * 512
    before = rig.content()
    alignment, direct = data.draw(st.sampled_from([1, 2, 256, 4096])), data.draw(st.sampled_from([None, 0, 1]))
    if data.draw(st.booleans()):
        content = data.draw(st.binary(min_size=8, max_size=8)) * (length // 8)
        cut = data.draw(sizes(16 + length))
        answer = line.do(OUT, sector, content, readable=cut, direct=direct, alignment=alignment)
        assert answer == Answer(OK, 1, b"")
        assert rig.content() == before[:start] + content + before[start + length :]
    else:
        cut = data.draw(sizes(length + 1))
        answer = line.do(IN, sector, room=length, writable=cut, direct=direct, alignment=alignment)
        assert answer == Answer(OK, length + 1, before[start : start + length])
    rig.guest.free = free


# Requests that fail.

BEYOND = [
    pytest.param(CAPACITY, 512, id="first sector behind the end"),
    pytest.param(CAPACITY - 1, 1024, id="over the end"),
    pytest.param(0, SIZE + 512, id="larger than the disk"),
    pytest.param(2**55, 512, id="2^55, which times 512 is 0"),
    pytest.param(2**55 + 1, 512, id="2^55 + 1"),
    pytest.param(2**54, 512, id="2^54"),
    pytest.param(2**63 - 1, 512, id="2^63 - 1"),
    pytest.param(2**63, 512, id="2^63"),
    pytest.param(2**64 - 1, 512, id="2^64 - 1"),
    pytest.param(2**64 - 1, 1024, id="over 2^64"),
    pytest.param(0, 511, id="a byte less than a sector"),
    pytest.param(0, 513, id="a byte more than a sector"),
    pytest.param(0, 1, id="one byte"),
]


@pytest.mark.parametrize(("sector", "size"), BEYOND)
def test_requests_outside_the_disk_are_errors(line: Line, sector: int, size: int) -> None:
    assert line.do(IN, sector, room=size) == Answer(IOERR, 0, bytes([NO_ANSWER] * size))
    assert line.do(OUT, sector, bytes(size)) == Answer(IOERR, 1, b"")
    assert line.rig.content() == DISK
    assert line.do(IN, room=512).status == OK


@pytest.mark.parametrize(
    ("sector", "size", "status"), [(8, 4096, OK), (1, 4096, IOERR), (4, 4096, IOERR), (0, 512, IOERR)]
)
def test_large_blocks_are_read_and_written_only_completely(
    make_rig: RigFactory, sector: int, size: int, status: int
) -> None:
    line = make_rig(block_size=4096).line().start()
    assert line.do(IN, sector, room=size).status == status
    assert line.do(OUT, sector, bytes(size)).status == status
    assert (line.rig.content() == DISK) == (status != OK)


def test_a_read_only_disk_is_not_written(make_rig: RigFactory) -> None:
    rig = make_rig(read_only=True)
    line = rig.line().start()
    assert line.do(OUT, 0, bytes(512)) == Answer(IOERR, 1, b"")
    assert line.do(OUT) == Answer(IOERR, 1, b"")
    assert line.do(FLUSH) == Answer(OK, 1, b"")
    assert line.do(IN, room=512) == Answer(OK, 513, DISK[:512])
    assert rig.content() == DISK


def test_only_requests_that_the_kernel_rejects_fail(rig: Rig) -> None:
    """The fd is read-only; io_submit(2) reports that in the middle of a batch."""
    image = Image(rig.path, ImageOptions(read_only=True, direct=False, lock="off"))
    rig.source = FileSource(image)
    line = rig.line().start()
    with held(line.worker):
        requests = [line.put(IN, 1, room=512), line.put(OUT, 2, bytes(512)), line.put(IN, 3, room=512)]
        line.kick()
        fetch_only(line.worker)
    line.wait()
    assert [line.answer(request).status for request in requests] == [OK, IOERR, OK]
    line.stop()
    rig.source.close()
    assert rig.content() == DISK


@pytest.mark.parametrize("direct", [False, True])
def test_reads_of_a_truncated_image_are_never_complete(make_kernel_rig: RigFactory, direct: bool) -> None:
    rig = direct_rig(make_kernel_rig) if direct else make_kernel_rig()
    line = rig.line().start()
    os.truncate(rig.path, 8192)
    assert line.do(IN, 8, room=4096) == Answer(OK, 4097, DISK[4096:8192])
    assert line.do(IN, 16, room=4096) == Answer(IOERR, 0, bytes([NO_ANSWER] * 4096))
    # Data read before the end is counted; the status is not, because it does not follow it directly.
    half = line.do(IN, 8, room=8192)
    assert half == Answer(IOERR, 4096, DISK[4096:8192] + bytes([NO_ANSWER] * 4096))


def test_a_truncated_image_through_a_bounce_buffer(make_kernel_rig: RigFactory) -> None:
    rig = direct_rig(make_kernel_rig)
    line = rig.line().start()
    os.truncate(rig.path, 8192)
    half = line.do(IN, 8, room=8192, alignment=1)
    assert half == Answer(IOERR, 4096, DISK[4096:8192] + bytes([NO_ANSWER] * 4096))


# O_DIRECT and bounce buffers.


@pytest.mark.parametrize("alignment", [1, 2, 64, 256])
def test_unaligned_buffers_with_direct_io(make_rig: RigFactory, alignment: int) -> None:
    rig = direct_rig(make_rig)
    line = rig.line().start()
    data = pattern(4096, 3)
    assert line.do(OUT, 8, data, alignment=alignment) == Answer(OK, 1, b"")
    assert rig.content() == DISK[:4096] + data + DISK[8192:]
    assert line.do(IN, 7, room=5120, alignment=alignment) == Answer(OK, 5121, DISK[3584:4096] + data + DISK[8192:8704])


@pytest.mark.parametrize("size", [BOUNCE_SIZE, BOUNCE_SIZE + 512, 3 * BOUNCE_SIZE - 512, SIZE])
def test_requests_larger_than_a_bounce_buffer(make_rig: RigFactory, size: int) -> None:
    rig = direct_rig(make_rig)
    line = rig.line().start()
    assert line.do(IN, room=size, alignment=1) == Answer(OK, size + 1, DISK[:size])
    data = pattern(size, 4)
    assert line.do(OUT, 0, data, alignment=1) == Answer(OK, 1, b"")
    assert rig.content() == data + DISK[size:]


@pytest.mark.parametrize("in_order", [False, True])
def test_more_requests_than_bounce_buffers(make_rig: RigFactory, in_order: bool) -> None:
    rig = direct_rig(make_rig)
    line = rig.line().start(size=256, in_order=in_order)
    count, size = 3 * BOUNCE_BUFFERS, BOUNCE_SIZE + 512
    with held(line.worker):
        reads = [line.put(IN, number, room=size, alignment=1) for number in range(count)]
        line.kick()
        fetch_only(line.worker)
        in_flight = line.worker.call(lambda: line.queue.in_flight)
    line.wait()
    assert in_flight.result() == count
    for number, read in enumerate(reads):
        assert line.answer(read) == Answer(OK, size + 1, DISK[number * 512 : number * 512 + size])
    # All of them were returned.
    assert line.do(IN, room=SIZE, alignment=1).data == DISK


@pytest.mark.parametrize("in_order", [False, True])
def test_draining_while_requests_wait_for_bounce_buffers(make_rig: RigFactory, in_order: bool) -> None:
    rig = direct_rig(make_rig)
    line = rig.line().start(size=256, in_order=in_order)
    with held(line.worker):
        reads = [line.put(IN, number, room=4096, alignment=1) for number in range(3 * BOUNCE_BUFFERS)]
        line.kick()
        fetch_only(line.worker)
        drained = line.worker.stop_queue(line.queue)
    drained.result(PATIENCE)
    assert len(line.ring.collect()) == len(reads)
    assert [line.answer(read).data for read in reads] == [DISK[n * 512 : n * 512 + 4096] for n in range(len(reads))]


# Many segments, many requests.


@pytest.mark.parametrize("segments", [129, 515, 1024, 1026])
@pytest.mark.parametrize("direct_io", [False, True])
def test_many_segments(make_rig: RigFactory, segments: int, direct_io: bool) -> None:
    rig = direct_rig(make_rig) if direct_io else make_rig()
    line = rig.line().start()
    size = 512 * segments
    readable, writable = [16] + [512] * segments, [512] * segments + [1]
    answer = line.do(IN, 5, room=size, writable=writable, direct=0, alignment=512)
    assert answer == Answer(OK, size + 1, DISK[2560 : 2560 + size])
    data = pattern(size, 5)
    assert line.do(OUT, 5, data, readable=readable, direct=0, alignment=512) == Answer(OK, 1, b"")
    assert rig.content() == DISK[:2560] + data + DISK[2560 + size :]


def test_many_small_segments_with_direct_io(make_rig: RigFactory) -> None:
    line = direct_rig(make_rig).line().start()
    answer = line.do(IN, room=512 * 64, writable=[32] * 1024 + [1], direct=0, alignment=1)
    assert answer == Answer(OK, 512 * 64 + 1, DISK[: 512 * 64])


# Starting, stopping, indices.


def test_stopping_consumes_unneeded_kicks(rig: Rig) -> None:
    line = rig.line().start()
    line.do(IN, room=512)
    line.stop()
    assert not has_event(line.kick_fd)


def test_stopping_twice_returns_twice(line: Line) -> None:
    with held(line.worker):
        line.put(IN, room=512)
        line.kick()
        fetch_only(line.worker)
        both = [line.worker.stop_queue(line.queue) for _ in range(2)]
    for stopped in both:
        stopped.result(2)


def test_stopping_a_ring_that_never_ran(rig: Rig) -> None:
    line = rig.line()
    line.worker.stop_queue(line.queue).result(PATIENCE)
    line.start()
    assert line.do(IN, room=512).status == OK


def test_a_ring_outside_the_memory_is_rejected(rig: Rig) -> None:
    line = rig.line()
    guest = rig.guest
    with pytest.raises(BadMemory, match="not inside one region"):
        line.start(table=MemoryTable([Region.map(0, 0, 4096, 0, guest.fd)]))
    assert not line.queue.record["running"]
    assert line.start().do(IN, room=512).status == OK


def test_a_kick_fd_that_cannot_be_watched_is_rejected(rig: Rig) -> None:
    """A regular file. An eventfd need not be read."""
    line, other = rig.line(), rig.line().start()
    kick_fd = line.kick_fd
    line.kick_fd = os.open(rig.path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="the kick fd is not an eventfd"):
            line.start()
    finally:
        os.close(line.kick_fd)
        line.kick_fd = kick_fd
    assert not line.queue.record["running"]
    assert other.do(IN, room=512).status == OK
    assert line.start().do(IN, room=512).status == OK


# Calls.


def test_without_a_call_fd_requests_are_served(line: Line) -> None:
    line.worker.set_call_fd(line.queue, -1).result(PATIENCE)
    line.put(IN, room=512)
    line.kick()
    line.finish_without_a_call()
    assert not has_event(line.call_fd)


def test_a_call_fd_may_be_a_pipe_that_nobody_reads(line: Line) -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    line.worker.set_call_fd(line.queue, writing).result(PATIENCE)
    for _ in range(20):
        line.put(SCSI_CMD)
        line.kick()
        line.finish_without_a_call()
    line.worker.set_call_fd(line.queue, -1).result(PATIENCE)
    assert os.read(reading, 4096) == struct.pack("<Q", 1) * 20
    os.close(reading)
    os.close(writing)


# Writes of drivers that cannot flush.


def last_operation(engine: Aio | Uring, slot: int) -> tuple[str, int]:
    """The last submission, which was for `slot`: "read or write" with its RWF_ flags, or "fdatasync"."""
    if isinstance(engine, Aio):
        iocb = engine._iocbs[slot]
        opcode, flags, sync = int(iocb["lio_opcode"]), int(iocb["rw_flags"]), IOCB_CMD_FDSYNC
    else:
        last = int(engine._engine["next_sqe"][0] - 1) & int(engine._engine["sq_mask"][0])
        sqe = np.frombuffer((ctypes.c_char * SQE.itemsize).from_address(engine._sqes + last * SQE.itemsize), SQE)[0]
        opcode, flags, sync = int(sqe["opcode"]), int(sqe["op_flags"]), IORING_OP_FSYNC
    return ("fdatasync", 0) if opcode == sync else ("read or write", flags)


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("write_through", [False, True])
def test_writes_are_stable_if_the_driver_cannot_flush(
    make_kernel_rig: RigFactory, write_through: bool, direct_io: bool
) -> None:
    """Through the page cache each write ends with its own fdatasync(2) (block/flush.py says why)."""
    rig = direct_rig(make_kernel_rig) if direct_io else make_kernel_rig()
    line = rig.line().start(write_through=write_through)
    engine = rig.workers[0].engine
    # One request at a time always uses the same slot.
    slot = int(rig.workers[0].state.record["free"])
    assert line.do(OUT, 0, bytes(512)).status == OK
    if write_through and not direct_io:
        assert last_operation(engine, slot) == ("fdatasync", 0)
    else:
        assert last_operation(engine, slot) == ("read or write", RWF_DSYNC if write_through else 0)
    assert line.do(IN, room=512).status == OK
    assert last_operation(engine, slot) == ("read or write", 0)


# Memory that is replaced.


def test_requests_in_flight_keep_their_memory(rig: Rig) -> None:
    guest = rig.guest
    table = guest.table()
    addresses = [region.mapping.address for region in table.regions]
    line = rig.line().start(table=table)
    del table

    def mapped() -> list[bool]:
        return [is_mapped(address, guest.fd) for address in addresses]

    with held(line.worker):
        reads = [line.put(IN, number, room=4096) for number in range(8)]
        line.kick()
        fetch_only(line.worker)
        changed = line.worker.set_memory(line.queue, guest.table())
        in_flight, still_mapped = line.worker.call(lambda: line.queue.in_flight), line.worker.call(mapped)
    line.wait()
    changed.result(PATIENCE)
    assert in_flight.result() == 8
    assert still_mapped.result() == [True, True]
    assert [line.answer(read).data for read in reads] == [DISK[n * 512 : n * 512 + 4096] for n in range(8)]
    assert eventually(lambda: not any(mapped()))
    assert line.do(IN, 9, room=512).data == DISK[9 * 512 : 10 * 512]


def test_memory_is_replaced_twice_under_requests(rig: Rig) -> None:
    line = rig.line().start()
    addresses: list[int] = []
    reads: list[Pending] = []

    def remember() -> None:
        addresses.extend(region.mapping.address for region in line.queue.memory.regions)

    with held(line.worker):
        for _ in range(2):
            reads += [line.put(IN, number, room=4096) for number in range(4)]
            # Published in between, so that each batch is fetched with another table.
            line.worker.call(lambda index=line.ring.avail_idx: line.ring.set_avail_idx(index))
            fetch_only(line.worker)
            line.worker.call(remember)
            line.worker.set_memory(line.queue, rig.guest.table())
        in_flight = line.worker.call(lambda: line.queue.in_flight)
    line.wait()
    assert in_flight.result() == 8
    assert [line.answer(read).data for read in reads] == [DISK[n * 512 : n * 512 + 4096] for n in range(4)] * 2
    assert len(addresses) == 4
    assert eventually(lambda: not any(is_mapped(address, rig.guest.fd) for address in addresses))


def test_memory_without_the_ring_stops_only_that_queue(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    line, other = rig.line().start(), rig.line().start()
    elsewhere = MemoryTable([Region.map(0, 0, 4096, 0, rig.guest.fd)])
    with caplog.at_level(logging.WARNING):
        line.worker.set_memory(line.queue, elsewhere).result(PATIENCE)
    wait_for_event(line.queue.err_fd, "the error event")
    assert "disk queue 0: suspended: the ring is not in the shared memory" in caplog.text
    line.put(IN, room=512)
    line.kick()
    assert other.do(IN, room=512).status == OK
    assert line.ring.device_used_idx() == 0


def test_memory_that_is_removed_and_added_again_resumes_the_ring(rig: Rig) -> None:
    line = rig.line().start()
    line.worker.set_memory(line.queue, MemoryTable()).result(PATIENCE)
    read = line.put(IN, 3, room=512)
    line.kick()
    line.worker.set_memory(line.queue, rig.guest.table()).result(PATIENCE)
    line.wait()
    assert line.answer(read) == Answer(OK, 513, DISK[1536:2048])


def test_a_ring_that_is_mapped_unaligned_is_rejected(rig: Rig) -> None:
    """Its user addresses are aligned, but their region is mapped one byte off."""
    line = rig.line()
    line.ring = Ring(rig.guest, 16)
    odd = MemoryTable([Region.map(GUEST_BASE, USER_BASE - 1, rig.guest.size - 1, 0, rig.guest.fd)])
    with pytest.raises(BadMemory, match="the ring is not aligned in memory"):
        line.resume(table=odd)


def test_queues_take_turns_when_there_are_more_requests_than_slots(make_rig: RigFactory) -> None:
    rig = make_rig(slots=4)
    worker = rig.workers[0]
    lines = [rig.line().start(size=256) for _ in range(3)]
    reader = worker.start_tracing().result(PATIENCE)
    with held(worker):
        for line in lines:
            for number in range(64):
                line.put(IN, number, room=512)
            line.ring.publish()
        worker.call(worker.rings.check_all)
    for line in lines:
        line.wait()
    fetched = [event.queue for event in reader.events() if event.event == FETCH]
    assert len(fetched) == 3 * 64
    # Among the requests of any six turns, each queue had one.
    assert all({0, 1, 2} <= set(fetched[start : start + 24]) for start in range(0, 3 * 64 - 24, 24))


# Trace and counters.


def test_trace_events_of_a_request(line: Line) -> None:
    reader = line.worker.start_tracing().result(PATIENCE)
    line.do(IN, 5, room=1024)
    line.do(SCSI_CMD)
    events = list(reader.events())
    assert [event.event for event in events] == [FETCH, COMPLETE] * 2
    fetched, completed = events[:2]
    for event in (fetched, completed):
        assert (event.disk, event.queue, event.type) == (line.rig.device.name, 0, IN)
        assert (event.sector, event.length) == (5, 1024)
    assert completed.status == OK
    assert completed.head == fetched.head
    assert completed.time_ns - fetched.time_ns == round(completed.microseconds * 1000)
    assert (events[3].type, events[3].status) == (SCSI_CMD, UNSUPP)


def test_counters_and_histograms(line: Line) -> None:
    for number in range(5):
        line.do(IN, number, room=1024)
    line.do(IN, CAPACITY, room=512)
    line.do(OUT, 0, bytes(2048))
    line.do(FLUSH)
    line.do(GET_ID, room=20)
    line.do(SCSI_CMD)
    counted = {name: line.queue.counters[kind] for kind, name in enumerate(KINDS)}
    seen = {name: (int(row["requests"]), int(row["errors"]), int(row["bytes"])) for name, row in counted.items()}
    expected = {"read": (6, 1, 5 * 1024), "write": (1, 0, 2048), "flush": (1, 0, 0), "other": (2, 1, 20)}
    assert seen == dict.fromkeys(KINDS, (0, 0, 0)) | expected
    assert {name: int(row["histogram"].sum()) for name, row in counted.items()} == {
        name: requests for name, (requests, _, _) in seen.items()
    }


# The worker's thread.


def test_calls_run_on_the_workers_thread_in_order(rig: Rig) -> None:
    order: list[int] = []
    futures = [rig.workers[0].call(lambda number=number: order.append(number)) for number in range(100)]
    name = rig.workers[0].call(lambda: threading.current_thread().name)
    assert name.result(PATIENCE) == "io-0"
    assert all(future.done() for future in futures)
    assert order == list(range(100))


def test_exceptions_are_raised_in_the_caller(line: Line) -> None:
    with pytest.raises(ZeroDivisionError):
        line.worker.call(lambda: 1 // 0).result(PATIENCE)
    assert line.do(IN, room=512).status == OK


def test_a_future_that_was_cancelled_does_not_end_the_thread(line: Line) -> None:
    with held(line.worker):
        cancelled: Future[None] = line.worker.call(lambda: None)
        cancelled.cancel()
    assert line.worker.call(lambda: 5).result(5) == 5


def test_a_closed_worker_leaves_nothing_behind(tmp_path: Path) -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = left()
    rig = make(tmp_path / "disk.img", DISK, workers=2)
    rig.line(0).start().do(IN, room=512)
    rig.line(1).start().do(IN, room=512)
    rig.close()
    assert left() == before


@pytest.mark.parametrize("slots", [1, 64])
def test_an_idle_worker_sleeps(make_rig: RigFactory, slots: int) -> None:
    """A worker that polled for work would be running whenever its state is read."""
    line = make_rig(slots=slots).line().start()
    line.do(IN, room=512)
    line.turn_is_over()

    def sleeps() -> bool:
        stat = Path(f"/proc/self/task/{line.worker._thread.native_id}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "S"

    assert eventually(sleeps)


# Flushes that fail.


@pytest.mark.parametrize("direct_io", [False, True])
def test_a_failed_flush_is_not_forgotten(make_rig: RigFactory, direct_io: bool) -> None:
    """The next fdatasync(2) succeeds, but does not cover the data that was written before."""
    rig = direct_rig(make_rig) if direct_io else make_rig()
    line = rig.line().start()
    assert line.do(FLUSH).status == OK
    if not line.queue.stack.uses_engine:
        # An image in memory has nothing to flush.
        return
    file = line.queue.stack.source._record[0]
    good, bad = int(file["file"]), os.eventfd(0)
    file["file"] = bad  # cannot be synchronised: EINVAL
    assert line.do(FLUSH).status == IOERR
    file["file"] = good
    os.close(bad)
    assert line.do(FLUSH).status == IOERR
    assert line.do(IN, 0, room=512).status == OK
