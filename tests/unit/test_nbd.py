"""The source `nbd` with a server in Python: I/Os as requests, all kinds of replies, lost connections."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.sources.choose_source import open_source, take_over_source
from ringplane.block.sources.nbd import nbd_units, receiving, reconnecting, silence
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd.connecting import connect, find_places
from ringplane.block.sources.nbd.handshake import HandshakeError
from ringplane.block.sources.nbd.link import Link
from ringplane.block.sources.nbd.nbd_source import NbdSource
from ringplane.block.sources.nbd.nbd_units import obey
from ringplane.control.export import Export
from ringplane.control.handover import HandoverError
from ringplane.control.taking_over import Predecessor
from ringplane.driver import Driver
from ringplane.driver.driver import segments
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import parse_image
from ringplane.options.nbd_uri import NbdUri
from ringplane.options.thread_options import IoThread
from ringplane.virtio import blk

from .nbd_server import (
    EVERYTHING,
    HangUp,
    NbdServer,
    Request,
    chunk,
    data_chunk,
    error_chunk,
    hole_chunk,
    simple,
)
from .rig import PATIENCE, eventually, pattern
from .waiting import wait_until

SIZE = 1 << 20
OK, IOERR = 0, 1
READ, WRITE = blk.VIRTIO_BLK_T_IN, blk.VIRTIO_BLK_T_OUT
FUA, NO_HOLE = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE


@pytest.fixture(params=[True, False], ids=["structured", "simple"])
def structured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def server(tmp_path: Path, structured: bool) -> Iterator[NbdServer]:
    made = NbdServer(tmp_path / "nbd", bytearray(pattern(SIZE)), structured)
    yield made
    made.stop()


@pytest.fixture
def served(server: NbdServer, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Serve the export with these options; returns a driver."""
    opened: list[Any] = []

    def serve(**options: Any) -> Driver:
        export = ringplane.serve(server.uri, tmp_path / "socket", **({"num_queues": 1} | options))
        opened.append(export)
        opened.append(Driver(tmp_path / "socket", timeout=PATIENCE, queues=options.get("num_queues", 1)))
        driver: Driver = opened[-1]
        return driver

    yield serve
    for each in reversed(opened):
        if isinstance(each, Export):
            each.request_stop()
            assert each.wait(PATIENCE)
        else:
            each.close()


Served = Callable[..., Driver]


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


def test_sizes_of_the_server(server: NbdServer, served: Served) -> None:
    server.block_sizes = (4096, 4096, 10000)
    with pytest.raises(ImageError, match="blocks of 4096 bytes; use --block-size 4096"):
        served()
    driver = served(block_size=4096)
    data = pattern(65536, 1)
    driver.write(4096, data)
    assert driver.read(4096, 65536) == data
    assert {(each.offset % 4096, each.length) for each in server.requests} == {(0, 8192)}


@pytest.mark.parametrize("structured", [True], indirect=True)
@pytest.mark.parametrize(
    ("preferred", "physical", "discard"),
    [(1, 4096, 4096), (512, 512, 512), (65536, 4096, 65536), (1 << 20, 4096, 4096)],
)
def test_the_preferred_size_is_not_a_physical_block(
    server: NbdServer, tmp_path: Path, preferred: int, physical: int, discard: int
) -> None:
    server.block_sizes = (1, preferred, 32 << 20)
    config = DiskConfig(parse_image(server.uri), ["io0"], socket_path=tmp_path / "socket")
    with contextlib.closing(open_source(config)) as source:
        found = source.limits().for_blocks(512)
    assert (found.physical_block, found.minimum_io, found.discard) == (physical, physical, discard)
    assert found.optimal_io == (preferred if preferred >= 512 else 0)


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


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_chunks(server: NbdServer, served: Served) -> None:
    server.content[8192:12288] = bytes(4096)

    def in_chunks(request: Request, server: NbdServer) -> bytes:
        start = request.offset
        return (
            data_chunk(request, start, bytes(server.content[start : start + 1000]))
            + data_chunk(request, start + 1000, bytes(server.content[start + 1000 : start + 8192]))
            + hole_chunk(request, start + 8192, 4096)
            + data_chunk(request, start + 12288, bytes(server.content[start + 12288 : start + 65536]))
            + chunk(request, nbd.TYPE_NONE, done=True)
        )

    server.reply = in_chunks
    assert served().read(0, 65536) == server.content[:65536]


def in_pieces(server: NbdServer, request: Request, chance: random.Random) -> list[bytes]:
    """Chunks with the data of a read, in any order; the last one says that it is the last."""
    cuts = sorted({0, request.length, *(chance.randrange(request.length) for _ in range(chance.randrange(9)))})
    pieces = list(itertools.pairwise(cuts))
    chance.shuffle(pieces)
    empty_end = chance.random() < 0.5
    found = []
    for number, (start, end) in enumerate(pieces, 1):
        place, done = request.offset + start, number == len(pieces) and not empty_end
        data = bytes(server.content[place : place + end - start])
        if any(data):
            found.append(data_chunk(request, place, data, done=done))
        else:
            found.append(hole_chunk(request, place, len(data), done=done))
    return [*found, chunk(request, nbd.TYPE_NONE, done=True)] if empty_end else found


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_chunks_in_any_order_between_those_of_other_replies(server: NbdServer, served: Served) -> None:
    chance, held = random.Random(7), list[Request]()
    for _ in range(100):
        start = chance.randrange(SIZE)
        server.content[start : start + 8192] = bytes(len(server.content[start : start + 8192]))

    def shuffle(request: Request, server: NbdServer) -> bytes:
        held.append(request)
        if len(held) < 8:
            return b""
        replies = [in_pieces(server, each, chance) for each in held]
        held.clear()
        sent = []
        while replies:
            reply = chance.choice(replies)
            sent.append(reply.pop(0))
            if not reply:
                replies.remove(reply)
        return b"".join(sent)

    server.reply = shuffle
    driver = served()
    for _ in range(25):
        wanted = []
        for _ in range(8):
            length = chance.randrange(1, 100) * 512
            sector = chance.randrange((SIZE - length) // 512)
            framing = [512] * (length // 512) if length < 40 * 512 else [length]
            sent = driver._submit_request(READ, sector, b"", length, 0, writable=[*framing, 1])
            wanted.append((sent, server.content[sector * 512 :][:length]))
        for sent, data in wanted:
            answer = driver._answer(*sent)
            assert (answer.status, answer.data) == (OK, data)
    assert server.accepted == 1


def test_errors_of_the_server(server: NbdServer, served: Served, structured: bool) -> None:
    def fail(request: Request, server: NbdServer) -> bytes | None:
        if request.offset < 65536:
            return None
        if structured:
            return error_chunk(request, errno.ENOSPC, b"full", done=False) + chunk(request, nbd.TYPE_NONE, done=True)
        return simple(request, errno.EIO)

    server.reply = fail
    driver = served()
    for _ in range(3):
        assert driver.request(READ, 128, read=4096).status == IOERR
        assert driver.request(WRITE, 128, bytes(4096)).status == IOERR
        assert driver.read(0, 4096) == server.content[:4096]
    assert server.accepted == 1


def test_a_flush_that_fails(server: NbdServer, served: Served) -> None:
    server.reply = lambda request, server: simple(request, errno.EIO) if request.command == nbd.CMD_FLUSH else None
    driver = served()
    assert [driver.request(blk.VIRTIO_BLK_T_FLUSH, 0).status for _ in range(3)] == [IOERR] * 3
    assert server.commands() == [nbd.CMD_FLUSH]


def test_a_flush_beside_one_that_fails(server: NbdServer, served: Served) -> None:
    """A server reports lost writes once, to the first of several flushes."""
    held: list[Request] = []

    def fail_the_first(request: Request, server: NbdServer) -> bytes:
        held.append(request)
        return b"" if len(held) < 2 else simple(held[0], errno.EIO) + simple(held[1])

    server.reply = fail_the_first
    driver = served()
    sent = [driver._submit_request(blk.VIRTIO_BLK_T_FLUSH, 0, b"", 0, 0) for _ in range(2)]
    assert [driver._answer(*each).status for each in sent] == [IOERR] * 2


def test_flushes_of_the_control_plane(server: NbdServer, tmp_path: Path) -> None:
    with ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export:
        export.disk.sync()
        with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
            driver.read(0, 512)
            export.disk.sync()
        assert server.commands() == [nbd.CMD_FLUSH, nbd.CMD_READ, nbd.CMD_FLUSH]
        server.reply = lambda request, server: simple(request, errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            export.disk.sync()
        with pytest.raises(OSError, match="a flush failed before"):
            export.disk.sync()


# Hostile servers. The first reply is wrong; then the server is as it should be.


def with_cookie(request: Request, change: Callable[[int], int]) -> Request:
    cookie = struct.pack("<Q", change(int.from_bytes(request.cookie, "little")))
    return Request(request.flags, request.command, cookie, request.offset, request.length)


SIMPLE_FAULTS = {
    "sent garbage": lambda request: b"garbage" * 100,
    "was not sent": lambda request: simple(with_cookie(request, lambda cookie: cookie ^ 1), data=bytes(4096)),
    "was not sent ": lambda request: simple(with_cookie(request, lambda cookie: cookie ^ 1 << 40), data=bytes(4096)),
    "was not sent  ": lambda request: simple(with_cookie(request, lambda cookie: cookie | 0xFFFFFFFF)),
    "was not sent   ": lambda request: simple(with_cookie(request, lambda cookie: cookie ^ 1 << 63)),
    "was not sent    ": lambda request: simple(request, data=bytes(4096)) + simple(request, data=bytes(4096)),
    "shuts down": lambda request: simple(request, errno.ESHUTDOWN),
    "garbage ": lambda request: data_chunk(request, request.offset, bytes(4096), done=True),
}
STRUCTURED_FAULTS = {
    "cannot have": lambda request: simple(request, data=bytes(4096)),
    "cannot have ": lambda request: chunk(request, 77, bytes(4)),
    "cannot have  ": lambda request: chunk(request, 5, bytes(12), done=True),
    "wrong length": lambda request: chunk(request, nbd.TYPE_NONE, bytes(1), done=True),
    "wrong length ": lambda request: chunk(request, nbd.TYPE_NONE),
    "wrong length  ": lambda request: data_chunk(request, request.offset, b"", done=True),
    "wrong length   ": lambda request: chunk(request, nbd.TYPE_OFFSET_HOLE, bytes(3), done=True),
    "wrong length    ": lambda request: hole_chunk(request, request.offset, 0, done=True),
    "wrong length     ": lambda request: error_chunk(request, 0),
    "wrong length      ": lambda request: error_chunk(request, 5, bytes(60000)),
    "not asked for": lambda request: data_chunk(request, request.offset, bytes(4097), done=True),
    "not asked for ": lambda request: data_chunk(request, request.offset + 1, bytes(4096), done=True),
    "not asked for  ": lambda request: data_chunk(request, request.offset - 512, bytes(4096), done=True),
    "not asked for   ": lambda request: hole_chunk(request, request.offset, 0xFFFFFFFF, done=True),
    "not asked for    ": lambda request: data_chunk(request, 1 << 63, bytes(4096), done=True),
    "not asked for     ": lambda request: data_chunk(request, request.offset + 4096, bytes(1), done=True),
    "or twice": lambda request: data_chunk(request, request.offset, bytes(4096)) + hole_chunk(request, 4096, 1),
    "or twice ": lambda request: (
        data_chunk(request, request.offset, bytes(2048)) + data_chunk(request, request.offset, bytes(2048), done=True)
    ),
    "or twice  ": lambda request: (
        hole_chunk(request, request.offset + 512, 3584) + hole_chunk(request, request.offset + 512, 512, done=True)
    ),
    "does not end": lambda request: error_chunk(request, 5, done=False) * (receiving.MOST_ERRORS + 1),
    "before all data": lambda request: data_chunk(request, request.offset, bytes(4095), done=True),
    "before all data ": lambda request: chunk(request, nbd.TYPE_NONE, done=True),
    "was not sent": lambda request: chunk(with_cookie(request, lambda cookie: cookie ^ 1), nbd.TYPE_NONE, done=True),
    "was not sent ": lambda request: chunk(request, nbd.TYPE_NONE, done=True)[:8] + b"\xff" * 12,
    "shuts down": lambda request: error_chunk(request, errno.ESHUTDOWN, b"bye"),
}


def once(fault: Callable[[Request], bytes]) -> Callable[[Request, NbdServer], bytes | None]:
    left = [fault]

    def reply(request: Request, server: NbdServer) -> bytes | None:
        return left.pop()(request) if left else None

    return reply


@pytest.mark.parametrize("delay", [0, 60])
@pytest.mark.parametrize(
    ("structured", "words"),
    [(False, words) for words in SIMPLE_FAULTS] + [(True, words) for words in STRUCTURED_FAULTS],
    indirect=["structured"],
)
def test_a_wrong_reply(
    server: NbdServer, served: Served, structured: bool, words: str, delay: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is given up, and another one is made."""
    caplog.set_level(logging.INFO)
    server.reply = once((STRUCTURED_FAULTS if structured else SIMPLE_FAULTS)[words])
    driver = served(nbd_reconnect_delay=delay)
    answer = driver.request(READ, 8, read=4096)
    # The first of two replies with the same cookie was right.
    assert answer.status == (OK if delay or words == "was not sent    " else IOERR)
    if delay and words != "was not sent    ":
        assert answer.data == server.content[4096:8192]
    assert eventually(lambda: any("connected again" in line for line in caplog.messages))
    assert any(words.strip() in line for line in caplog.messages), caplog.messages
    assert eventually(lambda: driver.request(READ, 8, read=4096).status == OK)
    assert driver.read(4096, 4096) == server.content[4096:8192]


@pytest.mark.parametrize("length", [0, 3, 16, 19, 27, 28, 29, 1000])
def test_half_a_reply(server: NbdServer, served: Served, length: int) -> None:
    def half(request: Request, server: NbdServer) -> bytes | None:
        if server.accepted > 1:
            return None
        server.connections[0].sendall(server.usual(request)[:length])
        raise HangUp

    server.reply = half
    assert served(nbd_reconnect_delay=60).read(4096, 4096) == server.content[4096:8192]


def test_replies_byte_by_byte(server: NbdServer, served: Served) -> None:
    def slowly(request: Request, server: NbdServer) -> bytes:
        for byte in server.usual(request):
            server.connections[0].sendall(bytes([byte]))
        return b""

    server.reply = slowly
    driver = served()
    assert driver.read(0, 1024) == server.content[:1024]
    driver.write(512, bytes(512))
    assert driver.read(0, 1024) == server.content[:512] + bytes(512)


# Connections that are lost.


def test_requests_wait_for_the_server(server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    came = threading.Event()

    def never(request: Request, server: NbdServer) -> bytes:
        came.set()
        return b""

    server.reply = never
    driver = served(nbd_reconnect_delay=3600)
    sent = [driver._submit_request(READ, 8 * number, b"", 4096, 0) for number in range(20)]
    sent.append(driver._submit_request(WRITE, 1024, pattern(65536, 3), 0, 0))
    assert came.wait(PATIENCE)
    server.stop()
    assert eventually(lambda: any("cannot be reached" in line for line in caplog.messages))
    sent.append(driver._submit_request(blk.VIRTIO_BLK_T_FLUSH, 0, b"", 0, 0))
    server.reply = lambda request, server: None
    server.start()
    answers = [driver._answer(*each) for each in sent]
    assert {answer.status for answer in answers} == {OK}
    assert [answer.data for answer in answers[:20]] == [
        bytes(server.content[4096 * number : 4096 * (number + 1)]) for number in range(20)
    ]
    assert server.content[1024 * 512 :][:65536] == pattern(65536, 3)


class Expiring:
    """Stands for a LINK without a connection. `expired` is stored as soon as the I/O thread has read it."""

    fd = new_fd = -1
    wake_fd = failing = 0

    def __init__(self) -> None:
        self._expired = 0

    @property
    def expired(self) -> int:
        found, self._expired = self._expired, 1
        return found

    @expired.setter
    def expired(self, value: int) -> None:
        self._expired = value


def test_the_end_of_waiting_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the I/O thread has looked for it: the next turn finds it."""
    link = Expiring()
    monkeypatch.setattr(nbd_units, "view", lambda address, layout: link)
    for name in ("monotonic_ns", "read", "fail_all", "receive_all", "begin_sync", "send_all"):
        monkeypatch.setattr(nbd_units, name, lambda *_: 0)
    obey._function(0, 0)
    assert not link.failing
    obey._function(0, 0)
    assert link.failing


def test_requests_fail_when_it_takes_too_long(
    server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    driver = served(nbd_reconnect_delay=1)
    server.stop()
    assert driver.request(READ, 0, read=512).status == IOERR
    assert any(
        "requests have waited for 1 s; they fail until there is a connection" in line for line in caplog.messages
    )
    assert driver.request(READ, 0, read=512).status == IOERR
    server.start()
    assert eventually(lambda: driver.request(READ, 0, read=512).status == OK)


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_server_that_shrinks_its_export(server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """What lies across its new end fails, in words, and so does all else until it is as it was."""
    driver, whole = served(nbd_reconnect_delay=1), server.content
    server.content = whole[: SIZE // 2]
    assert driver.read(SIZE // 2 - 4096, 4096) == whole[SIZE // 2 - 4096 : SIZE // 2]
    assert driver.request(READ, SIZE // 1024 - 8, read=8192).status == IOERR
    assert driver.request(READ, 0, read=512).status == IOERR
    for words in (
        "the server ended the reply to a read before all data had come",
        f"the server has made the export smaller: {SIZE // 2} bytes instead of {SIZE}",
        "requests have waited for 1 s; they fail until there is a connection",
    ):
        assert any(words in line for line in caplog.messages), words
    server.content = whole
    assert eventually(lambda: driver.request(READ, SIZE // 1024 - 8, read=8192).status == OK)


def hang_up_at(sector: int) -> Callable[[Request, NbdServer], bytes | None]:
    """The server ends each connection at requests for this sector."""

    def reply(request: Request, server: NbdServer) -> bytes | None:
        if request.offset == sector * 512:
            raise HangUp
        return None

    return reply


def test_a_server_that_hangs_up_at_a_certain_request(
    server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers others, also on the next connection, and so again and again: the delay is over nevertheless."""
    server.reply = hang_up_at(100)
    driver = served(nbd_reconnect_delay=1)
    assert driver.request(WRITE, 100, bytes(4096)).status == IOERR
    assert any("requests have waited for 1 s" in line for line in caplog.messages)
    # There are pauses between its connections.
    assert server.accepted < 20
    assert eventually(lambda: driver.request(READ, 0, read=4096).status == OK)


def test_a_server_that_hangs_up_at_once(server: NbdServer, served: Served) -> None:
    """After each handshake, without a request: the pauses become longer, and requests do not wait for ever."""
    driver = served(nbd_reconnect_delay=1)
    server.hangs_up = True
    server.drop_connections()
    assert driver.request(READ, 0, read=4096).status == IOERR
    assert server.accepted < 20
    server.hangs_up = False
    assert eventually(lambda: driver.request(READ, 0, read=4096).status == OK)


class Failing:
    """An epoll instance that can watch no socket once."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll, self._failed = epoll, False

    def register(self, fd: int, events: int) -> None:
        if not self._failed:
            self._failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._epoll.register(fd, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_connection_that_cannot_be_watched(
    server: NbdServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ringplane.serve(server.uri, tmp_path / "socket", num_queues=1, nbd_reconnect_delay=3600) as export:
        assert isinstance(export.disk.source, NbdSource)
        [link] = export.disk.source._links
        link._epoll = Failing(link._epoll)  # type: ignore[assignment]
        with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
            server.drop_connections()
            assert driver.read(0, 4096) == server.content[:4096]
    words = "cannot connect again: its connection cannot be used: No space left on device"
    assert any(words in line for line in caplog.messages)


def test_a_server_that_comes_back_smaller(server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    driver = served(nbd_reconnect_delay=3600)
    whole = server.content
    server.stop()
    server.content = whole[: SIZE // 2]
    server.start()
    assert eventually(lambda: any("has made the export smaller" in line for line in caplog.messages))
    server.stop()
    server.content = whole
    server.start()
    assert driver.read(SIZE - 512, 512) == whole[-512:]


def test_it_is_closed_while_the_server_is_gone(server: NbdServer, served: Served) -> None:
    driver = served()
    server.stop()
    assert driver.request(READ, 0, read=512).status == IOERR


def test_it_is_taken_over(server: NbdServer, tmp_path: Path) -> None:
    """With its connection: the server may allow only one."""
    server.flags = EVERYTHING & ~nbd.FLAG_CAN_MULTI_CONN
    path = tmp_path / "socket"
    with (
        ringplane.serve(server.uri, path, num_queues=1, upgradable=True) as export,
        Driver(path, timeout=PATIENCE) as driver,
    ):
        driver.write(0, pattern(4096, 7))
        with ringplane.serve(server.uri, path, num_queues=1, upgrade=True) as successor:
            assert export.wait(PATIENCE)
            assert driver.read(0, 4096) == pattern(4096, 7)
            assert server.accepted == 1
            server.stop()
            server.start()
            assert eventually(lambda: driver.request(READ, 0, read=512).status == OK)
            successor.disk.sync()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"create": SIZE}, "create is for files and devices of this machine"),
        ({"engine": "null"}, "engine null is for files"),
        ({"direct": False}, "buffered .* is for files"),
        ({"lock": "on"}, "lock is for files"),
    ],
)
@pytest.mark.parametrize("structured", [True], indirect=True)
def test_options_of_files(server: NbdServer, served: Served, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        served(**options)


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_read_only(server: NbdServer, served: Served) -> None:
    server.flags = EVERYTHING | nbd.FLAG_READ_ONLY
    with pytest.raises(ImageError, match="exports it read-only; --read-only serves it"):
        served()
    driver = served(read_only=True)
    assert driver.read(0, 512) == server.content[:512]
    assert driver.request(WRITE, 0, bytes(512)).status == IOERR


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_server_that_is_started_again_between_two_guests(
    server: NbdServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first request of the next guest does not fail, also without a delay."""
    caplog.set_level(logging.INFO)
    with ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export:
        for number in range(1, 4):
            server.stop()
            server.start()
            wait_until(lambda number=number: caplog.text.count("connected again") == number)  # type: ignore[misc]
            with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
                assert driver.read(0, 4096) == server.content[:4096]
            # It is not used by the I/O thread any more.
            wait_until(lambda: export.state != "attached")


# Servers that hang.


@pytest.fixture
def hanging(server: NbdServer) -> Iterator[threading.Event]:
    """The server replies to no request until this event is set."""
    go = threading.Event()

    def hang(request: Request, server: NbdServer) -> None:
        assert go.wait(PATIENCE)

    server.reply = hang
    yield go
    go.set()


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_disk_is_paused_while_its_server_hangs(server: NbdServer, hanging: threading.Event, tmp_path: Path) -> None:
    """What is in flight is waited for; nothing more is fetched until the disk is resumed."""
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export,
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        first = driver._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        pausing = threading.Thread(target=export.pause)
        pausing.start()
        wait_until(lambda: export.paused)
        second = driver._submit_request(READ, 8, b"", 4096, 0)
        assert export.in_flight == 1
        assert pausing.is_alive()
        hanging.set()
        pausing.join(PATIENCE)
        assert driver._answer(*first).data == server.content[:4096]
        assert len(server.requests) == 1
        export.resume()
        assert driver._answer(*second).data == server.content[4096:8192]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_an_upgrade_while_the_server_hangs(server: NbdServer, hanging: threading.Event, tmp_path: Path) -> None:
    """It is refused in one line, and the request ends in the running process."""
    path = tmp_path / "socket"
    with (
        ringplane.serve(server.uri, path, num_queues=1, upgradable=True),
        Driver(path, timeout=PATIENCE) as driver,
    ):
        sent = driver._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        with pytest.raises(HandoverError, match=r"continues to serve: .*requests in flight took longer than 2 seconds"):
            ringplane.serve(server.uri, path, num_queues=1, upgrade=True)
        hanging.set()
        assert driver._answer(*sent).data == server.content[:4096]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_front_end_that_stops_its_rings_while_the_server_hangs(
    server: NbdServer, hanging: threading.Event, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets its answer when the request in flight has ended."""
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1),
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        sent = driver._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        bases: list[list[int]] = []
        stopping = threading.Thread(target=lambda: bases.append(driver.stop()))
        stopping.start()
        wait_until(lambda: "waiting for 1 requests in flight" in caplog.text)
        assert not bases
        hanging.set()
        stopping.join(PATIENCE)
        assert bases == [[1]]
        assert driver._answer(*sent).data == server.content[:4096]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_front_ends_that_come_and_go_while_the_server_hangs(
    server: NbdServer, hanging: threading.Event, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory of one that has gone stays mapped until its request has ended; the next one is served then."""
    with ringplane.serve(server.uri, tmp_path / "socket", num_queues=1):
        gone = Driver(tmp_path / "socket", timeout=PATIENCE)
        gone._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        gone._close_connection()
        came: list[bytes] = []

        def come() -> None:
            with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
                came.append(driver.read(4096, 4096))

        coming = threading.Thread(target=come)
        coming.start()
        wait_until(lambda: "waiting for 1 requests in flight" in caplog.text)
        assert not came
        hanging.set()
        coming.join(PATIENCE)
        assert came == [server.content[4096:8192]]


# Handing over, closing. The source is that of a disk without an I/O thread.


@pytest.fixture
def config(server: NbdServer, tmp_path: Path) -> DiskConfig:
    return DiskConfig(parse_image(server.uri), ["io0"], socket_path=tmp_path / "socket", nbd_reconnect_delay=3600)


@pytest.fixture
def source(config: DiskConfig) -> Iterator[NbdSource]:
    with contextlib.closing(open_source(config).prepare([])) as made:
        assert isinstance(made, NbdSource)
        made.part(64)
        made.start_threads()
        made.watch(lambda: None)
        yield made


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_more_than_is_handled_in_a_turn(server: NbdServer, config: DiskConfig) -> None:
    """A server may send as fast as it is received: the rest comes in later turns, after those of other disks."""
    sent = threading.Event()

    def send_much(request: Request, server: NbdServer) -> bytes:
        server.connections[0].sendall(error_chunk(request, errno.EIO, done=False) * 1000)
        sent.set()
        return chunk(request, nbd.TYPE_NONE, done=True)

    server.reply = send_much
    with contextlib.closing(open_source(config).prepare([])) as source:
        link = source.part(64)
        assert isinstance(link, Link)
        # A few bytes with each call, as after a long read.
        link.record["eager"], link.record["sync_wanted"] = receiving.SHORT, 1
        obey(link.address, 0)
        assert sent.wait(PATIENCE)
        turns = 0
        while link.record["unanswered"]:
            obey(link.address, 0)
            turns += 1
        assert turns >= 1000 * 26 // (receiving.SHORT * receiving.MOST_CALLS)
        assert link.record["sync_result"] == -errno.EIO


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_replies_to_its_successor_are_left_alone(source: NbdSource) -> None:
    """Between the end of its I/O and its own end both processes have the connection."""
    [fd] = source.hand_over()["nbd"]["connections"]
    source.let_go()
    with socket.socket(fileno=os.dup(fd.number)) as successor:
        for _ in range(20):
            successor.send(struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, 0, 512))
            readable = select.poll()
            readable.register(successor, select.POLLIN)
            assert readable.poll(PATIENCE * 1000)
            # Nor does a flush that comes too late look at what arrives.
            with pytest.raises(OSError, match="another process takes over the disk"):
                source.sync()
            assert len(successor.recv(8192)) == 20 + 8 + 512


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_successor_that_never_serves_leaves_the_connection_as_it_is(
    server: NbdServer, config: DiskConfig, source: NbdSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with contextlib.closing(take_over_source(config, source.hand_over()).prepare([])) as successor:
        successor.part(64)
        source.let_go()
    source.take_back()
    source.sync()
    assert server.commands() == [nbd.CMD_FLUSH]
    # And its end is noticed as before.
    server.drop_connections()
    wait_until(lambda: "connected again" in caplog.text)
    source.sync()


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_connection_that_was_offered_and_lost(
    server: NbdServer, source: NbdSource, caplog: pytest.LogCaptureFixture
) -> None:
    """The successor would have one that has ended."""
    caplog.set_level(logging.INFO)
    source.hand_over()
    server.drop_connections()
    wait_until(lambda: "connected again" in caplog.text)
    with pytest.raises(ImageError, match="was lost, or made again, meanwhile; try again"):
        source.let_go()
    source.take_back()
    source.sync()
    source.hand_over()
    source.let_go()


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_an_upgrade_while_the_connection_is_lost(
    server: NbdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused in one line, and the running process serves on."""
    caplog.set_level(logging.INFO)
    take = Predecessor.take

    def take_late(self: Predecessor, *arguments: Any) -> None:
        server.drop_connections()
        wait_until(lambda: "connected again" in caplog.text)
        take(self, *arguments)

    monkeypatch.setattr(Predecessor, "take", take_late)
    path, options = tmp_path / "socket", {"num_queues": 1, "nbd_reconnect_delay": 3600}
    with (
        ringplane.serve(server.uri, path, upgradable=True, **options) as export,
        Driver(path, timeout=PATIENCE) as driver,
    ):
        words = "the running process continues to serve: .* its connection to the server was lost, or made again"
        with pytest.raises(HandoverError, match=words):
            ringplane.serve(server.uri, path, upgrade=True, **options)
        assert driver.read(0, 4096) == server.content[:4096]
        export.disk.sync()
        monkeypatch.setattr(Predecessor, "take", take)
        with ringplane.serve(server.uri, path, upgrade=True, **options):
            assert export.wait(PATIENCE)
            assert driver.read(0, 4096) == server.content[:4096]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_flush_of_a_disk_that_is_closed(server: NbdServer, source: NbdSource) -> None:
    """It ends, and it uses no fd that others have by then."""
    server.reply = lambda request, server: b""
    problems: list[OSError] = []

    def flush() -> None:
        try:
            source.sync()
        except OSError as error:
            problems.append(error)

    flushing = threading.Thread(target=flush)
    flushing.start()
    wait_until(lambda: server.commands() == [nbd.CMD_FLUSH])
    source.close()
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    flushing.join(PATIENCE)
    with pytest.raises(OSError, match="the disk was closed"):
        source.sync()
    for fd in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)
    assert [problem.strerror for problem in problems] == ["the disk was closed"]


# Servers that do not answer.


def drop_what_arrives(sock: socket.socket) -> None:
    """From now on the kernel acknowledges nothing of this connection, as if the machine were gone."""
    ignore = ctypes.create_string_buffer(struct.pack("=HBBI", BPF_RET, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(ignore)))


BPF_RET, SO_ATTACH_FILTER = 0x06, 26


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
    with client, peer:
        yield client, peer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "LONGEST_SILENCE", 300)
    monkeypatch.setattr(silence, "LAST_ANSWER", 100)
    monkeypatch.setattr(reconnecting, "LOOK", 0.02)


def test_a_peer_that_is_gone(connected: tuple[socket.socket, socket.socket], impatient: None) -> None:
    client, peer = connected
    client.send(b"x")
    assert peer.recv(1) == b"x"
    wait_until(lambda: not silence.is_silent(client))
    drop_what_arrives(peer)
    client.send(b"y")
    wait_until(lambda: silence.is_silent(client))


@pytest.mark.parametrize(
    ("probes", "unacknowledged", "sent", "acknowledged", "silent"),
    [
        (0, 1, 2_000, 26_000, True),
        (0, 1, 500, 26_000, False),
        (0, 1, 2_000, 24_000, False),
        (2, 0, 100, 26_000, True),
        # Nothing is on its way: keepalive asks.
        (0, 0, 26_000, 26_000, False),
        # It has no room, and has answered the last repetition, or the last question but one.
        (0, 1, 26_000, 26_000, False),
        (1, 0, 100, 26_000, False),
    ],
)
def test_when_a_peer_is_silent(probes: int, unacknowledged: int, sent: int, acknowledged: int, silent: bool) -> None:
    """By what the kernel may say of the connection, in milliseconds; when it says what depends on the machine."""
    information = silence.TCP_INFO.pack(probes, unacknowledged, sent, acknowledged)
    sock = cast(socket.socket, SimpleNamespace(getsockopt=lambda *asked: information))
    assert silence.is_silent(sock) == silent


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_server_whose_machine_is_gone(
    tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture, served: Served, server: NbdServer
) -> None:
    server.stop()
    server.port = 0
    server.start()
    driver = served(nbd_reconnect_delay=3600)
    drop_what_arrives(server.connections[0])
    assert driver.read(0, 4096) == server.content[:4096]
    assert any("the server's machine, or the network to it, does not answer" in line for line in caplog.messages)
    assert server.accepted == 2


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_an_address_without_a_socket(server: NbdServer) -> None:
    """The next one is tried, and the error is one of the server, not of this process."""
    uri = parse_image(server.uri)
    assert isinstance(uri, NbdUri)
    impossible = (250, "")
    sock, export = connect([impossible, *find_places(uri)], uri.export)
    sock.close()
    assert export.size == SIZE
    with pytest.raises(
        HandshakeError, match="cannot be reached: Address family not supported by protocol; in a systemd unit, change"
    ):
        connect([impossible], uri.export)


def test_it_is_added_to_a_running_process(server: NbdServer, tmp_path: Path) -> None:
    first = DiskConfig(tmp_path / "image", ["io0"], socket_path=tmp_path / "first", create=SIZE, name="first")
    added = DiskConfig(parse_image(server.uri), ["io0"], socket_path=tmp_path / "socket", name="added")
    with ringplane.serve_all([first], [IoThread("io0")]) as process:
        process.threads.call(lambda: process.add(added)).result(PATIENCE)
        with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
            assert driver.read(0, 4096) == server.content[:4096]
