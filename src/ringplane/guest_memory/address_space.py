"""How much address space, and how many mappings, the front end of each disk may use.

A front end may describe as much memory as it likes: a sparse file costs it nothing. All disks of a process share one
address space, so each disk has a quota: one half is divided equally and guaranteed, the other half is lent to the disks
that ask first.
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
    """An amount of something, shared by a number of users. Any thread may call."""

    def __init__(self, total: int, users: int) -> None:
        self.guaranteed = total // 2 // users
        self._to_lend = total - self.guaranteed * users
        self._lock = threading.Lock()
        # Finalizers give amounts back; they may interrupt any code, including code that holds the lock.
        self._returned: deque[tuple[Share, int]] = deque()

    def take(self, share: Share, amount: int) -> int | None:
        """Add the amount to the use of this share, or return the limit that it would exceed."""
        with self._lock:
            self._collect()
            limit = max(self.guaranteed, share.used) + self._to_lend
            if share.used + amount > limit:
                return limit
            self._set(share, share.used + amount)
            return None

    def give_back(self, share: Share, amount: int) -> None:
        """Return an amount that is not used any more."""
        self._returned.append((share, amount))

    def _collect(self) -> None:
        while self._returned:
            share, amount = self._returned.popleft()
            self._set(share, share.used - amount)

    def _set(self, share: Share, used: int) -> None:
        self._to_lend += self._borrowed(share.used) - self._borrowed(used)
        share.used = used

    def _borrowed(self, used: int) -> int:
        return max(0, used - self.guaranteed)


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


class AddressSpace:
    """The address space of this process, for `disks` disks. Created before the sandbox, because it reads /proc."""

    def __init__(self, disks: int) -> None:
        self._bytes, self._mappings = Pool(usable_bytes(), disks), Pool(usable_mappings(), disks)

    def quota(self) -> Quota:
        """The quota of one more disk."""
        return Quota(Share(self._bytes), Share(self._mappings))


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
