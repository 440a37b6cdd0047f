"""The options of the layer `delay`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringplane.options.declare import Options, option
from ringplane.options.kinds import Kind, shown

MAX_DELAY_MS = 3_600_000
NAMES = ("read", "write", "flush")


@dataclass(frozen=True, slots=True)
class Delay:
    """By how many milliseconds each request takes longer."""

    read: float = 0
    write: float = 0
    flush: float = 0


def parse_delay(text: str) -> Delay:
    """`5`: all of them; `read=5,flush=20.5`: only those. Raises ValueError."""
    times: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().rpartition("=")
        if equals and name not in NAMES:
            raise ValueError(f"{part!r} is not one of read=MS, write=MS, flush=MS")
        times |= dict.fromkeys([name] if equals else NAMES, _milliseconds(value))
    return Delay(**times)


def _milliseconds(text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = -1
    if not 0 <= time <= MAX_DELAY_MS:
        raise ValueError(f"{text!r} is not a number of milliseconds from 0 to {MAX_DELAY_MS}")
    return time


def _check_delay(delay: Any) -> None:
    if not isinstance(delay, Delay):
        raise ValueError(f"{delay!r} is not a Delay")
    for time in (delay.read, delay.write, delay.flush):
        if type(time) not in (int, float):
            raise ValueError(f"{time!r} is not a number of milliseconds")
        _milliseconds(str(time))


def _from_toml(value: Any) -> Delay:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f'{shown(value)} is neither a number of milliseconds nor, for example, "read=5,flush=20"')
    return parse_delay(str(value))


def _to_toml(delay: Delay) -> str:
    return ",".join(f"{name}={getattr(delay, name)}" for name in NAMES)


class DelayOptions(Options):
    """How much longer requests take."""

    delay: Delay | None = option(
        Kind(
            "MS[,...]",
            parse_delay,
            _from_toml,
            _check_delay,
            to_toml=_to_toml,
            json_types=("number", "string"),
        ),
        default=None,
        help="Milliseconds by which requests take longer, for example 5, or read=5,write=10,flush=20.",
        doc='milliseconds by which reads, writes and flushes take longer: `5`, or `"read=5,flush=20"` for some of them',
        doc_default="0",
    )
