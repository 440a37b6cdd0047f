"""Whether this process has given up the right to open files (control/sandbox.py), which is for good."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ringplane.system.seccomp import Only

_confined = False

# System calls that are kept beside those of any process, because of disks that it has; None: with any arguments.
_kept: dict[str, Only | None] = {}
# And TCP ports to which it may connect.
_kept_ports: set[int] = set()


def keep(calls: Mapping[str, Only | None], ports: Collection[int] = ()) -> None:
    """Keep these too, if it is not confined yet: what a disk uses makes them, for example the threads of a library.

    Threads that start later may connect to these TCP ports only.
    """
    for name, how in calls.items():
        _kept[name] = _either(_kept[name], how) if name in _kept else how
    _kept_ports.update(ports)


def kept_ports() -> Collection[int]:
    """All of those."""
    return _kept_ports


def _either(one: Only | None, other: Only | None) -> Only | None:
    """What two disks need; both limit the same argument."""
    if one is None or other is None:
        return None
    return Only(one.argument, {*one.values, *other.values}, one.mask)


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
