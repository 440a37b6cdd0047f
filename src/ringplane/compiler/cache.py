"""The cache folder of compiled code: its location, its permissions, and the versions that it keeps.

Loading from it runs code, so it must belong to this user or to root, and no other user may be able to write to it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numba

from ringplane.compiler.interpreted import INTERPRETED

PACKAGE = Path(__file__).resolve().parent.parent
KEPT_VERSIONS = 4
TEMPORARY = "ringplane-cache-"
FOLDER = re.compile(r"data-plane-[0-9a-f]{20}")

VARIABLE = "RINGPLANE_CACHE_DIR"
# The two units that are compiled: the data plane, and the load generator.
DATA_PLANE, DRIVER = "data-plane", "driver"
# The space that must be free, in bytes: more than the compiled code of a version.
ROOM = 4 << 20
# Errors of fallocate(2) for lack of space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Cache:
    """`folder` is the folder of this version; None: nothing can be written, so each process compiles.

    `short_lived`: why compiled code is lost at the end of the process, and what to do about it; empty: it is kept.
    """

    folder: Path | None
    short_lived: str = ""


@cache
def version_folder() -> str:
    """The name of the cache folder for exactly these sources, this Numba and this Python.

    Numba detects a change of the file with a compiled function, but not of the files with its callees. A folder named
    after all sources makes a stale data plane impossible, at the cost of reading some 300 kB at start. Numba also
    compares modification times, so they are part of the name: the code in the folder is the code that will be loaded.
    """
    digest = hashlib.blake2b(f"{numba.__version__} {sys.implementation.cache_tag}".encode(), digest_size=10)
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {path.stat().st_mtime_ns}".encode())
        digest.update(path.read_bytes())
    return f"data-plane-{digest.hexdigest()}"


@cache
def find_cache() -> Cache:
    """The cache in `$RINGPLANE_CACHE_DIR`, else in `$XDG_CACHE_HOME/ringplane`, else in `~/.cache/ringplane`.

    If that is unusable (a service without a home, a read-only system), it is a temporary folder for this process, or
    there is none. The interpreted mode has none.
    """
    if INTERPRETED:
        return Cache(None)
    chosen = os.environ.get(VARIABLE)
    base = Path(chosen) if chosen else _default_base()
    obstacle = _obstacle(base) if base else "no home folder is known"
    if base and not obstacle:
        return Cache(base / version_folder())
    why = f"{VARIABLE}={obstacle}" if chosen else f"{obstacle}; set {VARIABLE} to a folder that this user can write to"
    temporary = _make_temporary()
    return Cache(temporary / version_folder() if temporary else None, why)


def _default_base() -> Path | None:
    """None for a user without a home folder in HOME or passwd(5)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "ringplane" if home.is_absolute() else None


def cache_directory() -> Path | None:
    """The folder of compiled code for this version; None if nothing can be written."""
    return find_cache().folder


def is_cached(what: str = DATA_PLANE) -> bool:
    """Whether `what`, compiled from exactly these sources, is on disk as a whole (a start will be fast)."""
    folder = cache_directory()
    return folder is not None and _mark(folder, what).exists()


def mark_cached(what: str) -> None:
    """Mark `what` as complete in the cache: after an interrupted compilation, the next start compiles the rest."""
    folder = cache_directory()
    if folder is not None:
        # The folder may belong to root.
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not _mark(folder, what).exists():
                _mark(folder, what).touch()


def _mark(folder: Path, what: str) -> Path:
    return folder / f"{what}.complete"


def _obstacle(base: Path) -> str:
    """Why this folder cannot be the cache, and what to do; empty: it can be. It is created if it is missing."""
    user = os.geteuid()
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = base.stat()
        if status.st_uid not in (user, 0):
            return f"{base} belongs to user {status.st_uid}, whose code would run here; chown it to user {user}"
        if status.st_mode & 0o022:
            return f"{base} can be written by other users, whose code would run here; chmod go-w it"
        if not _mark(base / version_folder(), DATA_PLANE).exists():
            _try_room(base)
    except (FileExistsError, NotADirectoryError):
        return f"{base} is not a folder; name one"
    except OSError as error:
        if error.errno in FULL:
            return f"{base} has no room for {ROOM >> 20} MiB ({error.strerror}); make room"
        return f"{base} cannot be written by user {user} ({error.strerror})"
    return ""


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
    for parent in _temporary_places():
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _try_room(folder)
            return folder
    return None


def _temporary_places() -> Iterator[str]:
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        if os.environ.get(name):
            yield os.environ[name]
    yield from ("/tmp", "/var/tmp", "/dev/shm")


def remove_temporary_cache() -> None:
    """Remove the temporary folder now instead of at exit; all code that will be called has been loaded."""
    folder = cache_directory()
    if folder is not None and folder.parent.name.startswith(TEMPORARY):
        shutil.rmtree(folder.parent, ignore_errors=True)


def forget_old_versions() -> None:
    """Keep the cache folders of the newest versions; older ones are never read again."""
    current = cache_directory()
    if current is None:
        return
    versions = [entry for entry in current.parent.iterdir() if FOLDER.fullmatch(entry.name) and entry != current]
    versions.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in versions[KEPT_VERSIONS - 1 :]:
        shutil.rmtree(entry, ignore_errors=True)
