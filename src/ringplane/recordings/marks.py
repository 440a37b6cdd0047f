"""Marks from inside a guest: a write of one block that begins with the token of the recording, and then has a text."""

from __future__ import annotations

import os

# Of a token, in bytes: compiled code compares whole 64-bit words.
TOKEN_SIZE = 32

# A longer write is not looked at.
LARGEST_MARK = 4096


def new_token() -> str:
    """One that no guest writes by accident."""
    return f"RINGPLANE-MARK-{os.urandom(8).hex()}:"
