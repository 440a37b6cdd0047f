"""Keys of a terminal, one by one and without an echo."""

from __future__ import annotations

import contextlib
import os
import re
import termios
import tty
from collections.abc import Iterator

# A key that sends more than a character begins with ESC (console_codes(4)).
KEY = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|[^\x1b]")

NAMES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"k": "up",
    b"j": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b" ": "page down",
    b"\x1b[H": "home",
    b"\x1bOH": "home",
    b"\x1b[1~": "home",
    b"g": "home",
    b"\x1b[F": "end",
    b"\x1bOF": "end",
    b"\x1b[4~": "end",
    b"G": "end",
}


@contextlib.contextmanager
def keys_of(fd: int) -> Iterator[None]:
    """Have keys sent at once and not shown. Ctrl-Z does nothing: the screen would stay as it is."""
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd, termios.TCSANOW)
    attributes = termios.tcgetattr(fd)
    attributes[6][termios.VSUSP] = os.fpathconf(fd, "PC_VDISABLE").to_bytes(1, "little")
    termios.tcsetattr(fd, termios.TCSANOW, attributes)
    try:
        yield
    finally:
        # The terminal may have gone.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)


def pressed(data: bytes) -> list[str]:
    """The names of the keys that have sent this: a letter, or for example `page down`."""
    return [NAMES.get(key, key.decode("latin-1")) for key in KEY.findall(data)]
