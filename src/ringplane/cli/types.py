"""Types of the options' values, parsed by `ringplane.options.values`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ringplane.options.values import (
    check_cpus,
    parse_cpus,
    parse_feature,
    parse_group,
    parse_mode,
    parse_poll_us,
    parse_seconds,
    parse_size,
    parse_user,
    parse_zones,
)


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """The type of values that `parse` returns for a text; its ValueError is the error message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _usable_cpus(text: str) -> frozenset[int]:
    cpus = parse_cpus(text)
    check_cpus(cpus)
    return cpus


# The shell completes it; the code that opens the file checks whether it exists.
FILE = click.Path(readable=False, path_type=Path)
FOLDER = click.Path(file_okay=False, readable=False, path_type=Path)
SIZE = Parsed("size", parse_size)
SECONDS = Parsed("seconds", lambda text: parse_seconds(text, 0.01))
WARM_UP = Parsed("seconds", lambda text: parse_seconds(text, 0))
CPUS = Parsed("list", _usable_cpus)
FEATURE = Parsed("feature", parse_feature)
ZONES = Parsed("zones", parse_zones)
MODE = Parsed("mode", parse_mode)
GROUP = Parsed("group", parse_group)
USER = Parsed("user", parse_user)
POLL_TIME = Parsed("time", parse_poll_us)
