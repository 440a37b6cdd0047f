"""The registry of request types that are units of their own; docs/hacking.md says how to add one."""

from __future__ import annotations

from collections.abc import Mapping

from ringplane.compiler.units import Unit

# By the number in the header: the unit that begins a request of this type, and the one that is called before the
# request is answered, if there is one. See REQUEST_TYPE in state.py.
RequestTypes = Mapping[int, tuple[Unit, Unit | None]]

# Those of all disks. Those of some disks come with their layers (zone_requests.py).
EVERY_DISK: RequestTypes = {}
