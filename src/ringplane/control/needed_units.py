"""The compiled units (compiler/units.py) that a process needs for its I/O threads and its disks."""

from __future__ import annotations

from collections.abc import Iterable

from ringplane.compiler.units import Unit, known
from ringplane.control.opening import Parts
from ringplane.dataplane import limit_gate
from ringplane.dataplane.disk_figures import read_disk
from ringplane.dataplane.request_types import request_types_of, units_of_types
from ringplane.engines.choose_engine import WORKER_ENGINES, units_of
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread


def units_of_threads(io_threads: Iterable[IoThread]) -> list[Unit]:
    """Those that sleep and do the I/O of files."""
    return [unit for thread in io_threads for unit in units_of(thread.engine)]


def units_of_parts(parts: Parts) -> list[Unit]:
    """Those of the source and layers of a disk."""
    return [
        *parts.source.units,
        *(unit for layer in parts.layers for unit in layer.units),
        *units_of_types(request_types_of(parts.layers)),
    ]


def units_of_limits(disks: Iterable[DiskConfig]) -> list[Unit]:
    """Those of the limits of these disks."""
    return [*limit_gate.UNITS] if any(disk.limits for disk in disks) else []


def units_of_metrics() -> list[Unit]:
    """What reads the counters of disks."""
    return [read_disk]


def units_of_any_disk() -> list[Unit]:
    """Those that disks which are added later may need."""
    engines = {unit for engine in WORKER_ENGINES.values() for unit in engine.units}
    return [unit for unit in known.values() if unit not in engines]
