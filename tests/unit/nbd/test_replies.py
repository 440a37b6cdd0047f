"""Replies: in chunks of all kinds, with errors, wrong ones, and parts of one."""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import ringplane
from ringplane.block.sources.choose_source import open_source
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd import receiving
from ringplane.block.sources.nbd.link import Link
from ringplane.block.sources.nbd.nbd_units import obey
from ringplane.driver import Driver
from ringplane.options.disk_config import DiskConfig
from ringplane.virtio import blk

from ..nbd_server import HangUp, NbdServer, Request, chunk, data_chunk, error_chunk, hole_chunk, in_pieces, simple
from ..rig import IOERR, OK, PATIENCE, eventually
from .names import READ, SIZE, WRITE, Served


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
def test_half_a_reply(server: NbdServer, served: Served, length: int, caplog: pytest.LogCaptureFixture) -> None:
    def half(request: Request, server: NbdServer) -> bytes | None:
        if server.accepted > 1:
            return None
        server.connections[0].sendall(server.usual(request)[:length])
        raise HangUp

    server.reply = half
    assert served(nbd_reconnect_delay=60).read(4096, 4096) == server.content[4096:8192]
    assert "the server closed the connection; connecting again" in caplog.text


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
