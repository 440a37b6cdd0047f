"""Disks on real NBD servers, which are killed, stopped and continued under a verified load."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from ringplane.driver.load import Load, run_load
from unit.api_client import Api
from unit.waiting import is_idle

from .nbd_processes import NbdServer, Start, nbdkit, qemu_nbd, qemu_nbd_alone
from .serving import API, Disk, serving, upgrade, wait_until

KILLS, UPGRADES = 10, 5
WAITING = "nbd-reconnect-delay = 3600\n"
MIXED = Load(block_size=(4096, 65536), depth=16, read_percent=50, flush_every=20, verify=True, seconds=3, timeout=120)

SERVERS = {"qemu-nbd": qemu_nbd, "one connection": qemu_nbd_alone, "nbdkit": nbdkit, "tcp": qemu_nbd}


@pytest.fixture(params=list(SERVERS))
def server(request: pytest.FixtureRequest, start: Start) -> NbdServer:
    return start(SERVERS[request.param], tcp=request.param == "tcp")


@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_a_verified_load(server: NbdServer, engine: str) -> None:
    disk = Disk(server.uri, queues=2)
    with serving(disk, engine=engine, threads=2) as served, served.driver(queues=2) as driver:
        result = run_load(driver, MIXED)
        assert (result.errors, result.mismatches) == (0, 0)
        driver.write(0, b"x" * 4096)
        driver.discard(0, 1 << 20)
        driver.write_zeroes(2 << 20, 1 << 20)
        driver.write_zeroes(4 << 20, 1 << 20, unmap=True)
        driver.flush()
        assert driver.read(0, 5 << 20)[2 << 20 : 3 << 20] == bytes(1 << 20)


def test_killed_under_a_verified_load(server: NbdServer) -> None:
    """With a delay no request fails; the process is confined, and connects again nevertheless."""
    with serving(Disk(server.uri, queues=2, more=WAITING), threads=2) as served, served.driver(queues=2) as driver:

        def again(wanted: int) -> bool:
            return served.logged().count("connected again") >= wanted

        def kill() -> None:
            for number in range(1, KILLS + 1):
                server.crash()
                wanted = number * server.connections
                wait_until(partial(again, wanted), f"{wanted} new connections: {served.logged()}")

        with ThreadPoolExecutor(1) as pool:
            kills = pool.submit(kill)
            while True:
                result = run_load(driver, MIXED)
                assert (result.errors, result.mismatches) == (0, 0), result.first_error or result.first_mismatch
                if kills.done():
                    break
            kills.result()


def test_metrics_of_a_server(start: Start) -> None:
    """It is lost and found again, and an upgrade keeps what was counted."""
    server = start(qemu_nbd)
    with serving(Disk(server.uri, more=WAITING), process=API) as served, served.driver() as driver:
        api = Api(served.folder / "api.sock")

        def source() -> Any:
            (disk,) = api.get("/v1/statistics")["disks"]
            return disk["source"]

        for _ in range(3):
            driver.write(0, bytes(4096))
        driver.flush()
        assert (source()["state"], source()["reconnects"], source()["in_flight"]) == ("ok", 0, 0)
        server.kill()
        wait_until(lambda: source()["state"] == "reconnecting", source())
        waiting = driver._submit_request(0, 0, b"", 512, 0)
        wait_until(lambda: source()["in_flight"] == 1, source())
        server.start()
        assert driver._answer(*waiting).status == 0
        wait_until(lambda: source()["state"] == "ok", source())
        upgrade(served)
        driver.read(0, 512)
        after = source()
        assert (after["state"], after["reconnects"], after["in_flight"]) == ("ok", 1, 0)
        requests = {name: found["requests"] for name, found in after["operations"].items()}
        assert requests == {"read": 2, "write": 3, "flush": 1}
        metrics = api.request("GET", "/metrics").data.decode()
        assert re.search(r'^ringplane_disk_source_reconnects_total{disk="[^"]*"} 1$', metrics, re.MULTILINE)


def test_a_server_that_hangs(start: Start) -> None:
    """It is stopped and continued: requests wait, another disk of the thread is served, and nothing fails.

    What waits costs the thread no time, so the other disk has all of it.
    """
    hanging, other = start(qemu_nbd), start(qemu_nbd)
    with serving(Disk(hanging.uri), Disk(other.uri)) as served, served.driver(0) as slow, served.driver(1) as fast:
        slow.write(0, b"x" * 512)
        hanging.process.send_signal(signal.SIGSTOP)
        waiting = [slow._submit_request(0, 0, b"", 512, 0) for _ in range(32)]
        for _ in range(100):
            fast.write(0, b"y" * 4096)
        wait_until(lambda: is_idle(served.process.pid), "the thread spins")
        assert not any(slow._done(slow.queues[0], ticket) for _, ticket in waiting)
        hanging.process.send_signal(signal.SIGCONT)
        assert {slow._answer(*each).data for each in waiting} == {b"x" * 512}


def test_without_a_delay(start: Start) -> None:
    """What is in flight fails; later I/O works."""
    server = start(qemu_nbd)
    with serving(Disk(server.uri)) as served, served.driver() as driver:
        server.process.send_signal(signal.SIGSTOP)
        waiting = driver._submit_request(0, 0, b"", 512, 0)
        server.kill()
        assert driver._answer(*waiting).status == 1
        server.start()
        wait_until(lambda: driver.request(0, 0, read=512).status == 0, "no connection")


def test_upgrades_under_a_verified_load(start: Start) -> None:
    """Of a server that allows one connection: each process gets it from the one before."""
    server = start(qemu_nbd_alone)
    with serving(Disk(server.uri, queues=2, more=WAITING)) as served, served.driver(queues=2) as driver:

        def upgrade_several_times() -> None:
            for _ in range(UPGRADES):
                upgrade(served)

        with ThreadPoolExecutor(1) as pool:
            upgrades = pool.submit(upgrade_several_times)
            while True:
                result = run_load(driver, MIXED, backend_pid=os.getpid())
                assert (result.errors, result.mismatches) == (0, 0), result.first_error or result.first_mismatch
                if upgrades.done():
                    break
            upgrades.result()
        assert "connecting again" not in served.logged()


def test_a_stop_while_the_server_hangs(start: Start) -> None:
    """The ring stops when the request in flight has ended; a second signal does not wait for it."""
    server = start(qemu_nbd)
    with serving(Disk(server.uri), status=1) as served, served.driver() as driver:
        driver.write(0, b"x" * 512)
        server.process.send_signal(signal.SIGSTOP)
        driver._submit_request(0, 0, b"", 512, 0)
        served.process.terminate()
        wait_until(lambda: "waiting for 1 requests in flight, as storage" in served.logged(), served.logged())
