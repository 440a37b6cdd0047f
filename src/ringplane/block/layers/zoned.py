"""Layer `zoned`: a disk that is divided into zones that must be written sequentially (virtio 1.3, section 5.2.6).

Each zone is written at its *write pointer*. Such a disk is served by one I/O thread, so nothing here needs a lock;
zones.py has the part of the helper threads. A write pointer advances when a write is accepted, not when it has ended:
the next write may come before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ringplane.block import zonefile
from ringplane.block.io import (
    BLOCK_IO,
    FLUSH,
    FUA,
    READ,
    REFUSED,
    REPEATED,
    WRITE,
    ZONE_APPEND,
    ZONE_CLOSE,
    ZONE_FINISH,
    ZONE_OPEN,
    ZONE_REPORT,
    ZONE_RESET,
    ZONE_RESET_ALL,
)
from ringplane.block.layers import zones as pointers
from ringplane.block.layers.layer import Layer
from ringplane.block.layers.zones import ZONE, ZONES, zone_at
from ringplane.block.ranges import BACKING
from ringplane.block.stack import CONTINUE, HELP, LayerPart, call_again, turn_round
from ringplane.block.zonefile import ZoneFile
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.native.access import address_of, load64, store64, view
from ringplane.native.buffers import consume, copy_to
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_F_ZONED, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP
from ringplane.virtio.blk_zones import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    REPORT,
    REPORT_SIZE,
    VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE,
    VIRTIO_BLK_S_ZONE_INVALID_CMD,
    VIRTIO_BLK_S_ZONE_OPEN_RESOURCE,
    VIRTIO_BLK_S_ZONE_UNALIGNED_WP,
    VIRTIO_BLK_Z_HM,
    VIRTIO_BLK_ZS_CLOSED,
    VIRTIO_BLK_ZS_EMPTY,
    VIRTIO_BLK_ZS_EOPEN,
    VIRTIO_BLK_ZS_FULL,
    VIRTIO_BLK_ZS_IOPEN,
    VIRTIO_BLK_ZS_NOT_WP,
    VIRTIO_BLK_ZT_CONV,
    VIRTIO_BLK_ZT_SWR,
)

if TYPE_CHECKING:
    from ringplane.block.sources.source import Source
    from ringplane.opener.opener import Opener
    from ringplane.options.zone_options import ZoneOptions

# What is noted of each slot: the address of the ZONE that a write goes to, or 0, with one of these bits. MUST_SYNC: the
# write pointer has to be stable before the write ends. SYNCED: a helper has made it so, or has failed to.
MUST_SYNC, SYNCED = 1, 2
ZONE_BITS = ~3

# Not a status: the I/O continues to the source.
ACCEPTED = -1


@unit
def down(layer, channel, io_address):
    zones, io = view(layer, ZONES), view(io_address, BLOCK_IO)
    store64(note_of(zones, io), 0)
    if io.operation == READ or io.operation == WRITE:
        return continue_or_refuse(io, start_io(zones, io))
    if io.operation == ZONE_APPEND:
        return continue_or_refuse(io, start_append(zones, io))
    if io.operation == FLUSH:
        return start_sync(zones, io)
    if io.operation == ZONE_RESET or io.operation == ZONE_RESET_ALL:
        return start_reset(zones, io)
    return (
        turn_round(io, REFUSED - command(zones, io))
        if io.operation >= ZONE_REPORT
        else turn_round(io, REFUSED - VIRTIO_BLK_S_UNSUPP)
    )


@unit
def up(layer, channel, io_address):
    zones, io = view(layer, ZONES), view(io_address, BLOCK_IO)
    if io.operation == ZONE_RESET or io.operation == ZONE_RESET_ALL:
        end_reset(zones, io)
        return CONTINUE
    note = load64(note_of(zones, io))
    if note == 0:
        return CONTINUE
    zone = view(note & ZONE_BITS, ZONE)
    if io.result == 0 and not note & SYNCED:
        record_reached(zones, zone, io)
        if note & MUST_SYNC:
            store64(note_of(zones, io), address_of(zone) | SYNCED)
            call_again(io)
            return HELP
    end_write(zones, zone, io)
    return CONTINUE


@unit
def helped(layer, io_address):
    """What blocks: 0 or -errno."""
    zones, io = view(layer, ZONES), view(io_address, BLOCK_IO)
    backing = view(zones.backing, BACKING)
    if io.operation == ZONE_RESET or io.operation == ZONE_RESET_ALL:
        return pointers.reset(zones, backing, io)
    return pointers.sync(zones, backing)


@compiled
def continue_or_refuse(io, status):
    return CONTINUE if status == ACCEPTED else turn_round(io, REFUSED - status)


@compiled
def note_of(zones, io):
    return zones.notes + 8 * io.slot


# Reads and writes.


@compiled
def start_io(zones, io):
    """ACCEPTED if the zone accepts this read or write, else the status with which it is refused."""
    start, end = io.offset // SECTOR, (io.offset + io.length - 1) // SECTOR
    first, last = start // zones.size, end // zones.size
    if io.operation == WRITE and (io.offset | io.length) & zones.block_mask:
        return VIRTIO_BLK_S_IOERR if first < zones.conventional else VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    if last < zones.conventional:
        return ACCEPTED
    if first != last:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    zone = zone_at(zones, first)
    if io.operation == READ or is_repeated(zone, io):
        return ACCEPTED
    return start_write(zones, zone, io)


@compiled
def is_repeated(zone, io):
    """Whether a resubmitted write lies below the write pointer: then it is written again at the same place.

    The previous process completed it, or a later one, but the driver does not know. Some of its data may be missing,
    because the pointer is where the last completed write ends. A resubmitted append is appended again: its driver
    cannot distinguish that from another append.
    """
    return io.flags & REPEATED and end_of(zone, io) <= zone.pointer and not zone.reset_by


@compiled
def start_write(zones, zone, io):
    """Accept a write to a sequential zone: advance the write pointer."""
    count = io.length // SECTOR
    if zone.state == VIRTIO_BLK_ZS_FULL:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    if io.offset // SECTOR != zone.start + zone.pointer:
        return VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    if zone.reset_by or count > zones.capacity - zone.pointer:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    status = open_zone(zones, zone, VIRTIO_BLK_ZS_IOPEN)
    if status != VIRTIO_BLK_S_OK:
        return status
    zone.pointer += count
    zone.writing += 1
    if zone.pointer == zones.capacity:
        set_state(zones, zone, VIRTIO_BLK_ZS_FULL)
    # The source need not make the data stable: `sync` does that too.
    store64(note_of(zones, io), address_of(zone) | (MUST_SYNC if io.flags & FUA else 0))
    io.flags &= ~FUA
    return ACCEPTED


@compiled
def start_append(zones, io):
    """Set the offset to the write pointer; from then on the append is a write."""
    count = io.length // SECTOR
    zone = zone_at(zones, io.offset // SECTOR // zones.size)
    misplaced = zone.state == VIRTIO_BLK_ZS_NOT_WP or io.offset // SECTOR != zone.start
    if misplaced or not 0 < count <= zones.max_append:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    if io.length & zones.block_mask:
        return VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    io.operation = WRITE
    io.offset += zone.pointer * SECTOR
    return start_write(zones, zone, io)


@compiled
def record_reached(zones, zone, io):
    """The data of this write is written: advance the write pointer that counts after a restart."""
    place = reached_by(zones, zone)
    store64(place, max(load64(place), end_of(zone, io)))


@compiled
def reached_by(zones, zone):
    return zones.reached + 8 * (zone.start // zones.size)


@compiled
def end_of(zone, io):
    """The end of the write, in sectors from the zone's start."""
    return (io.offset + io.length) // SECTOR - zone.start


@compiled
def end_write(zones, zone, io):
    """A write to a sequential zone has ended. If it failed and was the last one, the write pointer moves back."""
    zone.writing -= 1
    if io.result < 0:
        io.done = 0
    if io.result < 0 and zone.pointer == end_of(zone, io):
        zone.pointer = io.offset // SECTOR - zone.start
        place = reached_by(zones, zone)
        store64(place, min(load64(place), zone.pointer))
        set_state(zones, zone, VIRTIO_BLK_ZS_CLOSED if zone.pointer > 0 else VIRTIO_BLK_ZS_EMPTY)


@compiled
def start_sync(zones, io):
    """Have a helper make data and write pointers stable."""
    if zones.failed:
        # It was logged when it happened.
        return turn_round(io, REFUSED - VIRTIO_BLK_S_IOERR)
    io.upward = 1
    return HELP


# States, and the limits of open and active (open or closed) zones.


@compiled
def is_open(state):
    return VIRTIO_BLK_ZS_IOPEN <= state <= VIRTIO_BLK_ZS_EOPEN


@compiled
def is_active(state):
    return VIRTIO_BLK_ZS_IOPEN <= state <= VIRTIO_BLK_ZS_CLOSED


@compiled
def set_state(zones, zone, state):
    zones.open += is_open(state) - is_open(zone.state)
    zones.active += is_active(state) - is_active(zone.state)
    zone.state = state


@compiled
def open_zone(zones, zone, state):
    """Open the zone implicitly or explicitly, within the limits; returns the status."""
    if not is_open(zone.state):
        if zones.max_active and not is_active(zone.state) and zones.active >= zones.max_active:
            return VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE
        if zones.max_open and zones.open >= zones.max_open and not close_another(zones):
            return VIRTIO_BLK_S_ZONE_OPEN_RESOURCE
    elif zone.state == VIRTIO_BLK_ZS_EOPEN:
        return VIRTIO_BLK_S_OK
    set_state(zones, zone, state)
    return VIRTIO_BLK_S_OK


@compiled
def close_another(zones):
    """Close the next implicitly opened zone, in round-robin order; False if there is none."""
    for _ in range(zones.count):
        zone = zone_at(zones, zones.next_closed)
        zones.next_closed = (zones.next_closed + 1) % zones.count
        if zone.state == VIRTIO_BLK_ZS_IOPEN:
            set_state(zones, zone, VIRTIO_BLK_ZS_CLOSED)
            return True
    return False


# Commands.


@compiled
def command(zones, io):
    """Carry out a command that needs no storage; returns its status."""
    if io.operation == ZONE_REPORT:
        return report(zones, io)
    zone = zone_at(zones, io.offset // SECTOR // zones.size)
    if not can_change(zone, io):
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    if io.operation == ZONE_OPEN:
        full = zone.state == VIRTIO_BLK_ZS_FULL
        return VIRTIO_BLK_S_ZONE_INVALID_CMD if full else open_zone(zones, zone, VIRTIO_BLK_ZS_EOPEN)
    if io.operation == ZONE_CLOSE:
        return close(zones, zone)
    return finish_zone(zones, zone) if io.operation == ZONE_FINISH else VIRTIO_BLK_S_UNSUPP


@compiled
def can_change(zone, io):
    """Whether the I/O names the start of a sequential zone that is not being reset."""
    return zone.state != VIRTIO_BLK_ZS_NOT_WP and io.offset // SECTOR == zone.start and not zone.reset_by


@compiled
def close(zones, zone):
    if not is_active(zone.state):
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    set_state(zones, zone, VIRTIO_BLK_ZS_CLOSED if zone.pointer > 0 else VIRTIO_BLK_ZS_EMPTY)
    return VIRTIO_BLK_S_OK


@compiled
def finish_zone(zones, zone):
    zone.pointer = zones.capacity
    store64(reached_by(zones, zone), zone.pointer)
    set_state(zones, zone, VIRTIO_BLK_ZS_FULL)
    return VIRTIO_BLK_S_OK


@compiled
def start_reset(zones, io):
    if io.operation == ZONE_RESET_ALL:
        return reset(zones, io, zones.conventional, zones.count)
    index = io.offset // SECTOR // zones.size
    if not can_change(zone_at(zones, index), io):
        return turn_round(io, REFUSED - VIRTIO_BLK_S_ZONE_INVALID_CMD)
    return reset(zones, io, index, index + 1)


@compiled
def reset(zones, io, first, end):
    """Have a helper empty the zones from `first` up to but not including `end`; empty zones are skipped.

    Fails with writes in flight, which the driver should have waited for: they could be completed and then erased.
    """
    found = False
    for index in range(first, end):
        if zone_at(zones, index).writing:
            return turn_round(io, REFUSED - VIRTIO_BLK_S_ZONE_INVALID_CMD)
    for index in range(first, end):
        zone = zone_at(zones, index)
        if zone.state != VIRTIO_BLK_ZS_EMPTY and not zone.reset_by:
            zone.reset_by = io.slot + 1
            found = True
    if not found:
        return turn_round(io, 0)
    call_again(io)
    return HELP


@compiled
def end_reset(zones, io):
    """The zones of this I/O are empty. If storage failed, their data may still be there, but the pointers are 0."""
    for index in range(zones.count):
        zone = zone_at(zones, index)
        if zone.reset_by == io.slot + 1:
            zone.reset_by = 0
            zone.pointer = 0
            set_state(zones, zone, VIRTIO_BLK_ZS_EMPTY)


@compiled
def report(zones, io):
    """Describe as many zones as fit, from the zone that contains the offset."""
    index = io.offset // SECTOR // zones.size
    count = min((io.length - REPORT_SIZE) // DESCRIPTOR_SIZE, zones.count - index)
    head = view(zones.scratch, REPORT)
    head.nr_zones = count
    for place in range(8, REPORT_SIZE, 8):
        store64(zones.scratch + place, 0)
    append(zones, io, REPORT_SIZE)
    for number in range(index, index + count):
        describe(zones, zone_at(zones, number), view(zones.scratch, DESCRIPTOR))
        append(zones, io, DESCRIPTOR_SIZE)
    return VIRTIO_BLK_S_OK


@compiled
def describe(zones, zone, descriptor):
    """Fill in the descriptor, whose reserved bytes are zero."""
    conventional = zone.state == VIRTIO_BLK_ZS_NOT_WP
    descriptor.z_cap = zones.size if conventional else zones.capacity
    descriptor.z_start = zone.start
    # A full zone's write pointer has no meaning; other devices report the end of the zone.
    descriptor.z_wp = zone.start + (zones.size if zone.state == VIRTIO_BLK_ZS_FULL else zone.pointer)
    descriptor.z_type = VIRTIO_BLK_ZT_CONV if conventional else VIRTIO_BLK_ZT_SWR
    descriptor.z_state = zone.state


@compiled
def append(zones, io, size):
    """Append `size` bytes from `scratch` to the buffers of the I/O."""
    copy_to(io.iov, zones.scratch, size)
    consume(io, size)
    io.done += size


class ZonedPart(LayerPart):
    """The part of the layer for the one I/O thread that serves such a disk."""

    def __init__(self, zones: ZoneFile, backing: int, slots: int) -> None:
        self._notes = np.zeros(slots, np.int64)
        self.state = zones.address
        zones.attach(backing, int(self._notes.ctypes.data))
        self.down, self.up, self.help = down.address(), up.address(), helped.address()


class ZonedLayer(Layer):
    """The layer of one disk, whose write pointers are in a zone file."""

    units = (down, up, helped)
    name = "zoned"
    one_thread = syncs_source = has_state = True
    fixed_size = "a zoned disk cannot get another size"
    needed_features = VIRTIO_BLK_F_ZONED
    impossible = frozenset({"discard", "write-zeroes", "secure-erase"})

    def __init__(self, zones: ZoneFile) -> None:
        self._zones = zones

    def part(self, backing: int, slots: int) -> ZonedPart:
        return ZonedPart(self._zones, backing, slots)

    def describe(self, config: np.void) -> None:
        model = self._zones.model
        config["zone_sectors"], config["max_append_sectors"] = model.size // SECTOR, self._zones.max_append_sectors
        config["max_open_zones"], config["max_active_zones"] = model.max_open, model.max_active
        config["write_granularity"], config["model"] = self._zones.block_size, VIRTIO_BLK_Z_HM

    @property
    def failed(self) -> bool:
        return self._zones.failed

    def sync(self) -> None:
        self._zones.sync()

    def snapshot(self) -> bytes:
        return self._zones.snapshot()

    def resume_from(self, saved: bytes) -> None:
        self._zones.resume_from(saved)

    def abandon(self) -> None:
        self._zones.abandon()

    def unlink(self) -> None:
        self._zones.unlink()

    def close(self) -> None:
        try:
            self._zones.close()
        except OSError as error:
            error.add_note(str(self._zones.path))
            raise


def open_layer(config: ZoneOptions, source: Source, *, shared: bool, opener: Opener) -> Layer | None:
    if config.zoned:
        zones = ZoneFile(source, config.zoned, block_size=config.block_size, shared=shared, opener=opener)
        return ZonedLayer(zones)
    if not shared:
        zonefile.check_not_zoned(source)
    return None


def check(config: ZoneOptions, source: Source) -> type[Layer] | None:
    if config.zoned:
        zonefile.check(source, config.zoned, block_size=config.block_size)
        return ZonedLayer
    zonefile.check_not_zoned(source)
    return None
