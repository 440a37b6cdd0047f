"""Sets of CPUs, as users write and read them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ringplane.options.kinds import Kind, shown

CPU_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", re.ASCII)


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs in the format of taskset(1): `2`, `2-3`, `0,2-3`. Raises ValueError."""
    cpus: set[int] = set()
    for part in text.split(","):
        found = CPU_RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(f"{text!r} is not a list of CPUs; examples: 2, 2-3, 0,2-3")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def check_cpus(cpus: Any) -> None:
    """Raises ValueError unless these are numbers of CPUs, on all of which this process may run."""
    if not isinstance(cpus, Collection) or not all(type(cpu) is int for cpu in cpus):
        raise ValueError(f"{shown(cpus)} is not a set of CPUs; an example: {{2, 3}}")
    allowed = os.sched_getaffinity(0)
    if not cpus:
        raise ValueError(f"no CPU is named; this process may use {format_cpus(allowed)}")
    if not allowed.issuperset(cpus):
        raise ValueError(
            f"CPU {format_cpus(set(cpus) - allowed)} is not available to this process, "
            f"which may use {format_cpus(allowed)}"
        )


def format_cpus(cpus: Iterable[int]) -> str:
    """The CPUs in the format of `parse_cpus`, as short as possible."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _usable(text: str) -> frozenset[int]:
    cpus = parse_cpus(text)
    check_cpus(cpus)
    return cpus


def _from_toml(value: Any) -> frozenset[int]:
    if isinstance(value, str):
        return _usable(value)
    if not isinstance(value, list) or not all(type(cpu) is int for cpu in value):
        raise ValueError(f'{shown(value)} is not a list of CPUs; examples: [2, 3], "2-3"')
    check_cpus(value)
    return frozenset(value)


def _check_each(sets: Any) -> None:
    if not isinstance(sets, Sequence):
        raise ValueError(f"{shown(sets)} is not a list of sets of CPUs; an example: [{{2, 3}}]")
    for cpus in sets:
        check_cpus(cpus)


CPUS = Kind("LIST", _usable, _from_toml, check_cpus, to_toml=sorted, json_types=("array", "string"))
# Of several threads; on the command line an option for each of them.
CPU_SETS = Kind("LIST", _usable, check=_check_each)
