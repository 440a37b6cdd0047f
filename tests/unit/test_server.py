"""Several disks in one process: real I/O on each, the requested threads, and isolation of errors."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ringplane
from ringplane.block.image import ImageError
from ringplane.control.listener import ListenError
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.control.threads import Threads
from ringplane.dataplane.trace_layout import FETCH
from ringplane.driver.driver import Driver
from ringplane.driver.frontend import FrontEnd, Refused
from ringplane.driver.load import Load, Result, check, fill, run_load
from ringplane.options.cpus import parse_cpus
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.vhost_user.messages import ProtocolError

from .waiting import wait_until

IMAGE_SIZE = 4 << 20
MEMORY_SIZE = 16 << 20
SOON = 10.0
CPUS = sorted(os.sched_getaffinity(0))

Start = Callable[..., Server]


def disk(folder: Path, number: int, *io_threads: str, queues: int = 1) -> DiskConfig:
    return DiskConfig(
        folder / f"{number}.img",
        io_threads or ("io0",),
        socket_path=folder / f"{number}.sock",
        create=IMAGE_SIZE,
        num_queues=queues,
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Serve so many disks, disk `i` with one queue on thread `i` modulo the number of threads."""
    servers: list[Server] = []

    def start(disks: int, threads: int = 2) -> Server:
        io_threads = [IoThread(f"io{number}") for number in range(threads)]
        configs = [disk(tmp_path, number, f"io{number % threads}") for number in range(disks)]
        servers.append(serve_all(configs, io_threads))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def attach(export: ringplane.Export, queues: int = 1) -> Driver:
    assert export.socket_path is not None
    return Driver(export.socket_path, queues=queues, memory_size=MEMORY_SIZE, timeout=SOON)


def works(export: ringplane.Export) -> bool:
    """Whether a new front end can write and read."""
    with attach(export) as driver:
        driver.write(4096, b"works" + bytes(507))
        return driver.read(4096, 512) == b"works" + bytes(507)


def accepts(export: ringplane.Export) -> bool:
    assert export.socket_path is not None
    with contextlib.suppress(BlockingIOError), contextlib.closing(FrontEnd(export.socket_path, SOON)) as front_end:
        return front_end.get_features() != 0
    return False


def run_verified(driver: Driver, seed: int) -> Result:
    return run_load(driver, Load(depth=8, read_percent=50, seconds=0.3, verify=True, seed=seed))


def allowed_cpus(threads: Threads) -> dict[str, frozenset[int]]:
    """The allowed CPUs of each I/O thread according to the kernel."""
    return {name: _allowed(worker.call(threading.get_native_id).result()) for name, worker in threads.workers.items()}


def _allowed(thread: int) -> frozenset[int]:
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return parse_cpus(status.split("\nCpus_allowed_list:")[1].split()[0])


# Serving


def test_each_disk_has_its_own_data(start: Start, tmp_path: Path) -> None:
    server = start(3)
    with contextlib.ExitStack() as stack:
        drivers = [stack.enter_context(attach(export)) for export in server.exports]
        for number, driver in enumerate(drivers):
            driver.write(8192, bytes([number + 1]) * 4096)
        assert [driver.read(8192, 512)[0] for driver in drivers] == [1, 2, 3]
        assert [export.state for export in server.exports] == ["attached"] * 3
    server.stop()
    for number in range(3):
        assert (tmp_path / f"{number}.img").read_bytes()[8192:12288] == bytes([number + 1]) * 4096


def test_64_disks_at_once(start: Start) -> None:
    server = start(64)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        drivers = [stack.enter_context(attach(export)) for export in server.exports]
        filled = list(pool.map(lambda driver: fill(driver, seed=id(driver)), drivers))
        # Only after all have been written, so that a block in a wrong image is detected.
        checked = list(pool.map(lambda both: check(both[0], both[1][0]), zip(drivers, filled, strict=True)))
        assert [result.mismatches for result in checked] == [0] * 64
        assert {result.sectors_checked for result in checked} == {IMAGE_SIZE // 512}
        assert all(export.counters["read"].errors == 0 for export in server.exports)
        assert threading.active_count() < 64


def test_load_on_several_disks_of_one_thread(start: Start) -> None:
    server = start(4, threads=1)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        drivers = [stack.enter_context(attach(export)) for export in server.exports]
        for result in pool.map(run_verified, drivers, range(4)):
            assert (result.errors, result.mismatches) == (0, 0)
    assert all(export.counters["write"].requests > 0 for export in server.exports)


def test_drain_of_one_disk_does_not_block_another(start: Start) -> None:
    first, second = start(2, threads=1).exports
    with attach(first) as one, attach(second) as other, ThreadPoolExecutor(2) as pool:
        results = [pool.submit(run_verified, driver, seed) for seed, driver in enumerate((one, other))]
        while not results[0].done():
            first.drain()
        assert all((r.result().errors, r.result().mismatches) == (0, 0) for r in results)


def test_trace_of_an_export_has_only_its_disk(start: Start) -> None:
    server = start(2, threads=1)
    events: list[list[str]] = [[], []]
    everything: list[str] = []
    for export, own in zip(server.exports, events, strict=True):
        export.trace(lambda event, own=own: own.append(str(event)))
    server.trace(lambda event: everything.append(str(event)))
    for number, export in enumerate(server.exports):
        with attach(export) as driver:
            driver.read(number * 512, 512)
    server.stop()
    for number, own in enumerate(events):
        fetches = [event for event in own if " fetch " in event]
        assert len(fetches) == 1
        assert f"sector={number} " in fetches[0]
    assert len([event for event in everything if " fetch " in event]) == 2


# Threads


def served_queues(server: Server, use: Callable[[], None]) -> dict[str, set[tuple[str, int]]]:
    """The queues (disk and number) from which each thread has fetched requests during `use`."""
    readers = {name: worker.start_tracing().result() for name, worker in server.threads.workers.items()}
    use()
    return {
        name: {(event.disk, event.queue) for event in reader.events() if event.event == FETCH}
        for name, reader in readers.items()
    }


def test_queues_are_served_by_the_named_threads(tmp_path: Path) -> None:
    configs = [disk(tmp_path, 0, "a", "b", queues=5), disk(tmp_path, 1, "b", "b", "c", queues=3)]
    with serve_all(configs, [IoThread(name) for name in "abc"]) as server:

        def use() -> None:
            for export, queues in zip(server.exports, (5, 3), strict=True):
                with attach(export, queues) as driver:
                    for queue in range(queues):
                        driver.read(0, 512, queue=queue)

        first, second = (export.name for export in server.exports)
        assert served_queues(server, use) == {
            "a": {(first, 0), (first, 2), (first, 4)},
            "b": {(first, 1), (first, 3), (second, 0), (second, 1)},
            "c": {(second, 2)},
        }


def test_thread_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'0\.img: io_threads: no I/O thread has the name "io1"; did you mean "io0"\?'):
        serve_all([disk(tmp_path, 0, "io1")], [IoThread("io0")])
    assert list(tmp_path.iterdir()) == []


def test_threads_of_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='name: "a" is the name of another I/O thread already'):
        serve_all([disk(tmp_path, 0, "a")], [IoThread("a"), IoThread("a")])


def test_affinity(tmp_path: Path) -> None:
    cpus = {"first": frozenset(CPUS[:1]), "last": frozenset(CPUS[-1:]), "all": frozenset(CPUS), "free": None}
    threads = [IoThread(name, cpus=each) for name, each in cpus.items()]
    with serve_all([disk(tmp_path, 0, *cpus, queues=4)], threads) as server:
        with attach(server.exports[0], 4) as driver:
            for queue in range(4):
                driver.read(0, 512, queue=queue)
        assert allowed_cpus(server.threads) == {**cpus, "free": frozenset(CPUS)}
    assert os.sched_getaffinity(0) == set(CPUS)


def test_affinity_of_a_single_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(IMAGE_SIZE))
    for given, expected in [([CPUS[-1:]], [CPUS[-1:]] * 2), ([CPUS[:1], CPUS[-1:]], [CPUS[:1], CPUS[-1:]])]:
        with ringplane.serve(image, tmp_path / "socket", io_threads=2, cpus=given) as export:
            assert list(allowed_cpus(export.threads).values()) == [frozenset(each) for each in expected]


@pytest.mark.parametrize(
    ("cpus", "words"),
    [
        ([[0], [0]], "given 2 times"),
        ([[]], "no CPU is named"),
        ([[65535]], "CPU 65535 is not available to this process"),
    ],
)
def test_invalid_affinity(tmp_path: Path, cpus: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ringplane.serve(tmp_path / "image", tmp_path / "socket", create=IMAGE_SIZE, io_threads=3, cpus=cpus)
    assert list(tmp_path.iterdir()) == []


# Starting and stopping


@pytest.mark.parametrize("wrong", ["image", "socket", "engine"])
def test_failed_start_leaves_nothing_behind(tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    configs = [disk(tmp_path, number) for number in range(4)]
    if wrong == "image":
        (tmp_path / "2.img").touch()
    elif wrong == "socket":
        (tmp_path / "2.sock").touch()
    else:
        monkeypatch.setattr("ringplane.control.threads._run_on", _refuse)
    left = sorted(tmp_path.iterdir())
    with pytest.raises((ImageError, ListenError, PermissionError)):
        serve_all(configs, [IoThread("io0"), IoThread("io1")])
    assert sorted(tmp_path.iterdir()) == left
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def _refuse(cpus: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_stop_while_several_front_ends_are_under_load(start: Start) -> None:
    threads = threading.active_count()
    server = start(4)
    errors: list[Exception] = []

    def work(driver: Driver) -> None:
        try:
            run_load(driver, Load(depth=16, read_percent=50, seconds=30))
        except ConnectionError as error:
            errors.append(error)

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        drivers = [stack.enter_context(attach(export)) for export in server.exports]
        for driver in drivers:
            pool.submit(work, driver)
        wait_until(lambda: all(export.counters["write"].requests > 100 for export in server.exports))
        server.stop()
    assert len(errors) == 4
    assert [export.state for export in server.exports] == ["stopped"] * 4
    assert all(export.in_flight == 0 for export in server.exports)
    assert not any(export.config.socket_path.exists() for export in server.exports if export.config.socket_path)
    assert threading.active_count() == threads
    assert server.wait(0)
    server.stop()


def test_disks_stop_one_by_one_and_the_last_stops_the_threads(start: Start) -> None:
    threads = threading.active_count()
    server = start(3)
    first, second, third = server.exports
    with attach(first), attach(second) as driver:
        first.stop()
        assert first.state == "stopped"
        assert first.socket_path is not None
        assert not first.socket_path.exists()
        driver.write(0, bytes(512))
        with pytest.raises(ImageError, match="in use"):
            ringplane.serve(second.config.image, "unused")
        with ringplane.serve(first.config.image, first.socket_path) as again:
            assert works(again)
    third.stop()
    assert not server.wait(0)
    second.stop()
    assert server.wait(0)
    assert threading.active_count() == threads
    for export in server.exports:
        export.drain()
        export.trace(print)


def test_stopping_and_attaching_concurrently(start: Start) -> None:
    """Front ends connect while disks stop: each is served or disconnected, and everything ends."""
    server = start(8)

    def come_and_go(export: ringplane.Export) -> None:
        with contextlib.suppress(OSError, ProtocolError):
            for _ in range(100):
                with attach(export) as driver:
                    driver.read(0, 512)

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(come_and_go, export) for export in server.exports]
        wait_until(lambda: all(export.counters["read"].requests for export in server.exports))
        for export in server.exports[:4]:
            export.request_stop()
        server.stop()
    assert all(future.exception() is None for future in done)


def test_inherited_connection_ends_only_its_disk(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    inherited = DiskConfig(tmp_path / "inherited.img", ("io0",), fd=theirs.detach(), create=IMAGE_SIZE)
    with serve_all([inherited, disk(tmp_path, 0)], [IoThread("io0")]) as server:
        ours.close()
        assert server.exports[0].wait(SOON)
        assert not server.wait(0)
        assert works(server.exports[1])


# Isolation of errors


def test_misbehaving_front_ends_do_not_disturb_others(start: Start) -> None:
    server = start(4, threads=1)
    victim = server.exports[0]
    stop = threading.Event()

    def misbehave(how: Callable[[FrontEnd], object]) -> None:
        while not stop.is_set():
            assert victim.socket_path is not None
            with contextlib.suppress(OSError, ProtocolError), contextlib.closing(FrontEnd(victim.socket_path)) as peer:
                how(peer)

    def flood(peer: FrontEnd) -> None:
        """Send requests without reading replies, until the socket is full."""
        peer.sock.settimeout(0.05)
        while True:
            peer.sock.sendall(bytes([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]) * 1000)

    with ThreadPoolExecutor(8) as pool, contextlib.ExitStack() as stack:
        # Also after a failure, because the pool waits for its threads.
        stack.callback(stop.set)
        for how in (
            lambda peer: peer.sock.sendall(os.urandom(4096)),
            lambda peer: peer.sock.sendall(b"\1"),
            flood,
        ):
            pool.submit(misbehave, how)
        drivers = [stack.enter_context(attach(export)) for export in server.exports[1:]]
        for result in pool.map(run_verified, drivers, range(3)):
            assert (result.errors, result.mismatches) == (0, 0)
    # The queue of connections may still be full of those whose front ends have gone.
    wait_until(lambda: accepts(victim))
    assert works(victim)


def test_silent_front_end_blocks_nobody_else(start: Start) -> None:
    server = start(2)
    assert server.exports[0].socket_path is not None
    with contextlib.closing(FrontEnd(server.exports[0].socket_path)):
        assert works(server.exports[1])


def test_failing_thread_does_not_stop_other_threads(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = start(2)
    first, second = server.exports

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with attach(first), attach(second) as driver:
        # The thread of the first disk hits this after it has run the call.
        worker = server.threads.workers["io0"]
        worker.call(lambda: setattr(worker.rings, "_finish_drains", fail)).result()
        wait_until(lambda: "io0: the I/O thread has failed" in caplog.text)
        result = run_verified(driver, 1)
        assert (result.errors, result.mismatches) == (0, 0)
        first.drain()
    wait_until(lambda: [export.state for export in server.exports] == ["listening"] * 2)
    with pytest.raises(Refused):
        attach(first)
    assert works(second)
    first.stop()
    assert works(second)


def test_error_in_a_session_ends_only_that_session(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(2)
    first, second = server.exports

    async def fail(self: object) -> None:
        raise ZeroDivisionError

    with attach(second) as driver:
        with monkeypatch.context() as patch:
            patch.setattr("ringplane.control.export.Session.run", fail)
            with pytest.raises((OSError, ProtocolError)):
                attach(first)
        wait_until(lambda: "0: front end dropped because of an internal error" in caplog.text)
        driver.read(0, 512)
    assert works(first)


def test_error_in_serving_ends_only_that_disk(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(2)
    first, second = server.exports

    async def fail(sock: socket.socket) -> None:
        sock.close()
        raise ZeroDivisionError

    with attach(second) as driver:
        monkeypatch.setattr(first, "_serve_front_end", fail)
        with pytest.raises((OSError, ProtocolError)):
            attach(first)
        assert first.wait(SOON)
        assert "0: stopped serving because of an internal error" in caplog.text
        driver.read(0, 512)
    assert works(second)
