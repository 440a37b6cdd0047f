"""Whether files exist, for policies that apply only as long as one does.

The functions of policies cannot look at files, and must not wait. So a thread waits for inotify(7), and stores what it
learns where they find it. A confined process cannot begin to watch a file, but it learns of one that it has begun to
watch before.

Events are quick, but not all changes are events: the folder is removed and made again, another one is renamed or
mounted in its place, events are lost, another host changes it. So the thread also looks at the path, once per second.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ringplane.system import libc
from ringplane.system.aside import start_thread
from ringplane.system.confinement import is_confined

NAME = "ringplane-files"
# include/uapi/linux/inotify.h
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_Q_OVERFLOW = 0x40, 0x80, 0x100, 0x200, 0x4000
COMES, GOES = IN_MOVED_TO | IN_CREATE, IN_MOVED_FROM | IN_DELETE
EVENT = struct.Struct("iIII")
BUFFER = 65536
# Milliseconds without an event after which the thread looks at the path.
QUIET_MS = 1000


class Flag:
    """Somebody who wants to know it. `store` is called now, and whenever that changes, until the flag is forgotten."""

    def __init__(self, store: Callable[[bool], None]) -> None:
        self.store = store


class _Presence:
    """What the thread knows, and who wants to know it."""

    def __init__(self, exists: bool) -> None:
        self._exists = exists
        self._flags: weakref.WeakSet[Flag] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, flag: Flag) -> None:
        with self._lock:
            flag.store(self._exists)
            self._flags.add(flag)

    def set(self, exists: bool) -> None:
        with self._lock:
            if exists == self._exists:
                return
            self._exists = exists
            for flag in self._flags:
                flag.store(exists)


class WatchedFile:
    """A file that may come and go; its folder exists. It is watched until this object is forgotten.

    Changes are noted from the beginning, and reported once `start` was called: threads are started late, because what a
    process gives up of its rights is kept by those that run already.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError."""
        if is_confined():
            raise ValueError("this process may watch no further files; start it with this policy, or with --no-sandbox")
        inotify = _watch(path.parent)
        # What happens from now on is an event.
        self._presence = _Presence(path.exists())
        stopped, self._stop = os.pipe2(os.O_CLOEXEC)
        self._close = weakref.finalize(self, _close, inotify, stopped, self._stop)
        self._runs, self._thread = False, partial(_follow, inotify, stopped, path, self._presence)

    def start(self) -> None:
        """Start the thread, unless it runs. Raises NoThread."""
        with _starting:
            if self._runs:
                return
            # It closes the other fds.
            start_thread(NAME, self._thread)
            self._runs = True
            self._close.detach()
            weakref.finalize(self, _close, self._stop)

    def add(self, flag: Flag) -> None:
        self._presence.add(flag)


_starting = threading.Lock()
_watched: weakref.WeakValueDictionary[Path, WatchedFile] = weakref.WeakValueDictionary()


def watch(path: str) -> WatchedFile:
    """The file at this path; one that is watched already is not watched twice. Raises ValueError."""
    place = Path(path).absolute()
    file = _watched.get(place)
    if file is None:
        file = _watched[place] = WatchedFile(place)
    return file


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _watch(folder: Path) -> int:
    """An inotify fd for the folder. Raises ValueError."""
    try:
        inotify = libc.inotify_init()
    except OSError as error:
        raise ValueError(f"no file can be watched: {error.strerror}") from None
    try:
        libc.inotify_add_watch(inotify, os.fsencode(folder), COMES | GOES)
    except OSError as error:
        os.close(inotify)
        raise ValueError(f"the folder {folder} cannot be watched: {error.strerror}") from None
    return inotify


def _follow(inotify: int, stopped: int, path: Path, presence: _Presence) -> None:
    """Store changes until the other end of the pipe `stopped` is closed."""
    poll = select.poll()
    for fd in (inotify, stopped):
        poll.register(fd, select.POLLIN)
    while stopped not in (ready := [fd for fd, _ in poll.poll(QUIET_MS)]):
        change = _last_change(os.read(inotify, BUFFER), os.fsencode(path.name)) if ready else None
        exists = _look(path) if change is None else change
        if exists is not None:
            presence.set(exists)
    _close(inotify, stopped)


def _last_change(events: bytes, name: bytes) -> bool | None:
    """Whether the file exists after these events; None: they do not say it."""
    exists, place = None, 0
    while place < len(events):
        _, mask, _, length = EVENT.unpack_from(events, place)
        place += EVENT.size
        if mask & IN_Q_OVERFLOW:
            exists = None
        elif mask & (COMES | GOES) and events[place : place + length].rstrip(b"\0") == name:
            exists = bool(mask & COMES)
        place += length
    return exists


def _look(path: Path) -> bool | None:
    """Whether it exists; None: this user may not know it any more, but is notified of events."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    return True
