"""Exceptions that end a bench early; a signal raises ringplane.system.signals.Interrupted instead."""

from __future__ import annotations


class BenchError(Exception):
    """The bench cannot be done; the text is a message for the user."""


def never() -> None:
    """A callback that does nothing."""
