"""What metrics read of a disk, compared with the counters of its queues."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringplane.dataplane.disk_figures import HIGHEST_POWER, LOWEST_POWER, read_figures
from ringplane.dataplane.queue import Device
from ringplane.dataplane.state import COUNTER, KINDS, QUEUE
from ringplane.metrics import histogram
from ringplane.native.structs import new


class Ring:
    """A queue that has counted requests of these kinds, each of which took so many nanoseconds."""

    def __init__(self, device: Device, number: int, in_flight: int, requests: list[tuple[int, int]]) -> None:
        self.number, self._array, self.counters = number, new(QUEUE), new(COUNTER, len(KINDS))
        self.address = int(self._array.ctypes.data)
        self._array["counters"], self._array["in_flight"] = self.counters.ctypes.data, in_flight
        for kind, lasted in requests:
            counter: Any = self.counters[kind]
            counter["requests"] += 1
            counter["errors"] += lasted % 2
            counter["bytes"] += 512
            counter["nanoseconds"] += lasted
            histogram.count(counter["histogram"].ctypes.data, lasted)
        device.start(self)  # type: ignore[arg-type]


requests = st.lists(st.tuples(st.integers(0, len(KINDS) - 1), st.integers(0, 1 << 40)), max_size=20)
queues = st.dictionaries(st.integers(0, 63), st.tuples(st.integers(0, 64), requests), max_size=4)


@given(st.lists(queues, max_size=3))
def test_the_sum_of_all_queues(disks: list[dict[int, tuple[int, list[tuple[int, int]]]]]) -> None:
    devices = [Device(1 << 20, read_only=False, block_size=512, serial="") for _ in disks]
    rings = [
        [Ring(device, number, *each) for number, each in disk.items()]
        for device, disk in zip(devices, disks, strict=True)
    ]
    found = read_figures(devices)
    assert len(found) == len(disks) == len(rings)
    for figures, disk in zip(found, disks, strict=True):
        assert figures["in_flight"] == sum(in_flight for in_flight, _ in disk.values())
        for kind in range(len(KINDS)):
            times = [lasted for _, some in disk.values() for each, lasted in some if each == kind]
            counted = figures["kinds"][kind]
            assert [counted[name] for name in ("requests", "errors", "bytes", "nanoseconds")] == [
                *(len(times), sum(lasted % 2 for lasted in times), 512 * len(times), sum(times)),
            ]
            powers = range(LOWEST_POWER, HIGHEST_POWER + 1)
            below = [sum(lasted < 2**power for lasted in times) for power in powers]
            assert counted["below"].tolist() == [*below, len(times)]


def test_a_disk_without_queues_has_counted_nothing() -> None:
    device = Device(1 << 20, read_only=False, block_size=512, serial="")
    assert not np.any(read_figures([device])["kinds"].view(np.int64))
