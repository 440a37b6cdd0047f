"""Limits of disks that are served: given at the start, changed while drivers wait, shared by groups."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.control.operation_errors import WrongState, WrongValue
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.control.written_config import written_config
from ringplane.driver.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread

from .rig import eventually

SIZE = 4 << 20
MEMORY = 16 << 20


def disk(folder: Path, name: str, *threads: str, **limits: Any) -> DiskConfig:
    keys = {key.replace("_", "-"): value for key, value in limits.items()}
    image, socket = folder / f"{name}.img", folder / f"{name}.sock"
    threads = threads or ("io0",)
    return DiskConfig(image, threads, socket_path=socket, create=SIZE, num_queues=2, name=name, limits=keys)


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:
        yield lambda *disks: stack.enter_context(serve_all(disks, [IoThread("io0"), IoThread("io1")]))


@contextlib.contextmanager
def reading(export: ringplane.Export) -> Iterator[threading.Event]:
    """A driver that reads, one sector after the other; the event is set when it has read so often."""
    done, stop = threading.Event(), threading.Event()

    def read() -> None:
        with contextlib.suppress(ConnectionError), Driver(export.socket_path, timeout=60) as driver:
            for _ in range(40):
                if stop.is_set():
                    return
                driver.read(0, 512)
            done.set()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        with contextlib.suppress(Exception):
            export.change_limits({"total-iops-sec": 0})
        thread.join()


def test_a_limit_from_the_start(start: Callable[..., Server], tmp_path: Path) -> None:
    """Without an upper bound: a slow machine may take any time."""
    export = start(disk(tmp_path, "a", total_iops_sec=100)).exports[0]
    begin = time.monotonic()
    with reading(export) as done:
        assert done.wait(60)
        assert time.monotonic() - begin >= (40 - 11) / 100
    assert export.throttled > 0


def test_a_limit_that_is_changed_wakes_what_waits(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a")).exports[0]
    assert export.limits == {}
    export.change_limits({"total-iops-sec": 1})
    with reading(export) as done:
        # 40 requests would take 39 seconds.
        assert eventually(lambda: export.counters["read"].requests >= 1)
        export.change_limits({"total-iops-sec": 1_000_000})
        assert done.wait(30)
    assert export.limits == {}


def test_a_disk_is_paused_while_its_requests_wait(start: Callable[..., Server], tmp_path: Path) -> None:
    """At once: what waits because of a limit was not fetched."""
    export = start(disk(tmp_path, "a", total_iops_sec=1)).exports[0]
    with reading(export) as done:
        assert eventually(lambda: export.throttled > 0)
        export.pause()
        assert (export.paused, export.in_flight) == (True, 0)
        before = export.counters["read"].requests
        export.change_limits({"total-iops-sec": 1_000_000})
        assert export.counters["read"].requests == before
        export.resume()
        assert done.wait(30)


def test_a_disk_is_drained_and_stopped_while_its_requests_wait(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a", total_iops_sec=1)).exports[0]
    with reading(export):
        assert eventually(lambda: export.throttled > 0)
        export.drain()
        export.stop()
        assert export.stopped


def test_a_disk_is_handed_over_while_its_requests_wait(tmp_path: Path) -> None:
    """The new process has its own limits."""
    image, path = tmp_path / "a.img", tmp_path / "a.sock"
    old = ringplane.serve(image, path, create=SIZE, limits={"total-iops-sec": 1}, upgradable=True)
    with old, reading(old) as done:
        assert eventually(lambda: old.throttled > 0)
        with ringplane.serve(image, path, limits={"total-iops-sec": 1_000_000}, upgrade=True):
            assert done.wait(30)
            assert old.wait(30)


def test_wrong_changes(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a", total_iops_sec=100)).exports[0]
    with pytest.raises(WrongValue, match=r"^total-iops-sec and read-iops-sec exclude each other"):
        export.change_limits({"read-iops-sec": 5})
    assert export.limits == {"total-iops-sec": 100}


def test_a_disk_that_has_stopped(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a", total_iops_sec=100)).exports[0]
    export.stop()
    with pytest.raises(WrongState, match="has stopped"):
        export.change_limits({"total-iops-sec": 5})


def test_a_group_has_the_limits_that_were_given_last(start: Callable[..., Server], tmp_path: Path) -> None:
    one, other, third = start(
        disk(tmp_path, "a", group_name="x", total_iops_sec=100),
        disk(tmp_path, "b", "io1", group_name="x", weight=3),
        disk(tmp_path, "c"),
    ).exports
    assert one.limits == {"total-iops-sec": 100, "group-name": "x", "weight": 1}
    assert other.limits == {"total-iops-sec": 100, "group-name": "x", "weight": 3}
    other.change_limits({"total-iops-sec": 200, "total-iops-sec-max": 400})
    assert one.limits == {"total-iops-sec": 200, "total-iops-sec-max": 400, "group-name": "x", "weight": 1}
    third.change_limits({"group-name": "x", "weight": 9})
    assert third.limits == {"total-iops-sec": 200, "total-iops-sec-max": 400, "group-name": "x", "weight": 9}
    one.change_limits({"group-name": None, "total-iops-sec": 5, "total-iops-sec-max": None})
    assert one.limits == {"total-iops-sec": 5}
    assert other.limits["total-iops-sec"] == 200
    other.stop()
    assert third.limits["total-iops-sec"] == 200


def test_the_written_configuration_has_the_present_limits(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a", total_iops_sec=100))
    server.exports[0].change_limits({"total-iops-sec": 200})
    assert "limits = { total-iops-sec = 200 }" in written_config(server)


def test_changes_at_the_same_time(start: Callable[..., Server], tmp_path: Path) -> None:
    """Under a load whose data is verified, on two threads: all of them happen, and the last one holds."""
    server = start(*(disk(tmp_path, name, "io0", "io1", group_name="x", total_iops_sec=10**6) for name in "ab"))
    first, second = server.exports

    async def change_all(number: int) -> None:
        await asyncio.gather(
            *(each.operations.change_limits({"total-iops-sec": 20_000 + number}) for each in (first, second))
        )

    load = Load(depth=16, queues=2, read_percent=50, requests=3000, verify=True)
    with Driver(first.socket_path, queues=2, memory_size=MEMORY) as driver, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_load, driver, load)
        for number in range(20):
            server.threads.call(lambda number=number: change_all(number)).result(30)
        assert running.result(60).requests >= 3000
    assert first.limits == second.limits == {"total-iops-sec": 20_019, "group-name": "x", "weight": 1}


def test_a_load_does_not_notice_what_is_changed_meanwhile(start: Callable[..., Server], tmp_path: Path) -> None:
    """Reads and writes with limits of their own, on two threads, in a group and alone, paused and drained."""
    first, _ = start(
        disk(tmp_path, "a", "io0", "io1", read_iops_sec=10_000),
        disk(tmp_path, "b", group_name="x", total_iops_sec=10_000),
    ).exports
    randomness = random.Random(1)

    def rate() -> int:
        return randomness.randrange(5_000, 50_000)

    def be_alone() -> None:
        first.change_limits(
            {"group-name": None, "total-iops-sec": 0, "read-iops-sec": rate(), "write-iops-sec": rate()}
        )

    def join() -> None:
        weight = randomness.randrange(1, 9)
        first.change_limits({"group-name": "x", "weight": weight, "read-iops-sec": 0, "write-iops-sec": 0})

    def limit_bytes() -> None:
        first.change_limits({"write-bytes-sec": randomness.choice([0, 4096 * rate()])})

    def pause() -> None:
        first.pause()
        first.resume()

    load = Load(depth=16, queues=2, read_percent=50, requests=10_000, verify=True)
    with Driver(first.socket_path, queues=2, memory_size=MEMORY) as driver, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_load, driver, load)
        while not running.done():
            randomness.choice([be_alone, join, limit_bytes, pause, first.drain])()
        result = running.result()
    assert (result.errors, result.mismatches) == (0, 0)
    assert result.requests >= 10_000
