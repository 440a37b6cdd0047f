"""What `ringplane compile` does: all that any disk and any command may need is in a folder, or nothing new."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ringplane.compiler import cache
from ringplane.compiler.apart import compile_apart
from ringplane.dataplane.compile_data_plane import all_units
from ringplane.system.signals import NONE, Signals


class Incomplete(Exception):
    """Not all was compiled; the folder has no new files."""


def fill(folder: Path, cpu: str, signals: Signals = NONE) -> list[Path]:
    """Make the folder complete for this CPU; returns its files. Raises Incomplete, BadCode or Interrupted."""
    if not contents(folder, cpu):
        with _staging(folder) as staging:
            if source := next((each for each in cache.folders() if contents(each, cpu)), None):
                for path in contents(source, cpu):
                    shutil.copyfile(path, staging / path.name)
            else:
                compile_apart(cache.DATA_PLANE, signals, [unit.job for unit in all_units()], staging, cpu)
                compile_apart(cache.DRIVER, signals, [], staging, cpu)
            for path in contents(staging, cpu):
                # The marks come last. All users may read it.
                path.chmod(0o644)
                path.rename(folder / path.name)
    if found := contents(folder, cpu):
        return found
    raise Incomplete("not all was compiled")


def contents(folder: Path, cpu: str) -> list[Path]:
    """The files of everything for this CPU, the marks at the end; none if anything is missing."""
    names = [unit.file_name(cpu) for unit in all_units()]
    with contextlib.suppress(FileNotFoundError):
        for what in (cache.DATA_PLANE, cache.DRIVER):
            names += cache.names_of(folder, what, cpu)
        paths = [folder / name for name in dict.fromkeys(names)]
        if all(path.exists() for path in paths):
            return sorted(paths, key=lambda path: path.suffix == ".complete")
    return []


@contextlib.contextmanager
def made(folder: Path, mode: int) -> Iterator[None]:
    """A folder with this mode; if it was missing, it is removed after an exception. Raises cache.Unusable."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with _umask(0o777 & ~mode):
            cache.prepare(folder, mode)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for each in missing:
                each.rmdir()
        raise


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder on the same file system: what is interrupted leaves nothing in the real one."""
    cache.forget_abandoned(folder)
    with tempfile.TemporaryDirectory(prefix=cache.STAGING, dir=folder) as staging:
        yield Path(staging)
