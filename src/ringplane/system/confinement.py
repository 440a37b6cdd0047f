"""Whether this process has given up the right to open files (control/sandbox.py), which is for good."""

from __future__ import annotations

_confined = False


def is_confined() -> bool:
    """What has to open a file by path need not be tried then."""
    return _confined


def set_confined() -> None:
    """It gives up the right now."""
    global _confined
    _confined = True
