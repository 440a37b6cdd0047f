"""A file descriptor as a type of its own: among plain values it is distinct from a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Fd:
    """A file descriptor of this process, which stays its owner's."""

    number: int

    @classmethod
    def of(cls, number: int) -> Self | None:
        """None for -1."""
        return cls(number) if number >= 0 else None
