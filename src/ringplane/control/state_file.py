"""The file that keeps what was changed at run time (changes.py) for the next start, also after a crash.

A confined process cannot open files. So two files are opened before that: the one at the path, and one beside it whose
name ends in `~`. The changes are written to the second one and made stable, then both exchange their names in one step
(renameat2(2), RENAME_EXCHANGE), and the folder is made stable. At any moment the path leads to a whole file, the old
one or the new one. The second file is the previous state, and the next one is written there.

The file is locked as long as a process uses it; processes of a planned restart share the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringplane.control.changes import Changes
from ringplane.system.fd import Fd
from ringplane.system.libc import RENAME_EXCHANGE, system_call
from ringplane.system.syscall_numbers import NUMBERS

VERSION = 1

# The end of the names of the second file, and of files that are kept because they cannot be used.
BESIDE, KEPT = "~", ".kept"

MODE = 0o600

# Seconds. The kernel's work for a process that was killed may hold its locks for some milliseconds.
LOCK_PATIENCE = 0.5

EMPTY = Changes()


def check(path: Path) -> None:
    """Raises StateError if nothing can be stored there, or what is there cannot be used; nothing is created."""
    try:
        os.stat(f"{path.parent}/.")
        if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if os.path.lexists(path):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise StateError(f"{path}: is not a regular file; choose another path")
            _parsed(path.read_bytes())
    except OSError as error:
        raise StateError(f"{path}: the state cannot be stored there: {error.strerror}; choose another path") from None
    except ValueError as error:
        raise StateError(f"{path}: {error}") from None


class StateError(RuntimeError):
    """The file cannot be used; the text is one line that says why."""


class StateFile:
    """Opened before the process is confined, and written by one thread at a time."""

    def __init__(self, path: Path, *, trusted: bool) -> None:
        """`trusted`: only a process with all rights of this one writes it, so that it may name any file."""
        self.path, self.trusted = Path(os.path.abspath(path)), trusted
        self._name = os.fsencode(self.path.name)
        self._fds: list[int] = []
        self._folder = -1
        # Names of files that were not there.
        self._created: set[bytes] = set()

    @property
    def folder(self) -> Path:
        return self.path.parent

    def open(self, inherited: Mapping[str, Any] | None = None) -> None:
        """Open the files, or use those of the previous process (`hand_over`) if it has the same. Raises StateError."""
        try:
            self._folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if inherited is not None and inherited["path"] == os.path.realpath(self.path):
                self._fds = [os.dup(fd.number) for fd in inherited["files"]]
            else:
                self._open_files()
            for fd in self._fds:
                # What it keeps may be secret, and others may have made it.
                os.fchmod(fd, MODE)
        except OSError as error:
            self.remove_created()
            self.close()
            raise StateError(
                f"{self.path}: the state cannot be stored there: {error.strerror}; choose another path"
            ) from None
        except BaseException:
            self.remove_created()
            self.close()
            raise

    def _open_files(self) -> None:
        beside = self._name + os.fsencode(BESIDE)
        if not os.path.lexists(self.path):
            fd = self._opened(beside)
            _write(fd, EMPTY)
            os.rename(beside, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._created.add(self._name)
            os.fsync(self._folder)
        else:
            self._opened(self._name)
        self._opened(beside)

    def _opened(self, name: bytes) -> int:
        """The fd of one of the files, locked. Raises OSError, StateError."""
        end = time.monotonic() + LOCK_PATIENCE
        while True:
            fd = self._open_one(name)
            self._lock(fd, end)
            if self._is_at(fd, name):
                return fd
            # Who had the lock has exchanged the files meanwhile.
            self._fds.remove(fd)
            os.close(fd)

    def _open_one(self, name: bytes) -> int:
        """Raises OSError, StateError."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, MODE, dir_fd=self._folder)
            self._created.add(name)
        except FileExistsError:
            fd = os.open(name, flags, dir_fd=self._folder)
        self._fds.append(fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StateError(f"{self.path.with_name(os.fsdecode(name))}: is not a regular file; choose another path")
        return fd

    def _lock(self, fd: int, end: float) -> None:
        """Raises StateError at that time, if another process has the lock."""
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StateError(
                        f"{self.path}: another process stores its state there; choose another path, or --upgrade to "
                        "take over from it"
                    ) from None
                time.sleep(LOCK_PATIENCE / 50)

    def read(self) -> Changes:
        """What the previous process has stored. Raises ValueError for what is not a state of ours, and StateError."""
        fd = next((fd for fd in self._fds if self._is_at(fd, self._name)), -1)
        if fd < 0:
            raise StateError(f"{self.path}: another program has replaced the file; start ringplane again to read it")
        return _parsed(os.pread(fd, os.fstat(fd).st_size, 0))

    def keep(self) -> Path:
        """Copy the file, so that what cannot be used is not lost; returns the path of the copy. Raises StateError."""
        number, kept = 1, self.path.with_name(f"{self.path.name}{KEPT}")
        while True:
            try:
                fd = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
                break
            except FileExistsError:
                number += 1
                kept = self.path.with_name(f"{self.path.name}{KEPT}-{number}")
            except OSError as error:
                raise StateError(f"{kept}: a copy of the state cannot be made: {error.strerror}") from None
        with open(fd, "wb") as file:
            file.write(self.path.read_bytes())
            file.flush()
            os.fsync(fd)
        return kept

    def store(self, changes: Changes) -> None:
        """Make these stable. Raises StateError; then the previous state is there."""
        beside = self._name + os.fsencode(BESIDE)
        try:
            # Whose name is which depends on how often they were exchanged, in the previous process too.
            fd = next((fd for fd in self._fds if self._is_at(fd, beside)), -1)
            if fd < 0 or not any(self._is_at(other, self._name) for other in self._fds if other != fd):
                raise StateError(f"{self.path}: another program has replaced the file; restart ringplane to store it")
            _write(fd, changes)
            system_call(NUMBERS["renameat2"], self._folder, beside, self._folder, self._name, RENAME_EXCHANGE)
            os.fsync(self._folder)
        except OSError as error:
            raise StateError(f"{self.path}: cannot be written: {_why(error)}") from None

    def _is_at(self, fd: int, name: bytes) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=self._folder, follow_symlinks=False))
        return False

    def hand_over(self) -> dict[str, Any]:
        """What a successor needs to use the same files; the fds stay ours."""
        return {"path": os.path.realpath(self.path), "files": [Fd(fd) for fd in self._fds]}

    def remove_created(self) -> None:
        """Undo `open`, before `close`: a start that fails leaves no files."""
        for name in self._created:
            with contextlib.suppress(OSError):
                if any(self._is_at(fd, name) for fd in self._fds):
                    os.unlink(name, dir_fd=self._folder)

    def close(self) -> None:
        """Close the files. May be called again."""
        for fd in (*self._fds, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fds, self._folder = [], -1


def _parsed(data: bytes) -> Changes:
    """Raises ValueError."""
    try:
        saved = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is damaged") from None
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        found = saved.get("version") if isinstance(saved, dict) else None
        raise ValueError(f"is of version {found}, and this release reads version {VERSION}")
    try:
        return Changes.from_json(saved)
    except ValueError as error:
        raise ValueError(f"is damaged: {error}") from None


def _write(fd: int, changes: Changes) -> None:
    """Raises OSError."""
    data = json.dumps({"version": VERSION, **changes.as_json()}, indent=1).encode() + b"\n"
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], written)
    # Afterwards: what the file has of its file system is not given away before.
    os.ftruncate(fd, len(data))
    os.fsync(fd)


def _why(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "its file system cannot exchange two files (renameat2(2)); choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"user {os.geteuid()} may not rename files in its folder; choose another folder, or change its owner"
    return error.strerror or str(error)
