"""What can be served, and what of the server the guest sees."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.sources.choose_source import open_source
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd.connecting import connect, find_places
from ringplane.block.sources.nbd.handshake import HandshakeError
from ringplane.driver import Driver
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import parse_image
from ringplane.options.nbd_uri import NbdUri
from ringplane.options.thread_options import IoThread

from ..nbd_server import EVERYTHING, NbdServer
from ..rig import IOERR, PATIENCE, pattern
from .names import SIZE, WRITE, Served


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
