"""Disks that were added at run time: their process is killed, and the next one completes the requests in flight."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from program.served import ServedApi, needs_all, starter
from ringplane.driver import Driver
from unit.packed_ring import NEW_RING, PackedRing
from unit.rig import OK, Answer, Ring

from .attacker import Attacker
from .conftest import DISK, Victim, sector
from .test_areas import AREAS, in_flight, stopped_in_flight

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
    with closing(Attacker(victim.socket, ring_class=ring_class, in_order=True, protocol_features=AREAS)) as attacker:
        line, front_end = attacker.lines[0], attacker.front_end
        described, fd = front_end.get_inflight_fd(2, 16)
        front_end.set_inflight_fd(described, fd)
        line.reset()
        requests = stopped_in_flight(victim, line, lambda: in_flight(fd, ring_class))
        served.process.kill()
        served.process.wait()
        assert in_flight(fd, ring_class) == len(requests)
        front_end.close()
        served = serve(*ARGUMENTS, strict=True)
        attacker.connect()
        attacker.front_end.set_inflight_fd(described, fd)
        attacker.lines[1].start(ring_class=ring_class, size=16, **attacker.negotiated)
        line.resume(base=NEW_RING if ring_class is PackedRing else 0)
        assert line.wait() == requests
        assert line.answer(requests[0]) == Answer(OK, 1, b"")
        for number, request in enumerate(requests[1:]):
            assert line.answer(request) == Answer(OK, 513, sector(number))
        attacker.check_honest_ring(DISK)
        assert in_flight(fd, ring_class) == 0
        attacker.front_end.close()
        os.close(fd)
    served.end()
