"""Recovery from a ring's in-flight region after a crash: which chains to resubmit, and where the ring resumes.

Source: QEMU's docs/interop/vhost-user.rst, section "Inflight I/O tracking", its parts "When reconnecting". The region
comes from the front end, so everything in it is checked before use.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ringplane.guest_memory.address_space import BadMemory
from ringplane.inflight.tracking import (
    PACKED_SIZE,
    PLACES,
    REGION_PACKED,
    REGION_SPLIT,
    SPLIT_SIZE,
    STATE_PACKED,
    STATE_SPLIT,
    VERSION,
)
from ringplane.virtio.packed import DESC_FLAGS, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED
from ringplane.virtio.split import DESC_SIZE, INDEX_MASK


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a packed ring."""

    index: int
    wrap: int

    def after(self, count: int, size: int) -> Place:
        """The position `count` descriptors further on."""
        laps, index = divmod(self.index + count, size)
        return Place(index, self.wrap ^ (laps & 1))


class SplitTracking:
    """The region of a split ring: `entries` are the heads of the chains in flight, oldest first."""

    def __init__(self, region: int, size: int, used_idx: int) -> None:
        """`used_idx` is the idx field of the used ring. Raises BadMemory for an invalid region."""
        self._head = _view(region, REGION_SPLIT, 1)[0]
        self._states = _view(region + SPLIT_SIZE, STATE_SPLIT, size)
        self.is_new = _is_new(self._head, size)
        if self.is_new:
            self._states[:] = np.zeros(1, STATE_SPLIT)
            self._head["desc_num"], self._head["used_idx"] = size, used_idx
            self._head["version"] = VERSION
        else:
            self._end_last_batch(used_idx, size)
        in_flight = np.flatnonzero(self._states["inflight"] == 1)
        self.entries, self.counter = _oldest_first(in_flight, self._states)
        self.last_batch_head = int(self._head["last_batch_head"])

    def _end_last_batch(self, used_idx: int, size: int) -> None:
        """Chains that are in the used ring, but are not marked as used in the region yet, are not in flight."""
        head = int(self._head["last_batch_head"])
        for _ in range(min((used_idx - int(self._head["used_idx"])) & INDEX_MASK, size)):
            if head >= size:
                raise BadMemory(f"in the in-flight region the last batch leads to descriptor {head} of {size}")
            self._states[head]["inflight"] = 0
            head = int(self._states[head]["next"])
        self._head["used_idx"] = used_idx


class PackedTracking:
    """The region of a packed ring: `entries` are the first entries of the chains in flight, oldest first.

    `used` is the position of the next used descriptor, `avail` that of the next chain; `places` (the value of PLACES),
    `links`, `lasts` and `counts` are the fields that inflight/tracking.py requires.
    """

    def __init__(self, region: int, size: int, ring: int, used: Place) -> None:
        """`ring` is the address of the descriptors, `used` the first position of a new region. Raises BadMemory."""
        self._size = size
        self._head = _view(region, REGION_PACKED, 1)[0]
        self._word = _view(region + PLACES, np.dtype(np.int64), 1)
        self._states = _view(region + PACKED_SIZE, STATE_PACKED, size)
        self.is_new = _is_new(self._head, size)
        if self.is_new:
            self._begin(used)
        elif self._places("used") != self._places("old_used"):
            self._settle_last_batch(ring)
        self._roll_back()
        self.links = self._states["next"].astype(np.int64)
        self.lasts, self.counts = np.zeros(size, np.int64), np.zeros(size, np.int64)
        in_flight = self._chains_in_flight()
        self.entries, self.counter = _oldest_first(in_flight, self._states)
        self.used = self._places("used")
        self.avail = self.used.after(int(self.counts[in_flight].sum()), size)

    @property
    def free_head(self) -> int:
        return int(self._head["free_head"])

    def _begin(self, used: Place) -> None:
        """Make all entries free; the last one links to the ring's size, which is not an entry."""
        head = self._head
        self._states[:] = np.zeros(1, STATE_PACKED)
        self._states["next"] = np.arange(1, self._size + 1)
        head["desc_num"], head["free_head"], head["old_free_head"] = self._size, 0, 0
        self._set_places(used)
        head["version"] = VERSION

    def _places(self, name: str) -> Place:
        place = Place(int(self._head[f"{name}_idx"]), int(self._head[f"{name}_wrap_counter"]))
        if place.index >= self._size or place.wrap > 1:
            raise BadMemory(f"the in-flight region has descriptor {place.index}, wrap counter {place.wrap} as {name}")
        return place

    def _settle_last_batch(self, ring: int) -> None:
        """Record the last batch as used if the driver can see that it is, even if the region does not show it yet."""
        old = self._places("old_used")
        flags = ctypes.c_uint16.from_address(ring + old.index * DESC_SIZE + DESC_FLAGS).value
        available = VIRTQ_DESC_F_AVAIL if old.wrap else VIRTQ_DESC_F_USED
        if flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) != available:
            self._head["old_free_head"] = self._head["free_head"]
            self._set_places(self._places("used"))

    def _roll_back(self) -> None:
        self._head["free_head"] = self._head["old_free_head"]
        self._set_places(self._places("old_used"))

    def _set_places(self, place: Place) -> None:
        """Set both positions with one store: the process may be killed at this moment too."""
        self.places = place.index | place.index << 16 | place.wrap << 32 | place.wrap << 40
        self._word[0] = self.places

    def _chains_in_flight(self) -> npt.NDArray[np.intp]:
        """The first entries of the chains that are not free; fills in their `lasts` and `counts`."""
        taken = np.ones(self._size, np.bool_)
        for entry in self._walk(self.free_head):
            taken[entry] = False
            self._states[entry]["inflight"] = 0
        found = np.flatnonzero(self._states["inflight"] == 1)
        for first in found.tolist():
            count = int(self._states[first]["num"])
            chain = self._walk(first, count)
            if len(chain) != count or count == 0 or not taken[chain].all():
                raise BadMemory(f"in the in-flight region the chain at entry {first} is not whole")
            taken[chain] = False
            self.lasts[first], self.counts[first] = chain[-1], count
        if taken.any():
            raise BadMemory("in the in-flight region some entries are neither free nor in flight")
        return found

    def _walk(self, entry: int, most: int | None = None) -> list[int]:
        """The linked entries, starting with this one; raises BadMemory for a list without an end."""
        walked: list[int] = []
        while entry != self._size and (most is None or len(walked) < most):
            if entry > self._size or len(walked) == self._size:
                raise BadMemory("in the in-flight region a list of entries has no end")
            walked.append(entry)
            entry = int(self.links[entry])
        return walked


def _is_new(head: np.void, size: int) -> bool:
    """Whether nothing was written to this region yet; raises BadMemory for an incompatible region."""
    if head["version"] == 0:
        return True
    if head["version"] != VERSION or head["desc_num"] != size:
        raise BadMemory(
            f"the in-flight region has version {head['version']} and {head['desc_num']} descriptors, "
            f"not version {VERSION} and {size} descriptors"
        )
    return False


def _oldest_first(in_flight: npt.NDArray[np.intp], states: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.intp], int]:
    """These entries in the order in which their chains were fetched, and the counter of the next one."""
    counters = states["counter"][in_flight]
    # The front end may have written any value there, and our counter is signed.
    following = (int(counters.max()) + 1) & ((1 << 62) - 1) if len(counters) else 0
    return in_flight[np.argsort(counters, kind="stable")], following


def _view(address: int, layout: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    memory = (ctypes.c_uint8 * (layout.itemsize * count)).from_address(address)
    return np.frombuffer(memoryview(memory).cast("B"), layout)
