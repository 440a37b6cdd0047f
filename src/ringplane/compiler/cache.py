"""The folders of compiled code: where it is looked for, where it is saved, and which versions are kept.

Loading code runs it, so a folder must belong to this user, to root or to the owner of the package, and no other user
may be able to write to it. Each file has its key in its name (key.py), so a folder can hold the code of any number of
versions and CPUs. A file appears under its name when it is whole.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ringplane.compiler.key import GENERIC, NATIVE, PACKAGE, key_of

# Of each function and each mark.
KEPT_VERSIONS = 8
TEMPORARY = "ringplane-cache-"
# A file's name: a module or function, the arguments of a function, the key.
NAME = re.compile(r"([\w.<>]+(?:-[0-9a-f]{8})?)-[0-9a-f]{20}\.(code|complete)")
# The end of the name of a file that is being written, the beginning of the name of a folder for several of them, and
# the age in seconds at which the writer has surely ended.
UNFINISHED, STAGING, ABANDONED = ".unfinished", ".compiling-", 86400

VARIABLE = "RINGPLANE_CACHE_DIR"
# The folder of this installation, for all its users. Who can write there can also replace Python itself.
SHARED = Path(sys.prefix, "lib", "ringplane")
# What is compiled, by the module that a child process runs for it: the data plane, and the load generator.
DATA_PLANE, DRIVER = "ringplane.dataplane.compile_data_plane", "ringplane.driver.compile_driver"
# The space that must be free, in bytes: more than the compiled code of a version.
ROOM = 4 << 20
# Errors of fallocate(2) for lack of space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Place:
    """Where compiled code is saved. `folder` is None if nothing can be written, so each process compiles.

    `short_lived`: why compiled code is lost at the end of the process, and what to do about it; empty: it is kept.
    """

    folder: Path | None
    short_lived: str = ""


class Unusable(Exception):
    """Compiled code cannot be saved in a folder; the message is the reason and what to do."""


# Where code is looked for


# The only folder, in a process that compiles; the temporary folder; the names of files that were loaded or saved.
_only: Path | None = None
_temporary: Path | None = None
_used: dict[str, None] = {}


def use_only(folder: Path) -> None:
    """Look for code only in this folder, and save it there."""
    global _only
    _only = folder


def folders() -> list[Path]:
    """The folders in which code is looked for, in this order."""
    if _only:
        return [_only]
    places = dict.fromkeys([*_bases(), *([_temporary] if _temporary else []), SHARED])
    return [folder for folder in places if _distrust(folder) == ""]


def _bases() -> list[Path]:
    """The user's folders. If the chosen one is only for reading, code is saved in the default one.

    The chosen one is `$RINGPLANE_CACHE_DIR`, the default one `$XDG_CACHE_HOME/ringplane` or `~/.cache/ringplane`.
    """
    chosen, default = os.environ.get(VARIABLE), _default_base()
    if not chosen:
        return [default] if default else []
    folder = Path(chosen)
    return [folder, default] if default and _is_for_reading(folder) else [folder]


def _default_base() -> Path | None:
    """None for a user without a home folder in HOME or passwd(5)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "ringplane" if home.is_absolute() else None


def _is_for_reading(folder: Path) -> bool:
    return folder.is_dir() and not os.access(folder, os.W_OK, effective_ids=True)


def _distrust(folder: Path) -> str:
    """Why code must not be loaded from this folder, and what to do; empty: it may be."""
    try:
        status = folder.stat()
    except OSError as error:
        return f"{folder} cannot be read by user {os.geteuid()} ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder; name one"
    if status.st_uid not in (os.geteuid(), 0, PACKAGE.stat().st_uid):
        return f"{folder} belongs to user {status.st_uid}, whose code would run here; chown it to user {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"{folder} can be written by other users, whose code would run here; chmod go-w it"
    return ""


def is_cached(what: str = DATA_PLANE) -> bool:
    """Whether all that the module `what` compiles is on disk, for exactly these sources (a start will be fast)."""
    return any(is_complete(folder, what, cpu) for cpu in (NATIVE, GENERIC) for folder in folders())


def exists(name: str) -> bool:
    """Whether a folder has the file of this name."""
    return any((folder / name).exists() for folder in folders())


def is_complete(folder: Path, what: str, cpu: str) -> bool:
    """Whether the folder contains all that the module `what` compiles for this CPU."""
    try:
        return all((folder / name).exists() for name in names_of(folder, what, cpu))
    except FileNotFoundError:
        return False


def names_of(folder: Path, what: str, cpu: str) -> list[str]:
    """The names of the files of all that the module `what` compiles. Raises FileNotFoundError if it is not there."""
    mark = mark_name(what, cpu)
    return [*(folder / mark).read_text().splitlines(), mark]


def mark_name(what: str, cpu: str) -> str:
    """The name of the file which says that `what` is there as a whole; it contains the names of its files."""
    return file_name(what, key_of(what, cpu), "complete")


def file_name(name: str, key: str, kind: str) -> str:
    return f"{name}-{key}.{kind}"


def read(name: str) -> bytes | None:
    """The content of the file of this name; None if no folder has it."""
    for folder in folders():
        with contextlib.suppress(OSError):
            data = (folder / name).read_bytes()
            _used[name] = None
            # So that what is used is not deleted; the folder may belong to root.
            with contextlib.suppress(OSError):
                os.utime(folder / name)
            return data
    return None


# Where code is saved


@cache
def place() -> Place:
    """The last folder of `_bases`, which is created if it is missing.

    If that is unusable (a service without a home, a read-only system), it is a temporary folder for this process, or
    there is none.
    """
    if _only:
        return Place(_only)
    try:
        folder = own()
        prepare(folder)
        return Place(folder)
    except Unusable as error:
        chosen = _bases() == [Path(os.environ.get(VARIABLE, ""))]
        advice = f"; set {VARIABLE} to a folder that this user can write to"
        why = f"{VARIABLE}={error}" if chosen else f"{error}{advice}"
    return Place(_make_temporary(), why)


def own() -> Path:
    """The folder in which the code of this user is saved."""
    if not (bases := _bases()):
        raise Unusable("no home folder is known")
    return bases[-1]


def prepare(folder: Path, mode: int = 0o700) -> None:
    """Create the folder if it is missing. Raises Unusable if it cannot be the cache."""
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        if why := _distrust(folder):
            raise Unusable(why)
        _try_room(folder)
    except (FileExistsError, NotADirectoryError):
        raise Unusable(f"{folder} is not a folder; name one") from None
    except OSError as error:
        if error.errno in FULL:
            raise Unusable(f"{folder} has no room for {ROOM >> 20} MiB ({error.strerror}); make room") from None
        raise Unusable(f"{folder} cannot be written by user {os.geteuid()} ({error.strerror})") from None


def _try_room(base: Path) -> None:
    """Raises OSError if no file of this size can be created."""
    with tempfile.TemporaryFile(dir=base) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, ROOM)
        except OSError as error:
            if error.errno in FULL:
                raise


def _make_temporary() -> Path | None:
    """A new folder in the first place where one can be created; it is removed at exit."""
    global _temporary
    for parent in _temporary_places():
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _try_room(folder)
            _temporary = folder
            return folder
    return None


def _temporary_places() -> Iterator[str]:
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        if os.environ.get(name):
            yield os.environ[name]
    yield from ("/tmp", "/var/tmp", "/dev/shm")


def write(name: str, data: bytes) -> None:
    """Save a file, unless there is no place for it."""
    folder = place().folder
    if folder is None:
        return
    _used[name] = None
    unfinished = folder / f"{name}.{os.getpid()}{UNFINISHED}"
    try:
        unfinished.write_bytes(data)
        unfinished.rename(folder / name)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def mark_cached(what: str) -> None:
    """Mark `what`, which this process has loaded or compiled, as complete.

    After an interrupted compilation there is no mark, and the next start compiles the rest. In the interpreted mode
    nothing is loaded.
    """
    names = [name for name in _used if name.endswith(".code")]
    if names and not is_cached(what):
        write(mark_name(what, NATIVE), "\n".join(names).encode())


def remove_temporary_cache() -> None:
    """Remove the temporary folder now instead of at exit; all code that will be called has been loaded."""
    if _temporary:
        shutil.rmtree(_temporary, ignore_errors=True)


def variables() -> dict[str, str]:
    """The environment variables with which a child process finds the code of this process."""
    return {VARIABLE: str(_temporary)} if _temporary else {}


def forget_old_versions() -> None:
    """Delete all but the last used versions of each function and mark."""
    folder = place().folder
    if folder is None:
        return
    versions = defaultdict(list)
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if name := NAME.fullmatch(entry.name):
                versions[name.groups()].append((entry.stat().st_mtime, entry.path))
    for files in versions.values():
        for _, path in sorted(files, reverse=True)[KEPT_VERSIONS:]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    forget_abandoned(folder)


def forget_abandoned(folder: Path) -> None:
    """Delete what was left unfinished by processes that were killed."""
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat().st_mtime > time.time() - ABANDONED:
                continue
            if entry.name.endswith(UNFINISHED):
                os.unlink(entry.path)
            elif entry.name.startswith(STAGING):
                shutil.rmtree(entry.path, ignore_errors=True)
