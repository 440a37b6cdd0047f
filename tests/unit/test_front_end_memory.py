"""Guest memory that changes, and the dirty log of a migration."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import ringplane
from ringplane.driver.compile_driver import warm_up
from ringplane.driver.driver import Driver
from ringplane.driver.frontend import Refused, SharedMemory
from ringplane.driver.load import Load, Result, run_load
from ringplane.driver.virtqueue import peek
from ringplane.vhost_user.messages import VHOST_F_LOG_ALL, Request
from ringplane.vhost_user.payloads import MemoryRegion, SingleMemoryRegion
from ringplane.virtio.blk import HEADER_SIZE, VIRTIO_BLK_S_OK

from .protocol_rig import (
    CONTENT,
    MEMORY_SIZE,
    MIB,
    QUEUES,
    RING_SIZE,
    Machine,
    machine,
    negotiated,
    region,
    sector,
    select_readable,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_invalid_memory_is_refused(export: ringplane.Export, memory: SharedMemory) -> None:
    good = region(memory, 0)
    bad = [
        MemoryRegion(0, 0, good.user_address, 0),
        MemoryRegion(0, MEMORY_SIZE + 4096, good.user_address, 0),
        MemoryRegion(0, MIB, good.user_address, MEMORY_SIZE),
        MemoryRegion((1 << 64) - MIB, MIB, good.user_address, 0),
        MemoryRegion(0, MIB, (1 << 64) - MIB, 0),
        MemoryRegion(0, MIB, good.user_address, (1 << 64) - MIB),
        MemoryRegion(0, (1 << 64) - 1, 0, 0),
    ]
    with negotiated(export) as peer:
        for one in bad:
            with pytest.raises(Refused):
                peer.set_mem_table([one], [memory.fd])
            with pytest.raises(Refused):
                peer.add_mem_reg(one, memory.fd)
        with pytest.raises(Refused):
            peer.set_mem_table([good, good], [memory.fd, memory.fd])
        with pytest.raises(Refused):
            peer.rem_mem_reg(good)
        peer.add_mem_reg(good, memory.fd)
        with pytest.raises(Refused):
            peer.add_mem_reg(good, memory.fd)
        peer.rem_mem_reg(good)


def test_fd_that_cannot_be_mapped_is_refused(export: ringplane.Export, memory: SharedMemory) -> None:
    fd = os.eventfd(0)
    with negotiated(export) as peer, pytest.raises(Refused):
        peer.add_mem_reg(region(memory, 0), fd)
    os.close(fd)


def test_region_can_be_removed_with_an_unneeded_fd(export: ringplane.Export, memory: SharedMemory) -> None:
    """libblkio sends one."""
    with negotiated(export) as peer:
        peer.add_mem_reg(region(memory, 0), memory.fd)
        peer.send(Request.REM_MEM_REG, SingleMemoryRegion(region(memory, 0)), [memory.fd])


def test_the_largest_number_of_regions(export: ringplane.Export, memory: SharedMemory) -> None:
    with negotiated(export) as peer:
        slots = peer.get_max_mem_slots()
        regions = [MemoryRegion(n * 4096, 4096, memory.address + n * 4096, n * 4096) for n in range(slots + 1)]
        for one in regions[:-1]:
            peer.add_mem_reg(one, memory.fd)
        with pytest.raises(Refused):
            peer.add_mem_reg(regions[-1], memory.fd)
        peer.rem_mem_reg(regions[0])
        peer.add_mem_reg(regions[-1], memory.fd)


def test_removed_memory_is_no_longer_used(export: ringplane.Export, memory: SharedMemory) -> None:
    with machine(export) as guest:
        extra = MemoryRegion(MEMORY_SIZE, MIB, memory.address, 0)
        guest.peer.add_mem_reg(extra, memory.fd)
        guest.start()
        guest.peer.rem_mem_reg(extra)
        guest.ring.poke_desc(0, MEMORY_SIZE, HEADER_SIZE, 0)
        guest.ring.offer(0)
        guest.ring.publish()
        guest.vring.kick()
        wait_until(lambda: bool(select_readable(guest.vring.err_fd)))


def test_ring_whose_memory_is_removed_stops_with_an_error(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        guest.peer.set_mem_table([], [])
        wait_until(lambda: bool(select_readable(guest.vring.err_fd)))
        guest.share_memory()
        guest.peer.get_vring_base(0)
        os.eventfd_read(guest.vring.err_fd)
        guest.start()
        assert guest.read(2) == sector(2)


class Loaded:
    """A driver with a load of reads, each verified against the image, that lasts as long as the `with`."""

    def __init__(self, export: ringplane.Export) -> None:
        assert export.socket_path is not None
        self.export = export
        self.driver = Driver(export.socket_path, queues=QUEUES, queue_size=128, memory_size=MEMORY_SIZE * 4)
        self.results: list[Result] = []
        self.load = Load(block_size=[4096, 65536], depth=16, queues=QUEUES, seconds=0.2)
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        """How long the messages take depends on the machine, so the load is repeated until they have been sent."""
        while not self.ending.is_set():
            self.results.append(run_load(self.driver, self.load))

    def __enter__(self) -> Driver:
        # Compiling is not part of the load.
        warm_up()
        before = self.export.counters["read"].requests
        self.thread.start()
        try:
            wait_until(lambda: self.export.counters["read"].requests > before)
        except BaseException:
            self._end()
            raise
        return self.driver

    def _end(self) -> None:
        self.ending.set()
        self.thread.join()
        self.driver.close()

    def __exit__(self, kind: object, *_: object) -> None:
        failed = not self.thread.is_alive()
        self._end()
        if kind is None:
            assert not failed, "the load has ended with an exception"
            assert [(each.errors, each.wrong_lengths) for each in self.results] == [(0, 0)] * len(self.results)


def test_memory_table_is_replaced_under_load(export: ringplane.Export) -> None:
    with Loaded(export) as driver:
        for _ in range(50):
            driver.front_end.set_mem_table([driver.memory.region()], [driver.memory.fd])


def test_regions_are_added_and_removed_under_load(export: ringplane.Export, memory: SharedMemory) -> None:
    with Loaded(export) as driver:
        for _ in range(50):
            extra = MemoryRegion(1 << 40, MEMORY_SIZE, memory.address, 0)
            driver.front_end.add_mem_reg(extra, memory.fd)
            driver.front_end.rem_mem_reg(extra)


def test_rings_are_disabled_and_enabled_under_load(export: ringplane.Export) -> None:
    with Loaded(export) as driver:
        for _ in range(20):
            for index in range(QUEUES):
                driver.front_end.set_vring_enable(index, False)
                driver.front_end.set_vring_enable(index, True)


def test_notifiers_are_set_again_under_load(export: ringplane.Export) -> None:
    with Loaded(export) as driver:
        for _ in range(20):
            for vring in driver.queues:
                driver.front_end.set_vring_call(vring.index, vring.call_fd)
                driver.front_end.set_vring_err(vring.index, vring.err_fd)
                driver.front_end.set_vring_kick(vring.index, vring.kick_fd)
                # The check when a ring starts makes up for a kick that went to the old fd.


def test_mappings_stay_until_their_requests_in_flight_end(export: ringplane.Export) -> None:
    """All memory except the ring's is removed while large reads into it are in flight."""
    with machine(export) as guest:
        guest.start()
        ring_only = MemoryRegion(0, MIB, guest.memory.address, 0)
        places = [guest.offer_read(0, MIB) for _ in range(4)]
        guest.ring.publish()
        guest.vring.kick()
        wait_until(lambda: export.in_flight > 0 or guest.used_idx > 0)
        guest.peer.set_mem_table([ring_only], [guest.memory.fd])
        guest.peer.set_mem_table([ring_only], [guest.memory.fd])
        fetched = guest.peer.get_vring_base(0)
        assert guest.used_idx == fetched
        for data, status in places[:fetched]:
            assert peek(status, 1)[0] == VIRTIO_BLK_S_OK
            assert peek(data, MIB) == CONTENT[:MIB]


# Migration: written pages are marked


def marked(log: mmap.mmap) -> set[int]:
    """The numbers of the pages whose bits are set; the bits are cleared, as a front end does after reading them."""
    bits = np.unpackbits(np.frombuffer(log[:], np.uint8), bitorder="little")
    log[:] = bytes(len(log))
    return set(np.flatnonzero(bits).tolist())


@pytest.fixture
def log() -> Iterator[tuple[mmap.mmap, int]]:
    """A dirty log for the whole memory of a Machine, and its fd."""
    fd = os.memfd_create("log")
    size = MEMORY_SIZE // 4096 // 8
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as mapping:
        yield mapping, fd
    os.close(fd)


def pages(guest: Machine, *places: tuple[int, int]) -> set[int]:
    """The numbers of the pages of these addresses and sizes."""
    found: set[int] = set()
    for address, size in places:
        start = guest.memory.guest(address)
        found |= set(range(start >> 12, (start + size - 1 >> 12) + 1))
    return found


def test_pages_that_requests_write_are_marked(export: ringplane.Export, log: tuple[mmap.mmap, int]) -> None:
    """Like in QEMU, the log, the features and the addresses are set while the ring runs."""
    mapping, fd = log
    with machine(export) as guest:
        guest.start()
        guest.read()
        assert marked(mapping) == set()
        guest.peer.set_log_base(len(mapping), 0, fd)
        guest.peer.set_features(guest.peer.features | VHOST_F_LOG_ALL)
        guest.set_addresses(flags=1, log=guest.memory.guest(guest.ring.used))
        data, status = guest.offer_read(9, 3 * 4096)
        guest.ring.publish()
        guest.vring.kick()
        guest.reap()
        ring = (guest.ring.used, 6 + 8 * RING_SIZE)
        assert marked(mapping) == pages(guest, (data, 3 * 4096), (status, 1), ring)
        # The log only covers the beginning of the memory; pages beyond its end are not marked.
        guest.peer.set_log_base(1, 0, fd)
        guest.read()
        assert all(page < 8 for page in marked(mapping))
        guest.peer.set_features(guest.peer.features & ~VHOST_F_LOG_ALL)
        guest.read()
        assert marked(mapping) == set()


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (1 << 63, 0), (4096, 1 << 63), (1 << 20, 0), (256, 1 << 20)])
def test_an_invalid_log_is_refused(
    export: ringplane.Export, log: tuple[mmap.mmap, int], size: int, offset: int
) -> None:
    """CVE-2020-10722, CVE-2019-14835: sizes and offsets that are not checked against the mapping."""
    with machine(export) as guest:
        with pytest.raises(Refused):
            guest.peer.set_log_base(size, offset, log[1])
        guest.start()
        assert guest.read() == sector(3)
