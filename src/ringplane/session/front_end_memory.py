"""The memory that one front end shares: the guest's, the dirty log of a migration, and the in-flight area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from ringplane.dataplane.dirty import PAGE_BITS
from ringplane.dataplane.queue import DirtyLog
from ringplane.guest_memory.address_space import Quota
from ringplane.guest_memory.regions import Alarm, Mapping, MemoryTable, Region
from ringplane.inflight.area import AreaSizes, InflightArea
from ringplane.session.refusal import Refused
from ringplane.session.snapshot import MemoryPart, MemorySnapshot, SharedRegion
from ringplane.system.fd import Fd
from ringplane.vhost_user.payloads import Inflight, LogRegion, MemoryRegion

# KVM's limit for a guest (KVM_USER_MEM_SLOTS of x86); front ends do not need more.
MAX_MEMORY_SLOTS = 509


class FrontEndMemory:
    """The mappings of a front end's memory. The fds that are mapped stay the caller's."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._alarm = Alarm()
        self.table = MemoryTable()
        self.log: DirtyLog | None = None
        self.inflight: InflightArea | None = None

    @property
    def alarm_fd(self) -> int:
        """Readable when pages of this memory were lost, because the front end has truncated it."""
        return self._alarm.fd

    def set_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        self.table = MemoryTable(self._map(region, fd) for region, fd in zip(regions, fds, strict=True))

    def add_region(self, region: MemoryRegion, fd: int) -> None:
        if len(self.table.regions) >= MAX_MEMORY_SLOTS:
            raise Refused(f"all {MAX_MEMORY_SLOTS} memory slots are in use")
        self.table = self.table.adding(self._map(region, fd))

    def remove_region(self, region: MemoryRegion) -> None:
        self.table = self.table.removing(region.guest_address, region.user_address, region.size)

    def set_log(self, described: LogRegion, fd: int) -> None:
        size, offset = described.size, described.offset
        if size == 0 or size + offset >= 1 << 62:
            raise Refused(f"impossible dirty log: {size} bytes at {offset}")
        self.log = DirtyLog(Mapping(fd, size, offset, self._alarm, self._quota))

    @property
    def log_size_needed(self) -> int:
        """The bytes of a dirty log in which each page of the memory has its bit."""
        # The regions are sorted.
        ends = [region.guest_address + region.size for region in self.table.regions[-1:]]
        return sum((end - 1 >> PAGE_BITS) // 8 + 1 for end in ends)

    def set_inflight(self, described: Inflight, fd: int) -> None:
        self.inflight = InflightArea(AreaSizes(*astuple(described)), fd, self._alarm, self._quota)

    def _map(self, region: MemoryRegion, fd: int) -> Region:
        where = (region.guest_address, region.user_address, region.size, region.mmap_offset)
        return Region.map(*where, fd, self._alarm, self._quota)

    def snapshot(self) -> MemorySnapshot:
        area = self.inflight
        return MemorySnapshot(
            regions=[
                SharedRegion(region.guest_address, region.user_address, _part(region.mapping))
                for region in self.table.regions
            ],
            log=_part(self.log.mapping) if self.log is not None else None,
            inflight=list(area.sizes) if area is not None else None,
            inflight_fd=Fd(area.fd) if area is not None else None,
        )

    def resume_from(self, saved: MemorySnapshot) -> None:
        """Map the same memory as another process; raises BadMemory and OSError."""
        self.set_table([_described(each) for each in saved.regions], [each.memory.fd.number for each in saved.regions])
        if saved.log is not None:
            self.set_log(LogRegion(saved.log.size, saved.log.offset), saved.log.fd.number)
        if saved.inflight is not None and saved.inflight_fd is not None:
            self.set_inflight(Inflight(*saved.inflight), saved.inflight_fd.number)

    def close(self) -> None:
        """Drop all memory; requests in flight keep what they need."""
        self.table, self.log, self.inflight = MemoryTable(), None, None
        # Cancelled tasks may hold this object until the next garbage collection, but they must not hold the fd.
        del self._alarm


def _part(mapping: Mapping) -> MemoryPart:
    return MemoryPart(Fd(mapping.fd), mapping.offset, mapping.size)


def _described(region: SharedRegion) -> MemoryRegion:
    memory = region.memory
    return MemoryRegion(region.guest_address, memory.size, region.user_address, memory.offset)
