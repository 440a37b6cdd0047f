"""The name of a disk: in log lines, in trace events, and wherever a running process is asked about the disk."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Any

from ringplane.options.declare import Options, option
from ringplane.options.image_address import ImageAddress
from ringplane.options.kinds import Kind, check_text, shown, text_from_toml

LONGEST_NAME = 64

# It is a part of paths, of URLs for example: no name is `..`, and none has to be quoted.
ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]+")


def parse_disk_name(text: str) -> str:
    """Raises ValueError unless a disk can have this name."""
    check_text(text)
    if len(text) > LONGEST_NAME or not ALLOWED.fullmatch(text):
        raise ValueError(
            f"{shown(text)} cannot be the name of a disk: up to {LONGEST_NAME} letters (a to z), digits and ._- are "
            "possible, beginning with a letter or digit"
        )
    return text


def _from_toml(value: Any) -> str:
    return parse_disk_name(text_from_toml(value))


class NameOptions(Options):
    """What a disk is called."""

    name: str | None = option(
        Kind("NAME", parse_disk_name, _from_toml, parse_disk_name),
        default=None,
        help="Name in log lines [default: from the file name of the image].",
        doc="its name in log lines: up to 64 letters, digits and `._-`, beginning with a letter or digit; no two disks "
        "have the same",
        doc_default="the file name of the image without its suffix; if that is taken, with `-2`, `-3`, ... added",
    )


def default_name(image: ImageAddress, taken: Container[str] = ()) -> str:
    """The name of a disk without this option, while others have the names that are `taken`."""
    name = NOT_ALLOWED.sub("-", image.stem).lstrip("._-")[:LONGEST_NAME] or "disk"
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name[: LONGEST_NAME - len(f'-{number}')]}-{number}"
    return found


def default_names(images: Iterable[ImageAddress], given: Iterable[str | None]) -> list[str]:
    """The names of disks with these images; those that are given come before all defaults."""
    names = list(given)
    taken = {name for name in names if name is not None}
    found = []
    for image, name in zip(images, names, strict=True):
        found.append(default_name(image, taken) if name is None else name)
        taken.add(found[-1])
    return found
