"""The compiled half of the load generator: choose, submit, reap and verify requests on one queue, without the GIL."""

from __future__ import annotations

from errno import EINTR

import numpy as np

from ringplane.compiler.jit import compiled
from ringplane.driver.content import (
    BUSY,
    GENERATION_MASK,
    WORD_STEP,
    content_differs,
    first_word,
    mix,
    word_at,
    write_content,
)
from ringplane.driver.driver import NO_STATUS
from ringplane.driver.virtqueue import (
    BAD_USED,
    NO_ROOM,
    QUEUE,
    SEGMENT,
    SEGMENT_SIZE,
    add,
    disable_notifications,
    enable_notifications,
    publish,
    take_used,
    used_count,
)
from ringplane.metrics import histogram
from ringplane.native.access import address_of, load8, load32, load64, store8, store32, store64, view, wrapping_add
from ringplane.native.epoll import EPOLL_EVENT
from ringplane.native.syscalls import epoll_wait, monotonic_ns, write
from ringplane.virtio.blk import (
    HEADER,
    HEADER_SIZE,
    SECTOR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
)

EPOLL_EVENT_SIZE = EPOLL_EVENT.itemsize
HEADER_SECTOR: int = HEADER.fields["sector"][1]  # type: ignore[index]

# A time that the clock never reaches, and a number of requests that is never used up.
FOREVER = 1 << 62

# With verification, requests are published each time that this many bytes of content were generated: the device must
# not wait until a whole batch of large writes is ready.
PUBLISH_BYTES = 128 * 1024

# How often a random choice that hit a busy sector is retried before the slot waits for the next completion.
CHOICES = 16

# Results of `drive`
DONE, AGAIN, TROUBLE, BROKEN = 0, 1, 2, 3

# A request that can be in flight. Addresses are ours.
SLOT = np.dtype(
    [(name, "<i8") for name in ("kind", "sector", "sectors", "started", "header", "status", "data", "table")]
)
SLOT_SIZE = SLOT.itemsize

# The load on one queue. Python writes the fields above the line before the start (`stop` at any time), `drive` those
# below.
RUN = np.dtype(
    [
        (name, "<i8")
        for name in (
            "ring",  # QUEUE
            "slots",  # `depth` SLOTs
            "free",  # stack of the numbers of free slots
            "depth",
            "segments",  # room for three SEGMENTs
            "sizes",  # `size_count` request sizes in sectors
            "size_count",
            "align",  # in sectors: where requests may begin
            "first",  # the part of the disk, in sectors
            "end",
            "sequential",
            "read_percent",
            "flush_every",
            "verify",
            "busy_poll",
            "seed",
            "model",  # address of sector 0's 32-bit entry
            "kick_fd",
            "call_fd",
            "epoll_fd",
            "events",  # room for EVENTS EPOLL_EVENTs
            "one",  # address of a 64-bit 1, which is written to kick_fd
            "measure_from",  # clock: earlier completions do not count
            "deadline",  # clock: from here on nothing is submitted, and completions do not count
            "stop",  # address of a number: from when it is not 0, nothing is submitted
            "stops_at_error",  # the first error sets that number
            # ---
            "random",  # state of the generator
            "cursor",  # next sector of a sequential load
            "budget",  # requests still to be submitted
            "free_count",
            "writes_since_flush",
            "last_progress",  # clock: the last completion, or the first submission after an idle time
            "finished",  # clock: the last completion that counted
            "requests",
            "bytes",
            "latency",  # sum in ns
            "errors",
            "error_kind",  # of the first one
            "error_sector",
            "error_status",
            "wrong_lengths",
            "checked",  # sectors
            "mismatches",  # sectors
            "bad_sector",  # of the first one
            "bad_expected",
            "bad_found",
            "bad_word",
            "bad_generation",
        )
    ]
    + [("histogram", "<i8", (histogram.BUCKETS,))]
)
RUN_HISTOGRAM: int = RUN.fields["histogram"][1]  # type: ignore[index]
EVENTS = 4


@compiled
def _next_random(run):
    run.random = wrapping_add(run.random, WORD_STEP)
    return mix(run.random)


@compiled
def _slot(run, number):
    return view(run.slots + number * SLOT_SIZE, SLOT)


@compiled
def _entry(run, sector):
    return run.model + 4 * sector


# Claiming sectors: with verification no two requests in flight overlap.


@compiled
def _is_free(run, sector, sectors):
    busy = 0
    for each in range(sector, sector + sectors):
        busy |= load32(_entry(run, each))
    return (busy & BUSY) == 0


@compiled
def _claim(run, slot):
    """Mark the sectors of a request busy; those of a write get their next generation and content."""
    for index in range(slot.sectors):
        sector = slot.sector + index
        generation = load32(_entry(run, sector))
        if slot.kind == VIRTIO_BLK_T_OUT:
            generation = (generation % GENERATION_MASK) + 1
            write_content(slot.data + index * SECTOR, first_word(run.seed, sector, generation))
        store32(_entry(run, sector), BUSY | generation)


@compiled
def _release(run, slot, succeeded):
    """The request is done: check what was read; after a failed write the content is unknown."""
    for index in range(slot.sectors):
        sector = slot.sector + index
        generation = load32(_entry(run, sector)) & ~BUSY
        if slot.kind == VIRTIO_BLK_T_OUT and not succeeded:
            generation = 0
        if slot.kind == VIRTIO_BLK_T_IN and succeeded and generation:
            _check(run, slot.data + index * SECTOR, sector, generation)
        store32(_entry(run, sector), generation)


@compiled
def _check(run, address, sector, generation):
    run.checked += 1
    word = first_word(run.seed, sector, generation)
    if content_differs(address, word) == 0:
        return
    run.mismatches += 1
    if run.mismatches == 1:
        _describe_mismatch(run, address, sector, generation, word)


@compiled
def _describe_mismatch(run, address, sector, generation, word):
    position = 0
    while load64(address + 8 * position) == word_at(word, position):
        position += 1
    run.bad_sector, run.bad_generation, run.bad_word = sector, generation, position
    run.bad_expected = word_at(word, position)
    run.bad_found = load64(address + 8 * position)


# Choosing


@compiled
def _choose_sequential(run, size):
    """(sector, sectors) at the cursor, shortened at the end of the queue's part of the disk."""
    return run.cursor, min(size, run.end - run.cursor)


@compiled
def _choose_random(run, size):
    places = (run.end - run.first - size) // run.align + 1
    return run.first + ((_next_random(run) >> 1) & (FOREVER - 1)) % places * run.align, size


@compiled
def _choose(run, slot):
    """Choose the slot's next request; False if that needs sectors that are busy."""
    if run.flush_every and run.writes_since_flush >= run.flush_every:
        slot.kind, slot.sector, slot.sectors = VIRTIO_BLK_T_FLUSH, 0, 0
        run.writes_since_flush = 0
        return True
    number = _next_random(run)
    size = load64(run.sizes + 8 * ((number & 0xFFFFFF) % run.size_count))
    is_read = ((number >> 24) & 0xFFFFFF) % 100 < run.read_percent
    for _ in range(CHOICES):
        sector, sectors = _choose_sequential(run, size) if run.sequential else _choose_random(run, size)
        if not run.verify or _is_free(run, sector, sectors):
            slot.kind, slot.sector, slot.sectors = VIRTIO_BLK_T_IN if is_read else VIRTIO_BLK_T_OUT, sector, sectors
            run.cursor = run.first if sector + sectors == run.end else sector + sectors
            run.writes_since_flush += 0 if is_read else 1
            return True
    return False


# Submitting


@compiled
def _set_segment(run, position, address, length, writable):
    segment = view(run.segments + position * SEGMENT_SIZE, SEGMENT)
    segment.address, segment.length, segment.writable = address, length, writable


@compiled
def _offer(run, queue, slot, number):
    """Write the request's header and add its chain: header, data if any, status."""
    store32(slot.header, slot.kind)
    store64(slot.header + HEADER_SECTOR, slot.sector)
    store8(slot.status, NO_STATUS)
    _set_segment(run, 0, slot.header, HEADER_SIZE, 0)
    count = 1
    if slot.sectors:
        _set_segment(run, 1, slot.data, slot.sectors * SECTOR, 1 if slot.kind == VIRTIO_BLK_T_IN else 0)
        count = 2
    _set_segment(run, count, slot.status, 1, 1)
    return add(queue, run.segments, count + 1, slot.table, number)


@compiled
def _publish(run, queue, batch):
    """Publish the requests whose slots were taken from the free stack since it had `batch` entries."""
    if run.free_count == batch:
        return
    now = monotonic_ns()
    if batch == run.depth:
        run.last_progress = now
    for position in range(run.free_count, batch):
        _slot(run, load64(run.free + 8 * position)).started = now
    if publish(queue):
        write(run.kick_fd, run.one, 8)


@compiled
def _may_submit(run, now):
    return run.free_count > 0 and run.budget > 0 and now < run.deadline and load64(run.stop) == 0


@compiled
def _submit(run, queue, now):
    """Fill the free slots with requests."""
    batch, made = run.free_count, 0
    while _may_submit(run, now):
        number = load64(run.free + 8 * (run.free_count - 1))
        slot = _slot(run, number)
        if not _choose(run, slot):
            break
        if run.verify:
            _claim(run, slot)
            made += slot.sectors * SECTOR
        if _offer(run, queue, slot, number) == NO_ROOM:
            # Python checked that the ring has room for all slots, so chains were lost.
            return False
        run.free_count -= 1
        if now >= run.measure_from:
            run.budget -= 1
        if made >= PUBLISH_BYTES:
            _publish(run, queue, batch)
            batch, made = run.free_count, 0
    _publish(run, queue, batch)
    return True


# Reaping


@compiled
def _count(run, slot, now):
    run.requests += 1
    run.bytes += slot.sectors * SECTOR
    run.latency += now - slot.started
    run.finished = now
    histogram.count(address_of(run) + RUN_HISTOGRAM, now - slot.started)


@compiled
def _count_error(run, slot, status):
    run.errors += 1
    if run.stops_at_error:
        store64(run.stop, 1)
    if run.errors == 1:
        run.error_kind, run.error_sector, run.error_status = slot.kind, slot.sector, status


@compiled
def _complete(run, number, length, now):
    slot = _slot(run, number)
    status = load8(slot.status)
    if status != VIRTIO_BLK_S_OK:
        _count_error(run, slot, status)
    elif length != 1 + (slot.sectors * SECTOR if slot.kind == VIRTIO_BLK_T_IN else 0):
        run.wrong_lengths += 1
    if run.measure_from <= now < run.deadline:
        _count(run, slot, now)
    if run.verify:
        _release(run, slot, status == VIRTIO_BLK_S_OK)
    store64(run.free + 8 * run.free_count, number)
    run.free_count += 1


@compiled
def _reap(run, queue, count, now):
    """Take `count` used chains; False if the device used one that is not in flight."""
    run.last_progress = now
    for _ in range(count):
        number, length = take_used(queue)
        if number == BAD_USED or number >= run.depth or run.free_count == run.depth:
            return False
        _complete(run, number, length, now)
    return True


# Waiting


@compiled
def _wait_for_notification(run, queue, now, until):
    """Sleep until the device notifies, at most until the time `until`; False if something else happened."""
    enable_notifications(queue)
    if used_count(queue):
        return True
    milliseconds = max(0, until - now) // 1_000_000 + 1
    count = epoll_wait(run.epoll_fd, run.events, EVENTS, milliseconds)
    disable_notifications(queue)
    if count < 0:
        return count == -EINTR
    for index in range(count):
        event = view(run.events + index * EPOLL_EVENT_SIZE, EPOLL_EVENT)
        # Python registered the fd: the upper half of the data is undefined.
        if event.data & 0xFFFFFFFF != run.call_fd:
            return False
    return True


@compiled
def drive(address, until):
    """Run the RUN at `address` until its load is DONE or until the time `until` (AGAIN).

    TROUBLE: the error eventfd or the socket became ready and must be checked. BROKEN: the used ring is invalid.
    """
    run = view(address, RUN)
    queue = view(run.ring, QUEUE)
    while True:
        count = used_count(queue)
        # After the ring was checked: the completions found there happened before this time.
        now = monotonic_ns()
        if count and not _reap(run, queue, count, now):
            return BROKEN
        if not _submit(run, queue, now):
            return BROKEN
        if run.free_count == run.depth and not _may_submit(run, now):
            return DONE
        if now >= until:
            return AGAIN
        if count == 0 and not run.busy_poll and not _wait_for_notification(run, queue, now, until):
            return TROUBLE
