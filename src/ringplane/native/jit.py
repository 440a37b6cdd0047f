"""The `compiled` decorator: Numba without the GIL, cached in a folder that a change of any source file invalidates."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

from ringplane.native.parts import PartType, part, whole

Function = TypeVar("Function", bound=Callable[..., Any])

PACKAGE = Path(__file__).resolve().parent.parent
KEPT_VERSIONS = 4
TEMPORARY = "ringplane-cache-"
FOLDER = re.compile(r"data-plane-[0-9a-f]{20}")


@cache
def version_folder() -> str:
    """The name of the cache folder for these very sources, this Numba and this Python.

    Numba notices a change of the file that holds a compiled function, not of the files that hold its callees. A folder
    named after all sources makes a stale data plane impossible, at the price of reading some 300 kB at start. Numba
    compares times of modification too, so they are in the name: what is in the folder is what will be loaded.
    """
    digest = hashlib.blake2b(f"{numba.__version__} {sys.implementation.cache_tag}".encode(), digest_size=10)
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {path.stat().st_mtime_ns}".encode())
        digest.update(path.read_bytes())
    return f"data-plane-{digest.hexdigest()}"


@cache
def cache_directory() -> Path:
    """The folder of compiled code for this version, private to this user.

    It is in `$RINGPLANE_CACHE_DIR`, else `$XDG_CACHE_HOME/ringplane`, else `~/.cache/ringplane`, or, where that cannot
    be written (a service without a home), in a temporary folder for this process alone. Loading from the cache runs
    code, so nobody else may be able to write there.
    """
    chosen = os.environ.get("RINGPLANE_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    base = Path(chosen) if chosen else Path(home, "ringplane")
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = base.stat()
        ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if not ours or not os.access(base, os.W_OK | os.X_OK):
            raise PermissionError(base)
    except OSError:
        base = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        atexit.register(shutil.rmtree, base, ignore_errors=True)
    return base / version_folder()


def remove_temporary_cache() -> None:
    """Do what else is done at the process's exit; everything that will be called has been loaded."""
    base = cache_directory().parent
    if base.name.startswith(TEMPORARY):
        shutil.rmtree(base, ignore_errors=True)


def forget_old_versions() -> None:
    """Keep the cache folders of the newest few versions; older ones are never read again."""
    current = cache_directory()
    versions = [entry for entry in current.parent.iterdir() if FOLDER.fullmatch(entry.name) and entry != current]
    versions.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in versions[KEPT_VERSIONS - 1 :]:
        shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def numba_cache_directory() -> Iterator[None]:
    """Numba reads its setting when a function is decorated; a program that embeds us keeps its own setting."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_directory())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


class _Compiled:
    """A compiled function: a part of each compiled function that calls it, a whole of its own for Python."""

    # Workers begin at the same time, and Numba's setting is the whole process's.
    _making = threading.Lock()

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._part = part(function)
        self._numba_type_ = PartType(self._part)
        self._whole: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        return self.whole()(*args)

    def whole(self) -> Any:
        """Few functions are called from Python, and for each of them Numba looks for its cache on disk."""
        return self._whole or self._make_whole()

    def _make_whole(self) -> Any:
        with self._making, numba_cache_directory():
            if self._whole is None:
                self._whole = whole(self.__wrapped__, cache=True)  # type: ignore[attr-defined]
            return self._whole


def compiled(function: Function) -> Function:
    """Compile `function` on its first call, or load it from the cache; it runs without the GIL and never raises.

    Division by zero gives NumPy's result instead of an exception, so no path out of compiled code needs the GIL.
    """
    return _Compiled(function)  # type: ignore[return-value]


def load(function: Callable[..., Any], *args: Any) -> None:
    """Compile, or load from the cache, what a call of a compiled function with such arguments will run."""
    dispatcher: Any = function.whole() if isinstance(function, _Compiled) else function
    dispatcher.compile(tuple(map(numba.typeof, args)))


def is_cached() -> bool:
    """Whether a data plane compiled from these very sources is on disk (a start will be fast)."""
    return any(cache_directory().rglob("loop.run-*.nbc"))
