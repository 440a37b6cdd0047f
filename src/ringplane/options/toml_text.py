"""Options as the text of a configuration file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringplane.options.declare import Options, declared
from ringplane.options.kinds import shown


def table(header: str, options: Options) -> str:
    """A table of a file."""
    return "\n".join([header, *(f"{key} = {toml(value)}" for key, value in keys(options).items())]) + "\n"


def keys(options: Options) -> dict[str, Any]:
    """The keys whose values are not the defaults, with values as TOML and JSON have them; paths are absolute."""
    found = {}
    for name, option in declared(type(options)).items():
        value = getattr(options, name)
        if option.doc and value != option.default:
            found[option.key] = option.kind.to_toml(option.kind.with_paths(absolute, value))
    return found


def absolute(path: Path) -> Path:
    """As files name it that may be read elsewhere."""
    return Path(os.path.abspath(path))


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return shown(value)
