"""The policies of a disk, changed while guests run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ringplane.block.layers.policy_layer import UNITS
from ringplane.control.operation_errors import WrongState, WrongValue
from ringplane.dataplane.compile_data_plane import warm_up
from ringplane.device.disk import Disk
from ringplane.options.policy_options import PolicyUse, named_policies
from ringplane.policies.loading import LoadedPolicy, PolicyError, find_policy
from ringplane.policies.running import RunningPolicy, WrongParameter
from ringplane.system.aside import NoThread
from ringplane.system.confinement import is_confined


async def change_policies(disk: Disk, policies: Sequence[RunningPolicy]) -> None:
    """Returns when all I/O threads ask these policies, which were loaded, and only these. Raises WorkerEnded.

    A policy that stays, by its name and its file, keeps its state; one whose file has changed keeps its counters.
    """
    present = [_continued(disk, each) for each in policies]
    await asyncio.gather(*map(asyncio.wrap_future, disk.use_policies(present)))


def load_policies(disk: Disk, uses: Sequence[PolicyUse]) -> list[RunningPolicy]:
    """Read, check and compile them, which may take seconds; nothing is changed. Raises OperationError."""
    try:
        named = named_policies(uses)
        loaded = [_find(disk, use) for use in named]
        new = [
            RunningPolicy(use.name, each, use.parameters, enabled=use.enabled, address=use.policy)
            for use, each in zip(named, loaded, strict=True)
        ]
    except PolicyError as error:
        raise WrongValue(str(error).partition("\n")[0], "policy") from None
    except (WrongParameter, ValueError) as error:
        raise WrongValue(str(error), "policy") from None
    _load_code(loaded)
    try:
        for each in new:
            each.start_threads()
    except NoThread as error:
        raise WrongState(str(error), "policy") from None
    return new


def _find(disk: Disk, use: PolicyUse) -> LoadedPolicy:
    present = disk.policies.named(use.name) if disk.policies is not None else None
    if not is_confined():
        return find_policy(use.policy)
    if present is None or present.address_of_file != use.policy:
        raise WrongState(
            "this process may not read or compile policies any more",
            use.name,
            "start it with this policy, perhaps switched off, or with --no-sandbox",
        )
    return present.loaded


def _load_code(policies: Sequence[LoadedPolicy]) -> None:
    units = [*UNITS, *(unit for each in policies for unit in each.units)]
    if not is_confined():
        warm_up(units)
    elif not all(unit.is_loaded for unit in units):
        raise WrongState(
            "this process may not load code any more, so its disks cannot get policies",
            "policy",
            "start it with a policy for this disk, or with --no-sandbox",
        )
    for unit in units:
        unit.address()


def _continued(disk: Disk, new: RunningPolicy) -> RunningPolicy:
    """The one that the disk has already, with what was changed, or the new one."""
    present = disk.policies.named(new.name) if disk.policies is not None else None
    if present is not None and present.loaded is new.loaded:
        present.take_parameters(new)
        present.enabled = new.enabled
        return present
    if present is not None:
        new.continue_from(present)
    return new
