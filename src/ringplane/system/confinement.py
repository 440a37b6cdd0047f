"""Whether this process has given up the right to open files (control/sandbox.py), which is for good."""

from __future__ import annotations

from collections.abc import Mapping

from ringplane.system.seccomp import Only

_confined = False

# System calls that are kept beside those of any process, because of disks that it has; None: with any arguments.
_kept: dict[str, Only | None] = {}


def keep(calls: Mapping[str, Only | None]) -> None:
    """Keep these too, if it is not confined yet: what a disk uses makes them, for example the threads of a library."""
    _kept.update(calls)


def kept() -> Mapping[str, Only | None]:
    """All of those."""
    return _kept


def is_confined() -> bool:
    """What has to open a file by path need not be tried then."""
    return _confined


def set_confined() -> None:
    """It gives up the right now."""
    global _confined
    _confined = True
