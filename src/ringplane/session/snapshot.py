"""The state of a front end that a process hands to its successor, which resumes it unnoticed.

All of it is plain values and fds (`Fd`), which control/handover.py sends. The fds stay their owner's: the process that
resumes a front end duplicates them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ringplane.system.fd import Fd


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """`size` bytes of a file from `offset`."""

    fd: Fd
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """Guest memory, with its addresses in the guest and in the front end."""

    guest_address: int
    user_address: int
    memory: MemoryPart


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """All memory that a front end shares. `inflight` is the fields of an Inflight."""

    regions: list[SharedRegion]
    log: MemoryPart | None
    inflight: list[int] | None
    inflight_fd: Fd | None

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        values = dict(saved)
        values["regions"] = [
            SharedRegion(each["guest_address"], each["user_address"], MemoryPart(**each["memory"]))
            for each in saved["regions"]
        ]
        values["log"] = MemoryPart(**saved["log"]) if saved["log"] else None
        return cls(**values)


@dataclass(frozen=True, slots=True)
class VringSnapshot:
    """The state of a stopped ring, which resumes at `base`.

    `address` is the fields of a VringAddr; `broken` the rule that the driver broke, or 0.
    """

    size: int
    base: int
    address: list[int] | None
    kick: Fd | None
    call: Fd | None
    err: Fd | None
    enabled: bool
    call_set: bool
    broken: int


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """A front end. `unfinished`, with its fds, is what has arrived of its next message."""

    socket: Fd
    unfinished: bytes
    unfinished_fds: list[Fd]
    features: int
    features_refused: bool
    protocol_features: int
    status: int
    write_back: bool
    memory: MemorySnapshot
    channel: Fd | None
    vrings: list[VringSnapshot]

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """Decode a JSON object in which `Fd`s and bytes have been decoded already. Raises TypeError and KeyError."""
        values = dict(saved)
        values["memory"] = MemorySnapshot.from_json(saved["memory"])
        values["vrings"] = [VringSnapshot(**each) for each in saved["vrings"]]
        return cls(**values)
