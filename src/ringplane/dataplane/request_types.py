"""The registry of request types that are units of their own; docs/hacking.md says how to add one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ringplane.compiler.units import Unit
from ringplane.dataplane import zone_requests
from ringplane.dataplane.state import RequestTypes

# Those of all disks, and those that come with a layer, by its name.
EVERY_DISK: RequestTypes = {}
OF_LAYER: dict[str, RequestTypes] = {"zoned": zone_requests.TYPES}


class Named(Protocol):
    """A layer, as far as it matters here."""

    @property
    def name(self) -> str: ...


def request_types_of(layers: Iterable[Named]) -> RequestTypes:
    """The request types of a disk with these layers."""
    types = dict(EVERY_DISK)
    for layer in layers:
        types |= OF_LAYER.get(layer.name, {})
    return types


def units_of_types(types: RequestTypes) -> list[Unit]:
    """What is compiled before a disk with these request types is served."""
    return [unit for pair in types.values() for unit in pair if unit is not None]
