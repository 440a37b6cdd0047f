"""Users, groups and file modes, as users write and read them."""

from __future__ import annotations

import grp
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ringplane.options.kinds import Kind, shown, text_from_toml

Entry = TypeVar("Entry")

# The highest user or group; the one above means none (chown(2)).
MAX_ID = (1 << 32) - 2

MODE_DIGITS = re.compile(r"0?[0-7]{3}", re.ASCII)


@dataclass(frozen=True, slots=True)
class User:
    """The user and group that a process changes to; `name` is what the user has written."""

    name: str
    uid: int
    gid: int


def parse_user(text: str) -> User:
    """`nobody`, `nobody:kvm` or `1000:1000`: a user, and a group unless it is the user's own. Raises ValueError."""
    name, _, group = text.partition(":")
    entry = _find(name, pwd.getpwnam, pwd.getpwuid)
    uid = entry.pw_uid if entry else _number(name, "user")
    if group:
        return User(text, uid, parse_group(group))
    if entry is None:
        raise ValueError(
            f"user {name} has no entry in the user database, so its group is unknown; give one, for example {name}:100"
        )
    return User(text, uid, entry.pw_gid)


def parse_group(text: str) -> int:
    """The number of a group: `kvm`, `109`. Raises ValueError."""
    found = _find(text, grp.getgrnam, grp.getgrgid)
    return found.gr_gid if found else _number(text, "group")


def format_group(number: int) -> str:
    """The name of a group, or its number if it has none."""
    found = _find(str(number), grp.getgrnam, grp.getgrgid)
    return found.gr_name if found else str(number)


def format_user(number: int) -> str:
    """The name of a user, or its number if it has none."""
    found = _find(str(number), pwd.getpwnam, pwd.getpwuid)
    return found.pw_name if found else str(number)


def parse_mode(text: str) -> int:
    """The permission bits of a file in octal, as chmod(1) has them: `0660`. Raises ValueError."""
    if not MODE_DIGITS.fullmatch(text):
        raise ValueError(f"{text!r} is not a file mode; it has three octal digits, for example 0660")
    return int(text, 8)


def _find(text: str, by_name: Callable[[str], Entry], by_number: Callable[[int], Entry]) -> Entry | None:
    try:
        return by_number(int(text)) if _is_number(text) else by_name(text)
    except (KeyError, OverflowError):
        return None


def _number(text: str, what: str) -> int:
    if not _is_number(text):
        raise ValueError(f"{what} {text!r} does not exist")
    if int(text) > MAX_ID:
        raise ValueError(f"{text} is too large for the number of a {what}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _group_from_toml(value: Any) -> int:
    return parse_group(str(value) if type(value) is int else text_from_toml(value))


def _mode_from_toml(value: Any) -> int:
    # Not a number: 660 without a prefix is decimal in TOML.
    if not isinstance(value, str):
        raise ValueError(f'{shown(value)} is not a file mode in quotation marks; an example: "0660"')
    return parse_mode(value)


def _check_group(value: Any) -> None:
    if type(value) is not int or not 0 <= value <= MAX_ID:
        raise ValueError(f"{shown(value)} is not the number of a group")


def _check_mode(value: Any) -> None:
    if type(value) is not int or not 0 <= value <= 0o777:
        given = oct(value) if type(value) is int else shown(value)
        raise ValueError(f"{given} is not a file mode, which is a number from 0 to 0o777")


GROUP = Kind("GROUP", parse_group, _group_from_toml, _check_group, json_types=("integer", "string"))
MODE = Kind("MODE", parse_mode, _mode_from_toml, _check_mode, to_toml="{:04o}".format)
