"""Ceph clusters that hang, fail, or refuse us, and processes that end: what drivers see of it."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ceph import CephCluster
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
from unit.rig import LOGGING_AT_ONCE
from unit.waiting import eventually, is_idle

from .serving import PATIENCE, Disk, Served, serving, wait_until

MIB = 1 << 20
OK, IOERR = VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR

# A system call that the sandbox does not allow ends the process (tests/program/test_sandbox.py).
STRICT = f"""
import ctypes
import functools
ctypes.CDLL(None).mallopt(-1, 1 << 30)
from ringplane.control import sandbox
from ringplane.system.seccomp import SECCOMP_RET_KILL_PROCESS
sandbox.confine = functools.partial(sandbox.confine, otherwise=SECCOMP_RET_KILL_PROCESS)
{LOGGING_AT_ONCE}"""


@contextlib.contextmanager
def stopped_osd(cluster: CephCluster) -> Iterator[None]:
    cluster.signal_osd(signal.SIGSTOP)
    try:
        yield
    finally:
        cluster.signal_osd(signal.SIGCONT)


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
    image = failing_cluster.new_image()
    with serving(Disk(failing_cluster.address(image)), program=STRICT) as served, served.driver() as driver:
        load = VerifiedLoad(driver)
        load.start()
        for _ in range(5):
            load.continues()
            failing_cluster.kill_osd()
        load.finish()
        assert "ERROR" not in served.logged()


def test_an_osd_that_is_stopped(failing_cluster: CephCluster, tmp_path: Path) -> None:
    """Its requests wait; another disk on the same I/O thread is served, and front ends of it come and go."""
    image = failing_cluster.new_image()
    (tmp_path / "other").write_bytes(b"o" * MIB)
    disks = Disk(failing_cluster.address(image)), Disk(tmp_path / "other")
    with serving(*disks) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        with stopped_osd(failing_cluster):
            answer = later(driver, b"b" * 512)
            for _ in range(3):
                with served.driver(1) as other:
                    assert other.read(0, 512) == b"o" * 512
            assert not answer
        wait_until(lambda: answer, "the write ends")
        assert answer[0].status == OK
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
    """Nothing is in flight, but the image cannot be closed: the process ends within its limit, with status 0."""
    image = failing_cluster.new_image()
    with serving(Disk(failing_cluster.address(image))) as served:
        with served.driver() as driver:
            driver.write(0, b"a" * 512)
        with stopped_osd(failing_cluster):
            served.process.terminate()
            assert served.process.wait(PATIENCE) == 0, served.logged()
            assert "the cluster does not answer, so the image is left open" in served.logged()


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
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        driver.write(0, b"a" * 512)
        client = cluster.rbd("status", image).split("watcher=")[1].split()[0]
        cluster.ceph("osd", "blocklist", "add", client)
        wait_until(lambda: driver.request(VIRTIO_BLK_T_OUT, 0, b"b" * 512).status == IOERR, served.logged())
        for kind, arguments in ((VIRTIO_BLK_T_IN, {"read": 512}), (VIRTIO_BLK_T_OUT, {"data": b"c" * 512})):
            assert driver.request(kind, 0, **arguments).status == IOERR
        assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR
        assert served.logged().count("has blocklisted this client") == 1
        assert "ERROR" not in served.logged()
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        assert driver.read(0, 512) == b"a" * 512


def test_two_processes_with_one_image(cluster: CephCluster) -> None:
    """As in a migration: both have it open, and the lock follows the writes."""
    image = cluster.new_image()
    chance = random.Random(4)
    with serving(Disk(cluster.address(image))) as one, serving(Disk(cluster.address(image))) as two:
        with one.driver() as first, two.driver() as second:
            for number in range(6):
                data = chance.randbytes(MIB)
                writer, reader = (first, second) if number % 2 else (second, first)
                writer.write(number * MIB, data)
                writer.flush()
                assert reader.read(number * MIB, MIB) == data
        for each in (one, two):
            assert "ERROR" not in each.logged()


def test_an_upgrade_under_load(cluster: CephCluster) -> None:
    image = cluster.new_image()
    with serving(Disk(cluster.address(image)), program=STRICT) as served, served.driver() as driver:
        load = VerifiedLoad(driver)
        load.start()
        for _ in range(3):
            load.continues()
            upgrade(served)
        load.finish()
        assert "ERROR" not in served.logged()


def upgrade(served: Served) -> None:
    """Start a process that takes over; it is the process of `served` from then on."""
    command = [*served.process.args, "--upgrade"]  # type: ignore[misc]
    with (served.folder / "log").open("a") as log:
        following = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert served.process.wait(PATIENCE) == 0, served.logged()
    assert served.process.stdout
    served.process.stdout.close()
    served.process = following
