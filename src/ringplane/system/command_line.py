"""What other users of this machine see of the command line of this process, in ps(1) and /proc/PID/cmdline."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# Of /proc/self/stat, after the name in parentheses: where the arguments begin and end, arg_start and arg_end (proc(5)).
BEGIN, END = 45, 46

HIDDEN = "x"


def hide(text: str) -> None:
    """Overwrite this text in the arguments, as far as that is possible: without /proc they stay as they are."""
    secret = os.fsencode(text)
    try:
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        begin, end = int(fields[BEGIN]), int(fields[END])
    except (OSError, ValueError, IndexError):
        return
    if not secret or not 0 < begin < end:
        return
    arguments = ctypes.string_at(begin, end - begin)
    place = arguments.find(secret)
    while place >= 0:
        ctypes.memset(begin + place, ord(HIDDEN), len(secret))
        place = arguments.find(secret, place + len(secret))
