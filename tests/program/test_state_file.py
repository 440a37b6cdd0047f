"""The state: what was changed at run time is there after a crash, whatever was under way."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.block.image import ImageError
from ringplane.block.sources.nbd import nbd_source
from ringplane.block.sources.nbd.handshake import Silent
from ringplane.cli.check import check
from ringplane.control import state_file
from ringplane.control.changes import Changes
from ringplane.control.changing import Changing
from ringplane.control.config import read_disk
from ringplane.control.operation_errors import NoSuchDisk, OperationError, Unavailable, WrongState
from ringplane.control.restoring import Restoring
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.control.state_file import StateError, StateFile
from ringplane.driver import Driver
from ringplane.opener import remote_opener
from ringplane.opener.remote_opener import RemoteOpener
from ringplane.options.declare import WrongOptions, declared
from ringplane.options.disk_config import DiskConfig
from ringplane.options.policy_options import PolicyUse
from ringplane.options.thread_options import IoThread
from unit.nbd_server import NbdServer
from unit.policy_texts import own_policy
from unit.protocol_rig import open_fds
from unit.rig import PATIENCE, eventually
from unit.test_operations import Idle, disk, do

from .served import MEMORY_SIZE, SOON, ServedApi, disk_table, needs_all, starter
from .served import body as described

ONE, OTHER = Changes(removed=["/one"]), Changes(removed=["/other"], paused=["/disk"] * 1000)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[StateFile]:
    state = StateFile(path, trusted=True)
    state.open()
    try:
        yield state
    finally:
        state.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


# The file


def test_what_is_stored_is_read(path: Path) -> None:
    with opened(path) as state:
        assert state.read() == Changes()
        for changes in (ONE, OTHER, ONE):
            state.store(changes)
            assert state.read() == changes
    with opened(path) as state:
        assert state.read() == ONE
        state.store(OTHER)
    assert sorted(each.name for each in path.parent.iterdir()) == ["state", "state~"]
    assert path.stat().st_mode & 0o777 == 0o600


class Counted:
    """Calls a function; the process ends in place of call number `last` of all that are counted."""

    def __init__(self, last: int) -> None:
        self.last, self.made = last, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            self.made += 1
            if self.made == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return call


CALLS = ("open", "ftruncate", "pwrite", "fsync", "rename")


def store_and_end(path: Path, last: int) -> None:
    """In a child process, which is killed in place of that system call."""
    counted = Counted(last)
    for name in CALLS:
        setattr(os, name, counted.wrap(getattr(os, name)))
    state_file.system_call = counted.wrap(state_file.system_call)
    with opened(path) as state:
        state.store(OTHER)
    os._exit(0)


@pytest.mark.parametrize("exists", [False, True])
def test_a_crash_between_any_two_system_calls(path: Path, exists: bool) -> None:
    """The old or the new state is there, and the next one can be stored."""
    before = Changes()
    if exists:
        before = ONE
        with opened(path) as state:
            state.store(ONE)
    last, found = 1, []
    while True:
        child = os.fork()
        if not child:
            try:
                store_and_end(path, last)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        with opened(path) as state:
            found.append(state.read())
            state.store(before)
        last += 1
    assert last > 8
    assert found[0] == before
    assert found[-1] == OTHER
    assert all(each in (before, OTHER) for each in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ('{"version": 1', "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is of version None, and this release reads version 1"),
        ('{"version": 2}', "is of version 2, and this release reads version 1"),
        ('{"version": 1, "added": [7]}', "is damaged: added is not a list of dict"),
    ],
)
def test_a_file_that_is_not_a_state(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    with opened(path) as state, pytest.raises(ValueError, match=words):
        state.read()
    assert path.read_text() == text


def test_copies_are_kept(path: Path) -> None:
    with opened(path) as state:
        path.write_text("first")
        assert state.keep().name == "state.kept"
        path.write_text("second")
        assert state.keep().name == "state.kept-2"
        state.store(ONE)
        state.store(ONE)
    assert [(path.parent / f"state.kept{end}").read_text() for end in ("", "-2")] == ["first", "second"]


def test_others_cannot_read_it(path: Path) -> None:
    """Also if they have made the files: addresses of images can contain a key."""
    beside = path.with_name(f"{path.name}~")
    with opened(path) as state:
        state.store(ONE)
    for file in (path, beside):
        file.chmod(0o644)
    with opened(path):
        assert {stat.S_IMODE(file.stat().st_mode) for file in (path, beside)} == {0o600}


def test_one_process_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "LOCK_PATIENCE", 0.05)
    with opened(path), pytest.raises(StateError, match="another process stores its state there"):
        StateFile(path, trusted=True).open()
    with opened(path):
        pass


def test_an_exchange_while_it_waits_for_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that has the lock stores once more before it ends: the names of both files are exchanged."""
    really_lock = fcntl.flock
    with opened(path) as old, contextlib.closing(StateFile(path, trusted=True)) as new:
        old.store(ONE)

        def lock(*arguments: Any) -> None:
            monkeypatch.setattr(fcntl, "flock", really_lock)
            old.store(OTHER)
            old.close()
            really_lock(*arguments)

        monkeypatch.setattr(fcntl, "flock", lock)
        new.open()
        assert new.read() == OTHER
        new.store(ONE)
        assert new.read() == ONE


def test_a_successor_shares_the_lock(path: Path) -> None:
    with opened(path) as old:
        old.store(ONE)
        new = StateFile(path, trusted=True)
        new.open(old.hand_over())
        old.store(OTHER)
        new.store(ONE)
        assert new.read() == ONE
    new.store(OTHER)
    assert new.read() == OTHER
    new.close()
    with opened(path) as again:
        assert again.read() == OTHER


def test_a_file_that_was_replaced(path: Path) -> None:
    """What another program has put there is not exchanged with anything."""
    with opened(path) as state:
        (path.parent / "mine").write_text("mine")
        (path.parent / "mine").rename(path)
        with pytest.raises(StateError, match="another program has replaced the file"):
            state.store(ONE)
        assert path.read_text() == "mine"
        with pytest.raises(StateError, match="has replaced the file; start ringplane again to read it"):
            state.read()
        path.unlink()
        with pytest.raises(StateError, match="another program has replaced the file"):
            state.store(ONE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: os.mkfifo(path), "is not a regular file; choose another path"),
        (lambda path: path.symlink_to("elsewhere"), "Too many levels of symbolic links"),
        (lambda path: path.parent.rmdir(), "No such file or directory"),
    ],
)
def test_paths_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "folder" / "state"
    path.parent.mkdir()
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StateError, match=words):
        StateFile(path, trusted=True).open()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("exists", [False, True])
def test_a_start_that_fails_leaves_no_new_files(tmp_path: Path, path: Path, exists: bool) -> None:
    """But for those that were there."""
    if exists:
        with opened(path) as state:
            state.store(ONE)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    missing = DiskConfig(tmp_path / "missing", ["io0"], socket_path=tmp_path / "socket")
    with pytest.raises(ImageError, match="no such file"):
        serve_all([missing], [IoThread("io0")], state=StateFile(path, trusted=True))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "ok: 1 disk"),
        (lambda path: path.write_text('{"version": 1}'), "ok: 1 disk"),
        (lambda path: path.write_text("{"), "state: is damaged"),
        (lambda path: path.mkdir(), "state: is not a regular file; choose another path"),
        (lambda path: path.parent.rmdir(), "the state cannot be stored there: No such file or directory"),
    ],
)
def test_check(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    """`ringplane check` creates nothing."""
    path = tmp_path / "folder" / "state"
    path.parent.mkdir()
    make(path)
    config = tmp_path / "disks.toml"
    config.write_text('state = "folder/state"\n[[disk]]\nimage = "a"\ncreate = "1M"\nsocket-path = "a.sock"\n')
    before = sorted(tmp_path.rglob("*"))
    assert words in CliRunner().invoke(check, [str(config)]).output
    assert sorted(tmp_path.rglob("*")) == before


CONFINED = """
import errno, os, sys
from pathlib import Path
from ringplane.control.sandbox import confine
from ringplane.system import libc
from ringplane.system.syscall_numbers import NUMBERS

def attempt(function):
    try:
        function()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]

def exchange(folder, flags=libc.RENAME_EXCHANGE):
    return libc.system_call(NUMBERS["renameat2"], folders[folder], b"a", folders[folder], b"b", flags)

folders = {name: os.open(name, os.O_RDONLY) for name in ("state", "elsewhere")}
confine([], Path("state"))
print(
    attempt(lambda: exchange("state")),
    attempt(lambda: exchange("elsewhere")),
    attempt(lambda: exchange("state", 0)),
    attempt(lambda: os.rename("state/a", "state/c")),
    attempt(lambda: os.open("state/new", os.O_CREAT | os.O_WRONLY)),
    attempt(lambda: os.open("state/a", os.O_RDONLY)),
)
"""


@needs_all
def test_what_a_confined_process_can_do_in_the_folder(tmp_path: Path) -> None:
    """Exchange two files, and no more."""
    for folder in ("state", "elsewhere"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            (tmp_path / folder / name).touch()
    command = [sys.executable, "-c", CONFINED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON)
    assert done.stdout.split() == ["done", "EACCES", "EPERM", "EPERM", "EPERM", "EPERM"], done.stderr


# A server that stores its state


@contextlib.contextmanager
def serving(folder: Path, *disks: DiskConfig) -> Iterator[Server]:
    state = StateFile(folder / "state", trusted=True)
    threads = [IoThread("io0"), IoThread("io1")]
    with serve_all(disks, threads, interface=Idle(folder / "interface"), state=state) as server:
        yield server


def shown(server: Server) -> dict[str, Any]:
    """All that lasts, by the names of the disks."""
    return {
        export.name: (
            export.added, dict(export.limits), export.limits_changed, export.paused, export.config.serial,
            str(export.config.image), export.config.num_queues, export.config.io_threads,
            list(export.policies), export.disk.policies_changed,
        )
        for export in server.exports
    }  # fmt: skip


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "total-iops-sec": st.sampled_from([0, 1000, 5000]),
        "read-bytes-sec": st.sampled_from([0, 10**6, 10**9]),
        "group-name": st.sampled_from(["one", "two", None]),
    },
)
NAMES = st.sampled_from("abcd")
POLICIES = st.lists(
    st.sampled_from(
        [
            PolicyUse("error", {"operation": "write", "probability": "0.5"}, "error"),
            PolicyUse("error", {"where": "0-4096"}, "other", enabled=False),
        ]
    ),
    unique_by=lambda use: use.name,
)
STEPS = st.one_of(
    st.tuples(st.just("add"), NAMES, st.sampled_from([None, "S"])),
    st.tuples(st.just("remove"), NAMES, st.none()),
    st.tuples(st.just("limit"), NAMES, LIMITS),
    st.tuples(st.just("policies"), NAMES, POLICIES),
    st.tuples(st.just("pause"), NAMES, st.none()),
    st.tuples(st.just("resume"), NAMES, st.none()),
    st.tuples(st.just("restart"), NAMES, st.none()),
)


async def step(server: Server, folder: Path, kind: str, name: str, value: Any) -> None:
    if kind == "add":
        # The same names and sockets as those of disks that were removed.
        await server.add(disk(folder, name, serial=value))
    elif kind == "remove":
        await server.remove(name)
    elif kind == "limit":
        await server.find(name).operations.change_limits(value)
    elif kind == "policies":
        await server.find(name).operations.policies.set(value)
    elif kind == "pause":
        await server.find(name).operations.pause()
    elif kind == "resume":
        await server.find(name).operations.resume()


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_any_changes_are_there_after_a_restart(steps: list[tuple[str, str, Any]]) -> None:
    """What runs is what ran, however often and with whatever changes; a step that fails changes nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = [disk(folder, "a", limits={"total-iops-sec": 500}), disk(folder, "b")]
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(serving(folder, *described))
            for kind, *rest in [*steps, ("restart", "", None)]:
                if kind == "restart":
                    before = shown(server)
                    stack.close()
                    server = stack.enter_context(serving(folder, *described))
                    assert shown(server) == before
                    continue
                with contextlib.suppress(OperationError):
                    do(server, partial(step, server, folder, kind, *rest))


def test_a_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is made, whoever asked for it is told, and the next one that can be stored stores both."""
    with serving(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as server:
        with monkeypatch.context() as full:

            def fail(*_: object) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            full.setattr(os, "pwrite", fail)
            for change in (
                lambda: server.find("a").operations.pause(),
                lambda: server.add(disk(tmp_path, "c")),
                lambda: server.remove("b"),
            ):
                with pytest.raises(Unavailable, match=r"done, but not kept for the next start: .*: cannot be written"):
                    do(server, change)
        assert {export.name: export.paused for export in server.exports} == {"a": True, "c": False}
        server.exports[1].change_limits({"total-iops-sec": 7})
        before = shown(server)
    with serving(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as server:
        assert shown(server) == before


def test_a_store_that_nobody_waits_for_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes what was true when it began, so no other one begins before its end, and no other process takes over."""
    begun, go, really_store = threading.Event(), threading.Event(), StateFile.store
    others: list[Changes] = []

    def store(state: StateFile, changes: Changes) -> None:
        if begun.is_set():
            others.append(changes)
            assert go.is_set()
        begun.set()
        assert go.wait(PATIENCE)
        really_store(state, changes)

    with serving(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as server:
        monkeypatch.setattr(StateFile, "store", store)
        a, b = server.exports
        pausing = server.threads.call(a.operations.pause)
        assert begun.wait(PATIENCE)
        # As when it stops: nobody waits for what is done with it.
        do(server, partial(called, a.operations.end))
        with pytest.raises(WrongState, match="has stopped"):
            pausing.result(PATIENCE)
        assert do(server, partial(called, lambda: is_under_way(server.changing)))
        changing = server.threads.call(lambda: b.operations.change_limits({"total-iops-sec": 7}))
        assert eventually(lambda: b.limits)
        go.set()
        changing.result(PATIENCE)
        assert len(others) == 1
        limits = json.loads((tmp_path / "state").read_text())["limits"]
        assert limits == {str(tmp_path / "b.sock"): {"total-iops-sec": 7}}


async def called(function: Callable[[], Any]) -> Any:
    return function()


def is_under_way(changing: Changing) -> bool:
    with changing.none() as under_way:
        return under_way


def test_a_state_needs_sockets_with_paths(tmp_path: Path) -> None:
    config = DiskConfig(tmp_path / "a.img", ("io0",), fd=0)
    with pytest.raises(WrongOptions, match="state needs socket_path"):
        serve_all([config], [IoThread("io0")], state=StateFile(tmp_path / "state", trusted=True))


def test_a_disk_that_was_removed_is_not_served_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as server:
        do(server, lambda: server.remove("a"))
    state = StateFile(tmp_path / "state", trusted=True)
    words = r"a\.sock was removed at run time, according to state; use another file there, or remove this one"
    with pytest.raises(WrongOptions, match=words):
        serve_all([disk(tmp_path, "a")], [IoThread("io0")], state=state)
    with caplog.at_level("INFO"), serving(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as server:
        assert [export.name for export in server.exports] == ["b"]
    assert f"{tmp_path / 'a.sock'}: not served, because this disk was removed at run time" in caplog.messages


def serving_through(opener: RemoteOpener, folder: Path) -> Server:
    """Disk a, and those of the state, whose files are opened by this process."""
    return serve_all(
        [disk(folder, "a")],
        [IoThread("io0")],
        interface=Idle(folder / "interface"),
        opener=opener,
        state=StateFile(folder / "state", trusted=False),
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"socket-path": "gone/b.sock"}, "the folder .*/gone does not exist"),
        ({"features": {"secure-erase": True}}, "secure-erase cannot be offered"),
        ({"image": "gone/b.img"}, "no such file"),
    ],
)
def test_a_restored_disk_that_cannot_be_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: dict[str, Any], words: str
) -> None:
    """Its folder has gone, or its storage has changed: all others are served, and nothing of it is left."""
    added = []
    for name in "bc":
        (tmp_path / f"{name}.img").write_bytes(bytes(1 << 20))
        added.append({"name": name, "image": f"{name}.img", "socket-path": f"{name}.sock"})
    added[0] |= keys
    for table in added:
        table |= {key: str(tmp_path / table[key]) for key in ("image", "socket-path")}
    with opened(tmp_path / "state") as state:
        state.store(Changes(added=added))
    with serving_through(RemoteOpener([tmp_path]), tmp_path) as server:
        assert [export.name for export in server.exports] == ["a", "c"]
        assert server.threads.workers["io0"]._disks == 2
        assert str(tmp_path / "b.img") not in open_fds().values()
        assert json.loads((tmp_path / "state.kept").read_text())["added"] == added
        assert [table["name"] for table in json.loads((tmp_path / "state").read_text())["added"]] == ["c"]
    assert re.search(f"b: was added at run time and is not served any more: .*{words}", caplog.text)
    assert not (tmp_path / "b.sock").exists()


def tables_on(server: NbdServer, folder: Path) -> list[dict[str, Any]]:
    """Disks b and c, which were added."""
    return [
        {
            "name": name,
            "image": server.uri.replace("disk", name, 1),
            "socket-path": str(folder / f"{name}.sock"),
            "num-queues": 1,
        }
        for name in "bc"
    ]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[NbdServer]:
    """A server, and a state with two disks of it, of which c is paused."""
    server = NbdServer(tmp_path / "nbd", bytearray(1 << 20))
    with opened(tmp_path / "state") as state:
        state.store(Changes(added=tables_on(server, tmp_path), paused=[str(tmp_path / "c.sock")]))
    yield server
    server.stop()


@contextlib.contextmanager
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """No NBD server answers; the result is how often one was asked."""
    asked: list[object] = []

    def connect(places: object, *_: object) -> None:
        asked.append(places)
        raise Silent("does not answer: no connection")

    with monkeypatch.context() as patch:
        patch.setattr(nbd_source, "connect", connect)
        yield asked


def stored(folder: Path) -> list[str]:
    """The names of the disks that the next start adds."""
    return [table["name"] for table in json.loads((folder / "state").read_text())["added"]]


@pytest.mark.parametrize("how", ["silent", "refuses"])
def test_disks_whose_server_does_not_answer_are_kept_for_the_next_start(
    tmp_path: Path, remote: NbdServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Others are served, and one that takes its time is waited for once."""
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(silent(monkeypatch)) if how == "silent" else []
        remote.stop()
        server = stack.enter_context(serving(tmp_path, disk(tmp_path, "a")))
        assert [export.name for export in server.exports] == ["a"]
        assert len(asked) == (how == "silent")
        assert stored(tmp_path) == ["b", "c"]
        assert [(each.name, each.image) for each in server.not_served] == [
            (table["name"], table["image"]) for table in tables_on(remote, tmp_path)
        ]
        assert all(each.why for each in server.not_served)
        # Also when something else is changed.
        server.find("a").pause()
        assert stored(tmp_path) == ["b", "c"]
    for name in "bc":
        assert re.search(f"{name}: was added at run time and is not served: .* the next start tries again", caplog.text)
    assert not (tmp_path / "state.kept").exists()
    remote.start()
    with serving(tmp_path, disk(tmp_path, "a")) as server:
        assert {export.name: export.paused for export in server.exports} == {"a": True, "b": False, "c": True}
        assert stored(tmp_path) == ["b", "c"]


def test_disks_whose_storage_hangs_are_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process that opens files is waited for once."""
    images = [tmp_path / f"{name}.img" for name in "bc"]
    with opened(tmp_path / "state") as state:
        added = [{"name": each.stem, "image": str(each), "socket-path": f"{each}.sock"} for each in images]
        state.store(Changes(added=added))
    for image in images:
        image.write_bytes(bytes(1 << 20))
    asked: list[Path] = []
    really_open = RemoteOpener.open

    def open_image(opener: RemoteOpener, path: Path, **how: bool) -> int:
        asked.append(path)
        return really_open(opener, path, **how)

    opener = RemoteOpener([tmp_path])
    opener.wait_until_ready()
    with monkeypatch.context() as patch:
        patch.setattr(remote_opener, "PATIENCE", 0.01)
        patch.setattr(RemoteOpener, "open", open_image)
        os.kill(opener.pid, signal.SIGSTOP)
        with serving_through(opener, tmp_path) as server:
            os.kill(opener.pid, signal.SIGCONT)
            assert [export.name for export in server.exports] == ["a"]
            assert asked == images[:1]
            assert stored(tmp_path) == ["b", "c"]
    for image in images:
        assert re.search(f"{image}: .*storage.* does not answer.*; the next start tries again", caplog.text)
    assert not (tmp_path / "state.kept").exists()
    with serving_through(RemoteOpener([tmp_path]), tmp_path) as server:
        assert [export.name for export in server.exports] == ["a", "b", "c"]


def test_disks_that_are_kept_are_removed_or_added_again(
    tmp_path: Path, remote: NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        with silent(monkeypatch):
            server = stack.enter_context(serving(tmp_path))
        # Its name is not given to another one.
        other = dataclasses.replace(disk(tmp_path, "b"), socket_path=tmp_path / "other.sock")
        assert do(server, lambda: server.add(other)).name == "b-2"
        do(server, lambda: server.remove("b-2"))
        do(server, lambda: server.remove("b"))
        assert [each.name for each in server.not_served] == stored(tmp_path) == ["c"]
        with pytest.raises(NoSuchDisk):
            do(server, lambda: server.remove("b"))
        again = read_disk(tables_on(remote, tmp_path)[1], ["io0"])
        assert not do(server, lambda: server.add(again)).paused
        assert stored(tmp_path) == ["c"]
    with serving(tmp_path) as server:
        assert {export.name: export.paused for export in server.exports} == {"c": False}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
OPTIONS = sorted(option.key for option in declared(DiskConfig).values())
PLACES = st.sampled_from(["/disks/a", "/disks/b", "/disks/c", ""]) | st.text(max_size=8)


def tables(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), VALUES, max_size=4)


ADDED = tables(OPTIONS).map(lambda table: {"image": "/images/b", "socket-path": "/disks/b", **table})
POLICY_KEYS = ["policy", "name", "enabled", "parameters"]
USES = tables(POLICY_KEYS).map(lambda table: {"policy": "error", **table})
LIMIT_KEYS = ["total-iops-sec", "read-bytes-sec", "write-iops-sec-max", "group-name", "weight", "size-iops-sec"]


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "version": st.just(1),
            "added": st.lists(ADDED, max_size=3),
            "removed": st.lists(st.text(max_size=8), max_size=2),
            "limits": st.dictionaries(PLACES, tables(LIMIT_KEYS), max_size=2),
            "names": st.dictionaries(PLACES, st.text(max_size=8), max_size=2),
            "paused": st.lists(PLACES, max_size=2),
            "policies": st.dictionaries(PLACES, st.lists(USES | tables(POLICY_KEYS), max_size=2), max_size=2),
        }
    )
)
def test_what_is_described_is_planned_whatever_a_state_has(saved: dict[str, Any]) -> None:
    """A confined process writes it, which an attacker may have taken over."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        path.write_text(json.dumps(saved))
        with opened(path) as state:
            disks = [DiskConfig(Path(f"/images/{name}"), ("io0",), socket_path=Path(f"/disks/{name}")) for name in "ac"]
            planned = Restoring(state).plan(disks, [IoThread("io0")])
    assert [str(each.config.socket_path) for each in planned][:2] == ["/disks/a", "/disks/c"]


def test_policies_that_cannot_be_restored(tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The disk is served with what describes it. A state that a confined process writes names no other files."""
    for name in ("own", "other"):
        (tmp_path / f"{name}.py").write_text(own_policy("return PASS"))
    own, other, gone = ({"policy": str(tmp_path / f"{name}.py")} for name in ("own", "other", "gone"))
    error = {"policy": "error", "parameters": {"probability": 2}}
    for trusted in (True, False):
        disks = [disk(tmp_path, name) for name in "abcd"]
        disks[3] = disk(tmp_path, "d", policy=[PolicyUse(f"{tmp_path}/own.py:own", {"number": 3})])
        with opened(path) as state:
            tables = ([other], [gone], [error], [own])
            state.store(Changes(policies={str(tmp_path / f"{n}.sock"): t for n, t in zip("abcd", tables, strict=True)}))
        state = StateFile(path, trusted=trusted)
        state.open()
        try:
            restoring = Restoring(state)
            planned = restoring.plan(disks, [IoThread("io0"), IoThread("io1")])
            restoring.report()
        finally:
            state.close()
        found = [(len(each.config.policy), each.policies_changed) for each in planned]
        assert found == [(int(trusted), trusted), (0, False), (0, False), (1, True)]
        assert dict(planned[3].config.policy[0].parameters) == {}
        for name, words in (
            ("b", r"/gone\.py cannot be read" if trusted else "is neither a policy of a disk that is described nor"),
            ("c", "probability: 2 is not from 0 to 1"),
        ):
            assert re.search(rf"{name}\.sock: its policies are not restored: .*{words}", caplog.text), caplog.text
        assert ("a.sock: its policies" in caplog.text) == (not trusted)


def test_policies_below_an_allowed_folder_are_restored(tmp_path: Path, path: Path) -> None:
    """A confined process can have loaded them."""
    (tmp_path / "other.py").write_text(own_policy("return PASS"))
    with opened(path) as state:
        state.store(Changes(policies={str(tmp_path / "a.sock"): [{"policy": f"{tmp_path}/other.py"}]}))
    state = StateFile(path, trusted=False)
    state.open()
    try:
        restoring = Restoring(state, allows=lambda file: file.parent == tmp_path)
        (planned,) = restoring.plan([disk(tmp_path, "a")], [IoThread("io0"), IoThread("io1")])
        restoring.report()
    finally:
        state.close()
    assert [each.policy for each in planned.config.policy] == [f"{tmp_path}/other.py"]


# Processes

Serve = Callable[..., ServedApi]

CONFIG = f"""
state = "state/disks"
[api]
socket = "api.sock"
allow-folders = ["images"]
{disk_table("a")}
{disk_table("b")}
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    (tmp_path / "disks.toml").write_text(CONFIG)
    for folder in ("state", "images"):
        (tmp_path / folder).mkdir()
    yield from starter(ServedApi, tmp_path)


def body(folder: Path, file: str, **keys: object) -> dict[str, object]:
    return described(folder / "images", file, **keys)


def listed(served: ServedApi) -> dict[str, Any]:
    """What lasts."""
    return {
        each["name"]: {key: each[key] for key in ("image", "socket", "paused", "size", "serial", "limits", "queues")}
        for each in served.api.get("/v1/disks")["disks"]
    }


def kill(served: ServedApi) -> None:
    served.process.kill()
    served.process.wait()


@needs_all
def test_a_kill_at_any_moment(serve: Serve, tmp_path: Path) -> None:
    """Under confinement, with a filter that ends the process at any call that is not allowed."""
    served = serve("--config", "disks.toml", strict=True)
    for name in "cd":
        limits = {"group-name": "tenant", "total-iops-sec": 90000}
        served.api.post("/v1/disks", body(tmp_path, name, serial=name, limits=limits), status=201)
    served.api.delete("/v1/disks/b")
    served.api.patch("/v1/disks/a", {"limits": {"total-iops-sec": 5000}})
    served.api.post("/v1/disks/d/pause")
    with Driver(tmp_path / "images/c.sock", memory_size=MEMORY_SIZE, timeout=SOON) as driver:
        driver.write(0, b"c" * 512)
        before = listed(served)
        for _ in range(3):
            kill(served)
            served = serve("--config", "disks.toml", strict=True)
            assert listed(served) == before
            driver.reconnect()
            assert driver.read(0, 512) == b"c" * 512
    served.api.post("/v1/disks/d/resume")
    served.api.delete("/v1/disks/d")
    assert b'state = "' in served.api.request("GET", "/v1/config").data
    served.end()
    served = serve("--config", "disks.toml", strict=True)
    assert listed(served).keys() == {"a", "c"}
    served.end()
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["c.img", "d.img"]


@needs_all
def test_upgrades_share_the_state(serve: Serve, tmp_path: Path) -> None:
    served = serve("--config", "disks.toml", strict=True)
    for name in "cd":
        served.api.post("/v1/disks", body(tmp_path, name), status=201)
        new = serve("--config", "disks.toml", "--upgrade", strict=True)
        assert served.process.wait(SOON) == 0, served.errors.read_text()
        served = new
    served.api.delete("/v1/disks/a")
    before = listed(served)
    kill(served)
    served = serve("--config", "disks.toml", strict=True)
    assert listed(served) == before
    assert before.keys() == {"b", "c", "d"}
    served.end()


def test_an_upgrade_that_would_drop_the_state_is_refused(serve: Serve, tmp_path: Path) -> None:
    """What is there would be stale, and wrong for a later start. Without the file nothing is dropped."""
    served, state = serve("--config", "disks.toml"), tmp_path / "state/disks"
    served.api.post("/v1/disks", body(tmp_path, "c"), status=201)
    for line in ("", 'state = "state/other"\n'):
        (tmp_path / "others.toml").write_text(CONFIG.replace('state = "state/disks"\n', line))
        with pytest.raises(AssertionError, match=f"{state}: the running process stores there what is changed"):
            serve("--config", "others.toml", "--upgrade")
    # It continues, and stores what is changed.
    served.api.delete("/v1/disks/b")
    before = listed(served)
    kill(served)
    served = serve("--config", "disks.toml")
    assert listed(served) == before
    (tmp_path / "errors").write_text("")
    state.unlink()
    served = serve("--config", "others.toml", "--upgrade")
    assert listed(served) == before
    assert not state.exists()
    # The other file has all of it soon.
    assert eventually(lambda: json.loads((tmp_path / "state/other").read_text())["removed"])
    kill(served)
    served = serve("--config", "others.toml")
    assert listed(served) == before
    served.end()


def test_what_cannot_be_restored(serve: Serve, tmp_path: Path) -> None:
    """Each has one line, the rest is served, and the state is kept."""
    served = serve("--config", "disks.toml")
    for name in "cdefgh":
        served.api.post("/v1/disks", body(tmp_path, name), status=201)
    served.end()
    (tmp_path / "images/c.img").unlink()
    (tmp_path / "images/d.img").unlink()
    (tmp_path / "images/d.img").mkdir()
    (tmp_path / "images/e.sock").touch()
    stored = json.loads((tmp_path / "state/disks").read_text())
    stored["added"][3]["colour"] = "red"
    stored["added"][4]["image"] = "/etc/passwd"
    stored["added"].append({**stored["added"][5], "name": "i"})
    stored["limits"] = {str(tmp_path / "a.sock"): {"total-iops-sec": -1}}
    text = json.dumps(stored)
    (tmp_path / "state/disks").write_text(text)
    (tmp_path / "errors").write_text("")
    served = serve("--config", "disks.toml")
    assert listed(served).keys() == {"a", "b", "h"}
    lines = [line for line in served.end().splitlines() if "WARNING" in line]
    for name, words in (
        ("c", "no such file"),
        ("d", "neither a regular file nor a block device"),
        ("e", "exists and is not a socket"),
        ("f", 'unknown key "colour"'),
        ("g", "is not below a folder of --allow-folder"),
        ("i", "is also the socket of disk h"),
        ("a.sock", "its limits are not restored: total-iops-sec: -1 is not a whole number"),
    ):
        found = [line for line in lines if f"{name}: " in line and words.lower() in line.lower()]
        assert len(found) == 1, "\n".join([name, *lines])
    assert f"the state as it was is kept as {tmp_path}/state/disks.kept" in lines[-1]
    assert len(lines) == 8
    assert (tmp_path / "state/disks.kept").read_text() == text
    # Nothing of them is left in the state.
    served = serve("--config", "disks.toml")
    assert listed(served).keys() == {"a", "b", "h"}
    served.end()


@pytest.mark.parametrize("text", ["damaged", '{"version": 9, "added": []}'])
def test_a_state_that_cannot_be_read(serve: Serve, tmp_path: Path, text: str) -> None:
    (tmp_path / "state/disks").write_text(text)
    served = serve("--config", "disks.toml")
    assert listed(served).keys() == {"a", "b"}
    assert served.end().count("what was changed at run time is lost") == 1
    assert (tmp_path / "state/disks.kept").read_text() == text


@needs_all
def test_no_disk_is_restored_that_could_not_be_added(serve: Serve, tmp_path: Path) -> None:
    """Without --allow-folder the next process opens nothing that a confined one has named."""
    served = serve("--no-sandbox", "--config", "disks.toml")
    served.api.post("/v1/disks", body(tmp_path, "c"), status=201)
    served.end()
    (tmp_path / "disks.toml").write_text(CONFIG.replace('allow-folders = ["images"]', ""))
    served = serve("--config", "disks.toml")
    assert listed(served).keys() == {"a", "b"}
    assert "is not below a folder of --allow-folder, because there is none" in served.end()


def test_a_stale_socket_is_replaced(serve: Serve, tmp_path: Path) -> None:
    served = serve("--config", "disks.toml")
    served.api.post("/v1/disks", body(tmp_path, "c"), status=201)
    kill(served)
    assert (tmp_path / "images/c.sock").is_socket()
    served = serve("--config", "disks.toml")
    with Driver(tmp_path / "images/c.sock", memory_size=MEMORY_SIZE, timeout=SOON) as driver:
        driver.read(0, 512)
    assert eventually(lambda: served.api.disk("c")["state"] == "listening")
    served.end()
