"""An NBD server in Python, and disks on its export."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.control.export import Export
from ringplane.driver import Driver
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import parse_image

from ..nbd_server import NbdServer, Request
from ..rig import PATIENCE, pattern
from .names import SIZE


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


@pytest.fixture
def config(server: NbdServer, tmp_path: Path) -> DiskConfig:
    return DiskConfig(parse_image(server.uri), ["io0"], socket_path=tmp_path / "socket", nbd_reconnect_delay=3600)


@pytest.fixture
def hanging(server: NbdServer) -> Iterator[threading.Event]:
    """The server replies to no request until this event is set."""
    go = threading.Event()

    def hang(request: Request, server: NbdServer) -> None:
        assert go.wait(PATIENCE)

    server.reply = hang
    yield go
    go.set()
