"""Lengths of time, as users write them."""

from __future__ import annotations

import math
from typing import Any

from ringplane.options.kinds import Kind, shown

MAX_POLL_US = 1_000_000

MAX_SECONDS = 86_400


def parse_poll_us(text: str) -> int | None:
    """Microseconds from 0 to MAX_POLL_US, or `always`, for which None is returned. Raises ValueError."""
    if text == "always":
        return None
    if not text.isascii() or not text.isdigit() or int(text) > MAX_POLL_US:
        raise ValueError(f"{text!r} is neither a number of microseconds from 0 to {MAX_POLL_US} nor always")
    return int(text)


def parse_seconds(text: str, lowest: float) -> float:
    """A number of seconds from `lowest` to MAX_SECONDS. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not lowest <= seconds <= MAX_SECONDS:
        raise ValueError(f"{text!r} is not a number of seconds from {lowest:g} to {MAX_SECONDS}")
    return seconds


def _poll_us_from_toml(value: Any) -> int | None:
    if type(value) is not int and not isinstance(value, str):
        raise ValueError(f'{shown(value)} is neither a number of microseconds nor "always"')
    return parse_poll_us(str(value))


def _check_poll_us(value: Any) -> None:
    if value is not None and type(value) is not int:
        raise ValueError(f"{shown(value)} is neither a number of microseconds nor None")
    if value is not None:
        parse_poll_us(str(value))


def _poll_us_to_toml(value: int | None) -> int | str:
    return "always" if value is None else value


POLL_TIME = Kind(
    "N|always",
    parse_poll_us,
    _poll_us_from_toml,
    _check_poll_us,
    to_toml=_poll_us_to_toml,
    json_types=("integer", "string"),
)
