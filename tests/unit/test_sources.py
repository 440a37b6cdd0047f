"""Sources: each one through the same list of expectations, and one that is neither a file nor has an fd."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.sources import null
from ringplane.block.sources.choose_source import is_offered, open_source, rehearse_source, take_over_source
from ringplane.block.sources.file import FileSource
from ringplane.block.sources.memory import MemorySource
from ringplane.block.sources.null import NullPart, NullSource
from ringplane.block.sources.source import Source
from ringplane.control import opening, taking_over
from ringplane.control.handover import Channel
from ringplane.driver import Driver
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread

from .rig import PATIENCE, eventually, loop_device, pattern

SIZE = 1 << 20

KINDS = {
    "O_DIRECT": (FileSource, "/var/tmp", {"engine": "aio"}),
    "buffered": (FileSource, "/var/tmp", {"engine": "io_uring", "direct": False}),
    "automatic": (FileSource, "/var/tmp", {}),
    "memory": (MemorySource, "/dev/shm", {"engine": "memory"}),
    "automatic memory": (MemorySource, "/dev/shm", {}),
    "null": (NullSource, "/var/tmp", {"engine": "null"}),
}
FILES = list(KINDS)

Config = Callable[..., DiskConfig]


@pytest.fixture(params=[*FILES, "device"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(kind: str) -> Iterator[Config]:
    """The options of a disk of this kind, whose image exists unless they have `create`."""
    _, place, options = KINDS.get(kind, KINDS["automatic"])
    with tempfile.TemporaryDirectory(dir=place) as folder, contextlib.ExitStack() as stack:
        path = Path(folder, "disk.img")

        def make(**more: Any) -> DiskConfig:
            image = path
            if "create" not in more:
                path.write_bytes(pattern(SIZE))
            if kind == "device":
                image = stack.enter_context(loop_device(path))
            return DiskConfig(image, ["io0"], socket_path=Path(folder, "socket"), **(options | more))

        yield make


@pytest.fixture(autouse=True)
def all_fds_are_closed() -> Iterator[None]:
    # Garbage of earlier tests may close its fds meanwhile.
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


def opened(config: DiskConfig) -> contextlib.closing[Source]:
    return contextlib.closing(open_source(config).prepare([]))


def test_it_is_what_the_options_say(config: Config, kind: str) -> None:
    with opened(config(read_only=True)) as source:
        assert type(source) is KINDS.get(kind, KINDS["automatic"])[0]
        assert (source.size, source.read_only, source.created) == (SIZE, True, False)
        assert source.title.startswith("/")
        assert source.direct or kind != "O_DIRECT" or source.notice
        assert (source.file is None) == (kind == "device")
        assert source.how("x")


def test_its_serial_number_stays_the_same(config: Config) -> None:
    options = config()
    with opened(options) as source:
        serial = source.serial
    with opened(options) as source:
        assert source.serial == serial


def test_it_is_locked_until_it_is_closed(config: Config) -> None:
    options = config()
    with opened(options) as source:
        with pytest.raises(ImageError, match="is in use already"):
            open_source(options)
        source.close()
        open_source(options).close()


def test_parts_for_two_threads(config: Config) -> None:
    with opened(config()) as source:
        for part in (source.part(64), source.part(64)):
            # What STACK needs; 0: none.
            assert all(isinstance(each, int) for each in (part.address, part.submit, part.ranges, part.backing))
            assert part.submit != 0 or part.address != 0
            assert part.warning() == ""


def test_a_sync_after_a_failed_flush(config: Config, kind: str) -> None:
    with opened(config()) as source:
        source.sync()
        assert not source.flush_failed
        source.set_flush_failed()
        assert source.flush_failed
        if kind != "null":
            with pytest.raises(OSError, match="a flush failed before"):
                source.sync()


def test_limits_are_the_same_in_a_rehearsal(config: Config, kind: str) -> None:
    options = config()
    with opened(options) as source:
        served = source.limits()
    rehearsed = rehearse_source(options)
    assert rehearsed
    with contextlib.closing(rehearsed):
        if kind != "device":
            assert rehearsed.check([]) == served
        else:
            # It is open for reading only, and such a device cannot be asked whether it erases.
            assert rehearsed.check([]) is not None


def test_it_is_handed_over(config: Config, tmp_path: Path) -> None:
    """By a channel, with the size that is served, and locked all the time."""
    options = config()
    (tmp_path / "other").write_bytes(bytes(SIZE))
    other = DiskConfig(tmp_path / "other", ["io0"], socket_path=tmp_path / "socket")
    ours, theirs = (Channel(each) for each in socket.socketpair())
    with ours, theirs, opened(options) as source:
        ours.send({"disk": {"size": SIZE // 2, **source.hand_over()}})
        offer = theirs.receive("disk", PATIENCE)["disk"]
        assert is_offered(options, offer)
        assert not is_offered(other, offer)
        successor = take_over_source(options, offer).prepare([])
        with contextlib.closing(successor):
            theirs.close()
            source.close()
            assert (successor.size, successor.serial, type(successor)) == (SIZE // 2, source.serial, type(source))
            assert not successor.created
            with pytest.raises(ImageError, match="is in use already"):
                open_source(options)
            successor.sync()
            successor.refresh_size()
            assert successor.size == SIZE


@pytest.mark.parametrize("kind", FILES, indirect=True)
def test_another_size_is_found(config: Config) -> None:
    options = config()
    with opened(options) as source:
        for size in (2 * SIZE, SIZE // 2):
            os.truncate(options.image, size + 100)
            assert source.size != size
            source.refresh_size()
            assert source.size == size
            source.resize(size)
        source.part(64)


@pytest.mark.parametrize("kind", FILES, indirect=True)
def test_its_path_leads_to_another_file(config: Config) -> None:
    options = config()
    with opened(options) as source:
        assert source.replaced == ""
        options.image.rename(options.image.with_name("moved"))
        assert "to another file now, or to none" in source.replaced


@pytest.mark.parametrize("kind", FILES, indirect=True)
def test_it_is_created_once(config: Config) -> None:
    options = config(create=SIZE)
    with opened(options) as source:
        assert (source.created, source.size, source.is_blank()) == (True, SIZE, True)
        assert options.image.stat().st_size == SIZE
    with opened(options) as source:
        assert not source.created
        source.unlink()
        assert options.image.exists(), "it was not created by this object"
    options.image.unlink()
    with opened(options) as source:
        source.unlink()
        assert not options.image.exists()


@pytest.mark.parametrize("kind", FILES, indirect=True)
def test_one_that_cannot_be_opened_is_not_left_behind(config: Config) -> None:
    options = config(create=SIZE + 512, block_size=4096)
    with pytest.raises(ImageError, match="is not a multiple of the block size"):
        open_source(options)
    assert not options.image.exists()


@pytest.mark.parametrize("kind", FILES, indirect=True)
def test_a_rehearsal_creates_nothing(config: Config) -> None:
    options = config(create=SIZE)
    source = rehearse_source(options)
    if source:
        with contextlib.closing(source):
            assert (source.size, source.created, source.is_blank()) == (SIZE, True, True)
            source.check([])
    assert not options.image.exists()


@pytest.mark.parametrize("kind", FILES, indirect=True)
def test_bytes_are_erased(config: Config, kind: str) -> None:
    options = config()
    with opened(options) as source:
        assert not source.is_blank()
        source.erase(8192, SIZE)
    assert options.image.read_bytes() == pattern(SIZE)[:8192] + bytes(SIZE - 8192)


# A source without an fd, whose size others change.


class Service:
    """A service on another machine: its state outlives those who are connected to it."""

    def __init__(self) -> None:
        self.size = SIZE
        self.connections = 0
        self.syncs = 0
        self.changed: Callable[[], None] = lambda: None
        # While it is clear, closing a connection hangs.
        self.answers = threading.Event()
        self.answers.set()

    def resize(self, size: int) -> None:
        self.size = size
        self.changed()


class RemoteSource(Source):
    units = (null.submit,)
    read_only = False
    serial = "remote-1"

    def __init__(self, config: DiskConfig, service: Service, size: int) -> None:
        self.title, self._service, self.size = f"remote:{config.image.name}", service, size
        self._failed = self._closed = False
        service.connections += 1

    def part(self, slots: int) -> NullPart:
        return NullPart()

    def how(self, engines: str) -> str:
        return "another machine"

    def watch(self, changed: Callable[[], None]) -> None:
        self._service.changed = changed

    def refresh_size(self) -> None:
        self.size = self._service.size

    @property
    def flush_failed(self) -> bool:
        return self._failed

    def set_flush_failed(self) -> None:
        self._failed = True

    def sync(self) -> None:
        self._service.syncs += 1

    def hand_over(self) -> dict[str, Any]:
        return {"remote": self.title}

    def close(self) -> None:
        self._service.answers.wait()
        self._service.connections -= not self._closed
        self._closed = True


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """What a line in choose_source.py would do."""
    made = Service()
    monkeypatch.setattr(opening, "open_source", lambda config, signals, opener: RemoteSource(config, made, made.size))
    monkeypatch.setattr(
        opening, "take_over_source", lambda config, offer, opener: RemoteSource(config, made, offer["size"])
    )
    monkeypatch.setattr(taking_over, "is_offered", lambda config, offer: offer["remote"] == "remote:vm1")
    return made


def test_a_source_elsewhere(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with (
        ringplane.serve("vm1", path, num_queues=1, upgradable=True) as export,
        Driver(path, timeout=PATIENCE) as driver,
    ):
        assert (export.disk.how, export.disk.serial, driver.capacity) == ("another machine", "remote-1", SIZE)
        assert not export.disk.limits.discard
        assert driver.request(0, 0, read=512).status == 0
        driver.set_write_back(False)
        assert service.syncs == 1

        service.resize(2 * SIZE)
        assert eventually(lambda: driver.read_config() is None and driver.capacity == 2 * SIZE)

        export.disk.set_flush_failed()
        with ringplane.serve("vm1", path, num_queues=1, upgrade=True) as successor:
            assert export.wait(PATIENCE)
            assert service.connections == 1
            assert successor.disk.flush_failed
            assert driver.request(0, 2 * SIZE // 512 - 1, read=512).status == 0
            service.resize(SIZE)
            assert eventually(lambda: driver.read_config() is None and driver.capacity == SIZE)
    assert service.connections == 0


def test_a_source_that_hangs_when_it_is_closed(service: Service, tmp_path: Path) -> None:
    """Another disk of the process is served meanwhile."""
    configs = [DiskConfig(Path(name), ["io0"], socket_path=tmp_path / name, num_queues=1) for name in ("vm1", "vm2")]
    with ringplane.serve_all(configs, [IoThread("io0")]) as server:
        service.answers.clear()
        try:
            server.exports[0].request_stop()
            # A new front end is accepted by the control thread, after the stop.
            with Driver(tmp_path / "vm2", timeout=PATIENCE) as driver:
                assert driver.request(0, 0, read=512).status == 0
            assert not server.exports[0].stopped
        finally:
            service.answers.set()
        assert server.exports[0].wait(PATIENCE)


def test_only_what_makes_sources_uses_their_fds() -> None:
    """A method of the source does what others want of its fd."""
    package = Path(ringplane.__file__).parent
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.parent.name != "sources" and path.name not in ("image.py", "mapped_image.py", "ranges.py")
        for line in path.read_text().splitlines()
        if re.search(r"\b(image|backing)\.fd\b|\._image\b", line)
    ]
    assert found == []
