"""How much address space, and how many mappings, the front end of each disk may use.

A front end may describe as much memory as it likes: a sparse file costs it nothing. All disks of a process share one
address space, so each disk has a quota: one half is divided equally and guaranteed, the other half is lent to the disks
that ask first. When a disk is added, the guaranteed shares get smaller: what others use beyond theirs counts as lent
then.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections import deque
from pathlib import Path

from ringplane.native.sigbus import MAX_GUARDS
from ringplane.options.sizes import format_size
from ringplane.system import libc

# The default of Linux, used if /proc/sys cannot be read.
MAX_MAP_COUNT = 65530


class BadMemory(ValueError):
    """The front end described impossible memory; the text says what is wrong."""


def usable_bytes() -> int:
    """Half of the address space; the other half is for the mappings of the process itself.

    The stack is at its top: 2^47 on x86-64; 2^39 or 2^48 on aarch64, depending on the kernel's configuration.
    """
    size = 1 << libc.stack_address().bit_length()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return (size if limit == resource.RLIM_INFINITY else min(size, limit)) // 2


def usable_mappings() -> int:
    """How many mappings front ends may use.

    Each has a guard (native/sigbus.py) and an fd, and may fall into pieces when its file is truncated.
    """
    count = MAX_MAP_COUNT
    with contextlib.suppress(OSError, ValueError):
        count = int(Path("/proc/sys/vm/max_map_count").read_text())
    fds, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(count, MAX_GUARDS, *([fds] if fds != resource.RLIM_INFINITY else [])) // 2


class Pool:
    """An amount of something, shared by users who come and go. Any thread may call."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._shares: set[Share] = set()
        self._lock = threading.Lock()
        # Finalizers give amounts back; they may interrupt any code, including code that holds the lock.
        self._returned: deque[tuple[Share, int]] = deque()

    @property
    def guaranteed(self) -> int:
        """What each share can always take."""
        return self._total // 2 // len(self._shares)

    def share(self) -> Share:
        """The share of one more user, until `end`."""
        share = Share(self)
        with self._lock:
            self._shares.add(share)
        return share

    def end(self, share: Share) -> None:
        """The user has gone, and has returned everything."""
        with self._lock:
            self._shares.discard(share)

    def take(self, share: Share, amount: int) -> int | None:
        """Add the amount to the use of this share, or return the limit that it would exceed."""
        with self._lock:
            self._collect()
            limit = max(self.guaranteed, share.used) + self._to_lend
            if share.used + amount > limit:
                return limit
            share.used += amount
            return None

    @property
    def _to_lend(self) -> int:
        """What is neither guaranteed nor lent. The shares became smaller since some was lent: perhaps nothing."""
        guaranteed = self.guaranteed
        lent = sum(max(0, share.used - guaranteed) for share in self._shares)
        return max(0, self._total - guaranteed * len(self._shares) - lent)

    def give_back(self, share: Share, amount: int) -> None:
        """Return an amount that is not used any more."""
        self._returned.append((share, amount))

    def _collect(self) -> None:
        while self._returned:
            share, amount = self._returned.popleft()
            share.used -= amount


class Share:
    """One user's share of a Pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.used = 0

    def take(self, amount: int) -> int | None:
        """See Pool.take."""
        return self.pool.take(self, amount)

    def give_back(self, amount: int) -> None:
        """See Pool.give_back."""
        self.pool.give_back(self, amount)

    def end(self) -> None:
        """See Pool.end."""
        self.pool.end(self)


class AddressSpace:
    """The address space of this process, for all its disks. Created before the sandbox, because it reads /proc."""

    def __init__(self) -> None:
        self._bytes, self._mappings = Pool(usable_bytes()), Pool(usable_mappings())

    def quota(self) -> Quota:
        """The quota of one more disk."""
        return Quota(self._bytes.share(), self._mappings.share())


class Quota:
    """The limit on the mappings of one disk's front ends."""

    def __init__(self, size: Share, mappings: Share) -> None:
        self._size, self._mappings = size, mappings

    def reserve(self, size: int) -> None:
        """Call before mapping `size` bytes; raises BadMemory if the quota would be exceeded."""
        limit = self._mappings.take(1)
        if limit is not None:
            raise BadMemory(f"one more mapping exceeds the limit of this disk's front end, which is {limit}")
        limit = self._size.take(size)
        if limit is not None:
            self._mappings.give_back(1)
            raise BadMemory(
                f"{format_size(size)} beside the {format_size(self._size.used)} that are mapped exceed the limit of "
                f"this disk's front end, which is {format_size(limit)} of address space"
            )

    def release(self, size: int) -> None:
        """Call after unmapping."""
        self._size.give_back(size)
        self._mappings.give_back(1)

    def end(self) -> None:
        """The disk has been removed: its guaranteed share is for the others."""
        self._size.end()
        self._mappings.end()
