"""What is wrong with compiled code, as one line with file and line number."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

# Numba repeats this line for each function that leads to the mistake.
PIPELINE = re.compile(r"^Failed in .* pipeline \(step: .*\)\n", re.MULTILINE)
# The first place in the message is the innermost one.
PLACE = re.compile(r'\bat (\S.*?) \((\d+)\)$|^File "(.+?)", line (\d+)', re.MULTILINE)
END = re.compile(r"^(There are \d|During: |File \")", re.MULTILINE)


class BadCode(RuntimeError):
    """Compiled code has mistakes; the message has one line for each."""


@contextlib.contextmanager
def bad_code() -> Iterator[None]:
    """Turn Numba's error, often hundreds of lines, into BadCode."""
    from numba.core.errors import NumbaError

    try:
        yield
    except NumbaError as error:
        raise BadCode(in_one_line(str(error))) from None


def in_one_line(text: str) -> str:
    """The place and the message of the innermost error in a message of Numba."""
    text = PIPELINE.sub("", text)
    message = " ".join(END.split(text)[0].split())
    place = PLACE.search(text)
    if place is None:
        return message
    path, line = (place[1], place[2]) if place[1] else (place[3], place[4])
    return f"{path}:{line}: {message}"
