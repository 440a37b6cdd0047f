"""Exceptions that end a bench early; a signal does it by ringplane.signals.Interrupted."""

from __future__ import annotations


class BenchError(Exception):
    """The bench cannot be done; the text is a message for the user."""


def never() -> None:
    """Nothing interrupts this bench."""
