"""A number of things, in words."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 cell`, `2 cells`."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
