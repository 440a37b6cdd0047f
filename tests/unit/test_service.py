"""What metrics know of the server of a remote disk: its states, and how long it takes, whatever it does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ringplane.api.scrape import scrape
from ringplane.api.statistics import statistics
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd.handshake import Export
from ringplane.block.sources.nbd.reconnecting import Reconnecting, _Outage
from ringplane.block.sources.service import OPERATIONS, STATES, Service, ServiceTimes, count_begin, count_end
from ringplane.compiler.jit import compiled
from ringplane.control.handed_counters import SERVICE_LAYOUT, resume_services
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.device.disk import Disk
from ringplane.driver import Driver
from ringplane.opener.opener import OpenerEnded
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import parse_image
from ringplane.options.thread_options import IoThread
from ringplane.system.fd import Fd
from ringplane.virtio.blk import VIRTIO_BLK_T_IN

from .nbd_server import EVERYTHING, NbdServer, Request
from .on_structs import on_structs
from .rig import IOERR, OK, PATIENCE, eventually, pattern
from .test_metrics import Scraped

SIZE = 1 << 20


@compiled
def begin(times, operation):
    count_begin(times, operation)


@compiled
def end(times, operation, lasted):
    count_end(times, operation, lasted)


def do(times: ServiceTimes, operation: str, *lasted: int) -> None:
    """Count requests that took so many nanoseconds."""
    number = OPERATIONS.index(operation)
    for each in lasted:
        on_structs(begin)(times.address, number)
        on_structs(end)(times.address, number, each)


def make_service(parts: int = 1, reconnects: int = 0) -> tuple[Service, list[ServiceTimes]]:
    made, times = Service(lambda: "ok", lambda: reconnects), [ServiceTimes() for _ in range(parts)]
    for each in times:
        made.add(each)
    return made, times


def test_all_parts_count() -> None:
    service, (one, other) = make_service(2)
    do(one, "read", 1000, 3000)
    do(other, "read", 5000)
    do(other, "flush", 7000)
    on_structs(begin)(one.address, 1)
    reads, writes, flushes, *rest = service.times()
    assert (reads["ended"], reads["nanoseconds"], reads["histogram"].sum()) == (3, 9000, 3)
    assert (writes["begun"], writes["ended"], flushes["ended"]) == (1, 0, 1)
    assert not any(each["begun"] for each in rest)
    assert service.in_flight == 1


def test_another_process_continues() -> None:
    before, (times,) = make_service(reconnects=3)
    do(times, "write", 10, 20)
    after, (times,) = make_service(reconnects=1)
    after.resume(before.counted())
    do(times, "write", 30)
    assert after.reconnects == 4
    assert after.in_flight == 0
    assert (after.times()[1]["ended"], after.times()[1]["nanoseconds"]) == (3, 60)
    with pytest.raises(ValueError, match="broadcast"):
        after.resume(np.zeros(7, np.int64))


def test_another_release_continues() -> None:
    """Its disks have counted other things, which come before in the file and have another size."""
    services = [make_service(reconnects=number)[0] for number in (3, 4)]
    resumed = [make_service()[0] for _ in services]
    disks = [SimpleNamespace(source=SimpleNamespace(service=each)) for each in resumed]
    with open(os.memfd_create("counters"), "wb", buffering=0) as file:
        file.write(bytes(1000))
        for each in services:
            file.write(each.counted().tobytes())
        saved = {"file": Fd(file.fileno()), "disks": [0], "service_layout": SERVICE_LAYOUT, "services": [1, 3]}
        resume_services(saved, dict(zip((1, 3), cast(list[Disk], disks), strict=True)))
    assert [each.reconnects for each in resumed] == [3, 4]


@pytest.fixture
def nbd_server(tmp_path: Path) -> Iterator[NbdServer]:
    made = NbdServer(tmp_path / "nbd", bytearray(pattern(SIZE)))
    yield made
    made.stop()


class Remote:
    """A process whose disk is on this server."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        found = server.exports[0].disk.source.service
        assert found is not None
        self.service = found

    def attach(self, queues: int = 1) -> Driver:
        return Driver(self.folder / "a.sock", queues=queues, timeout=PATIENCE)

    def scrape(self) -> Scraped:
        return Scraped("".join(scrape(self.server)))


Serve = Callable[..., contextlib.AbstractContextManager[Remote]]


@pytest.fixture
def serve(nbd_server: NbdServer, tmp_path: Path) -> Serve:
    @contextlib.contextmanager
    def serving(**options: Any) -> Iterator[Remote]:
        image = parse_image(nbd_server.uri)
        more = {"name": "a", "socket_path": tmp_path / "a.sock", "num_queues": 2, **options}
        config = DiskConfig(image, ("io0", "io1"), **more)
        with serve_all([config], [IoThread("io0"), IoThread("io1")]) as server:
            yield Remote(tmp_path, server)

    return serving


def do_everything(driver: Driver) -> None:
    """On both queues."""
    for queue in range(2):
        driver.read(0, 4096, queue)
    driver.write(0, bytes(512))
    driver.flush()
    driver.discard(0, 4096)
    driver.write_zeroes(0, 4096)


COUNTS = {"read": 2, "write": 1, "flush": 1, "discard": 1, "write_zeroes": 1}


def test_requests_of_all_kinds(serve: Serve) -> None:
    """None of them took longer at the server than in all."""
    with serve() as remote, remote.attach(2) as driver:
        do_everything(driver)
        (disk,) = statistics(remote.server).disks
        scraped = remote.scrape()
    assert disk.source is not None
    assert (disk.source.state, disk.source.reconnects, disk.source.in_flight) == ("ok", 0, 0)
    assert {name: found.requests for name, found in disk.source.operations.items()} == COUNTS
    for name, found in disk.source.operations.items():
        assert sum(count for _, count in found.latencies) == found.requests
        assert 0 < found.seconds < disk.operations[name].seconds
        labels = {"disk": "a", "operation": name}
        histogram = "ringplane_disk_source_request_duration_seconds"
        assert scraped.value(f"{histogram}_count", **labels) == found.requests
        assert scraped.value(f"{histogram}_bucket", **labels, le="+Inf") == found.requests
        assert scraped.value(f"{histogram}_sum", **labels) == found.seconds
    assert scraped.value("ringplane_disk_source_io_now", disk="a") == 0
    assert scraped.value("ringplane_disk_source_reconnects_total", disk="a") == 0
    states = {state: scraped.value("ringplane_disk_source_state", disk="a", state=state) for state in STATES}
    assert states == {"ok": 1, "reconnecting": 0, "failing": 0, "blocklisted": 0}


def test_an_io_of_several_requests(nbd_server: NbdServer, serve: Serve) -> None:
    """A write that is larger than the server takes; and one that has to be stable, which the server does not know."""
    nbd_server.block_sizes = (1, 4096, 8192)
    nbd_server.flags = EVERYTHING & ~nbd.FLAG_SEND_FUA
    with serve() as remote, remote.attach() as driver:

        def requests() -> list[int]:
            counts: list[int] = remote.service.times()["ended"].tolist()
            return counts

        driver.write(0, bytes(20_480))
        assert requests() == [0, 3, 0, 0, 0]
        driver.set_write_back(False)
        before = requests()
        driver.write(0, bytes(4096))
        assert [now - then for now, then in zip(requests(), before, strict=True)] == [0, 1, 1, 0, 0]


def test_what_the_server_has(nbd_server: NbdServer, serve: Serve) -> None:
    held: list[Request] = []

    def hold_three(request: Request, server: NbdServer) -> bytes:
        held.append(request)
        return b"" if len(held) < 3 else b"".join(map(server.usual, held))

    nbd_server.reply = hold_three
    with serve() as remote, remote.attach() as driver:
        sent = [driver._submit_request(VIRTIO_BLK_T_IN, 0, b"", 512, 0) for _ in range(2)]
        assert eventually(lambda: remote.service.in_flight == 2)
        assert remote.scrape().value("ringplane_disk_source_io_now", disk="a") == 2
        sent.append(driver._submit_request(VIRTIO_BLK_T_IN, 0, b"", 512, 0))
        assert [driver._answer(*each).status for each in sent] == [OK] * 3
        assert remote.service.in_flight == 0


def test_requests_that_wait_for_another_connection(nbd_server: NbdServer, serve: Serve) -> None:
    """That time counts, and they count once."""
    with serve(nbd_reconnect_delay=3600) as remote, remote.attach() as driver:
        driver.read(0, 512)
        nbd_server.stop()
        assert eventually(lambda: remote.service.state == "reconnecting")
        sent = driver._submit_request(VIRTIO_BLK_T_IN, 0, b"", 512, 0)
        assert eventually(lambda: remote.service.in_flight == 1)
        nbd_server.start()
        assert driver._answer(*sent).status == OK
        # One for each I/O thread, which may notice the end of its connection later than the other one.
        assert eventually(lambda: (remote.service.state, remote.service.reconnects) == ("ok", 2))
        assert remote.service.times()["ended"][0] == 2


def test_a_connection_is_counted_before_the_state_says_so() -> None:
    counted: list[int] = []

    class Noted(_Outage):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "connected" and value:
                counted.append(look.reconnects)
            super().__setattr__(name, value)

    def connect(signals: object, patience: float) -> Any:
        return None, Export(SIZE, EVERYTHING)

    link: Any = SimpleNamespace(continue_with=lambda sock, structured: None)
    look, outage = Reconnecting("disk", connect, 0), Noted(link, 0.0, None)
    look._connect_again(outage)
    look.close()
    assert (outage.connected, counted) == (True, [1])


def test_another_process_that_cannot_connect_again(caplog: pytest.LogCaptureFixture) -> None:
    """It makes the connections of a disk that was added, and may be gone, or hang."""

    def connect(signals: object, patience: float) -> Any:
        raise OpenerEnded("it has ended")

    link: Any = object()
    look = Reconnecting("disk", connect, 0)
    look._outages[link] = _Outage(link, 0.0, None)
    look._try_once()
    assert look.state == "failing"
    look.close()
    assert caplog.messages == ["disk: cannot connect again: the server cannot be reached: it has ended"]


def test_requests_that_do_not_wait(nbd_server: NbdServer, serve: Serve) -> None:
    with serve() as remote, remote.attach() as driver:
        driver.read(0, 512)
        nbd_server.stop()
        assert eventually(lambda: remote.service.state == "failing")
        assert driver.request(VIRTIO_BLK_T_IN, 0, read=512).status == IOERR
        assert remote.service.in_flight == 0
        nbd_server.start()
        assert eventually(lambda: remote.service.state == "ok")
        assert driver.request(VIRTIO_BLK_T_IN, 0, read=512).status == OK


def test_disks_of_this_machine_have_none(tmp_path: Path) -> None:
    config = DiskConfig(tmp_path / "a.img", ("io0",), socket_path=tmp_path / "a.sock", create=SIZE)
    with serve_all([config], [IoThread("io0")]) as server:
        assert statistics(server).disks[0].source is None
        text = "".join(scrape(server))
    assert not [line for line in text.splitlines() if line.startswith("ringplane_disk_source")]
