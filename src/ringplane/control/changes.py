"""What was changed at run time: how the disks of a process differ from those that were described at its start.

The next process begins with the same changes: after `--upgrade` (handover.py carries them). A disk is recognised by the
path of its socket.

What the next process is started with counts for the disks that it describes, as far as they were not changed: it may be
another file. For a disk that was added at run time what runs counts, unless the disk is described now.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ringplane.control.planned import Planned, place
from ringplane.control.spreading import spread
from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import DiskConfig, named
from ringplane.options.limit_options import Limits
from ringplane.options.policy_options import policies_from_tables
from ringplane.options.process_rules import check_process
from ringplane.options.thread_options import IoThread

# The keys of a [[disk]] table.
Table = Mapping[str, Any]

# Gets the table of a disk that was added and cannot be served now, and why; it may raise that.
Unusable = Callable[[Table, WrongOptions], None]


@dataclass(frozen=True, slots=True)
class Changes:
    """All changes of a process. `limits`, `names`, `paused` and `policies` are of all disks, by their places."""

    added: Sequence[Table] = field(default_factory=list)
    # Places of disks that were described, and were removed at run time.
    removed: Sequence[str] = field(default_factory=list)
    # Those that were changed at run time.
    limits: Mapping[str, Limits] = field(default_factory=dict)
    # The names of disks that were described; they may have been given none.
    names: Mapping[str, str] = field(default_factory=dict)
    paused: Sequence[str] = field(default_factory=list)
    # The tables of all policies of disks whose policies were changed at run time.
    policies: Mapping[str, Sequence[Table]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, saved: Any) -> Self:
        """Raises ValueError. What is missing has not been changed."""
        if not isinstance(saved, dict):
            raise ValueError("the changes are not an object")
        return cls(**{name: _checked(name, saved[name], kind, of) for name, kind, of in FORM if name in saved})

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name, *_ in FORM}


# The fields, and what each has of what.
FORM = (
    ("added", list, dict),
    ("removed", list, str),
    ("limits", dict, dict),
    ("names", dict, str),
    ("paused", list, str),
    ("policies", dict, list),
)


def _checked(name: str, value: Any, kind: type, of: type) -> Any:
    each = value.values() if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(one, of) for one in each):
        raise ValueError(f"{name} is not a {kind.__name__} of {of.__name__}")
    return value


def place_of(table: Table) -> str:
    """As `place`."""
    return os.path.realpath(str(table.get("socket-path", "")))


def without(changes: Changes, where: str) -> Changes:
    """Without the disk that was added with this place."""
    return dataclasses.replace(
        changes,
        added=[table for table in changes.added if place_of(table) != where],
        paused=[each for each in changes.paused if each != where],
    )


def refuse(_: Table, error: WrongOptions) -> None:
    """For those who serve all disks or none."""
    raise error.of("a disk that was added at run time: ")


def plan(
    disks: Sequence[DiskConfig], changes: Changes, io_threads: Sequence[IoThread], unusable: Unusable
) -> list[Planned]:
    """The disks that are described and were not removed, then those that were added. Each has a name.

    Raises WrongOptions if the described ones do not fit together as they were changed, and what `unusable` raises.
    """
    configs = _described(disks, changes)
    rules = check_process(configs, io_threads, least=0)
    count, places = len(configs), set(map(place, configs))
    for table in changes.added:
        try:
            config = _read_added(table, changes, io_threads, configs)
            if place(config) in places:
                continue
            for error in rules.add_disk(f"disk {config.name}", config):
                raise error
            configs.append(config)
        except WrongOptions as error:
            unusable(table, error)
    return [
        Planned(
            config,
            number >= count,
            place(config) in changes.limits,
            place(config) in changes.paused,
            place(config) in changes.policies,
        )
        for number, config in enumerate(named(configs))
    ]


def _described(disks: Sequence[DiskConfig], changes: Changes) -> list[DiskConfig]:
    """These disks as they were changed, without those that were removed. Raises WrongOptions."""
    return [
        _changed(dataclasses.replace(disk, name=disk.name or changes.names.get(place(disk))), changes)
        for disk in disks
        if place(disk) not in changes.removed
    ]


def _read_added(
    table: Table, changes: Changes, io_threads: Sequence[IoThread], others: Sequence[DiskConfig]
) -> DiskConfig:
    """A disk that was added. If it has I/O threads that do not exist any more, others serve it. Raises WrongOptions."""
    # Not at every start.
    from ringplane.control.config import ConfigError, read_disk

    names, wanted = [thread.name for thread in io_threads], table.get("io-threads")
    if not isinstance(wanted, Sequence) or any(name not in names for name in wanted):
        table = {key: value for key, value in table.items() if key != "io-threads"}
    try:
        return _changed(read_disk(table, spread(io_threads, others)), changes)
    except ConfigError as error:
        raise WrongOptions("{problem}", problem=error) from None


def _changed(config: DiskConfig, changes: Changes) -> DiskConfig:
    """Raises WrongOptions."""
    limits, policies = changes.limits.get(place(config)), changes.policies.get(place(config))
    if limits is not None:
        config = dataclasses.replace(config, limits=limits)
    if policies is None:
        return config
    try:
        return dataclasses.replace(config, policy=policies_from_tables(policies))
    except ValueError as error:
        raise WrongOptions("policy: {problem}", problem=error) from None
