"""Disks that were added at run time: their process is killed, and the next one completes the requests in flight."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from program.served import ServedApi, needs_all, starter
from ringplane.driver import Driver
from unit.packed_ring import PackedRing
from unit.rig import Ring

from .conftest import DISK, Victim
from .test_areas import complete_after_a_kill

ARGUMENTS = ("--api-socket", "api.sock", "--allow-folder", ".", "--state", "state/disks")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not in memory, where requests are done at once."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        (folder / "bad.img").write_bytes(DISK)
        (folder / "state").mkdir()
        yield folder


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., ServedApi]]:
    yield from starter(ServedApi, folder)


@needs_all
@pytest.mark.parametrize("ring_class", [Ring, PackedRing])
def test_requests_in_flight(serve: Callable[..., ServedApi], folder: Path, ring_class: Any) -> None:
    """Under confinement; the next process completes them in their order, as those of disks that are described."""
    served = serve(*ARGUMENTS, strict=True)
    body = {"image": str(folder / "bad.img"), "socket-path": str(folder / "bad.sock"), "num-queues": 2}
    served.api.post("/v1/disks", body | {"features": {"in-order": True}}, status=201)
    victim = Victim(folder, served.process, cast(Driver, None))

    @contextmanager
    def served_again() -> Iterator[None]:
        again = serve(*ARGUMENTS, strict=True)
        yield
        again.end()

    complete_after_a_kill(victim, ring_class, served_again)
