"""What many tests of processes begin with."""

from __future__ import annotations

from .served import serve

__all__ = ["serve"]
