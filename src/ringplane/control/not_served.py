"""Disks that were added to a previous process and cannot be served now: what users see of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ringplane.control.changes import Table, place_of
from ringplane.options.image_address import shown_image

# What can be done about it.
ADVICE = "the next start tries again, unless the disk is removed"


@dataclass(frozen=True, slots=True)
class NotServed:
    """Such a disk; `image` is a path, or an address without secrets."""

    name: str
    image: str
    socket: str
    why: str


def not_served(table: Table, because: Mapping[str, str]) -> NotServed:
    """The disk of this table; `because` has the reasons by the places of disks."""
    image, socket = shown_image(str(table.get("image"))), str(table.get("socket-path"))
    return NotServed(str(table.get("name")), image, socket, because.get(place_of(table), ""))
