"""A process's information about itself in /proc (proc(5)), which is not mounted in some jails."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SELF = Path("/proc/self")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def warn_if_missing() -> None:
    """Log one line if /proc is not mounted; each function of this file documents what it returns then."""
    if not os.path.exists(SELF):
        log.warning(
            "/proc is not mounted: threads outside the sandbox and writable code are not detected; the compiler's "
            "memory is not released; a zoned disk whose process is killed loses what was not flushed"
        )


def open_file(fd: int) -> Path:
    """A path that opens the file of `fd` again, even if it was renamed; without /proc it does not exist."""
    return SELF / "fd" / str(fd)


def kind_of(fd: int) -> str:
    """The kind of `fd` as /proc shows it, for example `anon_inode:[eventfd]`; empty without /proc."""
    try:
        return os.readlink(open_file(fd))
    except FileNotFoundError:
        return ""


def mappings() -> Iterator[tuple[int, int, str, str]]:
    """The mappings of this process: start, end, permissions and the file's path; nothing without /proc."""
    with contextlib.suppress(OSError), open(SELF / "maps", encoding="utf-8", errors="replace") as maps:
        for fields in map(str.split, maps):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            yield start, end, fields[1], fields[-1]


def other_threads() -> int:
    """How many other threads this process has, including those not started by Python; 0 without /proc."""
    try:
        return len(os.listdir(SELF / "task")) - 1
    except FileNotFoundError:
        return 0


def boot_id() -> bytes:
    """The boot id, which changes with each start of the machine (random(4)); empty without /proc.

    It is read once, because a process that has given up its rights cannot read it.
    """
    return _content(BOOT_ID)


@cache
def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except FileNotFoundError:
        return b""
