"""Guest memory registered with io_uring: the right bytes, only memory that is in use, and errors."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.dataplane import pinning
from ringplane.engines import uring
from ringplane.engines.uring import Uring
from ringplane.native import io_uring

from .rig import (
    IN,
    OK,
    OUT,
    PATIENCE,
    Line,
    Rig,
    RigFactory,
    eventually,
    is_mapped,
    pattern,
    rig_factory,
)

SIZE = 1 << 20
GUEST_SIZE = 8 << 20
# Not a multiple of a region's size, which is half of the guest's memory.
PIECE = 3 << 19


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    options = {"engine": "io_uring", "direct": True, "pin_memory": True, "guest_size": GUEST_SIZE}
    with rig_factory(tmp_path, pattern(SIZE), **options) as factory:
        yield factory


def engine_of(rig: Rig) -> Uring:
    engine = rig.workers[0].engine
    assert isinstance(engine, Uring)
    return engine


def registered(rig: Rig) -> list[tuple[int, int]]:
    """Addresses and sizes of the registered buffers."""
    buffers = engine_of(rig)._buffers
    return [(int(base), int(size)) for base, size in buffers[buffers["len"] > 0]]


def operations(rig: Rig, line: Line) -> list[int]:
    """The opcodes of the submissions for a read and a write of 4 KiB with single aligned buffers."""
    engine = engine_of(rig)
    record, opcodes = engine._engine[0], []
    for kind, data, room in ((IN, b"", 4096), (OUT, pattern(4096), 0)):
        before = int(record["next_sqe"])
        pending = line.put(kind, data=data, room=room, alignment=4096)
        line.kick()
        line.wait()
        assert line.answer(pending).status == OK
        address = int(record["sqes"]) + before % (int(record["sq_mask"]) + 1) * io_uring.SQE_SIZE
        opcodes.append(ctypes.string_at(address, 1)[0])
    return opcodes


def test_aligned_requests_use_registered_memory_and_others_work_too(make_rig: RigFactory) -> None:
    rig = make_rig()
    line = rig.line().start()
    assert sorted(size for _, size in registered(rig)) == [GUEST_SIZE // 2] * 2
    assert operations(rig, line) == [io_uring.IORING_OP_READ_FIXED, io_uring.IORING_OP_WRITE_FIXED]
    assert line.do(IN, room=4096).data == pattern(4096)
    assert line.do(IN, sector=8, room=8192, writable=[512, 7680, 1]).data == pattern(SIZE)[4096:12288]


def test_without_it_nothing_is_registered(make_rig: RigFactory) -> None:
    rig = make_rig(pin_memory=False)
    line = rig.line().start()
    assert operations(rig, line) == [io_uring.IORING_OP_READ, io_uring.IORING_OP_WRITE]
    assert not registered(rig)


def test_large_regions_are_registered_in_pieces(make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests inside a piece, and across the border of two pieces."""
    monkeypatch.setattr(uring, "MAX_BUFFER_SIZE", PIECE)
    rig = make_rig(poll_us=0)
    line = rig.line().start()
    half = GUEST_SIZE // 2
    assert sorted(size for _, size in registered(rig)) == sorted([PIECE, PIECE, half - 2 * PIECE] * 2)
    for start in range(PIECE - 8192, PIECE + 8192, 512):
        rig.guest.free = start
        assert line.do(IN, room=4096, alignment=512).data == pattern(SIZE)[:4096]


def test_removed_memory_is_unregistered(make_rig: RigFactory) -> None:
    rig = make_rig()
    worker = rig.workers[0]
    line = rig.line().start()
    old = [base for base, _ in registered(rig)]
    worker.set_memory(line.queue, rig.guest.table()).result(PATIENCE)
    assert line.do(IN, room=4096, alignment=4096).data == pattern(4096)
    assert eventually(lambda: not any(is_mapped(address, rig.guest.fd) for address in old))
    assert len(registered(rig)) == 2
    assert {base for base, _ in registered(rig)}.isdisjoint(old)
    line.stop()
    assert registered(rig) == []
    line.resume()
    assert line.do(IN, room=4096, alignment=4096).data == pattern(4096)


def test_queues_of_a_disk_share_registered_memory(make_rig: RigFactory) -> None:
    rig = make_rig()
    table = rig.guest.table()
    lines = [rig.line().start(table=table) for _ in range(3)]
    assert len(registered(rig)) == 2
    for line in lines:
        assert len(registered(rig)) == 2
        line.stop()
    assert registered(rig) == []


def test_a_disk_in_memory_registers_nothing(make_rig: RigFactory) -> None:
    rig = make_rig(engine="memory", direct=False)
    line = rig.line().start()
    assert line.do(IN, room=4096).data == pattern(4096)
    assert not registered(rig)


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_disks_are_served_if_memory_cannot_be_locked(
    make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, piece: int
) -> None:
    """The first call, for the table of buffers, fails, or a later one."""
    real, calls = io_uring.register, []

    def refuse(ring_fd: int, opcode: int, argument: int = 0, count: int = 0) -> None:
        if opcode in (io_uring.IORING_REGISTER_BUFFERS2, io_uring.IORING_REGISTER_BUFFERS_UPDATE):
            calls.append(opcode)
            if len(calls) == piece + 1:
                raise OSError(12, "Cannot allocate memory")
        real(ring_fd, opcode, argument, count)

    monkeypatch.setattr(io_uring, "register", refuse)
    rig = make_rig()
    with caplog.at_level(logging.WARNING, "ringplane"):
        line = rig.line().start()
        for _ in range(2):
            assert line.do(IN, room=4096, alignment=4096).data == pattern(4096)
            line.stop()
            line.resume()
    assert [record.getMessage() for record in caplog.records] == [
        "io-0: cannot pin the guests' memory; continuing without: [Errno 12] Cannot allocate memory"
    ]
    assert registered(rig) == []


def test_linux_aio_logs_that_it_cannot_register_memory(make_rig: RigFactory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, pinning.__name__):
        rig = make_rig(engine="aio")
        line = rig.line().start()
    assert "continuing without: [Errno 95] Linux AIO does not support it; use --engine io_uring" in caplog.text
    assert line.do(IN, room=4096).data == pattern(4096)
