"""The policies of a disk, changed while guests run.

They have turns of their own: a request that hangs because of a policy holds up operations that wait for requests, and
its end must not wait for these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from ringplane.block.layers.policy_layer import UNITS
from ringplane.compiler.bad_code import BadCode
from ringplane.control.changing import Changing
from ringplane.control.disk_errors import operation_errors
from ringplane.control.operation_errors import NoSuchPolicy, Unavailable, WrongState, WrongValue
from ringplane.control.turns import Turns
from ringplane.dataplane.compile_data_plane import warm_up
from ringplane.device.disk import Disk
from ringplane.log.event_bus import Emit
from ringplane.log.logs import DiskLog
from ringplane.opener.opener import Opener, OpenerEnded
from ringplane.options.policy_options import MAX_POLICIES, PolicyUse, named_policies
from ringplane.policies.loading import LoadedPolicy, PolicyError
from ringplane.policies.running import RunningPolicy, WrongParameter
from ringplane.policies.usable import NotReadable, usable_policy
from ringplane.system.aside import aside
from ringplane.system.confinement import is_confined

Result = TypeVar("Result")

CHANGE, LOADING, RELEASE = "a change of policies", "loading a policy", "a release of requests"


class Policing:
    """All that can be done with the policies of one disk.

    Each method returns when all I/O threads do what it says, and raises an OperationError if it has changed nothing.
    """

    def __init__(
        self,
        disk: Disk,
        changing: Changing,
        alone: Callable[[str, Callable[[], Coroutine[Any, Any, None]]], Awaitable[None]],
        logger: DiskLog,
        emit: Emit,
        opener: Opener,
    ) -> None:
        """`alone` does something while no other operation on the disk is done; `opener` opens files of policies."""
        self._disk, self._changing, self._alone, self._opener = disk, changing, alone, opener
        self._logger, self._emit = logger, emit
        self._turns, self._loads = Turns(disk.name), Turns(disk.name)

    def end(self) -> None:
        """The disk has stopped."""
        self._turns.end()
        self._loads.end()

    async def set(self, uses: Sequence[PolicyUse]) -> None:
        """Have these policies, in this order, and no others.

        What hangs because of a policy that is not there any more, or is switched off, continues. A policy that stays,
        by its name and its file, keeps its state; one whose file has changed keeps its counters.
        """
        with operation_errors(LOADING, self._disk.name):
            policies = await aside(partial(_load_all, uses, self._opener))
        await self._change(partial(self._use, policies))

    async def add(self, use: PolicyUse, position: int | None = None) -> RunningPolicy:
        """Have one more at this position, from 0; None: after all others."""
        loaded = await self._aside(partial(_load, use.name or use.default_name, use, self._opener))
        return await self._change(partial(self._add, use, loaded, position))

    async def replace(self, name: str, use: PolicyUse) -> RunningPolicy:
        """Have this one in place of that of this name, whose counters it continues."""
        self._find(name)
        loaded = await self._aside(partial(_load, name, use, self._opener))
        return await self._change(partial(self._replace, name, loaded))

    async def change(self, name: str, parameters: Mapping[str, Any], enabled: bool | None) -> RunningPolicy:
        """Change these parameters, and switch it on or off; None: leave it as it is."""
        # What is watched because of them is watched already when they are changed, which must not wait.
        use = PolicyUse(self._find(name).address_of_file, parameters)
        watched = await self._aside(partial(_made, name, use, self._find(name).loaded)) if parameters else None
        changed = await self._change(partial(self._change_one, name, parameters, enabled))
        del watched
        return changed

    async def remove(self, name: str) -> None:
        """Requests that hang because of it continue."""
        await self._change(partial(self._remove, name))

    async def release(self, name: str) -> None:
        """Have the requests continue that hang because of it now."""
        await self._take(RELEASE, partial(self._release, name))

    async def _change(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        return await self._take(CHANGE, work)

    async def _take(self, operation: str, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        with operation_errors(operation, self._disk.name):
            return await self._turns.take(operation, work, around=self._changing.one)

    async def _aside(self, load: Callable[[], RunningPolicy]) -> RunningPolicy:
        """It may wait for files."""
        with operation_errors(LOADING, self._disk.name):
            return await self._loads.take(LOADING, partial(aside, load))

    async def _add(self, use: PolicyUse, loaded: RunningPolicy, position: int | None) -> RunningPolicy:
        """`loaded` is the same policy; its name may be another one."""
        present = self._disk.running_policies
        if len(present) >= MAX_POLICIES:
            raise WrongState(f"the disk has {len(present)} policies already, the maximum", self._disk.name)
        try:
            name = named_policies([*(each.use for each in present), use])[-1].name
        except ValueError:
            right = "choose another name; PUT replaces the policy"
            raise WrongState("the disk has a policy of this name already", use.name, right) from None
        place = len(present) if position is None else position
        await self._use([*present[:place], _made(name, use, loaded.loaded), *present[place:]])
        return self._find(name)

    async def _replace(self, name: str, new: RunningPolicy) -> RunningPolicy:
        replaced = self._find(name)
        await self._use([new if each is replaced else each for each in self._disk.running_policies])
        return self._find(name)

    async def _change_one(self, name: str, parameters: Mapping[str, Any], enabled: bool | None) -> RunningPolicy:
        policy = self._find(name)
        try:
            policy.change(parameters)
        except WrongParameter as error:
            raise WrongValue(str(error), "parameters") from None
        if enabled is not None:
            policy.enabled = enabled
        await self._use(self._disk.running_policies)
        return policy

    async def _remove(self, name: str) -> None:
        removed = self._find(name)
        await self._use([each for each in self._disk.running_policies if each is not removed])

    async def _release(self, name: str) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, self._disk.release_policy(self._find(name))))
        self._logger.info("policy %s: requests that hung continue", name)

    async def _use(self, policies: Sequence[RunningPolicy]) -> None:
        ask = partial(self._ask, [self._continued(each) for each in policies])
        # The first policies bring a layer with them.
        await (ask() if self._disk.policies is not None else self._alone(CHANGE, ask))
        present = [each.name + ("" if each.enabled else " (off)") for each in self._disk.running_policies]
        self._logger.info("policies: %s", ", ".join(present) or "none")
        self._emit("policies-changed", policies=present)

    async def _ask(self, policies: Sequence[RunningPolicy]) -> None:
        self._disk.policies_changed = True
        await asyncio.gather(*map(asyncio.wrap_future, self._disk.use_policies(policies)))

    def _find(self, name: str) -> RunningPolicy:
        return find_policy(self._disk, name)

    def _continued(self, new: RunningPolicy) -> RunningPolicy:
        """The one that the disk has already, with what was changed, or the new one."""
        present = next((each for each in self._disk.running_policies if each.name == new.name), None)
        if present is None or present is new:
            return new
        if present.loaded is not new.loaded:
            new.continue_from(present)
            return new
        present.take_parameters(new)
        present.enabled, present.address_of_file = new.enabled, new.address_of_file
        return present


def find_policy(disk: Disk, name: str) -> RunningPolicy:
    """The policy of this name; any thread may ask. Raises NoSuchPolicy."""
    present = disk.running_policies
    for each in present:
        if each.name == name:
            return each
    names = ", ".join(each.name for each in present)
    right = f"the policies are: {names}" if names else "the disk has no policy"
    raise NoSuchPolicy("no policy of the disk has this name", name, right)


def _load_all(uses: Sequence[PolicyUse], opener: Opener) -> list[RunningPolicy]:
    """Read, check and compile them, which may take seconds; nothing is changed. Raises OperationError."""
    try:
        named = named_policies(uses)
    except ValueError as error:
        raise WrongValue(str(error), "policy") from None
    return [_load(use.name, use, opener) for use in named]


def _load(name: str, use: PolicyUse, opener: Opener) -> RunningPolicy:
    """Raises OperationError."""
    try:
        loaded = usable_policy(use.policy, opener)
    except NotReadable as error:
        raise WrongState(str(error), "policy") from None
    except PolicyError as error:
        first, *others = str(error).split("\n")
        right = f"`ringplane policy check {use.policy}` shows {len(others)} more" if others else ""
        raise WrongValue(first, "policy", right) from None
    except OpenerEnded as error:
        raise Unavailable(str(error), "policy") from None
    policy = _made(name, use, loaded)
    try:
        _load_code(loaded)
    except BadCode as error:
        raise WrongValue(str(error), "policy") from None
    return policy


def _made(name: str, use: PolicyUse, loaded: LoadedPolicy) -> RunningPolicy:
    """Files that it has as parameters are watched then. Raises WrongValue, NoThread."""
    try:
        policy = RunningPolicy(name, loaded, use.parameters, enabled=use.enabled, address=use.policy)
        policy.check_paths()
        policy.start_threads()
        return policy
    except WrongParameter as error:
        raise WrongValue(str(error), "parameters") from None


def _load_code(policy: LoadedPolicy) -> None:
    units = [*UNITS, *policy.units]
    if not is_confined():
        warm_up(units)
    elif not all(unit.is_loaded for unit in units):
        raise WrongState(
            "this process may not load code any more, so its disks cannot get policies",
            "policy",
            "start it with an API, with a policy for one of its disks, or with --no-sandbox",
        )
    for unit in units:
        unit.address()
