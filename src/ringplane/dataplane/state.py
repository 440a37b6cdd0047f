"""The structs of the data plane: workers, queues, devices, requests. The control plane reads them too.

All fields are int64, except some of DEVICE. A field that names another struct holds its address; the Python objects
that own the arrays keep them alive. Unless a comment says otherwise, only the worker's thread writes a field.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ringplane.compiler.units import Unit
from ringplane.metrics.histogram import BUCKETS
from ringplane.native.structs import struct
from ringplane.options.device_options import MAX_QUEUES
from ringplane.virtio.blk import VIRTIO_BLK_ID_BYTES

# A disk. Written by the control plane, but for `tick` and `busy_ticks`.
DEVICE = np.dtype(
    [
        ("capacity", "<i8"),  # in sectors of 512 bytes
        ("read_only", "<i8"),
        ("block_mask", "<i8"),  # logical block size - 1, in bytes: must be clear in a request's offset and length
        ("serial", "u1", (VIRTIO_BLK_ID_BYTES,)),
        ("padding", "u1", (4,)),
        ("request_types", "<i8"),  # REQUEST_TYPE structs by number, or 0 if there are only those of requests.py
        ("lifetime", "<i8"),  # size of the LIFETIME data that the storage reports of its wear; 0: none
        ("lifetime_data", "u1", (8,)),
        ("queues", "<i8", (MAX_QUEUES,)),  # by number: QUEUE of those that have ever been started, or 0
        # How long it had requests in flight (io_time.py)
        ("tick", "<i8"),  # up to which that is counted
        ("busy_ticks", "<i8"),
    ]
)
DEVICE_LIFETIME: int = DEVICE.fields["lifetime_data"][1]  # type: ignore[index]
DEVICE_SERIAL: int = DEVICE.fields["serial"][1]  # type: ignore[index]
DEVICE_QUEUES: int = DEVICE.fields["queues"][1]  # type: ignore[index]
DEVICE_TICK: int = DEVICE.fields["tick"][1]  # type: ignore[index]
DEVICE_BUSY_TICKS: int = DEVICE.fields["busy_ticks"][1]  # type: ignore[index]

# A type of request that only some disks have: addresses of units, or 0. begin(queue, request, io) checks the request
# and fills in the block I/O; it returns PENDING, or the status of a request that is complete. end(queue, request, io,
# status) is called before the request is completed, and returns its status.
REQUEST_TYPE = struct("begin", "end")
REQUEST_TYPE_SIZE = REQUEST_TYPE.itemsize
# The length of the table: types from this number on are unsupported.
REQUEST_TYPES = 64
# By the number in the header: `begin` and `end`.
RequestTypes = Mapping[int, tuple[Unit, Unit | None]]

# A virtqueue of a device, served by one worker.
QUEUE = struct(
    "number",
    "device",  # DEVICE
    # The ring: the fields that virtio/split.py requires, which explains them
    "desc",
    "avail",
    "used",
    "size",
    "last_avail",
    "seen_avail",
    "next_used",
    "signalled_used",
    "event_idx",
    "packed",  # 1: a packed ring, 0: a split ring. The next five fields are only for packed rings (virtio/packed.py)
    "avail_wrap",
    "used_wrap",
    "batch",
    "batch_flags",
    "uncounted",
    "indirect",  # the driver may refer to tables of descriptors (VIRTIO_F_INDIRECT_DESC)
    # The in-flight region, in memory that outlives this process: the fields that inflight/tracking.py requires
    "inflight",  # or 0: the ring has none
    "counter",
    "batch_list",
    "batched",
    "last_batch_head",
    "free_head",
    "places",
    "links",
    "lasts",
    "counts",
    "resubmit",  # address of the entries, int64 each, of chains that the previous process had fetched
    "resubmits",  # how many of them are still to be resubmitted; nothing else is fetched before
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
    "broken",  # the number of the rule that the driver broke, see ring_rules.py
    "broken_head",
    "in_flight",
    "features",  # the negotiated features
    "in_order",  # chains are used in the order in which they were made available (answer.py)
    "oldest = -1",  # only with in_order: the slot of the oldest request whose chain is not used yet, or -1
    "newest",
    "write_through",  # the driver does not flush, so each request that changes the disk is stable when it completes
    "stack",  # STACK (block/stack.py) of the disk on this worker
    "gate",  # GATE (limit_gate.py) if the disk has limits, else 0
    "call_fd = -1",
    # Membership in the worker's lists
    "ready",  # it is in the list of those to fetch from, or in that of those that are held
    "next_ready",
    "turn",  # how many chains to fetch in the next turn of the loop
    "quiet",  # kicks are off, because the queue was served since the worker last slept
    "next_quiet",
    "unpublished",
    "next_unpublished",
    "unnotified",  # the driver may want a notification of published used elements
    "next_unnotified",
    "counters",  # COUNTER structs, one per kind of request
    "failures",  # FAILURE structs, one per kind of request
    "tick",  # the last tick in which anything was fetched or completed (io_time.py)
    # Only while requests are traced (tracer.py)
    "traced",  # its number in trace events
    "traced_avail",  # `seen_avail` when it was last compared
    "seen_at",  # nanoseconds, CLOCK_MONOTONIC: when chains up to there were seen; 0: not known
)

QUEUE_COUNTERS: int = QUEUE.fields["counters"][1]  # type: ignore[index]
QUEUE_IN_FLIGHT: int = QUEUE.fields["in_flight"][1]  # type: ignore[index]
QUEUE_UNPUBLISHED: int = QUEUE.fields["unpublished"][1]  # type: ignore[index]

# Three words for what is asked for. The *type* is the number in the request's header (virtio/blk.py, blk_zones.py).
# The *kind* is how requests are counted and logged: types that are rare share one. The *operation* is what the block
# I/O does (block/io.py): a request can have none, and a layer can change it, as a zone append becomes a write.
KIND_READ, KIND_WRITE, KIND_FLUSH, KIND_DISCARD, KIND_ZERO, KIND_OTHER = range(6)
KINDS = ("read", "write", "flush", "discard", "write_zeroes", "other")

COUNTER = np.dtype(
    [
        ("requests", "<i8"),  # completed
        ("errors", "<i8"),  # of those, with a status other than OK
        ("bytes", "<i8"),
        ("nanoseconds", "<i8"),  # from fetch to completion, of all of them
        ("histogram", "<i8", (BUCKETS,)),  # nanoseconds from fetch to completion
    ]
)
COUNTER_SIZE = COUNTER.itemsize
COUNTER_HISTOGRAM: int = COUNTER.fields["histogram"][1]  # type: ignore[index]

# Errors of storage that Python has not logged yet (failures.py).
FAILURE = struct(
    "count",
    "seen",  # errors that Python was called for, one bit each
    "report_at",  # nanoseconds, CLOCK_MONOTONIC: when Python is to be called again for those
    "unreported",  # the next three fields describe an error that is not logged yet
    "result",  # -errno, or 0: nothing was transferred
    "offset",  # in bytes
    "length",
)
FAILURE_SIZE = FAILURE.itemsize

# A request between fetch and completion; its slot number is its index. Its block I/O (block/io.py) has the same slot.
REQUEST = struct(
    "slot",
    "next",  # the next free slot; -1 ends the list
    "queue",  # QUEUE
    "head",  # the chain: index of its first descriptor (split ring) or buffer id (packed ring)
    "descriptors",  # how many descriptors of a packed ring the chain takes
    "entry",  # the chain's first entry in the in-flight region of a packed ring (inflight/tracking.py)
    "iovecs",  # room for MAX_IOVECS IOVEC structs of this slot
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
    "status_address",
    "end",  # address of the unit that is called before it is completed (REQUEST_TYPE), or 0
    "length",  # of the data, in bytes
    "done",  # bytes transferred, when it is complete
    "written",  # bytes written without a gap from the start of the device-writable part
    "started",  # nanoseconds, CLOCK_MONOTONIC
    "retired_memory",  # not 0: the memory table that this request was translated with has been replaced
    "following",  # only with in_order: slot of the request that was fetched next, or -1
    "ended",  # only with in_order: the status is written, but the chains of older requests are not used yet
    "ranges",  # room for MAX_RANGES RANGE structs of this slot: what to discard, or fill with zeros
    "log_iovecs",  # room for MAX_IOVECS IOVEC structs of this slot: buffers it writes, in guest addresses (dirty.py)
    "log_iovec_count",
    "log_status",
)
REQUEST_SIZE = REQUEST.itemsize
REQUEST_HEADER: int = REQUEST.fields["header_type"][1]  # type: ignore[index]
REQUEST_SECTOR: int = REQUEST.fields["sector"][1]  # type: ignore[index]

# Room for a chain: the most segments that any driver is known to send is 515; QEMU's own limit is 1024 in all.
# Odd in cache lines (1028 * 16 / 64 = 257), so that the first iovecs of all slots do not compete for one cache set.
MAX_IOVECS = 1028

# The most segments of one request, and sectors of a segment (1 GiB), of discard, write zeroes and secure erase.
MAX_RANGES, MAX_RANGE_SECTORS = 256, 1 << 21

# Polling policies: what a worker does before it sleeps, and when it notifies drivers; the most costly last (tune.py).
# SLEEP: notify and sleep at once. COALESCE: hold notifications back, with short sleeps meanwhile. POLL: notify at once,
# and poll the rings for a while before sleeping.
SLEEP, COALESCE, POLL = range(3)
POLICIES = 3

# The result of a policy in a trial: how many requests were completed in how many nanoseconds.
TALLY = struct("completed", "lasted")
TALLY_SIZE = TALLY.itemsize

WORKER = struct(
    "channel",  # CHANNEL (block/io.py)
    "requests",  # REQUEST structs
    "free",  # first free slot, or -1
    "ready",  # list of queues that may have chains to fetch, first in first out: QUEUE, or 0
    "ready_last",
    "quiet",  # list of queues whose kicks are off: QUEUE, or 0
    "expects_kicks",  # not 0: before the last sleep, kicks were switched on for a queue that was in this list
    "held",  # heap of queues that are held because of limits: its first GATE (limit_gate.py), or 0
    "alarm",  # ALARM (alarm.py), or 0
    "pausing",  # not 0: the next sleep lasts as long as a source has asked for, whatever happens
    "unpublished",  # list of queues with used elements to publish: QUEUE, or 0
    "unnotified",  # list of queues whose notifications are held back: QUEUE, or 0
    "notify_at",  # nanoseconds, CLOCK_MONOTONIC: when these notifications are due
    "notify_limit",  # the same: when they are due at the latest, whatever completes meanwhile
    "attention",  # not 0: `run` returns to Python
    "failing",  # not 0: there are FAILURE structs to report
    "in_flight",  # requests fetched and not yet completed, over all queues
    "turns",  # of the loop since the engine was last asked for events
    "poll_ns",  # how long policy POLL polls the rings before sleeping; ALWAYS: the worker never sleeps
    "poll_end",  # nanoseconds, CLOCK_MONOTONIC: when the present polling ends; 0: not polling
    "ask_at",  # the same: when a worker that polls asks the engine for events, however short its polls are
    # Self-tuning, see tune.py
    "completed",  # requests
    "policy",
    "policies",  # the policies that are allowed, one bit each
    "best",  # the policy that the last trial found best
    "rate",  # how many requests per second it completed in the first sample after that
    "sample_start",  # nanoseconds, CLOCK_MONOTONIC
    "sample_end",
    "end_sample",  # address of the unit that is called then (tune.py)
    "sample_completed",  # `completed` at the start of the sampling period
    "rounds",  # of the present trial, so far
    "candidates",  # the policies that take part in it, one bit each
    "until_trial",  # nanoseconds until the next trial; 0: a trial is running
    "steady_ns",  # how long the time from the last trial to the next one is
    "gaps",  # in a row
    "tallies",  # TALLY structs, one per policy
    # Addresses of units: what few requests need is not compiled into the loop (worker_state.py)
    "take_packed",
    "begin_other",
    "publish_tracked",
    "record_buffers",
    "mark_request",
    "mark_ring",
    "record_failure",
    "begin_tick",
    "now",  # nanoseconds, CLOCK_MONOTONIC, of the present turn
    "trace",  # TRACER (tracer.py), or 0 when tracing is off
    "one",  # the number 1, for eventfds
    # Counted for metrics
    "polled",  # nanoseconds for which the rings were polled
    "wakeups",  # how often the worker has slept
    "fetched",  # requests, up to the last turn that fetched some
    "batches",  # POWERS int64 (metrics/histogram.py): how many requests were fetched in a turn of the loop
    "signaller",  # SIGNALLER (signaller.py) if the worker serves several disks, else 0; set by the control plane
)
WORKER_ONE: int = WORKER.fields["one"][1]  # type: ignore[index]

# Not a status: the request is still in progress.
PENDING = -1

# A `poll_ns` that means: never sleep.
ALWAYS = 1 << 62

# A time that the clock does not reach.
NEVER = 1 << 62

# What the engine reports of a watched fd: one of these, the address of a QUEUE that was kicked, or an event's token
# (block/events.py). Structs are at multiples of 8, so no address has one of the bits of NO_ADDRESS.
TOKEN_CONTROL, TOKEN_HELPERS, TOKEN_ALARM, NO_ADDRESS = 1, 2, 3, 7
