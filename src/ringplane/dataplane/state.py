"""The structs that the data plane works on and the control plane reads: workers, queues, devices, requests.

All fields are int64, but for some of a device's. Addresses point at other structs; the Python objects that own the
arrays keep them alive. Unless a field says otherwise it is written by the worker's thread alone.
"""

from __future__ import annotations

import numpy as np

from ringplane.engines.ranges import BACKING
from ringplane.histogram import BUCKETS
from ringplane.virtio.blk import VIRTIO_BLK_ID_BYTES


def _struct(*fields: str) -> np.dtype[np.void]:
    return np.dtype([(field, "<i8") for field in fields])


# A disk. Written by the control plane, but for `flush_failed`. The last fields are a BACKING (engines/ranges.py).
DEVICE = np.dtype(
    [
        ("capacity", "<i8"),  # in sectors of 512 bytes
        ("read_only", "<i8"),
        ("block_mask", "<i8"),  # logical block size - 1, in bytes: what a request's sector and length must respect
        ("memory_mask", "<i8"),  # what the address of a buffer must respect for O_DIRECT; 0 when buffered
        ("segment_mask", "<i8"),  # what the length of each buffer must respect for O_DIRECT; 0 when buffered
        ("serial", "u1", (VIRTIO_BLK_ID_BYTES,)),
        ("padding", "u1", (4,)),
        ("flush_failed", "<i8"),  # set by any worker, never cleared: what was written may be lost (flush.py)
        ("storage", "<i8"),  # engines.common: THROUGH_WORKER, IN_MEMORY or NOWHERE
        ("zones", "<i8"),  # ZONES (engines/zones.py), or 0
        ("lifetime", "<i8"),  # bytes of LIFETIME that the storage tells of its wear; 0: it does not
        ("lifetime_data", "u1", (8,)),
        *((name, "<i8") for name in BACKING.names or ()),
    ]
)
# Where its BACKING begins: what the helper threads need to know of it.
DEVICE_BACKING: int = DEVICE.fields["fd"][1]  # type: ignore[index]
DEVICE_LIFETIME: int = DEVICE.fields["lifetime_data"][1]  # type: ignore[index]
DEVICE_SERIAL: int = DEVICE.fields["serial"][1]  # type: ignore[index]

# A virtqueue of a device, served by one worker.
QUEUE = _struct(
    "number",
    "device",  # DEVICE
    # The ring, as virtio/split.py wants it
    "desc",
    "avail",
    "used",
    "size",
    "last_avail",
    "seen_avail",
    "next_used",
    "signalled_used",
    "event_idx",
    "packed",  # which format the ring has; what follows is for packed rings alone
    "avail_wrap",
    "used_wrap",
    "batch",
    "batch_flags",
    "uncounted",
    "indirect",
    # What is in flight, in memory that outlives this process, as virtio/inflight.py wants it
    "inflight",  # or 0: nobody is told
    "counter",
    "batch_list",
    "batched",
    "last_batch_head",
    "free_head",
    "places",
    "links",
    "lasts",
    "counts",
    "resubmit",  # address of the entries, int64 each, of chains that the last process had fetched
    "resubmits",  # how many of them have not been started again yet; nothing else is fetched before
    # Migration: the dirty log (dirty.py), and its size in bytes
    "log",  # or 0
    "log_size",
    # Guest memory: REGION structs
    "regions",
    "region_count",
    "last_region",  # where the last address was found
    # State
    "running",
    "draining",  # the control plane waits for in_flight to become 0
    "broken",  # the number of the rule that the driver broke, see rules.py
    "broken_head",
    "in_flight",
    "features",  # what driver and device have agreed on
    "in_order",  # requests are answered in the order of their chains (complete.py)
    "oldest",  # of the requests that were not answered yet, then: its slot, or -1
    "newest",
    # The driver does not flush, so what changes the disk ends when that is stable; for writes there are two ways:
    "write_through",
    "dsync",  # they carry RWF_DSYNC
    "flush_writes",  # they are followed by a flush
    "file",  # its fd of the image as the worker's engine wants it
    # Flushes (flush.py): slots, or -1
    "flushing",  # the first of the requests that the present fdatasync(2) is for
    "flush_first",  # of those that wait for the next one
    "flush_last",
    "call_fd",  # or -1
    # Membership in the worker's lists
    "ready",
    "next_ready",
    "turn",  # how many chains to fetch in the next turn
    "quiet",  # kicks are off, as it was served since the worker last slept
    "next_quiet",
    "unpublished",
    "next_unpublished",
    "uncalled",  # the driver may want a call for what was published
    "next_uncalled",
    "counters",  # COUNTER structs, one for each kind of request
    "failures",  # FAILURE structs, the same
)

# Kinds of requests that are counted apart.
KIND_READ, KIND_WRITE, KIND_FLUSH, KIND_DISCARD, KIND_ZERO, KIND_OTHER = range(6)
KINDS = ("read", "write", "flush", "discard", "write_zeroes", "other")

COUNTER = np.dtype(
    [
        ("requests", "<i8"),  # completed
        ("errors", "<i8"),  # of those, with a status other than OK
        ("bytes", "<i8"),
        ("histogram", "<i8", (BUCKETS,)),  # nanoseconds from fetch to completion
    ]
)
COUNTER_SIZE = COUNTER.itemsize
COUNTER_HISTOGRAM: int = COUNTER.fields["histogram"][1]  # type: ignore[index]

# What storage has failed to do, and Python has not been told yet (failures.py).
FAILURE = _struct(
    "count",
    "seen",  # errors that Python was called for, a bit for each
    "again_at",  # nanoseconds, CLOCK_MONOTONIC: when it is to be called again for those
    "untold",  # what follows is new
    "result",  # -errno, or 0: nothing was transferred
    "offset",  # in bytes
    "length",
)
FAILURE_SIZE = FAILURE.itemsize

# A request between fetch and completion; its slot number is its index.
REQUEST = _struct(
    "slot",
    "next",  # the next free slot, or the next request waiting for a bounce buffer or flush; -1 ends the list
    "queue",  # QUEUE
    "head",  # which chain it is, as the driver calls it
    "descriptors",  # how many of a packed ring's the chain takes
    "entry",  # of the chain, where a packed ring's chains are tracked (virtio/inflight.py)
    "iovecs",  # this slot's own room for MAX_IOVECS IOVEC structs
    # From the chain, filled by fetch: the driver's buffers as IOVEC structs, readable ones before writable ones
    "readable_count",
    "readable_bytes",
    "writable_count",
    "writable_bytes",
    # From the header
    "header_type",  # the header as it was copied from the driver, 16 bytes: type and reserved, then sector
    "header_sector",
    "type",
    "kind",
    "sector",
    "length",  # of the data, in bytes
    "status_address",
    # Progress
    "operation",  # engines.common
    "zone",  # ZONE that a write goes to, or 0 (zones.py)
    "iov",  # what is still to be transferred
    "iov_count",
    "done",  # bytes transferred
    "joined",  # the request whose I/O is done together with this one's, after it: its slot, or -1 (merge.py)
    "whole_length",  # bytes, and IOVEC structs, of the I/O that begins with this request
    "whole_iov_count",
    "bounce",  # address of the bounce buffer in use, or 0
    "bounce_iov_base",  # one IOVEC that describes it
    "bounce_iov_len",
    "ranges",  # this slot's own room for MAX_RANGES RANGE structs: what to discard, or fill with zeros
    "range_count",
    "noted",  # this slot's own room for MAX_IOVECS IOVEC structs: what it writes, in guest addresses (dirty.py)
    "noted_count",
    "noted_status",
    "zeros_iov_base",  # one IOVEC for zeros that are written
    "zeros_iov_len",
    "started",  # nanoseconds, CLOCK_MONOTONIC
    "following",  # the request that came after it on a queue whose answers are in order: its slot, or -1
    "ended",  # its status is written, but on such a queue an older request is not answered yet
    "retired_memory",  # not 0: the memory table that this request was translated with has been replaced
)
REQUEST_SIZE = REQUEST.itemsize
REQUEST_HEADER: int = REQUEST.fields["header_type"][1]  # type: ignore[index]
REQUEST_SECTOR: int = REQUEST.fields["sector"][1]  # type: ignore[index]
REQUEST_ZEROS_IOV: int = REQUEST.fields["zeros_iov_base"][1]  # type: ignore[index]
REQUEST_BOUNCE_IOV: int = REQUEST.fields["bounce_iov_base"][1]  # type: ignore[index]

# Room for a chain: the most segments that any driver is known to send is 515; QEMU's own limit is 1024 in all.
# Odd in cache lines (1028 * 16 / 64 = 257), so that the first iovecs of all slots do not compete for one cache set.
MAX_IOVECS = 1028

# The most segments of one request, and sectors of a segment (1 GiB), of discard, write zeroes and secure erase.
MAX_RANGES, MAX_RANGE_SECTORS = 256, 1 << 21

# What a worker does before it sleeps, and when it calls drivers, the dearest habit last (tune.py): call and sleep at
# once; hold calls back and take naps meanwhile; look at the rings for a while before sleeping.
SLEEP, NAP, POLL = range(3)
HABITS = 3

# What a trial has found of a habit: requests answered in so many nanoseconds.
TALLY = _struct("answered", "lasted")
TALLY_SIZE = TALLY.itemsize

WORKER = _struct(
    "engine",  # ENGINE
    "requests",  # REQUEST structs
    "free",  # first free slot, or -1
    "ready",  # list of queues that may have chains to fetch, first in first out: QUEUE, or 0
    "ready_last",
    "quiet",  # list of queues whose kicks are off: QUEUE, or 0
    "unpublished",  # list of queues with used elements to publish: QUEUE, or 0
    "uncalled",  # list of queues whose calls are held: QUEUE, or 0
    "call_at",  # nanoseconds, CLOCK_MONOTONIC, when the held calls are due
    "call_limit",  # and when they are due at the latest, whatever completes meanwhile
    "held",  # the request that begins an I/O which more may join; -1: none (merge.py)
    "held_last",  # the last one that has joined
    "copy_first",  # requests to be copied in this turn, oldest first; -1: none
    "copy_last",
    "waiting_first",  # requests that wait for a bounce buffer, oldest first; -1: none
    "waiting_last",
    "bounce_free",  # list of free bounce buffers, each holding the address of the next; 0: none
    "attention",  # not 0: `run` is to return to Python
    "failing",  # there are FAILURE structs for it
    "in_flight",  # requests fetched and not yet answered, over all queues
    "turns",  # of the loop since the engine was last asked for events
    "poll_ns",  # how long to look at the rings before sleeping, in the habit POLL; ALWAYS: instead of sleeping
    "poll_end",  # nanoseconds, CLOCK_MONOTONIC, when the present look at the rings began and is not over, else 0
    # Self-tuning, see tune.py
    "answered",  # requests
    "habit",
    "habits",  # those that it may have, a bit for each
    "best",  # the habit that the last trial found best
    "rate",  # and how many requests a second it answered then
    "spell_start",  # nanoseconds, CLOCK_MONOTONIC
    "spell_end",
    "spell_answered",  # `answered` when it began
    "rounds",  # of the present trial, so far
    "trying",  # which habits take part in it, a bit for each
    "resting",  # nanoseconds until the next trial; 0: there is one now
    "rest_ns",  # how long the present rest was to be
    "gaps",  # in a row
    "tallies",  # TALLY structs, one for each habit
    "now",  # nanoseconds, CLOCK_MONOTONIC, of the present turn
    "trace",  # TRACE structs, or 0 when tracing is off
    "traced",  # events traced so far
    "one",  # the number 1, for eventfds
    "caller",  # CALLER (caller.py) where the queues of several disks are served, else 0; set by the control plane
    "jobs_fd",  # the pipes to and from the helper threads (helpers.py)
    "done_fd",
    "helped_slot",  # room for a COMPLETION
    "helped_result",
)
WORKER_HELPED: int = WORKER.fields["helped_slot"][1]  # type: ignore[index]
WORKER_ONE: int = WORKER.fields["one"][1]  # type: ignore[index]
WORKER_TRACED: int = WORKER.fields["traced"][1]  # type: ignore[index]

# Not a status: the request goes on.
PENDING = -1

# A `poll_ns` that means: never sleep.
ALWAYS = 1 << 62

# A moment that the clock does not reach.
NEVER = 1 << 62

# What the engine reports of a watched fd: one of these, or the address of a QUEUE that was kicked.
TOKEN_CONTROL, TOKEN_HELPED = 1, 2

BOUNCE_SIZE = 256 * 1024
BOUNCE_ALIGNMENT = 4096

TRACE_FETCH, TRACE_COMPLETE, TRACE_START, TRACE_STOP = 1, 2, 3, 4
# Of a request; for the start and stop of a queue `sector` is its index in the available ring and `length` its size.
TRACE = _struct("time", "event", "device", "queue", "head", "type", "sector", "length", "status", "nanoseconds")
TRACE_SIZE = TRACE.itemsize
TRACE_CAPACITY = 1 << 16
