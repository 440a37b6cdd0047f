"""The features of a disk that users can switch on and off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringplane.options.kinds import Kind, shown

# Features that users can switch (device/disk.py has the bit of each), and those that are off by default, because
# drivers that accept them pay for them.
FEATURES = (
    *("indirect-desc", "event-idx", "packed", "in-order", "order-platform", "notification-data", "ring-reset"),
    *("size-max", "seg-max", "geometry", "topology", "flush", "config-wce"),
    *("discard", "write-zeroes", "secure-erase", "lifetime"),
    *("status", "inband-notifications"),
)
OFF_BY_DEFAULT = ("in-order", "inband-notifications")


def parse_feature(text: str) -> tuple[str, bool]:
    """A feature's name, and whether to offer it: `packed=off`. Raises ValueError."""
    name, _, state = text.partition("=")
    if state not in ("on", "off"):
        raise ValueError(f"{text!r} is neither {name}=on nor {name}=off")
    check_feature(name)
    return name, state == "on"


def check_feature(name: str) -> None:
    """Raises ValueError unless this is the name of a feature that can be switched."""
    if name not in FEATURES:
        import difflib

        near = difflib.get_close_matches(str(name), FEATURES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the features are {', '.join(FEATURES)}"
        raise ValueError(f"{name!r} is not a feature that can be switched; {hint}")


def _from_toml(value: Any) -> dict[str, bool]:
    _check(value)
    switches: dict[str, bool] = value
    return switches


def _check(switches: Any) -> None:
    if not isinstance(switches, Mapping):
        raise ValueError(f"{shown(switches)} is not a table of features; example: {{ packed = false }}")
    for name, on in switches.items():
        check_feature(name)
        if not isinstance(on, bool):
            raise ValueError(f"{name}: {shown(on)} is neither true nor false")


# On the command line an option for each of them.
SWITCHES = Kind("NAME=on|off", parse_feature, _from_toml, _check, to_toml=dict, json_types=("object",))
