"""Operations on disks that are served: added, removed, paused, resumed, flushed and resized under load."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.control import adding as adding_module
from ringplane.control.adding import Adding
from ringplane.control.listener import Listener
from ringplane.control.operation_errors import NoSuchDisk, OperationError, Unavailable, WrongState, WrongValue
from ringplane.control.server import ADDED_AT_ONCE, MOST_NAMES, Server
from ringplane.control.start import serve_all
from ringplane.control.state_file import StateFile
from ringplane.control.turns import MAX_TAKEN, Turns
from ringplane.dataplane.ring_rules import MESSAGES
from ringplane.driver.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.log.event_bus import KEPT, Events
from ringplane.options.api_options import ApiOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.system.aside import aside

from .protocol_rig import break_ring, machine, open_fds
from .rig import eventually

IMAGE_SIZE = 4 << 20
MEMORY_SIZE = 16 << 20
SOON = 20.0


class Idle:
    """An interface that does nothing: the server runs until it is stopped."""

    def __init__(self, path: Path) -> None:
        self.options, self.path = ApiOptions(path), path
        self._done = threading.Event()

    def prepare(self, inherited: Listener | None) -> None:
        """Nothing."""

    def open(self, server: Server) -> None:
        self.listener = Listener.at(self.path)

    def start(self) -> None:
        """Nothing."""

    def close(self) -> None:
        self.listener.close()

    def request_stop(self) -> None:
        self._done.set()

    async def release(self) -> None:
        self.request_stop()

    @property
    def stopped(self) -> bool:
        return self._done.is_set()

    async def run(self) -> None:
        await aside(self._done.wait)
        self.close()


def disk(folder: Path, name: str, **options: Any) -> DiskConfig:
    options = {"create": IMAGE_SIZE, "num_queues": 2, **options}
    return DiskConfig(folder / f"{name}.img", ("io0",), socket_path=folder / f"{name}.sock", **options)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(*disks: DiskConfig) -> Server:
            return stack.enter_context(serve_all(disks, [IoThread("io0")], interface=Idle(tmp_path / "interface")))

        yield start


def do(server: Server, work: Callable[[], Any]) -> Any:
    """The result of a coroutine on the control thread."""
    return server.threads.call(work).result(SOON)


def add(server: Server, config: DiskConfig) -> ringplane.Export:
    export: ringplane.Export = do(server, lambda: server.add(config))
    return export


def attach(export: ringplane.Export, queues: int = 1) -> Driver:
    assert export.socket_path is not None
    return Driver(export.socket_path, queues=queues, memory_size=MEMORY_SIZE, timeout=SOON)


def kinds(server: Server) -> list[tuple[str, str]]:
    return [(event.kind, event.disk) for event in server.events.after(0)[0]]


# Adding and removing


def test_a_server_without_disks_waits_for_some(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start()
    assert not server.wait(0)
    for _ in range(2):
        export = add(server, disk(tmp_path, "a"))
        with attach(export) as driver:
            driver.write(512, b"x" * 512)
            assert driver.read(512, 512) == b"x" * 512
        assert eventually(lambda export=export: export.state == "listening")
        do(server, lambda: server.remove("a"))
        assert (server.exports, export.stopped, (tmp_path / "a.sock").exists()) == ((), True, False)
    assert not server.wait(0)
    assert kinds(server) == [(kind, "a") for _ in range(2) for kind in ("added", "attached", "detached", "removed")]


def test_without_an_interface_the_last_disk_ends_the_server(tmp_path: Path) -> None:
    with serve_all([disk(tmp_path, "a")], [IoThread("io0")]) as server:
        do(server, lambda: server.remove("a"))
        assert server.wait(SOON)


def own_fds() -> int:
    """How many files are open, without the memory of drivers, which lives as long as some variable of a test."""
    return sum("ringplane-driver" not in target for target in open_fds().values())


def test_nothing_of_a_removed_disk_is_left(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "first"))
    # The threads that add disks are started by the first one.
    add(server, disk(tmp_path, "a"))
    do(server, lambda: server.remove("a"))
    with attach(server.exports[0]) as driver:
        before = own_fds()
        for _ in range(10):
            with attach(add(server, disk(tmp_path, "a"))) as other:
                other.write(0, bytes(4096))
                assert driver.read(0, 512) == bytes(512)
            do(server, lambda: server.remove("a", detach=True))
        assert eventually(lambda: own_fds() <= before)
    assert [export.name for export in server.exports] == ["first"]


def test_disks_come_and_go_beside_a_verified_load(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "steady"))
    with attach(server.exports[0], 2) as driver, ThreadPoolExecutor(1) as pool:
        steady = pool.submit(run_load, driver, Load(depth=8, read_percent=50, seconds=3, verify=True))
        count = 0
        while not steady.done():
            with attach(add(server, disk(tmp_path, "other"))) as other:
                other.write(0, b"o" * 4096)
                do(server, lambda: server.exports[-1].operations.pause())
                do(server, lambda: server.exports[0].operations.drain())
                do(server, lambda: server.exports[-1].operations.resume())
                assert other.read(0, 4096) == b"o" * 4096
            do(server, lambda: server.remove("other", detach=True))
            count += 1
        assert (steady.result().errors, steady.result().mismatches) == (0, 0)
        assert count > 0


def test_a_stop_while_a_disk_is_added(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringplane.control.threads.CALLS_PATIENCE", SOON)
    server = start()
    opening, go = threading.Event(), threading.Event()
    really_open = Adding.open

    def open_slowly(adding: Adding, *arguments: Any) -> ringplane.Export:
        opening.set()
        assert go.wait(SOON)
        return really_open(adding, *arguments)

    monkeypatch.setattr(Adding, "open", open_slowly)
    adding = server.threads.call(lambda: server.add(disk(tmp_path, "a")))
    assert opening.wait(SOON)
    server.request_stop()
    go.set()
    with pytest.raises(WrongState, match="the process is stopping"):
        adding.result(SOON)
    assert server.wait(SOON)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_whose_storage_hangs_is_removed_when_it_completes(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringplane.control.server.PATIENCE", 0.01)
    server = start(disk(tmp_path, "a"))
    go = threading.Event()
    close = server.exports[0].disk.close
    monkeypatch.setattr(server.exports[0].disk, "close", lambda: go.wait(SOON) and close())
    for _ in range(3):
        with pytest.raises(Unavailable, match="its image is being closed: storage does not answer"):
            do(server, lambda: server.remove("a"))
    go.set()
    assert eventually(lambda: server.exports == ())
    assert kinds(server) == [("removed", "a")]


def test_a_removal_whose_state_cannot_be_stored_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the state's storage that does not answer, and the disk is not served any more."""
    state, interface = StateFile(tmp_path / "state", trusted=True), Idle(tmp_path / "interface")
    begun, go = threading.Event(), threading.Event()
    with serve_all([disk(tmp_path, "a")], [IoThread("io0")], interface=interface, state=state) as server:
        store, export = state.store, server.exports[0]
        monkeypatch.setattr(state, "store", lambda changes: begun.set() or (go.wait(SOON) and store(changes)))
        removed = server.threads.call(lambda: server.remove("a"))
        assert begun.wait(SOON)
        assert str(server._not_removed(export)).startswith(f"removed, but that is not stored yet in {state.path}")
        go.set()
        removed.result(SOON)


def hang(monkeypatch: pytest.MonkeyPatch, exports: Sequence[ringplane.Export], method: str) -> threading.Event:
    """This method of these disks hangs until the event is set."""
    go = threading.Event()
    for export in exports:
        really = getattr(export.disk, method)
        monkeypatch.setattr(export.disk, method, lambda really=really: go.wait(SOON) and really())
    return go


@pytest.mark.parametrize("method", ["close", "sync"])
def test_storage_that_hangs_holds_up_no_other_disk(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Removals or flushes of twenty disks hang; of others nothing does."""
    names = [f"hangs-{number}" for number in range(20)]
    server = start(*(disk(tmp_path, name) for name in (*names, "a", "b")))
    hanging, well = server.exports[:20], server.exports[20]
    go = hang(monkeypatch, hanging, method)
    waiting = []
    if method == "close":
        with monkeypatch.context() as patch:
            patch.setattr("ringplane.control.server.PATIENCE", 0.01)
            for name in names:
                with pytest.raises(Unavailable, match="its image is being closed: storage does not answer"):
                    do(server, lambda name=name: server.remove(name))
    else:
        waiting = [server.threads.call(export.operations.flush) for export in hanging]
    well.flush()
    well.resize(2 * IMAGE_SIZE)
    with attach(well) as driver:
        driver.write(0, b"x" * 512)
    do(server, lambda: server.remove("b"))
    add(server, disk(tmp_path, "c"))
    do(server, lambda: server.remove("c"))
    assert not any(future.done() for future in waiting)
    assert len(server.exports) == 21
    assert {export.state for export in hanging} == {"stopping" if method == "close" else "listening"}
    go.set()
    for future in waiting:
        future.result(SOON)
    assert method == "sync" or eventually(lambda: server.exports == (well,))


def test_images_that_hang_hold_up_no_other_disk(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being opened has its name, its socket and its image already."""
    server, go, really_open = start(), threading.Event(), adding_module.open_parts

    def open_slowly(config: DiskConfig, *arguments: Any, **more: Any) -> Any:
        assert config.socket_path is not None
        assert not config.socket_path.name.startswith("hangs") or go.wait(SOON)
        return really_open(config, *arguments, **more)

    monkeypatch.setattr(adding_module, "open_parts", open_slowly)
    hanging = [
        server.threads.call(lambda number=number: server.add(disk(tmp_path, f"hangs-{number}")))
        for number in range(ADDED_AT_ONCE - 1)
    ]
    with attach(add(server, disk(tmp_path, "a"))) as driver:
        driver.write(0, b"x" * 512)
    do(server, lambda: server.remove("a", detach=True))
    new = disk(tmp_path, "b")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "hangs-0"}, 'name: "hangs-0" is the name of disk hangs-0 already'),
        ({"image": tmp_path / "hangs-1.img"}, "is also the image of disk hangs-1"),
        ({"socket_path": tmp_path / "hangs-1.sock"}, "is also the socket of disk hangs-1"),
    ]
    for changed, words in wrong:
        with pytest.raises(WrongValue, match=words):
            add(server, dataclasses.replace(new, **changed))
    # The name that it would have is taken.
    (tmp_path / "more").mkdir()
    assert add(server, dataclasses.replace(new, image=tmp_path / "more" / "hangs-2.img")).name == "hangs-2-2"
    assert not any(future.done() for future in hanging)
    go.set()
    names = [future.result(SOON).name for future in hanging]
    assert names == [f"hangs-{number}" for number in range(ADDED_AT_ONCE - 1)]


def added_at_the_same_time(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    slow: DiskConfig,
    meanwhile: Callable[[], object],
    step: str = "open_parts",
) -> ringplane.Export:
    """This disk is added, and between the check of its options and this step something else happens."""
    opening, go, really_open = threading.Event(), threading.Event(), getattr(adding_module, step)

    def open_slowly(config: DiskConfig, *arguments: Any, **more: Any) -> Any:
        if config.socket_path == slow.socket_path:
            opening.set()
            assert go.wait(SOON)
        return really_open(config, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(adding_module, step, open_slowly)
        adding = server.threads.call(lambda: server.add(slow))
        assert opening.wait(SOON)
        try:
            meanwhile()
        finally:
            go.set()
        export: ringplane.Export = adding.result(SOON)
        return export


@pytest.mark.parametrize("path", ["image", "link"])
def test_two_disks_of_one_image_at_the_same_time(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Without a lock that would say so. Of the second one nothing is left."""
    (tmp_path / "image").write_bytes(bytes(IMAGE_SIZE))
    (tmp_path / "link").symlink_to("image")
    slow, other = (
        dataclasses.replace(disk(tmp_path, name, lock="off", create=None), name=name, image=tmp_path / image)
        for name, image in (("a", path), ("b", "image"))
    )
    server = start()
    add(server, slow)
    do(server, lambda: server.remove("a"))
    before = own_fds()
    with pytest.raises(WrongValue, match="image: is also the image of disk b"):
        added_at_the_same_time(server, monkeypatch, slow, lambda: add(server, other))
    assert [export.name for export in server.exports] == ["b"]
    assert not (tmp_path / "a.sock").exists()
    with attach(server.exports[0]) as driver:
        driver.write(0, b"x" * 512)
    do(server, lambda: server.remove("b", detach=True))
    assert eventually(lambda: own_fds() <= before)
    add(server, slow)


def test_an_image_that_was_created_for_another_disk_is_kept(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is rejected, because this one has begun to serve the image meanwhile."""
    (tmp_path / "link.img").symlink_to("a.img")
    slow = disk(tmp_path, "a", lock="off")
    other = dataclasses.replace(disk(tmp_path, "b", lock="off", create=None), name="b", image=tmp_path / "link.img")
    server = start()
    with pytest.raises(WrongValue, match="image: is also the image of disk b"):
        added_at_the_same_time(server, monkeypatch, slow, lambda: add(server, other), step="listen")
    assert (tmp_path / "a.img").stat().st_size == IMAGE_SIZE
    assert not (tmp_path / "a.sock").exists()
    with attach(server.exports[0]) as driver:
        driver.write(0, b"x" * 512)
    assert (tmp_path / "a.img").read_bytes()[:512] == b"x" * 512


def test_limits_of_a_group_that_change_while_a_disk_is_added(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not overwritten by what holds no more. A disk that names only the group has its new limits."""
    limits: dict[str, Any] = {"group-name": "x", "total-iops-sec": 100}
    server = start(disk(tmp_path, "a", limits=limits))
    first = server.exports[0]
    with pytest.raises(WrongValue, match='limits: the group "x" has other limits at disk a'):
        added_at_the_same_time(
            server,
            monkeypatch,
            disk(tmp_path, "b", limits=limits),
            lambda: first.change_limits({"total-iops-sec": 200}),
        )
    assert first.limits["total-iops-sec"] == 200
    # The image that was created with it has gone too.
    assert sorted(path.name for path in tmp_path.glob("b.*")) == []
    named = disk(tmp_path, "b", limits={"group-name": "x"})
    change = partial(first.change_limits, {"total-iops-sec": 300})
    assert added_at_the_same_time(server, monkeypatch, named, change).limits["total-iops-sec"] == 300


def test_images_of_other_disks_are_not_looked_at(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their storage may hang. A disk with the same image is found all the same."""
    server, really_stat = start(disk(tmp_path, "a")), os.stat
    new = disk(tmp_path, "b")
    (tmp_path / "link.img").symlink_to("a.img")

    def stat(path: Any, *arguments: Any, **more: Any) -> os.stat_result:
        assert path != tmp_path / "a.img"
        return really_stat(path, *arguments, **more)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(WrongValue, match="is also the image of disk a"):
        add(server, dataclasses.replace(new, image=tmp_path / "link.img"))
    assert add(server, new).name == "b"


def test_without_threads_for_calls(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations say so, and a disk still ends."""
    server = start(disk(tmp_path, "a"), disk(tmp_path, "b"))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(Unavailable, match="flush failed: no thread can be started; raise the limit"):
            server.exports[0].flush()
        with pytest.raises(Unavailable, match="cannot be opened: no thread can be started; raise the limit"):
            add(server, disk(tmp_path, "c"))
        do(server, lambda: server.remove("a"))
    assert [export.name for export in server.exports] == ["b"]


def test_an_attached_disk_is_removed_only_with_its_front_end(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"))
    with attach(server.exports[0]) as driver:
        with pytest.raises(WrongState, match=r"a front end \(process \d+.*\) is attached; detach it, or add"):
            do(server, lambda: server.remove("a"))
        assert driver.read(0, 512) == bytes(512)
        do(server, lambda: server.remove("a", detach=True))
        with pytest.raises(OSError):  # noqa: PT011
            driver.read(0, 512)


def test_names_that_do_not_exist(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"), disk(tmp_path, "b"))
    with pytest.raises(NoSuchDisk, match="no disk has this name; the disks are: a, b"):
        do(server, lambda: server.remove("c"))
    for number in range(MOST_NAMES - 1):
        add(server, disk(tmp_path, f"more-{number}"))
    with pytest.raises(NoSuchDisk, match="no disk has this name; list the disks: there are 11"):
        do(server, lambda: server.remove("c"))


def test_wrong_disks_are_rejected_and_leave_nothing(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"))
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "empty").touch()
    wrong: list[tuple[dict[str, Any], type[OperationError], str]] = [
        ({"name": "a"}, WrongValue, 'name: "a" is the name of disk a already'),
        ({"image": tmp_path / "a.img"}, WrongValue, "image: is also the image of disk a"),
        ({"socket_path": tmp_path / "a.sock"}, WrongValue, "socket-path: .* is also the socket of disk a"),
        ({"io_threads": ("io9",)}, WrongValue, 'io-threads: no I/O thread has the name "io9"'),
        ({"image": tmp_path / "none.img", "create": None}, WrongState, "none.img: no such file"),
        ({"image": tmp_path / "empty"}, WrongState, "empty: "),
        ({"socket_path": tmp_path / "no" / "b.sock"}, WrongState, "the folder .*/no does not exist"),
        ({"engine": "memory"}, WrongState, "engine memory serves only images on tmpfs"),
    ]
    for changed, kind, words in wrong:
        options: dict[str, Any] = {
            "image": tmp_path / "b.img",
            "io_threads": ("io0",),
            "socket_path": tmp_path / "b.sock",
            "create": IMAGE_SIZE,
            **changed,
        }
        with pytest.raises(kind, match=words):
            add(server, DiskConfig(**options))
    (tmp_path / "empty").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert [export.name for export in server.exports] == ["a"]


# Pause


def test_requests_wait_while_a_disk_is_paused(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a")).exports[0]
    with attach(export) as driver, ThreadPoolExecutor(1) as pool:
        driver.write(0, b"a" * 512)
        export.pause()
        assert (export.paused, export.in_flight) == (True, 0)
        reading = pool.submit(driver.read, 0, 512)
        # Messages are answered meanwhile.
        driver.read_config()
        export.drain()
        export.flush()
        assert not reading.done()
        assert export.counters["read"].requests == 0
        export.resume()
        assert reading.result(SOON) == b"a" * 512
    assert not export.paused


def test_pause_under_load_drains_and_loses_nothing(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a")).exports[0]
    with attach(export, 2) as driver, ThreadPoolExecutor(1) as pool:
        load = pool.submit(run_load, driver, Load(depth=32, read_percent=50, seconds=2, verify=True))
        while not load.done():
            export.pause()
            assert export.in_flight == 0
            counted = sum(counter.requests for counter in export.counters.values())
            assert sum(counter.requests for counter in export.counters.values()) == counted
            export.resume()
        assert (load.result().errors, load.result().mismatches) == (0, 0)


def test_a_disk_stays_paused_for_the_next_front_end(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a")).exports[0]
    with attach(export):
        export.pause()
    assert eventually(lambda: export.state == "listening")
    with attach(export) as driver, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(driver.read, 0, 512)
        assert eventually(lambda: export.state == "attached")
        export.drain()
        assert not reading.done()
        export.resume()
        assert reading.result(SOON) == bytes(512)


def test_rings_stop_and_start_while_paused(start: Callable[..., Server], tmp_path: Path) -> None:
    export = start(disk(tmp_path, "a")).exports[0]
    with attach(export) as driver, ThreadPoolExecutor(1) as pool:
        for number in range(5):
            driver.write(512 * number, bytes([number]) * 512)
        export.pause()
        waiting = pool.submit(driver.read, 512, 512)
        assert eventually(lambda: waiting.running())
        front_end = driver.front_end
        # A ring that is disabled and enabled again stays paused.
        front_end.set_vring_enable(0, False)
        front_end.set_vring_enable(0, True)
        front_end.get_features()
        assert not waiting.done()
        export.resume()
        assert waiting.result(SOON) == b"\1" * 512


def test_the_end_of_a_paused_disk(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"))
    export = server.exports[0]
    with attach(export):
        export.pause()
        do(server, lambda: server.remove("a", detach=True))
    with pytest.raises(WrongState, match="has stopped"):
        export.resume()


# Resize and flush


def test_a_file_grows(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"))
    export = server.exports[0]
    with attach(export) as driver:
        export.pause()
        resized = export.resize(2 * IMAGE_SIZE)
        assert (resized.before, resized.now) == (IMAGE_SIZE, 2 * IMAGE_SIZE)
        export.resume()
        assert eventually(lambda: driver.read_config() or driver.capacity == 2 * IMAGE_SIZE)
        driver.write(2 * IMAGE_SIZE - 512, b"e" * 512)
        assert export.resize().now == 2 * IMAGE_SIZE
    os.truncate(tmp_path / "a.img", IMAGE_SIZE)
    assert export.resize().now == IMAGE_SIZE
    assert ("resized", "a") in kinds(server)


def test_sizes_that_are_not_possible(start: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "r.img").write_bytes(bytes(IMAGE_SIZE))
    plain, read_only = start(disk(tmp_path, "a"), disk(tmp_path, "r", read_only=True, create=None)).exports
    for export, size, words in (
        (plain, IMAGE_SIZE - 512, "shrinking it would destroy data"),
        (plain, IMAGE_SIZE + 1, "not a multiple of the block size, 512"),
        (plain, 1 << 63, "cannot be made"),
        (read_only, 2 * IMAGE_SIZE, "is served read-only"),
    ):
        with pytest.raises(WrongState, match=words):
            export.resize(size)
        assert export.disk.size == IMAGE_SIZE


def test_flush_reports_the_error(start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = start(disk(tmp_path, "a")).exports[0]
    export.flush()

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(export.disk, "sync", fail)
    with pytest.raises(Unavailable, match="flush failed: Input/output error"):
        export.flush()


# Events


def test_events_of_a_front_end(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"))
    export = server.exports[0]
    with attach(export) as driver:
        driver.read(0, 512)
        export.pause()
        export.resume()
    assert eventually(lambda: export.state == "listening")
    assert [kind for kind, _ in kinds(server)] == ["attached", "paused", "resumed", "detached"]
    attached = server.events.after(0)[0][0]
    assert str(attached.fields["front_end"]).startswith(f"process {os.getpid()}")
    assert abs(attached.time - time.time()) < 3600


def test_the_event_of_a_broken_ring(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"))
    with machine(server.exports[0]) as guest:
        guest.start()
        break_ring(guest)
        assert eventually(lambda: "ring-broken" in [kind for kind, _ in kinds(server)])
    broken = next(event for event in server.events.after(0)[0] if event.kind == "ring-broken")
    assert (broken.disk, broken.fields["queue"]) == ("a", 0)
    assert broken.fields["rule"] in MESSAGES.values()


def test_the_event_of_storage_that_fails(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(disk(tmp_path, "a"))
    with attach(server.exports[0]) as driver:
        os.truncate(tmp_path / "a.img", 4096)
        with pytest.raises(OSError, match="I/O error"):
            driver.read(1 << 20, 512)
        assert eventually(lambda: "io-error" in [kind for kind, _ in kinds(server)])
    failed = next(event for event in server.events.after(0)[0] if event.kind == "io-error")
    assert (failed.disk, failed.fields["operation"], failed.fields["error"]) == ("a", "read", "EIO")
    assert str(failed.fields["message"]).startswith("read of 512 bytes at 1048576 failed: ")


def test_old_events_are_lost_and_counted() -> None:
    events = Events()
    woken: list[int] = []
    events.subscribe(lambda: woken.append(1))
    for _ in range(KEPT + 10):
        events.emit("paused", "a")
    found, lost = events.after(5)
    assert (len(found), lost, found[-1].number) == (KEPT, 5, KEPT + 10)
    assert events.after(events.last) == ([], 0)
    assert len(woken) == KEPT + 10


# Turns


def test_operations_that_do_not_end_hold_up_nobody_for_long() -> None:
    async def check() -> None:
        turns, go, done = Turns("a"), asyncio.Event(), []

        async def hang() -> int:
            await go.wait()
            done.append(1)
            return 7

        for _ in range(MAX_TAKEN):
            with pytest.raises(Unavailable, match=r"pause has not ended after 0 seconds.*; look again"):
                await turns.take("pause", hang, 0, later="look again")
        for _ in range(3):
            with pytest.raises(Unavailable, match="pause was not begun: 8 operations wait already"):
                await turns.take("pause", hang, 0)
        go.set()
        # However many ask at the same time, each has its turn.
        assert await asyncio.gather(*(turns.take("pause", hang, SOON) for _ in range(50))) == [7] * 50
        assert len(done) == MAX_TAKEN + 50
        go.clear()
        waiting = [asyncio.create_task(turns.take("pause", hang, SOON)) for _ in range(MAX_TAKEN + 5)]
        await asyncio.sleep(0)
        turns.end()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(result) for result in results} == {WrongState}
        with pytest.raises(WrongState, match="has stopped"):
            await turns.take("pause", hang)

    asyncio.run(check())
