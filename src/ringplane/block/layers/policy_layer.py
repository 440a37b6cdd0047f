"""Layer of policies: what users write, or ringplane ships, decides about each I/O (policy_walk.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ringplane.block.image import ImageError
from ringplane.block.layers.layer import Layer
from ringplane.block.layers.policy_walk import CHANGE, ENTRY, POLICIES, down, forget, release, up
from ringplane.block.stack import LayerPart
from ringplane.native.structs import new
from ringplane.opener.opener import LOCAL
from ringplane.options.policy_options import PolicyOptions, PolicyUse, named_policies
from ringplane.policies.io_view import SEEN

if TYPE_CHECKING:
    from ringplane.block.sources.source import Source
    from ringplane.compiler.units import Unit
    from ringplane.log.event_bus import Emit
    from ringplane.opener.opener import Opener
    from ringplane.options.disk_config import DiskConfig
    from ringplane.policies.running import RunningPolicy

UNITS = (down, up, release, forget)


class PolicyList:
    """Policies in the form in which they are asked. It never changes: others are another list."""

    def __init__(self, policies: Sequence[RunningPolicy], *, shared: bool) -> None:
        """`shared`: several I/O threads ask them. Loads their code."""
        self.policies = tuple(policies)
        self.entries: npt.NDArray[np.void] = new(ENTRY, max(len(policies), 1))
        for entry, each in zip(self.entries, policies, strict=False):
            entry["memory"], entry["shared"] = each.address, shared
            entry["time"], entry["data"] = each.loaded.needs_time, each.loaded.program.data
            # Also of those that are off: later it may not be possible to load code.
            code = each.down, each.up
            if each.enabled:
                entry["down"], entry["up"] = code

    @property
    def wants_results(self) -> bool:
        return bool(self.entries["up"].any())


class PolicyPart(LayerPart):
    """The part of the layer for one I/O thread."""

    def __init__(self, slots: int, size: int, block_size: int) -> None:
        """`size` of the disk, and of a logical block, in bytes."""
        self._record, self._changes, self._seen = new(POLICIES), new(CHANGE, slots), new(SEEN)
        self.state = int(self._record.ctypes.data)
        self.down, self.up = down.address(), up.address()
        # Later it may not be possible to load code.
        for each in (release, forget):
            each.address()
        record = self._record[0]
        record["changes"], record["seen"] = self._changes.ctypes.data, self._seen.ctypes.data
        record["block_mask"] = block_size - 1
        self.resize(size)
        self.use(PolicyList((), shared=False))

    def use(self, policies: PolicyList) -> None:
        """Ask these from now on; between two runs of the loop."""
        for each in policies.policies:
            each.in_use = True
            each.put_in_force()
        record = self._record[0]
        record["entries"], record["count"] = policies.entries.ctypes.data, len(policies.policies)
        record["results"] = policies.wants_results
        # Kept as long as they are used.
        self.policies = policies

    def kept(self, ios: npt.NDArray[np.void]) -> list[int]:
        slots, slot = [], int(self._record["hung_first"][0])
        while slot >= 0:
            slots.append(slot)
            slot = int(ios["next"][slot])
        return slots

    def forget(self, channel: int, slot: int) -> None:
        forget(self.state, channel, slot)

    def resize(self, size: int) -> None:
        self._record["size"] = self._seen["disk_size"] = size

    def swap(self, policies: PolicyList, channel: int) -> None:
        """Use these, and have the I/Os of the channel continue that hang because of one that is gone or off now."""
        before, now = self.policies.policies, [each for each in policies.policies if each.enabled]
        self.use(policies)
        for each in before:
            if each not in now:
                self.release(channel, each)

    def release(self, channel: int, policy: RunningPolicy | None = None) -> None:
        """Have the I/Os of the channel at this address continue that hang because of a policy, or of any."""
        release(self.state, channel, policy.address if policy is not None else 0)


class PolicyLayer(Layer):
    """The policies of one disk."""

    def __init__(self, size: int, block_size: int, policies: Sequence[RunningPolicy] = ()) -> None:
        self.policies = tuple(policies)
        self._size, self._block_size = size, block_size
        self._parts: list[PolicyPart] = []

    @property
    def units(self) -> Sequence[Unit]:  # type: ignore[override]
        return *UNITS, *(unit for each in self.policies for unit in each.loaded.units)

    def part(self, backing: int, slots: int) -> PolicyPart:
        self._parts.append(PolicyPart(slots, self._size, self._block_size))
        # No thread runs yet.
        for part in self._parts:
            part.use(self.listed())
        return self._parts[-1]

    def listed(self) -> PolicyList:
        """The policies of now, for its parts."""
        return PolicyList(self.policies, shared=len(self._parts) > 1)

    def named(self, name: str) -> RunningPolicy | None:
        return next((each for each in self.policies if each.name == name), None)

    def check_paths(self) -> None:
        # With them, this is loaded.
        from ringplane.policies.running import WrongParameter

        for each in self.policies:
            try:
                each.check_paths()
            except WrongParameter as error:
                raise ImageError(f"policy {each.name}: {error}") from None

    def start_threads(self, emit: Emit) -> None:
        for each in self.policies:
            each.start_threads()

    def resize(self, size: int) -> None:
        for part in self._parts:
            part.resize(size)


def open_layer(config: DiskConfig, source: Source, *, shared: bool, opener: Opener) -> Layer | None:
    return (
        PolicyLayer(source.size, config.block_size, load_policies(config.policy, source.title, opener))
        if config.policy
        else None
    )


def check(config: PolicyOptions, source: Source) -> type[Layer] | None:
    if config.policy:
        load_policies(config.policy, source.title)
    return PolicyLayer if config.policy else None


def load_policies(uses: Sequence[PolicyUse], title: str = "", opener: Opener = LOCAL) -> list[RunningPolicy]:
    """Those of the disk with this title, whose files this opens. Raises ImageError, OpenerEnded."""
    # Few disks need it.
    from ringplane.policies.loading import PolicyError
    from ringplane.policies.running import WrongParameter

    try:
        return [run_policy(use, opener) for use in named_policies(uses)]
    except PolicyError as error:
        first, *others = str(error).split("\n")
        more = f" (and {len(others)} more; see `ringplane policy check`)" if others else ""
        raise ImageError(f"{first}{more}") from None
    except WrongParameter as error:
        raise ImageError(f"{title}: {error}" if title else str(error)) from None


def run_policy(use: PolicyUse, opener: Opener = LOCAL) -> RunningPolicy:
    """Load a policy of a disk, whose files this opens. Raises PolicyError, WrongParameter, OpenerEnded."""
    from ringplane.policies.running import RunningPolicy, WrongParameter
    from ringplane.policies.usable import usable_policy

    try:
        loaded = usable_policy(use.policy, opener)
        return RunningPolicy(use.name, loaded, use.parameters, enabled=use.enabled, address=use.policy)
    except WrongParameter as error:
        raise WrongParameter(f"policy {use.policy}: {error}") from None
