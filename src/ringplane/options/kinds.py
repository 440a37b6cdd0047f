"""What the value of an option may be, however it is given: on the command line, in TOML, or in Python."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def shown(value: object) -> str:
    """Nearly as in TOML."""
    return json.dumps(value, ensure_ascii=False, default=str)


def suggestion(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: what was probably meant, or the list of what there is."""
    import difflib

    near = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {shown(near[0])}?" if near else f"; possible are {', '.join(map(shown, names))}"


def text_from_toml(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise ValueError(f"{shown(value)} is not a printable text in quotation marks")
    return value


def check_text(value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a text")


def _same(value: Any) -> Any:
    """For values that TOML has too."""
    return value


class Kind:
    """A kind of values; a text unless the arguments say otherwise.

    Its functions raise a ValueError that says what is wrong and what is right.
    """

    def __init__(
        self,
        metavar: str = "TEXT",
        parse: Callable[[str], Any] = str,
        from_toml: Callable[[Any], Any] = text_from_toml,
        check: Callable[[Any], object] = check_text,
        to_toml: Callable[[Any], Any] = _same,
        json_types: tuple[str, ...] = ("string",),
        with_paths: Callable[[Callable[[Path], Path], Any], Any] | None = None,
    ) -> None:
        """`parse` converts a text of the command line, which shows `metavar` for it, and `from_toml` a value of TOML.

        `check` is for values that a program gives, which may be of any type; `to_toml` is the inverse of `from_toml`,
        whose argument is of one of `json_types`. If values contain paths, `with_paths(change, value)` is the value with
        each path changed.
        """
        self.metavar = metavar
        self.parse, self.from_toml, self.check = parse, from_toml, check
        self.to_toml, self.json_types, self._with_paths = to_toml, json_types, with_paths
        self.has_paths = with_paths is not None

    def with_paths(self, change: Callable[[Path], Path], value: Any) -> Any:
        """A value with each path in it changed."""
        return value if self._with_paths is None else self._with_paths(change, value)


class OneOf(Kind):
    """One of some words or numbers."""

    def __init__(self, *choices: int | str) -> None:
        self.choices = {str(choice): choice for choice in choices}
        super().__init__("", self.choices.__getitem__, self._checked, self._checked)

    def _checked(self, value: Any) -> Any:
        # Not by equality alone: true is 1 to Python.
        choices = self.choices.values()
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{shown(value)} is not one of {', '.join(map(shown, choices))}")
        return value


class Whole(Kind):
    """A whole number in a range."""

    def __init__(self, lowest: int, highest: int) -> None:
        self.lowest, self.highest = lowest, highest
        super().__init__("", int, self._checked, self._checked, json_types=("integer",))

    def _checked(self, value: Any) -> Any:
        if type(value) is not int or not self.lowest <= value <= self.highest:
            raise ValueError(f"{shown(value)} is not a whole number from {self.lowest} to {self.highest}")
        return value


def _checked_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value


def list_from_toml(value: Any, of: str, example: str = "") -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{shown(value)} is not a list of {of}{example}")
    return value


def _names_from_toml(value: Any) -> list[str]:
    return [text_from_toml(name) for name in list_from_toml(value, "names", '; example: ["io0", "io1"]')]


def _check_names(value: Any) -> None:
    _check_list(value, check_text, "names")


def _check_path(value: Any) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{shown(value)} is not a path")


def _check_paths(value: Any) -> None:
    _check_list(value, _check_path, "paths")


def _check_list(value: Any, check: Callable[[Any], None], what: str) -> None:
    # A text is a sequence too.
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{shown(value)} is not a list of {what}")
    for each in value:
        check(each)


# On the command line it has no value.
FLAG = Kind(from_toml=_checked_flag, check=_checked_flag, json_types=("boolean",))
NAME = Kind()
NAMES = Kind(from_toml=_names_from_toml, check=_check_names, to_toml=list, json_types=("array",))


def _paths_from_toml(value: Any) -> tuple[Path, ...]:
    return tuple(map(Path, _names_from_toml(value)))


# In a configuration file a relative path starts at the folder of the file.
PATH = Kind(
    *("PATH", Path, lambda value: Path(text_from_toml(value)), _check_path),
    to_toml=str,
    with_paths=lambda change, path: change(path),
)
# On the command line each is given by itself.
PATHS = Kind(
    *("PATH", Path, _paths_from_toml, _check_paths),
    to_toml=lambda paths: list(map(str, paths)),
    json_types=("array",),
    with_paths=lambda change, paths: tuple(map(change, paths)),
)
