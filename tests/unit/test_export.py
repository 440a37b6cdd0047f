"""An export in a Python program: states, counters, drain and stop under load, no growth, no wake-ups when idle."""

from __future__ import annotations

import gc
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.sources.source import Source
from ringplane.control import server as server_module
from ringplane.control.listener import ListenError
from ringplane.driver.driver import Driver
from ringplane.driver.frontend import FrontEnd
from ringplane.driver.load import Load, Model, Result, check, fill, run_load
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.vhost_user.messages import ProtocolError
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT

from .waiting import wait_until

IMAGE_SIZE = 32 << 20
MEMORY_SIZE = 16 << 20
SOON = 10.0
CYCLES = 200
KINDS = {"read", "write", "flush", "discard", "write_zeroes", "other"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(IMAGE_SIZE)
    return path


@pytest.fixture
def export(image: Path, tmp_path: Path) -> Iterator[ringplane.Export]:
    with ringplane.serve(image, tmp_path / "socket", num_queues=2) as export:
        yield export


def attach(export: ringplane.Export, queues: int = 1) -> Driver:
    assert export.socket_path is not None
    return Driver(export.socket_path, queues=queues, memory_size=MEMORY_SIZE)


class SlowOpener:
    """Stands in for a process that removes files, whose storage does not answer."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def unlink(self, path: Path) -> None:
        self.begun.set()
        assert self.go.wait(SOON * 12)
        path.unlink()


def test_a_socket_whose_removal_takes_long_holds_nobody_up(export: ringplane.Export) -> None:
    opener = SlowOpener()
    export.listener.opener = opener  # type: ignore[assignment]
    export.request_stop()
    assert opener.begun.wait(SOON * 12)
    called = threading.Event()
    export.threads.soon(called.set)
    assert called.wait(SOON * 12)
    opener.go.set()
    export.stop()
    assert export.socket_path is not None
    assert not export.socket_path.exists()


def test_a_process_ends_at_once_while_the_removal_of_a_socket_hangs(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ABANDON_PATIENCE", 0.01)
    opener = SlowOpener()
    other = tmp_path / "other"
    other.write_bytes(bytes(IMAGE_SIZE))
    disks = [DiskConfig(path, ("io0",), socket_path=Path(f"{path}.sock")) for path in (image, other)]
    with ringplane.serve_all(disks, [IoThread("io0")]) as server:
        server.exports[0].listener.opener = opener  # type: ignore[assignment]
        server.abandon()
        assert opener.begun.wait(SOON * 12)
        # The others come first.
        assert not Path(f"{other}.sock").exists()
        opener.go.set()
        wait_until(lambda: not Path(f"{image}.sock").exists())


def test_a_source_that_cannot_be_watched_ends_its_disk(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Source, "watch", fail)
    with ringplane.serve(image, tmp_path / "socket", num_queues=1) as export:
        assert export.wait(SOON * 12)
    assert "stopped serving because of an internal error; please report it" in caplog.text
    assert not (tmp_path / "socket").exists()


def test_a_source_that_cannot_be_closed_ends_its_disk(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    export = ringplane.serve(image, tmp_path / "socket", num_queues=1)
    with monkeypatch.context() as patch:
        patch.setattr(export.disk.source, "close", fail)
        export.request_stop()
        assert export.wait(SOON * 12)
    export.disk.source.close()
    assert "could not be closed because of an internal error; please report it" in caplog.text


class Loaded:
    """A load on a driver, in a separate thread."""

    def __init__(self, driver: Driver, load: Load) -> None:
        self.driver, self.load = driver, load
        self.result: Result | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        try:
            self.result = run_load(self.driver, self.load)
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()


# States


def test_states(image: Path, tmp_path: Path) -> None:
    with ringplane.serve(image, tmp_path / "socket") as export:
        assert export.state == "listening"
        with attach(export):
            assert export.state == "attached"
        wait_until(lambda: export.state == "listening")
        with attach(export):
            assert export.state == "attached"
        assert not export.wait(0)
    assert export.state == "stopped"
    assert export.wait(0)


def test_stop_while_attached_ends_the_connection_and_removes_the_socket(export: ringplane.Export) -> None:
    assert export.socket_path is not None
    with attach(export) as driver:
        export.stop()
        assert export.state == "stopped"
        assert not export.socket_path.exists()
        with pytest.raises(ConnectionError):
            driver.read(0, 512)
    export.stop()


def test_stop_does_not_remove_another_server_s_socket(export: ringplane.Export) -> None:
    path = export.socket_path
    assert path is not None
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        export.stop()
        assert path.exists()


def test_image_is_free_after_stop(export: ringplane.Export, image: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="in use"):
        ringplane.serve(image, tmp_path / "second")
    export.stop()
    with ringplane.serve(image, tmp_path / "second") as second, attach(second) as driver:
        driver.write(0, bytes(512))


def test_stopped_while_front_ends_wait_in_the_queue(export: ringplane.Export) -> None:
    assert export.socket_path is not None
    with attach(export):
        waiting = FrontEnd(export.socket_path, timeout=SOON)
        export.stop()
        with pytest.raises((OSError, ProtocolError)):
            waiting.get_features()
        waiting.close()


def test_inherited_connection_ends_the_export(image: Path) -> None:
    """The export has then stopped by itself, and `stop` does nothing."""
    ours, theirs = socket.socketpair()
    with ringplane.serve(image, fd=theirs.detach()) as export:
        assert export.socket_path is None
        assert not export.wait(0)
        ours.close()
        assert export.wait(SOON)
        assert export.state == "stopped"


def test_inherited_connection_can_be_stopped(image: Path) -> None:
    ours, theirs = socket.socketpair()
    with ringplane.serve(image, fd=theirs.detach()) as export:
        export.stop()
    ours.settimeout(SOON)
    assert ours.recv(1) == b""
    ours.close()


def test_drain_and_counters_of_a_stopped_export(export: ringplane.Export) -> None:
    with attach(export) as driver:
        driver.read(0, 512)
    export.stop()
    export.drain()
    assert export.counters["read"].requests == 1
    assert export.in_flight == 0


# Errors


def test_socket_path_and_fd_exclude_each_other(image: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either"):
        ringplane.serve(image)
    with pytest.raises(ValueError, match="either"):
        ringplane.serve(image, tmp_path / "socket", fd=0)


def test_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    image = tmp_path / "new"
    with pytest.raises(ListenError):
        ringplane.serve(image, tmp_path / "nowhere" / "socket", create=IMAGE_SIZE)
    with pytest.raises(ImageError):
        ringplane.serve(image, tmp_path / "socket", create=IMAGE_SIZE + 1)
    with pytest.raises(ImageError):
        ringplane.serve(image, tmp_path / "socket")
    assert list(tmp_path.iterdir()) == []
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_fd_that_is_not_a_stream_socket_is_rejected_and_left_open(image: Path) -> None:
    for fd in (os.eventfd(0), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(), socket.socket().detach()):
        with pytest.raises(ListenError):
            ringplane.serve(image, fd=fd)
        os.close(fd)


def test_failed_start_keeps_an_existing_image(tmp_path: Path) -> None:
    image = tmp_path / "old"
    image.write_bytes(b"precious" * 64)
    with pytest.raises(ListenError):
        ringplane.serve(image, tmp_path / "nowhere" / "socket", create=IMAGE_SIZE)
    assert image.read_bytes() == b"precious" * 64


def test_created_image_is_private_and_has_the_given_size(tmp_path: Path) -> None:
    image = tmp_path / "new"
    with ringplane.serve(image, tmp_path / "socket", create=IMAGE_SIZE) as export, attach(export) as driver:
        assert driver.capacity == IMAGE_SIZE
    assert image.stat().st_size == IMAGE_SIZE
    assert stat.S_IMODE(image.stat().st_mode) == 0o600


# Options


@pytest.mark.parametrize("queues", [1, 3, 64])
def test_number_of_queues(image: Path, tmp_path: Path, queues: int) -> None:
    with (
        ringplane.serve(image, tmp_path / "socket", num_queues=queues, io_threads=2) as export,
        attach(export, min(queues, 8)) as driver,
    ):
        assert driver.front_end.get_queue_num() == queues
        assert driver.config["num_queues"] == queues
        for queue in range(min(queues, 8)):
            driver.write(queue * 4096, bytes([queue]) * 512, queue=queue)
            assert driver.read(queue * 4096, 512) == bytes([queue]) * 512


@pytest.mark.parametrize("cpus", [1, 128])
def test_default_number_of_queues_is_that_of_the_largest_guest(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    """QEMU wants a queue for each CPU of the guest, whatever the host has."""
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    with ringplane.serve(image, tmp_path / "socket") as export, attach(export) as driver:
        assert driver.front_end.get_queue_num() == driver.config["num_queues"] == 64


def open_files(image: Path) -> int:
    """How often this process has the image open."""
    return sum(os.path.samefile(f"/proc/self/fd/{fd}", image) for fd in os.listdir("/proc/self/fd") if is_open(fd))


def is_open(fd: str) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("direct", [False, True])
def test_unused_queues_cost_nothing(image: Path, tmp_path: Path, direct: bool) -> None:
    """No open file, and no counters."""
    with ringplane.serve(image, tmp_path / "socket", direct=direct, engine="aio") as export:
        with attach(export, 2) as driver:
            assert open_files(image) == 1
            for queue in range(2):
                driver.write(queue * 4096, b"x" * 512, queue=queue)
                driver.flush(queue=queue)
            assert [queue.number for queue in export.disk.started] == [0, 1]
            assert not any(hasattr(queue, "counters") for queue in export.disk.queues[2:])
        assert (export.counters["write"].requests, export.counters["flush"].requests) == (2, 2)


def test_each_io_thread_has_an_open_file_where_there_is_a_page_cache(image: Path, tmp_path: Path) -> None:
    """The kernel reports to each of them once what could not be written (block/flush.py)."""
    with ringplane.serve(image, tmp_path / "socket", direct=False, engine="aio", io_threads=3) as export:
        assert open_files(image) == 3
        files = [queue.stack.source.fd for queue in export.disk.queues]
        assert files == (files[:3] * 22)[:64]
        assert len(set(files)) == 3


def test_serial(image: Path, tmp_path: Path) -> None:
    with ringplane.serve(image, tmp_path / "socket", serial="twenty-bytes-serial!") as export, attach(export) as driver:
        assert driver.serial() == "twenty-bytes-serial!"


def test_default_serial_is_derived_from_the_path(image: Path, tmp_path: Path) -> None:
    serials = []
    for path in (image, image, tmp_path / "another"):
        with ringplane.serve(path, tmp_path / "socket", create=IMAGE_SIZE) as export, attach(export) as driver:
            serials.append(driver.serial())
    assert serials[0] == serials[1] != serials[2]


@pytest.mark.parametrize("direct", [True, False])
def test_written_data_is_in_the_image(image: Path, tmp_path: Path, direct: bool) -> None:
    with ringplane.serve(image, tmp_path / "socket", direct=direct) as export, attach(export) as driver:
        assert direct or not export.disk.source.direct
        driver.write(8192, b"ring" * 1024)
        driver.flush()
        assert driver.read(8192, 4096) == b"ring" * 1024
    assert image.read_bytes()[8192:12288] == b"ring" * 1024


# Counters


def test_counters(export: ringplane.Export) -> None:
    assert set(export.counters) == KINDS
    assert all((c.requests, c.errors, c.bytes, c.histogram.sum()) == (0, 0, 0, 0) for c in export.counters.values())
    assert export.counters["read"].percentile_us(50) == 0
    with attach(export, queues=2) as driver:
        for queue in range(2):
            driver.write(0, bytes(4096), queue=queue)
            driver.read(0, 512, queue=queue)
            driver.read(0, 8192, queue=queue)
        driver.flush()
        driver.serial()
        beyond = IMAGE_SIZE // 512
        assert driver.request(VIRTIO_BLK_T_IN, beyond, read=512).status == VIRTIO_BLK_S_IOERR
        assert driver.request(VIRTIO_BLK_T_OUT, beyond, bytes(512)).status == VIRTIO_BLK_S_IOERR
    wait_until(lambda: export.state == "listening")
    counters = export.counters
    assert {kind: (c.requests, c.errors) for kind, c in counters.items()} == dict.fromkeys(KINDS, (0, 0)) | {
        "read": (5, 1),
        "write": (3, 1),
        "flush": (1, 0),
        "other": (1, 0),
    }
    assert counters["read"].bytes == 2 * (512 + 8192)
    assert counters["write"].bytes == 2 * 4096
    assert {kind: int(c.histogram.sum()) for kind, c in counters.items()} == {
        kind: c.requests for kind, c in counters.items()
    }
    # Between a microsecond and ten seconds.
    assert 1 < counters["write"].percentile_us(100) < 10_000_000


def test_counters_continue_across_front_ends(export: ringplane.Export) -> None:
    for times in range(1, 4):
        with attach(export) as driver:
            driver.read(0, 512)
        assert export.counters["read"].requests == times


def test_trace_reports_each_request(export: ringplane.Export) -> None:
    events: list[str] = []
    export.trace(lambda event: events.append(str(event)))
    with attach(export) as driver:
        driver.write(4096, bytes(512))
        driver.flush()
    # All of it, up to the last request before the stop.
    export.stop()
    assert len([event for event in events if " fetch " in event]) == 2
    assert len([event for event in events if " complete " in event]) == 2
    assert any("sector=8" in event and "length=512" in event for event in events)


# Under load


def test_in_flight_is_counted_and_returns_to_zero(export: ringplane.Export) -> None:
    with attach(export) as driver:
        load = Loaded(driver, Load(block_size=65536, depth=32, seconds=0.4))
        wait_until(lambda: export.in_flight > 0)
        assert export.in_flight <= 32
        load.join()
    assert export.in_flight == 0


def test_drain_under_load_stops_and_loses_nothing(export: ringplane.Export) -> None:
    with attach(export, queues=2) as driver:
        drains = 0
        # On a busy machine one load may end after few of them.
        while drains < 6:
            load = Loaded(driver, Load(block_size=4096, depth=16, queues=2, read_percent=50, seconds=0.5, verify=True))
            wait_until(lambda: export.counters["read"].requests > 0)
            while load.thread.is_alive():
                export.drain()
                drains += 1
            load.join()
            assert load.error is None
            assert load.result is not None
            assert (load.result.errors, load.result.mismatches, load.result.wrong_lengths) == (0, 0, 0)


def test_drain_without_front_end_returns(export: ringplane.Export) -> None:
    export.drain()


def test_stop_under_load_loses_no_completed_write(export: ringplane.Export, image: Path) -> None:
    """Writes that the driver saw completed are in the image; those in flight at the end may or may not be."""
    assert export.socket_path is not None
    model = Model((0, IMAGE_SIZE))
    driver = attach(export)
    load = Loaded(driver, Load(depth=32, read_percent=30, flush_every=50, verify=True, model=model, seconds=30))
    wait_until(lambda: export.counters["write"].requests > 2000)
    export.stop()
    load.join()
    assert isinstance(load.error, ConnectionError)
    driver.close()
    known = int((model.generations > 0).sum())
    assert known > 1000
    with ringplane.serve(image, export.socket_path) as again, attach(again) as driver:
        result = check(driver, model)
    assert result.mismatches == 0, result.first_mismatch
    assert result.sectors_checked == known


def test_completed_writes_stay_when_the_front_end_disconnects_under_load(export: ringplane.Export) -> None:
    with attach(export) as driver:
        model, _ = fill(driver, seed=3)
        load = Loaded(driver, Load(depth=32, read_percent=0, verify=True, model=model, seconds=30))
        wait_until(lambda: export.counters["write"].requests > 1000)
        driver.front_end.sock.shutdown(socket.SHUT_RDWR)
        load.join()
        assert isinstance(load.error, ConnectionError)
        wait_until(lambda: export.state == "listening")
        driver.reconnect()
        result = check(driver, model)
    assert result.mismatches == 0, result.first_mismatch
    assert result.sectors_checked > IMAGE_SIZE // 512 // 2


def test_two_exports_in_one_process(export: ringplane.Export, tmp_path: Path) -> None:
    with ringplane.serve(tmp_path / "second", tmp_path / "socket-2", create=IMAGE_SIZE) as second:
        with attach(export) as one, attach(second) as other:
            loads = [
                Loaded(driver, Load(depth=8, read_percent=50, seconds=0.3, verify=True, seed=seed))
                for seed, driver in enumerate((one, other))
            ]
            for load in loads:
                load.join()
                assert load.error is None
                assert load.result is not None
                assert load.result.mismatches == 0
            second.stop()
            assert one.read(0, 512)
        assert second.counters["write"].requests > 0


# Growth and idleness


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def mapping_lines() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


def test_attaching_and_detaching_leaves_nothing_behind(export: ringplane.Export) -> None:
    def cycle() -> None:
        with attach(export) as driver:
            driver.write(4096, b"x" * 4096)
            assert driver.read(4096, 512) == b"x" * 512
        wait_until(lambda: export.state == "listening")

    for _ in range(10):
        cycle()
    gc.collect()
    fds, threads, native_threads, mappings = (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        tasks(),
        mapping_lines(),
    )
    for _ in range(CYCLES):
        cycle()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads
    assert tasks() == native_threads
    # The allocator may have added a few areas; one mapping per cycle would add CYCLES.
    assert mapping_lines() - mappings < CYCLES // 10


def test_starting_and_stopping_exports_leaves_nothing_behind(image: Path, tmp_path: Path) -> None:
    def cycle() -> None:
        with ringplane.serve(image, tmp_path / "socket", io_threads=2) as export, attach(export) as driver:
            driver.read(0, 512)

    cycle()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), tasks()
    for _ in range(20):
        cycle()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count(), tasks()) == before


def switches(thread: threading.Thread) -> int:
    """How often the thread went to sleep."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def named(name: str) -> threading.Thread:
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith(name))
    return thread


def do_not_wake_up(threads: list[threading.Thread], seconds: float) -> bool:
    before = [switches(thread) for thread in threads]
    time.sleep(seconds)
    return [switches(thread) for thread in threads] == before


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "listening"])
def test_idle_export_does_not_wake_up(export: ringplane.Export, attached: bool) -> None:
    """Neither the I/O thread nor its helpers nor the control thread wake up while the front end does nothing."""
    threads = [named(name) for name in ("ringplane-io-0", "ringplane-control", "helper-0 of ringplane-io-0")]
    driver = attach(export)
    driver.read(0, 512)
    if not attached:
        driver.close()
        wait_until(lambda: export.state == "listening")
    wait_until(lambda: do_not_wake_up(threads, 0.05))
    assert do_not_wake_up(threads, 1)
    before = switches(threads[0])
    with suppress(Exception):
        driver.read(0, 512)
    if attached:
        # The measurement detects it: a request wakes the I/O thread.
        wait_until(lambda: switches(threads[0]) > before)
    driver.close()


def test_drain_during_a_stop_returns(tmp_path: Path) -> None:
    for number in range(10):
        export = ringplane.serve(tmp_path / f"{number}.img", tmp_path / "socket", create=1 << 20, num_queues=1)
        with attach(export) as driver:
            driver.read(0, 512)
            drains = [threading.Thread(target=export.drain) for _ in range(4)]
            for drain in drains:
                drain.start()
            export.stop()
            for drain in drains:
                drain.join(SOON)
            assert not any(drain.is_alive() for drain in drains)
        export.drain()
        export.trace(print)


def test_program_that_ends_without_stop_exits_cleanly(tmp_path: Path) -> None:
    """Its threads still serve while the interpreter shuts down."""
    program = (
        "import ringplane, threading\n"
        "from ringplane.driver import Driver, Load, run_load\n"
        f"export = ringplane.serve({str(tmp_path / 'disk.img')!r}, {str(tmp_path / 's')!r}, create=1 << 20)\n"
        f"disk = Driver({str(tmp_path / 's')!r})\n"
        "load = Load(depth=32, seconds=60)\n"
        "threading.Thread(target=run_load, args=[disk, load], daemon=True).start()\n"
        "import time\n"
        "while sum(each.requests for each in export.counters.values()) < 1000: time.sleep(0.01)\n"
    )
    for _ in range(3):
        (tmp_path / "disk.img").unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_failed_worker_is_reported_and_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(worker: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ringplane.dataplane.worker.Worker._turn", fail)
    with pytest.raises(RuntimeError, match="ringplane-io-0 has ended"):
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", create=1 << 20)
    assert "the I/O thread has failed" in caplog.text
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
