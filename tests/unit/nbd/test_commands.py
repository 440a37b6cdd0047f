"""I/Os as requests to the server: data, order, stable writes, discards and zeroes."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

import ringplane
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd import receiving
from ringplane.driver import Driver
from ringplane.driver.driver import segments
from ringplane.virtio import blk

from ..nbd_server import EVERYTHING, NbdServer, Request, error_chunk, simple
from ..rig import IOERR, OK, PATIENCE, pattern
from ..waiting import wait_until
from .names import READ, SIZE, WRITE, Served


@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_any_reads_and_writes(server: NbdServer, served: Served, engine: str) -> None:
    driver, model, chance = served(engine=engine), bytearray(server.content), random.Random(1)
    for _ in range(150):
        start = chance.randrange(SIZE // 512)
        length = min(chance.choice([1, 1, 8, 8, 31, 33, 64, 300]), SIZE // 512 - start) * 512
        start *= 512
        if chance.random() < 0.5:
            model[start : start + length] = data = chance.randbytes(length)
            driver.write(start, data)
        else:
            assert driver.read(start, length) == model[start : start + length]
    assert server.content == model


@pytest.mark.parametrize("length", [512, 4096, receiving.EAGER, 100 * 1024, 900 * 1024])
@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_data_in_any_buffers(server: NbdServer, served: Served, length: int, pieces: int) -> None:
    driver, some = served(), length // pieces
    framing = [some] * (pieces - 1) + [length - some * (pieces - 1)]
    answer = driver.request(READ, 3, read=length, writable=[*framing, 1])
    assert answer.data == server.content[3 * 512 : 3 * 512 + length]
    data = pattern(length, 5)
    assert driver.request(WRITE, 5, data, readable=[16, *framing]).status == OK
    assert server.content[5 * 512 : 5 * 512 + length] == data


def test_many_in_flight_are_answered_in_any_order(server: NbdServer, served: Served, structured: bool) -> None:
    held: list[Request] = []

    def hold_eight(request: Request, server: NbdServer) -> bytes:
        held.append(request)
        if len(held) < 8:
            return b""
        replies = [server.usual(each) for each in reversed(held)]
        held.clear()
        return b"".join(replies)

    server.reply = hold_eight
    driver = served()
    sizes = [4096 * (1 + number % 5) for number in range(16)]
    sent = [driver._submit_request(READ, 100 * number, b"", size, 0) for number, size in enumerate(sizes)]
    for number, each in enumerate(sent):
        assert driver._answer(*each).data == server.content[51200 * number :][: sizes[number]]


ADJACENT, PART = 8, 4096


def at_once(server: NbdServer, folder: Path, kind: int, engine: str = "auto") -> list[tuple[int, bytes]]:
    """The answers to ADJACENT requests of PART bytes each, which are fetched together."""
    data = [pattern(PART, number) if kind == WRITE else b"" for number in range(ADJACENT)]
    size = 0 if kind == WRITE else PART
    with (
        ringplane.serve(server.uri, folder / "socket", num_queues=1, engine=engine) as export,
        Driver(folder / "socket", timeout=PATIENCE) as driver,
    ):
        export.pause()
        sent = [driver._submit_request(kind, 8 * number, each, size, 0) for number, each in enumerate(data)]
        export.resume()
        answers = [driver._answer(*each) for each in sent]
        return [(answer.status, answer.data) for answer in answers]


@pytest.mark.parametrize("engine", ["io_uring", "aio"])
@pytest.mark.parametrize("kind", [READ, WRITE])
def test_adjacent_requests_are_sent_as_one(server: NbdServer, tmp_path: Path, kind: int, engine: str) -> None:
    before = bytes(server.content)
    answers = at_once(server, tmp_path, kind, engine)
    if kind == READ:
        assert answers == [(OK, before[PART * number :][:PART]) for number in range(ADJACENT)]
    else:
        written = b"".join(pattern(PART, number) for number in range(ADJACENT))
        assert (answers, server.content[: len(written)]) == ([(OK, b"")] * ADJACENT, written)
    assert len(server.requests) < ADJACENT
    assert sum(request.length for request in server.requests) == ADJACENT * PART


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_a_bad_block_fails_only_its_own_request(server: NbdServer, tmp_path: Path, structured: bool, kind: int) -> None:
    bad = 3 * PART

    def fail(request: Request, server: NbdServer) -> bytes | None:
        if not request.offset <= bad < request.offset + request.length:
            return None
        return error_chunk(request, errno.EIO) if structured and kind == READ else simple(request, errno.EIO)

    server.reply = fail
    answers = at_once(server, tmp_path, kind)
    assert [status for status, _ in answers] == [OK, OK, OK, IOERR, OK, OK, OK, OK]


def test_a_server_of_small_requests_gets_them_one_by_one(server: NbdServer, tmp_path: Path) -> None:
    server.block_sizes = (1, 4096, 65536)
    assert [status for status, _ in at_once(server, tmp_path, WRITE)] == [OK] * ADJACENT
    assert [request.length for request in server.requests] == [PART] * ADJACENT


FUA, NO_HOLE = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE


@pytest.mark.parametrize("flags", [EVERYTHING, EVERYTHING & ~nbd.FLAG_SEND_FUA])
def test_writes_that_must_be_stable(server: NbdServer, served: Served, flags: int) -> None:
    server.flags = flags
    driver = served()
    driver.write(0, bytes(512))
    driver.flush()
    assert [(each.command, each.flags) for each in server.requests] == [(nbd.CMD_WRITE, 0), (nbd.CMD_FLUSH, 0)]
    driver.set_write_back(False)
    server.requests.clear()
    driver.write(0, bytes(512))
    driver.write_zeroes(512, 512)
    commands = [(each.command, each.flags) for each in server.requests]
    if flags & nbd.FLAG_SEND_FUA:
        assert commands == [(nbd.CMD_WRITE, FUA), (nbd.CMD_WRITE_ZEROES, FUA | NO_HOLE)]
    else:
        flush = (nbd.CMD_FLUSH, 0)
        assert commands == [(nbd.CMD_WRITE, 0), flush, (nbd.CMD_WRITE_ZEROES, NO_HOLE), flush]


def test_a_server_that_knows_no_flush(server: NbdServer, served: Served) -> None:
    server.flags = EVERYTHING & ~nbd.FLAG_SEND_FLUSH & ~nbd.FLAG_SEND_FUA
    driver = served()
    driver.flush()
    driver.set_write_back(False)
    driver.write(0, bytes(512))
    assert server.commands() == [nbd.CMD_WRITE]


def test_discards_and_zeroes(server: NbdServer, served: Served) -> None:
    driver = served()
    driver.discard(4096, 8192)
    driver.write_zeroes(65536, 4096)
    driver.write_zeroes(131072, 4096, unmap=True)
    driver.request(blk.VIRTIO_BLK_T_DISCARD, 0, segments((0, 8, 0), (16, 8, 0), (400, 1, 0)))
    assert [(each.command, each.flags, each.offset, each.length) for each in server.requests] == [
        (nbd.CMD_TRIM, 0, 4096, 8192),
        (nbd.CMD_WRITE_ZEROES, NO_HOLE, 65536, 4096),
        (nbd.CMD_WRITE_ZEROES, 0, 131072, 4096),
        (nbd.CMD_TRIM, 0, 0, 4096),
        (nbd.CMD_TRIM, 0, 8192, 4096),
        (nbd.CMD_TRIM, 0, 204800, 512),
    ]


def test_a_server_that_knows_neither(server: NbdServer, served: Served) -> None:
    server.flags = EVERYTHING & ~nbd.FLAG_SEND_TRIM & ~nbd.FLAG_SEND_WRITE_ZEROES
    server.block_sizes = (1, 4096, 16384)
    driver = served()
    before = bytes(server.content)
    driver.write_zeroes(512, 65536)
    assert [(each.command, each.length) for each in server.requests] == [(nbd.CMD_WRITE, 16384)] * 4
    assert server.content == before[:512] + bytes(65536) + before[512 + 65536 :]
    assert not driver.features & blk.VIRTIO_BLK_F_DISCARD


@pytest.mark.parametrize(
    ("error", "tries"),
    [(errno.EINVAL, 2), (errno.ENOSPC, 2), (errno.EPERM, 1), (errno.EOPNOTSUPP, 1)],
)
def test_zeros_that_the_server_does_not_make_are_written(
    server: NbdServer, served: Served, error: int, tries: int
) -> None:
    """An errno that holds for all requests is not asked for again. Discard is advice."""
    refused = [nbd.CMD_WRITE_ZEROES, nbd.CMD_TRIM]
    server.reply = lambda request, server: simple(request, error) if request.command in refused else None
    server.block_sizes = (1, 4096, 16384)
    driver = served()
    before = bytes(server.content)
    for _ in range(2):
        driver.write_zeroes(512, 16384 + 512)
        driver.discard(SIZE // 2, 4096)
    assert server.content == before[:512] + bytes(16384 + 512) + before[16384 + 1024 :]
    assert server.commands().count(nbd.CMD_WRITE_ZEROES) == tries
    assert [each.length for each in server.requests if each.command == nbd.CMD_WRITE] == [16384, 512] * 2
    # Only an error of writing them is the guest's.
    refused.append(nbd.CMD_WRITE)
    assert driver.request(blk.VIRTIO_BLK_T_WRITE_ZEROES, 0, segments((0, 8, 0))).status == blk.VIRTIO_BLK_S_IOERR


@pytest.mark.parametrize("queues", [2])
def test_a_connection_for_each_thread(server: NbdServer, served: Served, queues: int) -> None:
    driver = served(num_queues=queues, io_threads=2)
    assert server.accepted == 2
    for queue in range(queues):
        assert driver.read(0, 4096, queue) == server.content[:4096]


def test_a_server_that_allows_one_connection(server: NbdServer, served: Served) -> None:
    server.flags = EVERYTHING & ~nbd.FLAG_CAN_MULTI_CONN
    driver = served(num_queues=2, io_threads=2)
    assert server.accepted == 1
    assert driver.read(0, 4096, 1) == server.content[:4096]


def test_limits(server: NbdServer, tmp_path: Path) -> None:
    """They hold for an export as for a file."""
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export,
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        export.change_limits({"total-iops-sec": 50})
        wait_until(lambda: driver.read(0, 512) == server.content[:512] and export.throttled > 0)
