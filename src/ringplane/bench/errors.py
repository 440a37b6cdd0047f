"""Exceptions that end a bench early."""

from __future__ import annotations


class BenchError(Exception):
    """The bench cannot be done; the text is a message for the user."""


class Interrupted(Exception):
    """A signal asked for the end. It is raised only where the bench asks for signals, so nothing is left half made."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.number = number


def never() -> None:
    """Nothing interrupts this bench."""
