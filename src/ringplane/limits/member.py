"""A disk as its limits see it. Each disk is a Member; what else limits need is loaded for those that have some."""

from __future__ import annotations

from ringplane.limits.shares import MEMBER
from ringplane.native.structs import new


class Member:
    """What a disk has used of its limits. It lives as long as the disk."""

    def __init__(self) -> None:
        self._record = new(MEMBER)
        self.address = int(self._record.ctypes.data)

    @property
    def weight(self) -> int:
        """Its share of the limits of its group."""
        return int(self._record["weight"][0])

    @weight.setter
    def weight(self, weight: int) -> None:
        self._record["weight"] = weight

    @property
    def throttled(self) -> float:
        """Seconds in which its requests waited in the ring because of a limit."""
        return self.throttled_ns / 1e9

    @property
    def throttled_ns(self) -> int:
        """The same in nanoseconds."""
        return int(self._record["throttled"][0])

    @throttled_ns.setter
    def throttled_ns(self, nanoseconds: int) -> None:
        self._record["throttled"] = nanoseconds
