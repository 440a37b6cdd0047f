"""The registry of request types that are units of their own; docs/hacking.md says how to add one."""

from __future__ import annotations

from ringplane.dataplane.state import RequestTypes

# Those of all disks. Those of some disks come with their layers (zone_requests.py).
EVERY_DISK: RequestTypes = {}
