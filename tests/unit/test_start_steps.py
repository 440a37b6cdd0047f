"""The start of a process: whichever step fails, nothing is left of those before it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringplane.api.http import HttpApi
from ringplane.api.metrics_endpoint import MetricsEndpoint
from ringplane.control.changes import Changes
from ringplane.control.server import Server
from ringplane.control.start import serve, serve_all
from ringplane.control.start_steps import Start
from ringplane.control.state_file import StateFile
from ringplane.control.threads import Threads
from ringplane.opener.remote_opener import RemoteOpener
from ringplane.options.addresses import Address
from ringplane.options.api_options import ApiOptions
from ringplane.options.declare import WrongOptions
from ringplane.options.metrics_options import MetricsOptions
from ringplane.options.thread_options import IoThread
from ringplane.options.zone_options import ZoneModel

from .protocol_rig import open_fds
from .test_operations import Idle, disk, do
from .waiting import wait_until

MIB = 1 << 20
ZONES = ZoneModel(size=MIB, capacity=MIB)


class Failed(Exception):
    """What a step raises."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the state of a process that has served a zoned disk beside those that are described; its zones are lost."""
    image, sock = tmp_path / "added.img", tmp_path / "added.sock"
    image.touch()
    os.truncate(image, 4 * MIB)
    added = {"name": "added", "image": str(image), "socket-path": str(sock), "zoned": "1M", "num-queues": 1}
    with contextlib.closing(StateFile(tmp_path / "state", trusted=True)) as state:
        state.open()
        state.store(Changes(added=[added]))
    return tmp_path


def serve_with_everything(folder: Path, upgrade: bool = False) -> Server:
    """Disks that are created, one that is restored, and all that a process can have beside them."""
    return serve_all(
        [disk(folder, "a"), disk(folder, "b", zoned=ZONES, create=4 * MIB, num_queues=1)],
        [IoThread("io0")],
        upgradable=True,
        upgrade=upgrade,
        give_up=lambda *_: None,
        interface=HttpApi(ApiOptions(folder / "api.sock")),
        metrics=MetricsEndpoint(MetricsOptions(Address("127.0.0.1", 0))),
        opener=RemoteOpener([folder]),
        state=StateFile(folder / "state", trusted=True),
        traced=True,
    )


def children() -> list[int]:
    """Those that run. One that took longer than a second to end is waited for by the next one."""
    ids = [int(each) for task in Path("/proc/self/task").iterdir() for each in (task / "children").read_text().split()]
    return [each for each in ids if running(each)]


def running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def present(folder: Path) -> tuple[list[str], int, int, int]:
    """All that a start makes: files, open files, threads, child processes."""
    # The mapping of a zone file has an fd of its own, which ends with the objects that use it.
    gc.collect()
    return sorted(os.listdir(folder)), len(open_fds()), threading.active_count(), len(children())


def failing_after(step: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        step(*arguments)
        raise Failed

    return fail


def failing_at_once(*_: Any) -> Any:
    raise Failed


# When the control thread runs, the start has succeeded. `origin` returns what has to be closed.
AT_ONCE = ("run", "origin", "_begin")
STEPS = [
    (Start, name)
    for name, value in vars(Start).items()
    if inspect.isfunction(value) and name not in ("__init__", *AT_ONCE)
]
PLACES = [*((Start, name) for name in AT_ONCE), *STEPS, (Threads, "_make_workers"), (Threads, "_start_io_threads")]

# All that serve.
THREADS = ["ringplane-control", "io0", "helper-0 of io0", "helper-1 of io0", "ringplane-api", "ringplane-metrics"]


@pytest.fixture(scope="module", autouse=True)
def served_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is made once in a process, for all starts."""
    folder = tmp_path_factory.mktemp("once")
    with contextlib.closing(StateFile(folder / "state", trusted=True)) as state:
        state.open()
    serve_with_everything(folder).stop()


@pytest.mark.parametrize(("owner", "step"), PLACES, ids=[name for _, name in PLACES])
def test_a_step_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, owner: type, step: str) -> None:
    before = present(folder)
    fail = failing_at_once if step in AT_ONCE else failing_after(getattr(owner, step))
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(Failed):
        serve_with_everything(folder)
    wait_until(lambda: present(folder) == before)


@contextlib.contextmanager
def without_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """No thread of this name can be started meanwhile; another process may use up TasksMax= at any moment."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


@pytest.mark.parametrize("name", THREADS)
def test_a_thread_that_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = present(folder)
    with without_thread(monkeypatch, name), pytest.raises((OSError, RuntimeError), match="thread"):
        serve_with_everything(folder)
    wait_until(lambda: present(folder) == before)


@pytest.mark.parametrize("name", THREADS)
def test_a_running_process_serves_until_all_threads_of_the_next_one_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with serve_with_everything(folder) as running:
        with without_thread(monkeypatch, name), pytest.raises((OSError, RuntimeError), match="thread"):
            serve_with_everything(folder, upgrade=True)
        do(running, lambda: running.find("a").operations.flush())
        with serve_with_everything(folder, upgrade=True) as following:
            wait_until(lambda: running.wait(0))
            do(following, lambda: following.find("a").operations.flush())


def test_an_end_at_once_removes_sockets_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While all threads run, which still use all other things."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with serve_with_everything(folder) as server:
        server.abandon()
        assert not [path for path in folder.iterdir() if path.is_socket()]
        do(server, lambda: server.find("a").operations.pause())
    assert not failed


def test_nothing_is_left_after_the_end(folder: Path) -> None:
    """Of what is not an image."""
    before = present(folder)
    server = serve_with_everything(folder)
    with server:
        assert [export.name for export in server.exports] == ["a", "b", "added"]
        during = present(folder)
        assert all(more > less for more, less in zip(during[1:], before[1:], strict=True))
    del server
    wait_until(lambda: present(folder)[1:] == before[1:])
    assert {name for name in os.listdir(folder) if "sock" in name} == set()


@pytest.fixture
def removed(tmp_path: Path) -> Path:
    """A folder with the state of a process whose one disk was removed."""
    interface, state = Idle(tmp_path / "interface"), StateFile(tmp_path / "state", trusted=True)
    with serve_all([disk(tmp_path, "a")], [IoThread("io0")], interface=interface, state=state) as server:
        do(server, lambda: server.remove("a"))
    return tmp_path


def test_the_one_disk_was_removed(removed: Path) -> None:
    """`serve` returns a disk, so there has to be one."""
    state = StateFile(removed / "state", trusted=True)
    with pytest.raises(WrongOptions, match=r"a\.sock was removed at run time, according to state"):
        serve(removed / "a.img", removed / "a.sock", interface=Idle(removed / "interface"), state=state)
