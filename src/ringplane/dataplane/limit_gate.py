"""The gate of a queue whose disk has limits (limits/): what may not begin yet is left in the ring.

A queue is held when its disk has no room for another request: it is in the worker's heap `held` until a time, with
kicks off, and takes no slot; the worker sleeps meanwhile, or serves other queues. Whether there is room is known when a
request was fetched, because its size and type are in it: so each request is counted after it has begun, and the queue
is held if the limits of its type are exceeded then. After the wait the limits of that type are asked again: other
queues, on other threads too, use the same ones. So if requests of a type without a limit are behind one that is held,
they wait too (docs/limits.md).

All of it is units, so a disk without limits compares one field per turn of the loop and one per request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import addresses, call, unit
from ringplane.dataplane.ready import mark_ready
from ringplane.dataplane.state import QUEUE, REQUEST, REQUEST_TYPES, WORKER
from ringplane.dataplane.trace_layout import HOLD, RELEASE
from ringplane.dataplane.tracer import TRACER
from ringplane.limits.member import Member
from ringplane.limits.meters import READS, TICKS, WRITES, move_level
from ringplane.limits.shares import (
    LIMITS,
    MEMBER,
    count_request,
    count_throttled,
    end_wait,
    may_begin_at,
    wait_in_group,
)
from ringplane.native.access import address_of, view
from ringplane.native.structs import new, struct
from ringplane.virtio.blk import (
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SECURE_ERASE,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from ringplane.virtio.blk_zones import VIRTIO_BLK_T_ZONE_APPEND
from ringplane.virtio.ring import available

if TYPE_CHECKING:
    from ringplane.limits.limiter import Limiter

# Types of requests that the limits of writes count, one bit each; as in QEMU all that change the disk.
COUNTED_AS_WRITES = (
    1 << VIRTIO_BLK_T_OUT
    | 1 << VIRTIO_BLK_T_DISCARD
    | 1 << VIRTIO_BLK_T_WRITE_ZEROES
    | 1 << VIRTIO_BLK_T_SECURE_ERASE
    | 1 << VIRTIO_BLK_T_ZONE_APPEND
)

# Of one queue. `admit`, `count` and `release` are the addresses of the units below.
GATE = struct(
    "admit",
    "count",
    "release",
    "queue",  # QUEUE
    "limits",  # LIMITS
    "member",  # MEMBER
    "kind",  # of the last request: that of the next one is assumed to be the same
    "served",  # nanoseconds, CLOCK_MONOTONIC: when the last request began
    "waits_until",  # ticks: until when its disk counts as one that waits, because of this queue
    "held_at",  # nanoseconds: since when and until when it is held
    "until",
    "left",  # in the heap of held ones: GATE, or 0
    "right",
)

# Nanoseconds. A wake-up for each request would cost more than the request, and what a bucket has room for is not lost
# meanwhile. A queue that is held for longer looks again after a second.
SHORTEST_HOLD, LONGEST_HOLD = 50_000, 1_000_000_000


@unit
def admit(worker_address, queue_address):
    """1: a request may be fetched from this queue, which has some. 0: the queue is held."""
    worker, queue = view(worker_address, WORKER), view(queue_address, QUEUE)
    gate = view(queue.gate, GATE)
    return hold_unless_ready(worker, queue, gate)


@unit
def count(worker_address, queue_address, request_address):
    """A request has begun. 1: another one may be fetched; 0: the queue is held."""
    worker, queue, request = view(worker_address, WORKER), view(queue_address, QUEUE), view(request_address, REQUEST)
    gate = view(queue.gate, GATE)
    kind = kind_of(request.type)
    if not kind:
        return 1
    gate.kind = kind
    gate.served = worker.now
    member = view(gate.member, MEMBER)
    end_wait(member, gate.waits_until)
    count_request(view(gate.limits, LIMITS), member, kind, request.length, worker.now * TICKS)
    return hold_unless_ready(worker, queue, gate)


@compiled
def hold_unless_ready(worker, queue, gate):
    """1: another request may be fetched; 0: the queue is held."""
    until = find_time(worker, gate)
    if until <= worker.now:
        return 1
    if available(queue):
        gate.waits_until = wait_in_group(view(gate.member, MEMBER), until * TICKS)
    hold(worker, queue, gate, until)
    return 0


@compiled
def kind_of(request_type):
    """What limits count a request of this type, 0: none. Flushes are not counted, as in QEMU."""
    if request_type == VIRTIO_BLK_T_IN:
        return READS
    return WRITES if request_type < REQUEST_TYPES and COUNTED_AS_WRITES >> request_type & 1 else 0


@compiled
def find_time(worker, gate):
    """The time, in nanoseconds, at which the next request may begin."""
    limits, member = view(gate.limits, LIMITS), view(gate.member, MEMBER)
    until = may_begin_at(limits, member, gate.kind, worker.now * TICKS)
    return (until + TICKS - 1) // TICKS


@compiled
def hold(worker, queue, gate, until):
    """Put the queue into the heap of held ones."""
    queue.ready = 1
    gate.held_at = worker.now
    if worker.trace:
        call(view(worker.trace, TRACER).held, address_of(worker), address_of(queue), HOLD, worker.now)
    least = find_end_of_pause(view(gate.limits, LIMITS), worker.now)
    gate.until = min(max(until, least), worker.now + LONGEST_HOLD)
    gate.left = gate.right = 0
    worker.held = merge(worker.held, address_of(gate))


@compiled
def find_end_of_pause(limits, now):
    """How long a queue is held at least: as long as others with the same limits.

    They are released together then, and the one that has waited for longest comes first. With a pause of its own, a
    queue that was served would be released before one that has asked in vain a moment later, each time.
    """
    if limits.pause_until <= now:
        limits.pause_until = now + SHORTEST_HOLD
    return limits.pause_until


@unit
def release(worker_address, everything):
    """Have the queues fetched from whose time has come, or all that are held."""
    worker = view(worker_address, WORKER)
    while worker.held and (everything or view(worker.held, GATE).until <= worker.now):
        gate = view(worker.held, GATE)
        worker.held = merge(gate.left, gate.right)
        end_hold(worker, view(gate.queue, QUEUE), gate, worker.now)
    return 0


@compiled
def end_hold(worker, queue, gate, now):
    queue.ready = 0
    if worker.trace:
        call(view(worker.trace, TRACER).held, address_of(worker), address_of(queue), RELEASE, now)
    if queue.running:
        if available(queue):
            count_throttled(view(gate.member, MEMBER), gate.held_at, now)
        mark_ready(worker, queue)


# The held queues are a skew heap: the time to insert one, or to take out the first, grows with the logarithm of their
# number.


@compiled
def merge(one, other):
    """Make two heaps one, and return its first gate; 0 is an empty heap."""
    first = last = 0
    while one and other:
        if is_before(view(other, GATE), view(one, GATE)):
            one, other = other, one
        if last:
            view(last, GATE).left = one
        else:
            first = one
        last, gate = one, view(one, GATE)
        one = gate.right
        gate.right = gate.left
    rest = one + other
    if not last:
        return rest
    view(last, GATE).left = rest
    return first


@compiled
def is_before(gate, other):
    """Whether it is released first: of those with the same time, the one that was served longer ago."""
    if gate.until == other.until:
        return gate.served < other.served
    return gate.until < other.until


# What has to be loaded before disks are limited.
UNITS = (admit, count, release, move_level)


class Gate:
    """The gate of one queue; made before its disk is first limited, because it loads code."""

    def __init__(self, queue_address: int, member: Member) -> None:
        self._record = new(GATE)
        self.address = int(self._record.ctypes.data)
        self._member = member
        record = self._record[0]
        found = addresses(UNITS)
        for name in ("admit", "count", "release"):
            record[name] = found[name]
        record["queue"], record["member"] = queue_address, member.address
        self._limiter: Limiter | None = None

    def use(self, limiter: Limiter) -> None:
        """Called on the I/O thread of the queue, after which each queue has to be asked again."""
        self._record["limits"] = limiter.address
        self._limiter = limiter
