"""The event loop of a worker: wait, fetch, submit, complete, publish; it runs without the GIL."""

from __future__ import annotations

from ringplane.dataplane import rules
from ringplane.dataplane.complete import complete_all, finish, publish_all
from ringplane.dataplane.execute import PENDING, execute
from ringplane.dataplane.fetch import gather
from ringplane.dataplane.state import (
    QUEUE,
    REQUEST,
    REQUEST_SIZE,
    TOKEN_CONTROL,
    TRACE_FETCH,
    WORKER,
)
from ringplane.dataplane.trace import trace
from ringplane.engines.common import ENGINE
from ringplane.engines.dispatch import submit, wait
from ringplane.native.access import address_of, load64, view
from ringplane.native.jit import compiled
from ringplane.native.syscalls import monotonic_ns
from ringplane.virtio.split import available, disable_kicks, enable_kicks, take_head

RETRY_MS = 1


@compiled
def run(address):
    """Serve the queues of the WORKER struct at `address` until Python has something to do.

    Requests in flight stay in flight when this returns, and lists stay as they are: the next call goes on.
    """
    worker = view(address, WORKER)
    engine = view(worker.engine, ENGINE)
    while not worker.attention:
        note_events(worker, engine, wait(engine, timeout_ms(worker, engine)))
        serve_ready(worker)
        if engine.prepared > 0:
            submit(engine)
        complete_all(worker)
        publish_all(worker)
    worker.attention = 0


@compiled
def timeout_ms(worker, engine):
    """How long the engine may sleep; -1: until something happens.

    Without a free slot nothing can be fetched before something completes, so queues that wait for one do not count.
    """
    if worker.ready and worker.free >= 0:
        return 0
    if engine.prepared > 0:
        if engine.stuck:
            return RETRY_MS
        if not engine.submits_in_wait:
            return 0
    return -1


@compiled
def note_events(worker, engine, count):
    """Note who was kicked. A completion needs no mark: the engine is reaped in each turn."""
    for index in range(count):
        token = load64(engine.tokens + 8 * index)
        if token == TOKEN_CONTROL:
            worker.attention = 1
        else:
            mark_ready(worker, view(token, QUEUE))


@compiled
def mark_ready(worker, queue):
    """Put the queue at the end of those that wait for their turn."""
    if queue.ready:
        return
    queue.ready = 1
    queue.next_ready = 0
    if worker.ready:
        view(worker.ready_last, QUEUE).next_ready = address_of(queue)
    else:
        worker.ready = address_of(queue)
    worker.ready_last = address_of(queue)


@compiled
def serve_ready(worker):
    """Fetch from each queue that was kicked or had more than one turn's worth; those with more still go to the end.

    When the slots run out, the others keep their places: they come first when there are slots again.
    """
    if not worker.ready:
        return
    worker.now = monotonic_ns()
    last = worker.ready_last
    served = 0
    while worker.free >= 0 and served != last:
        served = worker.ready
        queue = view(served, QUEUE)
        worker.ready = queue.next_ready
        queue.ready = 0
        if queue.running and fetch_available(worker, queue):
            mark_ready(worker, queue)


@compiled
def fetch_available(worker, queue):
    """Fetch what is available now; returns whether there is or may be more.

    Kicks are off meanwhile. When the ring is empty they are on again and one more look is taken. When slots run out
    they stay off: fetching resumes when a completion has freed one.
    """
    disable_kicks(queue)
    waiting = available(queue)
    if waiting > queue.size:
        break_ring(worker, queue, rules.AVAIL_INDEX, -1)
        return False
    for _ in range(waiting):
        if worker.free < 0:
            return True
        if not fetch_one(worker, queue):
            return False
    enable_kicks(queue)
    return available(queue) != 0


@compiled
def fetch_one(worker, queue):
    """Take one chain and start its request; False when it breaks the ring."""
    request = view(worker.requests + worker.free * REQUEST_SIZE, REQUEST)
    request.head = take_head(queue)
    rule = rules.TOO_MANY_IN_FLIGHT if queue.in_flight >= queue.size else gather(queue, request)
    if rule != rules.OK:
        break_ring(worker, queue, rule, request.head)
        return False
    worker.free = request.next
    request.queue = address_of(queue)
    request.started = worker.now
    queue.in_flight += 1
    status = execute(worker, queue, request)
    if worker.trace:
        trace(worker, TRACE_FETCH, queue, request, 0, 0)
    if status != PENDING:
        finish(worker, queue, request, status)
    return True


@compiled
def break_ring(worker, queue, rule, head):
    """Stop serving this queue until the driver has reset it; Python logs why and signals the error eventfd."""
    queue.running = 0
    queue.broken = rule
    queue.broken_head = head
    worker.attention = 1
