"""Policies of disks on a real NBD server and on a real Ceph cluster: the layer is above all sources."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ceph import CephCluster
from ringplane.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.driver.virtqueue import peek
from ringplane.options.policy_options import parse_policy, table_of
from ringplane.options.toml_text import toml
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from unit.api_client import Api
from unit.policy_texts import own_policy

from .nbd_processes import Start, nbdkit
from .serving import API, Disk, Served, serving, wait_until

MIB, BLOCK = 1 << 20, 4096
POLICIES = "/v1/disks/data/policies"
# The server counts as lost, and requests fail, until it is connected again.
FAILING, WAITING = "", "nbd-reconnect-delay = 3600\n"


@pytest.fixture(params=["nbd", "rbd"])
def address(request: pytest.FixtureRequest) -> str:
    if request.param == "nbd":
        return str(request.getfixturevalue("start")(nbdkit).uri)
    cluster: CephCluster = request.getfixturevalue("cluster")
    return cluster.address(cluster.new_image())


def disk(address: str, *policies: str, more: str = "", **options: Any) -> Disk:
    """With these policies, written as on the command line."""
    lines = [more, 'name = "data"']
    for each in policies:
        table = table_of(parse_policy(each)).items()
        lines += ["[[disk.policy]]", *(f"{key} = {toml(value)}" for key, value in table)]
    return Disk(address, more="\n".join(lines), **options)


@contextlib.contextmanager
def served_with(address: str, *policies: str, more: str = "") -> Iterator[tuple[Served, Driver]]:
    with serving(disk(address, *policies, more=more), process=API) as served, served.driver() as driver:
        yield served, driver


def api(served: Served) -> Api:
    return Api(served.folder / "api.sock")


def counted(served: Served, policy: str) -> dict[str, int]:
    counters: dict[str, int] = api(served).get(f"{POLICIES}/{policy}")["counters"]
    return counters


def switch(served: Served, policy: str, *, enabled: bool) -> None:
    api(served).patch(f"{POLICIES}/{policy}", {"enabled": enabled})


def test_what_fails_does_not_reach_the_server(address: str) -> None:
    with served_with(address, "error,operation=write,where=1M-2M") as (served, driver):
        driver.write(0, b"a" * BLOCK)
        with pytest.raises(OSError, match="writing"):
            driver.write(MIB, b"b" * BLOCK)
        assert driver.read(MIB, BLOCK) == bytes(BLOCK)
        assert counted(served, "error") == {"requests": 3, "matched": 1, "failed": 1}
        switch(served, "error", enabled=False)
        driver.write(MIB, b"c" * BLOCK)
        assert driver.read(MIB, BLOCK) == b"c" * BLOCK


def test_a_delay(address: str) -> None:
    """Many requests wait side by side; each ends after its time, and in any order."""
    with served_with(address, "delay,operation=read,distribution=uniform,time=50ms,p99=99ms") as (served, driver):
        data = bytes(range(256)) * 16
        for number in range(16):
            driver.write(number * BLOCK, bytes([number]) + data[1:])
        start = time.monotonic()
        waiting = [driver._submit_request(VIRTIO_BLK_T_IN, number * 8, b"", BLOCK, 0) for number in range(16)]
        answers = [driver._answer(*each) for each in waiting]
        took = time.monotonic() - start
        assert [answer.data for answer in answers] == [bytes([number]) + data[1:] for number in range(16)]
        assert counted(served, "delay")["delayed"] == 16
        assert took >= counted(served, "delay")["delays"] / 16 / 1e6


def test_data_is_changed_on_both_ways(address: str, tmp_path: Path) -> None:
    """A write: in a copy, the buffers of the driver stay as they are. A read: in the buffers, whatever their pieces."""
    path = tmp_path / "own.py"
    path.write_text(
        own_policy(
            "if io.operation == WRITE:\n"
            "    for place in range(0, io.length, 511):\n"
            "        store8(io, place, 7)\n"
            "return PASS",
            "if io.operation == READ and io.result == 0:\n"
            "    for place in range(1, io.length, 513):\n"
            "        store8(io, place, load8(io, place) ^ 255)\n"
            "return PASS",
            data=True,
        )
    )
    with served_with(address, str(path)) as (served, driver):
        for size in (512, BLOCK, 3 * BLOCK + 512, 5 * MIB + 512):
            data = bytes(number % 251 for number in range(size))
            parts = [16, 100, size // 3, size - size // 3 - 100]
            placed, ticket = driver._submit_request(VIRTIO_BLK_T_OUT, 8, data, 0, 0, readable=parts, misalign=3)
            assert driver._answer(placed, ticket).status == VIRTIO_BLK_S_OK
            given = b"".join(peek(place, length) for place, length, writable in placed.segments if not writable)
            assert given[16:] == data
            stored = bytearray(data)
            stored[0::511] = b"\7" * len(stored[0::511])
            changed = bytearray(stored)
            changed[1::513] = bytes(each ^ 255 for each in stored[1::513])
            parts = [5, size // 2, size - size // 2 - 5, 1]
            answer = driver.request(VIRTIO_BLK_T_IN, 8, read=size, writable=parts, misalign=1)
            assert (answer.status, answer.used, answer.data) == (VIRTIO_BLK_S_OK, size + 1, changed)
            switch(served, "own", enabled=False)
            assert driver.request(VIRTIO_BLK_T_IN, 8, read=size).data == stored
            switch(served, "own", enabled=True)


def test_what_hangs_is_released(address: str) -> None:
    """Other requests are done meanwhile."""
    with served_with(address, "hang,where=0-1M,name=stuck") as (served, driver):
        driver.write(MIB, b"a" * BLOCK)
        written = driver.begin(VIRTIO_BLK_T_OUT, 0, b"b" * BLOCK)
        read = driver._submit_request(VIRTIO_BLK_T_IN, 8, b"", BLOCK, 0)
        wait_until(lambda: counted(served, "stuck")["hung"] == 2, "nothing hangs")
        assert driver.read(MIB, BLOCK) == b"a" * BLOCK
        assert not any(driver._done(driver.queues[0], ticket) for ticket in (written.ticket, read[1]))
        api(served).post(f"{POLICIES}/stuck/release")
        assert driver.end(written).status == driver._answer(*read).status == VIRTIO_BLK_S_OK
        again = driver._submit_request(VIRTIO_BLK_T_IN, 0, b"", BLOCK, 0)
        wait_until(lambda: counted(served, "stuck")["hung"] == 3, "nothing hangs")
        switch(served, "stuck", enabled=False)
        assert driver._answer(*again).data == b"b" * BLOCK


def test_writes_that_are_lost_torn_and_misdirected(address: str) -> None:
    policies = (
        *("lost_writes,where=0-1M", "torn_writes,where=1M-2M,unit=4096"),
        *("misdirected_writes,where=4M-5M,distance=1M", "lying_flush"),
    )
    with served_with(address, *policies) as (_, driver):
        for place in (0, MIB, 4 * MIB):
            driver.write(place, b"x" * 16 * BLOCK)
        driver.flush()
        assert driver.read(0, 16 * BLOCK) == bytes(16 * BLOCK)
        torn = driver.read(MIB, 16 * BLOCK)
        written = torn.count(b"x")
        assert torn == b"x" * written + bytes(16 * BLOCK - written)
        assert 0 < written < 16 * BLOCK
        assert written % BLOCK == 0
        assert driver.read(4 * MIB, 16 * BLOCK) == bytes(16 * BLOCK)
        assert driver.read(5 * MIB, 16 * BLOCK) == b"x" * 16 * BLOCK


def test_a_verified_load(address: str, tmp_path: Path) -> None:
    """Two I/O threads, random delays, writes that are copied, and requests that hang until they are released."""
    path = tmp_path / "own.py"
    path.write_text(own_policy("store8(io, 0, load8(io, 0))\nreturn PASS", data=True))
    policies = ("delay,distribution=long-tail,time=50us,p99=5ms,longest=20ms", "hang,every=500,name=stuck", str(path))
    load = Load(
        block_size=(512, 4096, 65536), depth=8, queues=4, read_percent=50, flush_every=20, requests=2000, verify=True
    )
    options = disk(address, *policies, queues=4)
    with serving(options, threads=2, process=API) as served, served.driver(queues=4) as driver, released(served):
        result = run_load(driver, load)
        assert (result.errors, result.mismatches) == (0, 0), result
        assert counted(served, "stuck")["hung"] > 0


@contextlib.contextmanager
def released(served: Served) -> Iterator[None]:
    """Whatever hangs is released again and again."""
    ended = threading.Event()

    def release() -> None:
        while not ended.wait(0.01):
            api(served).post(f"{POLICIES}/stuck/release")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(release)
        try:
            yield
        finally:
            ended.set()
            done.result()


def test_policies_learn_of_errors_of_a_server(start: Start) -> None:
    """A server that is lost makes a disk read-only, as read_only_after says."""
    server = start(nbdkit)
    with served_with(server.uri, "read_only_after,errors=1", more=FAILING) as (served, driver):
        driver.write(0, b"a" * BLOCK)
        server.kill()
        wait_until(lambda: driver.request(VIRTIO_BLK_T_IN, 0, read=512).status == VIRTIO_BLK_S_IOERR, "no error")
        server.start()
        wait_until(lambda: driver.request(VIRTIO_BLK_T_IN, 0, read=512).status == VIRTIO_BLK_S_OK, "no connection")
        assert driver.request(VIRTIO_BLK_T_OUT, 0, b"b" * BLOCK).status == VIRTIO_BLK_S_IOERR
        assert counted(served, "read_only_after")["rejected"] == 1
        assert driver.read(0, BLOCK) == b"a" * BLOCK


def test_what_hangs_outlives_its_server(start: Start) -> None:
    """A request that hangs has not been sent: released, it is sent on the new connection."""
    server = start(nbdkit)
    with served_with(server.uri, "hang,operation=write,name=stuck", more=WAITING) as (served, driver):
        written = driver.begin(VIRTIO_BLK_T_OUT, 0, b"b" * BLOCK)
        wait_until(lambda: counted(served, "stuck")["hung"] == 1, "nothing hangs")
        server.crash()
        assert driver.read(0, BLOCK) == bytes(BLOCK)
        api(served).post(f"{POLICIES}/stuck/release")
        assert driver.end(written).status == VIRTIO_BLK_S_OK
        assert driver.read(0, BLOCK) == b"b" * BLOCK


def test_a_policy_learns_that_another_client_resized_the_image(cluster: CephCluster, tmp_path: Path) -> None:
    path, image = tmp_path / "own.py", cluster.new_image()
    path.write_text(own_policy("my.found = io.disk_size\nreturn PASS"))
    with served_with(cluster.address(image), str(path)) as (served, driver):
        driver.read(0, BLOCK)
        assert counted(served, "own")["found"] == 64 * MIB
        cluster.rbd("resize", image, "--size", "96M")

        def found() -> int:
            driver.read(0, BLOCK)
            return counted(served, "own")["found"]

        wait_until(lambda: found() == 96 * MIB, "the size is not known")
