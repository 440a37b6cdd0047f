"""The limits of all disks of a process: who shares which ones, and how they are changed while guests run.

A disk that is in no group is a group of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ringplane.device.disk import Disk
from ringplane.options.limit_options import Limits, Rates, group_of, rates_of, weight_of

if TYPE_CHECKING:
    from ringplane.limits.limiter import Limiter

# By their names in a configuration file.
Present = dict[str, int | str]

# The name of a group, or of a disk that is in none.
Key = tuple[str, str]


class Group:
    """Disks that share limits."""

    def __init__(self) -> None:
        self.rates = Rates()
        self.disks: list[Disk] = []
        # Whether they, or what disks share them, were changed at run time.
        self.changed = False
        self.limiter: Limiter | None = None

    def apply(self) -> list[Future[None]]:
        """Have all its disks obey the present limits; the futures are done when they do."""
        self.limiter = self._make_limiter() if any(self.rates.limits()) else None
        return [done for disk in self.disks for done in disk.limit(self.limiter)]

    def _make_limiter(self) -> Limiter:
        # It takes memory, and most disks have no limits. A confined process has imported it (start_steps.py).
        from ringplane.limits.limiter import Limiter

        return Limiter(self.rates, [disk.member for disk in self.disks], self.limiter)


class Limiting:
    """The groups. Used on the control thread, or before it runs."""

    def __init__(self) -> None:
        self._groups: dict[Key, Group] = {}
        self._keys: dict[Disk, Key] = {}
        # Disks whose limits a previous process removed.
        self._freed: set[Disk] = set()
        self._changing = asyncio.Lock()

    def add(self, disk: Disk, limits: Limits, *, changed: bool = False) -> None:
        """Limit a disk that no front end uses yet, after `prepare_limits`.

        `changed`: a previous process changed its limits to these.
        """
        if limits:
            self._join(disk, limits)
            self._groups[self._keys[disk]].changed |= changed
        elif changed:
            self._freed.add(disk)

    def remove(self, disk: Disk) -> None:
        """The disk is not served any more: others of its group share what it had."""
        self._freed.discard(disk)
        if disk in self._keys:
            self._leave(disk)

    async def change(self, disk: Disk, limits: Limits) -> None:
        """Returns when all I/O threads obey these limits, after `prepare_limits`; raises WorkerEnded.

        The limits of a group are those that were given last, for any of its disks.
        """
        async with self._changing:
            waiting = self._leave(disk) if disk in self._keys and self._keys[disk] != _key(disk, limits) else []
            waiting += self._join(disk, limits)
            self._groups[self._keys[disk]].changed = True
            await asyncio.gather(*map(asyncio.wrap_future, waiting))

    def is_changed(self, disk: Disk) -> bool:
        """Whether what holds for a disk was changed at run time."""
        return self._groups[self._keys[disk]].changed if disk in self._keys else disk in self._freed

    def limits_of(self, disk: Disk) -> Present:
        """All that holds for a disk now."""
        if disk not in self._keys:
            return {}
        group, name = self._groups[self._keys[disk]], self._keys[disk][0]
        in_group: Present = {"group-name": name, "weight": disk.member.weight} if name else {}
        return {**group.rates.keys(), **in_group}

    def snapshot(self, disk: Disk) -> dict[str, Any] | None:
        """How much of its limits, or of those of its group, is used now; None: it has none."""
        limiter = self._limiter_of(disk)
        return limiter.snapshot() if limiter else None

    def resume_from(self, disk: Disk, saved: Mapping[str, Any]) -> None:
        """So much of its limits is used; the same may come for each disk of a group. Before any disk is used."""
        if limiter := self._limiter_of(disk):
            limiter.resume_from(saved)

    def _limiter_of(self, disk: Disk) -> Limiter | None:
        return self._groups[self._keys[disk]].limiter if disk in self._keys else None

    def _join(self, disk: Disk, limits: Limits) -> list[Future[None]]:
        key = self._keys[disk] = _key(disk, limits)
        group = self._groups.setdefault(key, Group())
        if disk not in group.disks:
            group.disks.append(disk)
        disk.member.weight = weight_of(limits)
        rates = rates_of(limits)
        # Whoever names only the group leaves its limits as they are.
        if rates != Rates() or not group_of(limits):
            group.rates = rates
        return group.apply()

    def _leave(self, disk: Disk) -> list[Future[None]]:
        key = self._keys.pop(disk)
        group = self._groups[key]
        group.disks.remove(disk)
        if not group.disks:
            del self._groups[key]
        return [*disk.limit(None), *group.apply()]


def _key(disk: Disk, limits: Limits) -> Key:
    group = group_of(limits)
    return group, "" if group else disk.name
