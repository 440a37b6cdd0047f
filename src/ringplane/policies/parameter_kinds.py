"""What a parameter may be: how a text of the command line, or a value of TOML or JSON, becomes a number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ringplane.engines.common import (
    DISCARD,
    FLUSH,
    READ,
    SECURE_ERASE,
    WRITE,
    ZERO,
    ZONE_APPEND,
    ZONE_CLOSE,
    ZONE_FINISH,
    ZONE_OPEN,
    ZONE_REPORT,
    ZONE_RESET,
    ZONE_RESET_ALL,
)
from ringplane.options.sizes import parse_size
from ringplane.policies.io_view import ANY

Number = int | float
# A range is the first byte and the one after the last; a text is the path of a file.
Value = int | float | tuple[int, int] | str

OPERATIONS = {
    "any": ANY,
    "read": READ,
    "write": WRITE,
    "flush": FLUSH,
    "discard": DISCARD,
    "write-zeroes": ZERO,
    "secure-erase": SECURE_ERASE,
    "zone-append": ZONE_APPEND,
    "zone-report": ZONE_REPORT,
    "zone-open": ZONE_OPEN,
    "zone-close": ZONE_CLOSE,
    "zone-finish": ZONE_FINISH,
    "zone-reset": ZONE_RESET,
    "zone-reset-all": ZONE_RESET_ALL,
}
# Microseconds.
DURATIONS = {"us": 1, "ms": 1000, "s": 1_000_000, "min": 60_000_000, "h": 3_600_000_000}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
MOST = (1 << 63) - 1


@dataclass(frozen=True)
class ParameterKind:
    """`read` makes a value of a text, and raises ValueError; `what` is what a wrong text is not."""

    name: str
    what: str
    read: Callable[[str], Value]
    # How a value is written.
    shown: Callable[[Any], str] = str
    # The numbers that may be given without a text: of these types.
    numbers: tuple[type, ...] = (int,)
    # How many int64 a value has.
    count: int = 1
    # Of `one_of`.
    words: tuple[str, ...] = ()

    def value(self, given: object) -> Value:
        """What was given on the command line, in TOML, JSON or Python. Raises ValueError."""
        if isinstance(given, str):
            try:
                return self.read(given.strip())
            except (ValueError, KeyError, OverflowError):
                pass
        elif isinstance(given, int | float) and type(given) in self.numbers and abs(given) <= MOST:
            return float(given) if float in self.numbers else int(given)
        raise ValueError(f"{json.dumps(given, ensure_ascii=False, default=str)} is not {self.what}")


def _read_whole(text: str) -> int:
    number = int(text, 0)
    if abs(number) > MOST:
        raise ValueError
    return number


def _read_real(text: str) -> float:
    number = float(text)
    # Also for "nan".
    if not abs(number) <= MOST:
        raise ValueError
    return number


def _read_flag(text: str) -> int:
    if text.lower() not in TRUE + FALSE:
        raise ValueError
    return int(text.lower() in TRUE)


def _read_size(text: str) -> int:
    return 0 if text == "0" else parse_size(text)


def _read_duration(text: str) -> int:
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    time = float(digits) * DURATIONS[text[len(digits) :].strip() or "us"]
    if not 0 <= time <= MOST:
        raise ValueError
    return int(time)


def _show_duration(us: int) -> str:
    unit = next((unit for unit in ("s", "ms") if us and us % DURATIONS[unit] == 0), "us")
    return f"{us // DURATIONS[unit]}{unit}"


def _read_range(text: str) -> tuple[int, int]:
    if text == "all":
        return 0, MOST
    first, dash, end = text.partition("-")
    if not dash:
        raise ValueError
    place = _read_size(first or "0"), _read_size(end) if end else MOST
    if place[0] >= place[1]:
        raise ValueError
    return place


def _show_range(place: tuple[int, int]) -> str:
    if place == (0, MOST):
        return "all"
    return f"{place[0]}-{'' if place[1] == MOST else place[1]}"


def one_of(*names: str) -> ParameterKind:
    """One of these words; in the policy it is a number, counted from 0."""
    return replace(_words("one of", {name: number for number, name in enumerate(names)}), words=names)


def _words(name: str, numbers: Mapping[str, int]) -> ParameterKind:
    words = {number: word for word, number in numbers.items()}
    return ParameterKind(name, f"one of {', '.join(numbers)}", numbers.__getitem__, words.__getitem__, ())


WHOLE = ParameterKind("whole number", "a whole number", _read_whole)
REAL = ParameterKind("number", "a number", _read_real, "{:.15g}".format, (int, float))
FLAG = ParameterKind("yes or no", "yes or no", _read_flag, lambda flag: "yes" if flag else "no", (bool,))
SIZE = ParameterKind("size", "a size; examples: 512M, 64K, 4096", _read_size)
DURATION = ParameterKind("time", "a time; examples: 5ms, 20us, 1.5s", _read_duration, _show_duration)
OPERATION = _words("operation", OPERATIONS)
# The policy gets 1 if the file exists, or if there is no path, and else 0.
FILE = ParameterKind("file", "a path", str, numbers=())
RANGE = ParameterKind(
    "range", "a range of bytes; examples: 1M-2M, 64K-, all", _read_range, _show_range, numbers=(), count=2
)
