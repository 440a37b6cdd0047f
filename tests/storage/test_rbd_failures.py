"""Ceph clusters that hang, fail, or refuse us, and processes that end: what drivers see of it."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ceph import CephCluster
from ringplane.api.schemas import Disk as DiskState
from ringplane.api.schemas import Disks, Statistics
from ringplane.client.api_errors import ApiError
from ringplane.client.client import Client, disk_path
from ringplane.driver import Driver
from ringplane.driver.driver import Answer
from ringplane.driver.load import Load, run_load
from ringplane.virtio.blk import (
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
)
from strict_sandbox import STRICT
from unit.rig import LOGGING_AT_ONCE
from unit.waiting import eventually, is_idle

from .serving import API, PATIENCE, Disk, Served, serving, upgrade, wait_until

MIB = 1 << 20
OK, IOERR = VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR


@contextlib.contextmanager
def stopped_osd(cluster: CephCluster) -> Iterator[None]:
    cluster.stop_osd()
    try:
        yield
    finally:
        cluster.continue_osd()


@contextlib.contextmanager
def verified_load(image: str, **options: Any) -> Iterator[tuple[Served, VerifiedLoad]]:
    """A strictly confined process that serves the image, with a load; nothing may fail until the end of this `with`."""
    with serving(Disk(image), program=STRICT + LOGGING_AT_ONCE, **options) as served, served.driver() as driver:
        load = VerifiedLoad(driver)
        load.start()
        yield served, load
        load.finish()
        assert "ERROR" not in served.logged()


class VerifiedLoad(threading.Thread):
    """Reads and writes, each of them verified, until `finish`; no request may fail."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(daemon=True)
        self._driver = driver
        self.rounds = 0
        self._enough = False
        self._error: BaseException | None = None

    def run(self) -> None:
        load = Load(
            block_size=(512, 4096, 16384),
            depth=8,
            read_percent=40,
            flush_every=30,
            requests=200,
            verify=True,
            timeout=3 * PATIENCE,
        )
        try:
            while not self._enough:
                result = run_load(self._driver, load)
                assert (result.errors, result.mismatches) == (0, 0), result
                self.rounds += 1
        except BaseException as error:
            self._error = error

    def continues(self) -> None:
        """Wait until requests complete again."""
        before = self.rounds
        # On a busy machine an OSD needs most of this until it serves again.
        assert eventually(lambda: self.rounds > before or self._error is not None), "no requests complete"
        if self._error:
            raise self._error

    def finish(self) -> None:
        self.continues()
        self._enough = True
        self.join()
        if self._error:
            raise self._error


def test_an_osd_that_is_killed(failing_cluster: CephCluster) -> None:
    """Five times, while a confined process has requests in flight: they wait, and none fails."""
    with verified_load(failing_cluster.address(failing_cluster.new_image())) as (_, load):
        for _ in range(5):
            load.continues()
            failing_cluster.kill_osd()


def test_a_monitor_that_is_gone(failing_cluster: CephCluster) -> None:
    """Nobody needs it while the OSD is where it was: not under load, not for the end of a process."""
    with verified_load(failing_cluster.address(failing_cluster.new_image())) as (served, load):
        load.continues()
        failing_cluster.kill_monitor()
        try:
            for _ in range(2):
                load.continues()
            assert "WARNING" not in served.logged()
        finally:
            failing_cluster.start()
        for _ in range(2):
            load.continues()
        failing_cluster.kill_osd()


def test_a_process_that_ends_without_a_monitor(failing_cluster: CephCluster) -> None:
    image = failing_cluster.new_image()
    try:
        with serving(Disk(failing_cluster.address(image))) as served:
            with served.driver() as driver:
                driver.write(0, b"a" * 512)
                driver.flush()
            failing_cluster.kill_monitor()
    finally:
        failing_cluster.start()


def test_an_osd_that_is_stopped(failing_cluster: CephCluster, tmp_path: Path) -> None:
    """Its requests wait; another disk on the same I/O thread is served, and front ends of it come and go.

    What waits costs the thread no time, so the other disk has all of it.
    """
    image = failing_cluster.new_image()
    (tmp_path / "other").write_bytes(b"o" * MIB)
    disks = Disk(failing_cluster.address(image)), Disk(tmp_path / "other")
    with serving(*disks) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        with stopped_osd(failing_cluster):
            waiting = [driver._submit_request(VIRTIO_BLK_T_OUT, 0, b"b" * 512, 0, 0) for _ in range(32)]
            for _ in range(3):
                with served.driver(1) as other:
                    assert other.read(0, 512) == b"o" * 512
            wait_until(lambda: is_idle(served.process.pid), "the thread spins")
            assert not any(driver._done(driver.queues[0], ticket) for _, ticket in waiting)
        assert {driver._answer(*each, 3 * PATIENCE).status for each in waiting} == {OK}
        assert driver.read(0, 512) == b"b" * 512


def later(driver: Driver, data: bytes) -> list[Answer]:
    """Write `data` at the start of the disk, beside the test; the list has the answer when it has come."""
    answer: list[Answer] = []

    def write() -> None:
        # The process may end meanwhile.
        with contextlib.suppress(ConnectionError):
            answer.append(driver.request(VIRTIO_BLK_T_OUT, 0, data, timeout=3 * PATIENCE))

    threading.Thread(target=write, daemon=True).start()
    return answer


def test_a_front_end_that_stops_its_rings_meanwhile(failing_cluster: CephCluster) -> None:
    """GET_VRING_BASE is answered when the request in flight has ended."""
    image = failing_cluster.new_image()
    with serving(Disk(failing_cluster.address(image))) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        bases: list[list[int]] = []
        stopping = threading.Thread(target=lambda: bases.append(driver.stop()), daemon=True)
        with stopped_osd(failing_cluster):
            _, ticket = driver._submit_request(VIRTIO_BLK_T_OUT, 0, b"c" * 512, 0, 0)
            wait_until(lambda: is_idle(served.process.pid), "the write is fetched")
            stopping.start()
            wait_until(lambda: "requests in flight" in served.logged(), "the stop waits")
            assert not bases
        stopping.join(PATIENCE)
        assert bases == [[2]]
        assert ticket.used == 1
        driver.start(bases[0])
        assert driver.read(0, 512) == b"c" * 512


def test_a_front_end_that_leaves_meanwhile(failing_cluster: CephCluster) -> None:
    """librbd still has to write to its memory, which stays mapped until then. Afterwards the next one is served."""
    image = failing_cluster.new_image()
    with serving(Disk(failing_cluster.address(image)), process=API) as served:
        with served.driver() as driver:
            driver.write(0, b"a" * 512)
            with stopped_osd(failing_cluster):
                driver._submit_request(VIRTIO_BLK_T_IN, 0, b"", 512, 0)
                wait_until(lambda: shown(served).in_flight == 1, "the read is fetched")
                driver.front_end.close()
                wait_until(lambda: "waiting for 1 requests in flight" in served.logged(), served.logged())
                assert has_guest_memory(served)
            wait_until(lambda: not has_guest_memory(served), "the memory of the front end is released")
        with served.driver() as following:
            assert following.read(0, 512) == b"a" * 512


def has_guest_memory(served: Served) -> bool:
    return "memfd:ringplane-driver" in Path(f"/proc/{served.process.pid}/maps").read_text()


def test_sigterm_while_a_request_hangs(failing_cluster: CephCluster) -> None:
    """It waits, and says so; the second signal ends the process at once."""
    image = failing_cluster.new_image()
    with serving(Disk(failing_cluster.address(image)), status=1) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        with stopped_osd(failing_cluster):
            later(driver, b"d" * 512)
            wait_until(lambda: is_idle(served.process.pid), "the write is fetched")
            served.process.terminate()
            wait_until(lambda: "waiting for 1 requests in flight" in served.logged(), served.logged())
            served.process.terminate()
            assert served.process.wait(PATIENCE) == 1


def test_sigterm_while_the_cluster_hangs(failing_cluster: CephCluster) -> None:
    """Nothing is in flight, but images cannot be closed: the process ends within its limit, with status 0.

    Emptying a cache does not wait for the cluster, whether the image was written or only read.
    """
    disks = [
        Disk(failing_cluster.address(failing_cluster.new_image()), direct=direct) for direct in (True, False, False)
    ]
    with serving(*disks) as served, contextlib.ExitStack() as attached:
        written, cached, read = (attached.enter_context(served.driver(number)) for number in range(3))
        for driver in (written, cached):
            driver.write(0, b"a" * 512)
        assert read.read(0, 512) == bytes(512)
        with stopped_osd(failing_cluster):
            served.process.terminate()
            assert served.process.wait(PATIENCE) == 0, served.logged()
            assert served.logged().count("the cluster does not answer, so the image is left open") == 3


def test_a_start_while_the_cluster_hangs(failing_cluster: CephCluster) -> None:
    image = failing_cluster.new_image()
    command = [sys.executable, "-m", "ringplane", "serve", "--image", failing_cluster.address(image)]
    with stopped_osd(failing_cluster):
        process = subprocess.Popen(
            [*command, "--socket-path", "/dev/shm/hanging.sock"], stderr=subprocess.PIPE, text=True
        )
        _, errors = process.communicate(timeout=3 * PATIENCE)
        assert process.returncode == 1
        assert "the cluster does not answer within 30 s" in errors
        process = subprocess.Popen(
            [*command, "--socket-path", "/dev/shm/hanging.sock"], stderr=subprocess.PIPE, text=True
        )
        time.sleep(2)
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert "stopped by SIGTERM while starting" in errors


def test_a_pause_while_the_cluster_hangs(failing_cluster: CephCluster) -> None:
    """It is answered in time, and says what hangs; the disk can be resumed when the cluster is back, and not before."""
    disk = Disk(failing_cluster.address(failing_cluster.new_image()), more='name = "vm1"')
    with serving(disk, process=API, program=IMPATIENT) as served, served.driver() as driver:
        client = served.client()
        driver.write(0, b"a" * 512)
        with stopped_osd(failing_cluster):
            answer = later(driver, b"b" * 512)
            wait_until(lambda: shown(served).in_flight == 1, "the write is fetched")
            with pytest.raises(ApiError, match="pause has not ended after 2 seconds: 1 request in flight, storage"):
                client.ask("POST", disk_path("vm1", "pause"))
            with pytest.raises(ApiError, match="flush has not ended after 2 seconds"):
                client.ask("POST", disk_path("vm1", "flush"))
            assert shown(served).paused
            assert not answer
        wait_until(lambda: answer, "the write ends")
        # A turn that began before the cluster was back may take longer than this program waits.
        wait_until(lambda: _succeeds(client, "resume"), served.logged())
        assert not shown(served).paused
        assert driver.read(0, 512) == b"b" * 512
        client.ask("POST", disk_path("vm1", "pause"))
        client.ask("POST", disk_path("vm1", "resume"))


# A process whose operations are given up soon.
IMPATIENT = f"""
from ringplane.control.turns import Turns
_, *others = Turns.take.__defaults__
Turns.take.__defaults__ = (2.0, *others)
{LOGGING_AT_ONCE}"""


def _succeeds(client: Client, operation: str) -> bool:
    try:
        client.ask("POST", disk_path("vm1", operation))
    except ApiError:
        return False
    return True


def shown(served: Served) -> DiskState:
    """What the API says of the only disk."""
    (disk,) = served.client().read("/v1/disks", Disks).disks
    return disk


def test_completed_writes_are_in_the_cluster(failing_cluster: CephCluster) -> None:
    """Also with librbd's cache: a guest outlives a process that is killed, and so must what it has written."""
    image = failing_cluster.new_image()
    with serving(Disk(failing_cluster.address(image), direct=False)) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        # From now on librbd would keep writes.
        driver.flush()
        with stopped_osd(failing_cluster):
            answer = later(driver, b"b" * 512)
            wait_until(lambda: is_idle(served.process.pid), "the write is fetched")
            assert not answer
        wait_until(lambda: answer, "the write ends")


def test_requests_that_time_out(failing_cluster: CephCluster) -> None:
    image = failing_cluster.new_image()
    address = failing_cluster.address(image, ":rados_osd_op_timeout=2")
    with serving(Disk(address)) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        with stopped_osd(failing_cluster):
            for _ in range(2):
                assert driver.request(VIRTIO_BLK_T_OUT, 0, b"e" * 512).status == IOERR
                assert driver.request(VIRTIO_BLK_T_IN, 0, read=512).status == IOERR
        assert served.logged().count("a write that has timed out may still be done later") == 1
        assert "write of 512 bytes at 0 failed: Connection timed out" in served.logged()
        wait_until(lambda: driver.request(VIRTIO_BLK_T_OUT, 0, b"f" * 512).status == OK, served.logged())
        assert driver.read(0, 512) == b"f" * 512


def test_a_blocklisted_client(cluster: CephCluster) -> None:
    """Everything fails at once and for good, and the log has one line."""
    image = cluster.new_image()
    with serving(Disk(cluster.address(image)), process=API) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        assert shown(served).trouble is None
        client = cluster.rbd("status", image).split("watcher=")[1].split()[0]
        cluster.ceph("osd", "blocklist", "add", client)
        wait_until(lambda: driver.request(VIRTIO_BLK_T_OUT, 0, b"b" * 512).status == IOERR, served.logged())
        for kind, arguments in ((VIRTIO_BLK_T_IN, {"read": 512}), (VIRTIO_BLK_T_OUT, {"data": b"c" * 512})):
            assert driver.request(kind, 0, **arguments).status == IOERR
        assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR
        assert served.logged().count("has blocklisted this client") == 1
        assert "ERROR" not in served.logged()
        assert source(served)[0].state == "blocklisted"
        state = shown(served)
        assert (state.trouble, state.state, state.flush_failed) == ("blocklisted", "attached", True)
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        assert driver.read(0, 512) == b"a" * 512


def test_an_upgrade_of_a_blocklisted_client(cluster: CephCluster) -> None:
    """With a cache, which it cannot write any more. The next process is another client, and flushes still fail."""
    image = cluster.new_image()
    with serving(Disk(cluster.address(image), direct=False)) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        driver.flush()
        client = cluster.rbd("status", image).split("watcher=")[1].split()[0]
        cluster.ceph("osd", "blocklist", "add", client)
        wait_until(lambda: driver.request(VIRTIO_BLK_T_OUT, 0, b"b" * 512).status == IOERR, served.logged())
        assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR
        upgrade(served)
        assert driver.read(0, 512) == b"a" * 512
        driver.write(0, b"c" * 512)
        assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR


def source(served: Served) -> Any:
    """What the API says of the cluster, and of the disk."""
    (disk,) = served.client().read("/v1/statistics", Statistics).disks
    assert disk.source is not None
    return disk.source, disk


def test_metrics_of_a_cluster(failing_cluster: CephCluster) -> None:
    """What it has, how long it took apart from our share, and that an upgrade keeps what was counted."""
    image = failing_cluster.new_image()
    with serving(Disk(failing_cluster.address(image)), process=API) as served, served.driver() as driver:
        for _ in range(3):
            driver.write(0, bytes(4096))
        driver.flush()
        with stopped_osd(failing_cluster):
            answer = later(driver, bytes(512))
            wait_until(lambda: source(served)[0].in_flight == 1, "the write is with the cluster")
        wait_until(lambda: answer, "the write ends")
        cluster, disk = source(served)
        assert cluster.operations.keys() == {"write", "flush"}
        for name, found in cluster.operations.items():
            assert 0 < found.seconds < disk.operations[name].seconds
        upgrade(served)
        driver.read(0, 512)
        cluster, _ = source(served)
        assert (cluster.state, cluster.reconnects, cluster.in_flight) == ("ok", None, 0)
        requests = {name: found.requests for name, found in cluster.operations.items()}
        assert requests == {"read": 1, "write": 4, "flush": 1}


def test_two_processes_with_one_image(cluster: CephCluster) -> None:
    """As in a migration: both have it open, and the lock, which the first write takes, follows the writes."""
    image = cluster.new_image()
    chance = random.Random(4)
    with serving(Disk(cluster.address(image))) as one, serving(Disk(cluster.address(image))) as two:
        with one.driver() as first, two.driver() as second:
            assert first.read(0, MIB) == second.read(0, MIB) == bytes(MIB)
            assert cluster.owners(image) == 0
            for number in range(6):
                data = chance.randbytes(MIB)
                writer, reader = (first, second) if number % 2 else (second, first)
                writer.write(number * MIB, data)
                writer.flush()
                assert reader.read(number * MIB, MIB) == data
                assert cluster.owners(image) == 1
        for each in (one, two):
            assert "ERROR" not in each.logged()


def test_an_upgrade_under_load(cluster: CephCluster) -> None:
    with verified_load(cluster.address(cluster.new_image())) as (served, load):
        for _ in range(3):
            load.continues()
            upgrade(served)


def test_an_upgrade_to_another_cluster(cluster: CephCluster, failing_cluster: CephCluster) -> None:
    """Both have an image of this name; the running process continues to serve its own one."""
    image = cluster.new_image()
    failing_cluster.rbd("create", image, "--size", "64M")
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        driver.write(0, b"o" * 512)
        options = served.folder / "disks.toml"
        options.write_text(options.read_text().replace(str(cluster.conf), str(failing_cluster.conf)))
        command = [*served.process.args, "--upgrade"]  # type: ignore[misc]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE)
        assert refused.returncode == 1, refused.stderr
        assert f"rbd:{image}: is not the image that the running process serves" in refused.stderr
        assert driver.read(0, 512) == b"o" * 512
