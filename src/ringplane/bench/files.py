"""The files that a bench writes. They are checked before measuring and replaced when the new text is complete."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ringplane.bench.errors import BenchError


def check(path: Path) -> None:
    """Raise BenchError unless a file can be written at `path`."""
    if path.exists() and not path.is_file():
        raise BenchError(f"{path}: is not a regular file; name another file")
    if not path.parent.is_dir():
        raise BenchError(f"{path}: the directory {path.parent} does not exist; create it first")
    _check_writable(path, path.parent)


def check_directory(path: Path) -> None:
    """Raise BenchError unless files can be written in a directory, which need not exist yet."""
    nearest = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise BenchError(f"{path}: {nearest} is not a directory; name another directory")
    _check_writable(path, nearest)


def _check_writable(path: Path, directory: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror}; name another place") from None


def write(path: Path, text: str) -> None:
    """Write a file; an existing one is replaced when the new text is complete. Raises BenchError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
