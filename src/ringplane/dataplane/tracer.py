"""Tracing in compiled code: what happens to requests is written to a ring buffer, which Python reads (trace_events.py).

All of it is units: while nobody traces, a worker compares one field per fetched and per completed request, and a
process in which nobody can trace does not load them.

A request has an event when it is completed, which also has the times before. It has one when it is fetched only if a
reader wants to know at once: events cost the caches of two CPUs more than they cost instructions. On a disk with layers
it also has one each time it leaves the layers for the source, and one each time it comes back: `passed` is the
functions of a probe below the layers (block/stack.py). Of a disk with limits it is traced when a queue is held, and
when that ends (limit_gate.py).
"""

from __future__ import annotations

from ringplane.block.io import BLOCK_IO
from ringplane.block.stack import CONTINUE
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.dataplane.state import QUEUE, REQUEST, REQUEST_SIZE, WORKER
from ringplane.dataplane.trace_layout import (
    COMPLETE,
    EVENT,
    EVENT_BITS,
    EVENT_SIZE,
    FETCH,
    LAST_SECTOR,
    LAST_TYPE,
    LEAVE,
    LENGTH_SHIFT,
    LONGEST_WAIT,
    RETURN,
    ROUNDED,
    TIME_SHIFT,
    WAIT_SHIFT,
)
from ringplane.native.access import address_of, load64, store64, store64_release, view
from ringplane.native.structs import struct
from ringplane.native.syscalls import monotonic_ns

# How many events are kept.
CAPACITY = 1 << 18

# Of a worker. The first four are the addresses of the units below.
TRACER = struct(
    "fetched",
    "completed",
    "passed",
    "held",
    "worker",  # WORKER
    "events",  # CAPACITY EVENT structs
    "written",  # events so far
    "waits",  # int64 per slot: `waited` of its request
    "fetches",  # 1: a reader wants events of fetches
)
WRITTEN: int = TRACER.fields["written"][1]  # type: ignore[index]


@unit
def fetched(worker_address, queue_address, request_address, status):
    """Returns `status`: to keep it across the call would cost the loop instructions also while nobody traces."""
    worker, queue, request = view(worker_address, WORKER), view(queue_address, QUEUE), view(request_address, REQUEST)
    tracer = view(worker.trace, TRACER)
    note_seen(queue, worker.now)
    waited = 0 if queue.packed else worker.now - queue.seen_at
    store64(tracer.waits + 8 * request.slot, min(waited >> WAIT_SHIFT, LONGEST_WAIT))
    if tracer.fetches:
        write(tracer, worker.now, FETCH, queue, request, 0, 0)
    return status


@unit
def completed(worker_address, queue_address, request_address, status):
    worker, queue, request = view(worker_address, WORKER), view(queue_address, QUEUE), view(request_address, REQUEST)
    write(view(worker.trace, TRACER), worker.now, COMPLETE, queue, request, status, worker.now - request.started)
    return 0


@unit
def passed(tracer_address, channel_address, io_address):
    """The functions of the probe below the layers, on the way down and up."""
    tracer, io = view(tracer_address, TRACER), view(io_address, BLOCK_IO)
    worker = view(tracer.worker, WORKER)
    request = view(worker.requests + io.slot * REQUEST_SIZE, REQUEST)
    # In the worker, so that what is traced later in this turn has no earlier time.
    worker.now = monotonic_ns()
    write(tracer, worker.now, RETURN if io.upward else LEAVE, view(request.queue, QUEUE), request, 0, 0)
    return CONTINUE


@unit
def held(worker_address, queue_address, event, time):
    """HOLD or RELEASE of a queue."""
    worker, queue = view(worker_address, WORKER), view(queue_address, QUEUE)
    note_seen(queue, time)
    tracer = view(worker.trace, TRACER)
    entry = next_entry(tracer, time, queue)
    entry.event = event
    entry.sector = entry.sector_high = entry.head = entry.length = entry.lasted = entry.waited = entry.type = 0
    count(tracer)
    return 0


UNITS = (fetched, completed, passed, held)


@compiled
def note_seen(queue, now):
    """Note when a split ring's available index was loaded: all chains up to there were seen then.

    It is loaded again only when all of these have been fetched, so one time is enough.
    """
    if queue.seen_avail != queue.traced_avail:
        queue.traced_avail = queue.seen_avail
        queue.seen_at = now


@compiled
def write(tracer, time, event, queue, request, status, lasted):
    """Write an event of a request."""
    entry = next_entry(tracer, time, queue)
    sector = LAST_SECTOR if request.sector & ~LAST_SECTOR else request.sector
    entry.sector = sector
    entry.sector_high = sector >> 32
    entry.head = request.head
    entry.length = rounded_to_31_bits(request.length, LENGTH_SHIFT)
    entry.lasted = rounded_to_31_bits(lasted, TIME_SHIFT)
    entry.waited = load64(tracer.waits + 8 * request.slot)
    entry.type = min(request.type, LAST_TYPE)
    entry.event = event | status << EVENT_BITS
    count(tracer)


@compiled
def rounded_to_31_bits(number, shift):
    return number if number < ROUNDED else ROUNDED | min(number >> shift, ROUNDED - 1)


@compiled
def next_entry(tracer, time, queue):
    entry = view(tracer.events + (tracer.written & (CAPACITY - 1)) * EVENT_SIZE, EVENT)
    entry.time = time
    entry.queue = queue.traced
    return entry


@compiled
def count(tracer):
    # Release: the entry is complete before it is counted. The reader loads the count, then the entries.
    store64_release(address_of(tracer) + WRITTEN, tracer.written + 1)
