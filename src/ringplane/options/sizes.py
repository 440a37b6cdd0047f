"""Numbers of bytes, as users write and read them."""

from __future__ import annotations

from typing import Any

from ringplane.options.kinds import Kind, shown

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
UNIT_NAMES = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def parse_size(text: str) -> int:
    """A number of bytes, with a suffix K, M, G or T for powers of 1024: `10G`, `1.5M`, `4096`. Raises ValueError."""
    short = text.strip().upper().removesuffix("IB").removesuffix("B")
    number, unit = (short[:-1], short[-1]) if short[-1:] and short[-1:] in UNITS else (short, "")
    try:
        size = int(float(number) * UNITS[unit]) if "." in number else int(number) * UNITS[unit]
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; examples: 512M, 10G, 4096") from None
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return size


def format_size(size: int) -> str:
    """A number of bytes in the largest unit of which it has one, with up to two decimals: `64 MiB`, `1.5 GiB`."""
    number, units = float(size), iter(UNIT_NAMES)
    unit = next(units)
    while round(number, 2) >= 1024:
        number, unit = number / 1024, next(units)
    return f"{number:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def _from_toml(value: Any) -> int:
    return parse_size(value) if isinstance(value, str) else _checked(value)


def _checked(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f'{shown(value)} is not a size; examples: "512M", "10G", 4096')
    if value <= 0:
        raise ValueError(f"{value} is not a positive size")
    return value


SIZE = Kind("SIZE", parse_size, _from_toml, _checked, json_types=("integer", "string"))
