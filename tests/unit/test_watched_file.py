"""Files whose presence policies follow."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

import ringplane
from ringplane.driver import Driver
from ringplane.engines.common import READ, WRITE
from ringplane.options.policy_options import PolicyUse
from ringplane.policies import watched_file
from ringplane.policies.running import WrongParameter
from ringplane.policies.watched_file import NAME, Flag, watch

from .asked_policy import PASS, Asked
from .rig import PATIENCE, eventually


def watching() -> int:
    """How many threads watch files."""
    return sum(thread.name == NAME for thread in threading.enumerate())


def inotify_fds() -> list[str]:
    fds = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return [fd.name for fd in fds if os.readlink(fd) == "anon_inode:inotify"]


def test_a_file_comes_and_goes(tmp_path: Path) -> None:
    """Created, removed, renamed and linked; other files beside it do not matter."""
    path, other = tmp_path / "file", tmp_path / "other"
    stored: list[bool] = []
    file, flag = watch(str(path)), Flag(stored.append)
    file.start()
    file.add(flag)
    changes = [
        (path.touch, True),
        (path.unlink, False),
        (other.touch, False),
        (lambda: other.rename(path), True),
        (lambda: path.rename(other), False),
        (lambda: os.link(other, path), True),
        (other.unlink, True),
        (lambda: (path.unlink(), tmp_path.rmdir()), False),
    ]
    assert stored == [False]
    for change, exists in changes:
        change()  # type: ignore[no-untyped-call]
        assert eventually(lambda exists=exists: stored[-1] == exists)  # type: ignore[misc]


def test_a_file_is_watched_once_and_as_long_as_needed(tmp_path: Path) -> None:
    assert eventually(lambda: (gc.collect(), watching())[1] == 0)
    path = tmp_path / "file"
    path.touch()
    first, second = watch(str(path)), watch(f"{tmp_path}/./file")
    assert first is second
    assert watching() == 0
    first.start()
    second.start()
    assert (watching(), len(inotify_fds())) == (1, 1)
    kept: list[bool] = []
    flag, forgotten = Flag(kept.append), Flag(lambda _: pytest.fail("forgotten") if kept else None)
    first.add(forgotten)
    first.add(flag)
    del forgotten
    path.unlink()
    assert eventually(lambda: kept == [True, False])
    del first, second
    assert eventually(lambda: (gc.collect(), watching())[1] == 0)
    assert inotify_fds() == []


def test_what_cannot_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        WrongParameter, match=r"trigger: the folder .*/none cannot be watched: No such file or directory"
    ):
        Asked("error", trigger=str(tmp_path / "none" / "file"))
    policy = Asked("error", trigger=str(tmp_path / "file"))
    monkeypatch.setattr(watched_file, "is_confined", lambda: True)
    # Another policy may take over what is watched.
    assert Asked("error", trigger=str(tmp_path / "file")).ask() == policy.ask() == PASS
    with pytest.raises(
        WrongParameter, match="trigger: this process may watch no further files; start it with this policy"
    ):
        policy.policy.change({"trigger": str(tmp_path / "other"), "errno": 28})
    assert policy.policy.shown()["errno"] == "5"


@pytest.mark.parametrize(
    "name", ["error", "delay", "hang", "lost_writes", "torn_writes", "misdirected_writes", "corrupt"]
)
def test_a_policy_applies_while_a_file_exists(name: str, tmp_path: Path) -> None:
    path = tmp_path / "now"
    policy = Asked(name, trigger=str(path))
    policy.policy.start_threads()

    def applies() -> bool:
        if name == "corrupt":
            return policy.write(0, bytes(8192)) != bytes(8192)
        return policy.ask(WRITE, 0, 8192) != PASS

    assert not applies()
    path.touch()
    assert eventually(applies)
    path.unlink()
    assert eventually(lambda: not applies())
    # Without a file it applies again.
    policy.policy.change({"trigger": ""})
    assert applies()
    path.touch()
    policy.policy.change({"trigger": str(path)})
    assert applies()
    # Whatever happens before its thread is started is noted.
    path.unlink()
    policy.policy.start_threads()
    assert eventually(lambda: not applies())
    assert policy.policy.shown()["trigger"] == str(path)
    assert policy.ask(READ) == PASS or name in ("error", "delay", "hang")


def test_a_policy_does_not_apply_meanwhile_when_it_is_given_again(tmp_path: Path) -> None:
    """Nothing but the absence of the file is ever stored."""
    stored: list[int] = []

    class Noting:
        def __setitem__(self, key: str, value: int) -> None:
            if key == "trigger":
                stored.append(value)

    policy, again, other = (Asked("error", trigger=str(tmp_path / name)).policy for name in ("now", "now", "other"))
    policy._my = Noting()  # type: ignore[assignment]
    policy.take_parameters(again)
    policy.take_parameters(other)
    policy.change({"trigger": str(tmp_path / "now")})
    assert set(stored) == {0}


@pytest.mark.parametrize("replaced", ["made again", "renamed", "another link"])
def test_a_folder_that_is_replaced(replaced: str, tmp_path: Path) -> None:
    """What exists at the path counts, although its folder is not the one that was watched at first."""
    path, other = tmp_path / "folder" / "file", tmp_path / "other"
    other.mkdir()
    if replaced == "another link":
        (tmp_path / "first").mkdir()
        path.parent.symlink_to("first")
    else:
        path.parent.mkdir()
    stored: list[bool] = []
    file, flag = watch(str(path)), Flag(stored.append)
    file.start()
    file.add(flag)
    path.touch()
    assert eventually(lambda: stored == [False, True])
    if replaced == "made again":
        path.unlink()
        path.parent.rmdir()
        path.parent.mkdir()
    elif replaced == "renamed":
        path.parent.rename(tmp_path / "gone")
        other.rename(path.parent)
    else:
        path.parent.unlink()
        path.parent.symlink_to(other)
    assert eventually(lambda: stored == [False, True, False])
    path.touch()
    assert eventually(lambda: stored == [False, True, False, True])


def test_a_folder_that_cannot_be_searched_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perhaps after --user: events still say what happens in it."""
    path, looks, stored = tmp_path / "file", list[Path](), list[bool]()
    assert watched_file._look(tmp_path / ("x" * 300)) is None
    file, flag = watch(str(path)), Flag(stored.append)
    file.add(flag)
    monkeypatch.setattr(watched_file, "_look", looks.append)
    monkeypatch.setattr(watched_file, "QUIET_MS", 1)
    file.start()
    assert eventually(lambda: len(looks) > 2)
    path.touch()
    assert eventually(lambda: stored == [False, True])
    count = len(looks)
    assert eventually(lambda: len(looks) > count + 2)
    assert stored == [False, True]


@pytest.mark.parametrize("exists", [True, False])
def test_lost_events(exists: bool, tmp_path: Path) -> None:
    """Whether the file exists is looked up when the kernel's queue was full."""
    path, stored = tmp_path / "file", list[bool]()
    if exists:
        path.touch()
    presence, flag = watched_file._Presence(not exists), Flag(stored.append)
    presence.add(flag)
    (events, feed), (stopped, stop) = os.pipe(), os.pipe()
    os.write(feed, watched_file.EVENT.pack(-1, watched_file.IN_Q_OVERFLOW, 0, 0))
    thread = threading.Thread(target=watched_file._follow, args=(events, stopped, path, presence))
    thread.start()
    assert eventually(lambda: stored == [not exists, exists])
    os.close(stop)
    thread.join(PATIENCE)
    os.close(feed)
    assert not thread.is_alive()


def test_a_file_that_nobody_wants_to_know_of_is_closed(tmp_path: Path) -> None:
    assert eventually(lambda: (gc.collect(), inotify_fds())[1] == [])
    file = watch(str(tmp_path / "file"))
    assert len(inotify_fds()) == 1
    del file
    gc.collect()
    assert inotify_fds() == []


def test_a_served_disk_follows_a_file(tmp_path: Path) -> None:
    """Its policies are of its start, or come later."""
    first, second = tmp_path / "first", tmp_path / "second"

    def fails(driver: Driver, sector: int) -> bool:
        try:
            driver.write(512 * sector, bytes(512))
        except OSError:
            return True
        return False

    def policies(*files: Path) -> list[PolicyUse]:
        return [
            PolicyUse("error", {"trigger": str(file), "where": f"{512 * number}-{512 * (number + 1)}"})
            for number, file in enumerate(files)
        ]

    image, socket = tmp_path / "disk.img", tmp_path / "socket"
    with (
        ringplane.serve(image, socket, create=1 << 20, policy=policies(first)) as export,
        Driver(socket) as driver,
    ):
        assert not fails(driver, 0)
        first.touch()
        assert eventually(lambda: fails(driver, 0))
        export.set_policies(policies(first, second))
        assert fails(driver, 0)
        assert not fails(driver, 1)
        second.touch()
        assert eventually(lambda: fails(driver, 1))
        first.unlink()
        assert eventually(lambda: not fails(driver, 0))
