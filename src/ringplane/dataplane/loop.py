"""The event loop of a worker: wait, fetch, submit, complete, publish. It runs without the GIL.

`run` is the whole loop. One pass through it is a *turn*: fetch a few chains of each queue that has some, submit their
I/O with one system call, complete what has ended, publish the used elements, notify. `find_timeout` decides whether the
worker may sleep before a turn, according to its polling policy (tune.py).
"""

from __future__ import annotations

from ringplane.block.events import EVENT_TOKEN, handle_event
from ringplane.block.helper_threads import take_from_helpers
from ringplane.block.io import CHANNEL, io_at
from ringplane.block.merge import send_held
from ringplane.block.route import first_due, move_all, wake_due
from ringplane.block.transfer import progress_all, submit_batches
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call
from ringplane.dataplane import ring_rules
from ringplane.dataplane.alarm import find_timeout_until
from ringplane.dataplane.answer import answer_all, answer_with, notify_all, publish_all, queue_up
from ringplane.dataplane.fetch import gather
from ringplane.dataplane.io_time import TICK_BITS
from ringplane.dataplane.limit_gate import GATE
from ringplane.dataplane.ready import mark_ready
from ringplane.dataplane.requests import execute
from ringplane.dataplane.state import (
    ALWAYS,
    NEVER,
    NO_ADDRESS,
    PENDING,
    POLL,
    QUEUE,
    REQUEST,
    REQUEST_SIZE,
    SLEEP,
    TOKEN_ALARM,
    TOKEN_HELPERS,
    WORKER,
)
from ringplane.dataplane.tracer import TRACER
from ringplane.dataplane.tune import count_gap
from ringplane.engines.common import COMPLETION, COMPLETION_SIZE, ENGINE
from ringplane.engines.dispatch import has_events, reap, submit, wait
from ringplane.inflight import tracking
from ringplane.metrics.histogram import count_power
from ringplane.native.access import address_of, load64, relax, view
from ringplane.native.syscalls import monotonic_ns
from ringplane.virtio.ring import available, disable_kicks, enable_kicks, known
from ringplane.virtio.split import take_head

RETRY_NS = 1_000_000

# More events than can happen during a short sleep of policy COALESCE: completions do not end that sleep.
MANY = 1 << 10

# How many chains of a queue are fetched in a turn: few at first, so that a sleeping driver is notified early and wakes
# up while we work, then more and more. The kernel merges and batches what is submitted together: with at most 16
# instead of 64 a disk did 10 to 25 % fewer deep sequential writes, and tmpfs, through io_uring, 15 % fewer deep random
# reads.
FIRST_TURN, TURN = 2, 64

# A worker that does not sleep asks the engine once in this many turns, even if nothing indicates events.
ENGINE_TURNS = 16
POLL_SLICE_NS = 100_000


@compiled
def run(address):
    """Serve the queues of the WORKER struct at `address` until Python has something to do.

    Requests in flight stay in flight when this returns, and lists stay as they are: the next call resumes there.
    """
    worker = view(address, WORKER)
    channel = view(worker.channel, CHANNEL)
    engine = view(channel.engine, ENGINE)
    while not worker.attention:
        timeout = find_timeout(worker, channel, engine)
        worker.turns += 1
        if timeout != 0 or engine.prepared > 0 or has_events(engine) or worker.turns >= ENGINE_TURNS:
            worker.turns = 0
            wait_for_events(worker, channel, engine, timeout)
        serve_ready(worker, channel)
        end_turn(worker, channel)
        if engine.prepared > 0:
            submit(engine)
        complete_all(worker, channel, engine)
        answer_all(worker, channel)
        publish_all(worker)
        if worker.now >= worker.sample_end:
            call(worker.end_sample, address)
    notify_all(worker)
    worker.attention = 0


@compiled
def end_turn(worker, channel):
    """Pass on the block I/Os of this turn: to their layers, to the engine, and to sources without it."""
    if channel.due_first >= 0:
        worker.now = channel.now = monotonic_ns()
        wake_due(channel)
    move_all(channel)
    send_held(channel)
    submit_batches(channel)
    if channel.attention:
        channel.attention = 0
        worker.attention = 1


@compiled
def complete_all(worker, channel, engine):
    """Reap the engine's completions and continue each block I/O that they belong to."""
    completions = reap(engine)
    if completions == 0:
        return
    worker.now = monotonic_ns()
    for index in range(completions):
        completion = view(engine.completions + index * COMPLETION_SIZE, COMPLETION)
        progress_all(channel, io_at(channel, completion.slot), completion.result)
    move_all(channel)


@compiled
def find_timeout(worker, channel, engine):
    """How many nanoseconds the engine may sleep: 0 if there is something to do, -1: until something happens."""
    worker.pausing = 0
    if can_fetch(worker) or has_work(channel):
        return 0
    time = find_next_time(worker, channel)
    timeout = find_sleep(worker, channel, engine, time)
    if timeout == 0 or time == NEVER:
        return timeout
    channel.now = monotonic_ns()
    if timeout > 0:
        return min(timeout, max(time - channel.now, 0))
    return find_timeout_until(worker.alarm, time, channel.now)


@compiled
def find_next_time(worker, channel):
    """When the first of the held queues is released, or the first of the waiting I/Os continues."""
    time = first_due(channel) if channel.due_first >= 0 else NEVER
    return min(time, view(worker.held, GATE).until) if worker.held else time


@compiled
def has_work(channel):
    """Whether block I/Os can continue without an event, for example after a short read in a source without engine."""
    return channel.batches != 0 or channel.moving_first >= 0 or channel.held >= 0 or channel.ended_first >= 0


@compiled
def find_sleep(worker, channel, engine, time):
    """Like `find_timeout`, according to the polling policy; at this `time` there is something to do.

    The fields of `engine` are explained in engines/common.py. Without a free slot nothing can be fetched before
    something completes, so queues that wait for a slot do not count.
    """
    if engine.stuck:
        notify_all(worker)
        return RETRY_NS
    if worker.unnotified:
        return doze(worker, channel)
    if engine.prepared > 0:
        if engine.submit or is_polling(worker):
            return 0
    elif is_polling(worker) and poll(worker, engine, time):
        return 0
    if channel.pause and worker.policy == SLEEP and worker.signaller == 0:
        return doze(worker, channel)
    ask_for_kicks(worker)
    return 0 if can_fetch(worker) else -1


@compiled
def can_fetch(worker):
    return worker.ready != 0 and worker.free >= 0


@compiled
def wait_for_events(worker, channel, engine, timeout):
    """Let the engine sleep, mark the queues that were kicked, and handle events. Each turn reaps all completions."""
    sleeps = timeout < 0 and worker.in_flight == 0
    asleep = monotonic_ns() if sleeps else 0
    count = wait(engine, timeout, MANY if worker.unnotified or worker.pausing else 1)
    channel.pause = 0
    if timeout != 0:
        worker.wakeups += 1
    if sleeps:
        worker.now = monotonic_ns()
        count_gap(worker, worker.now - asleep)
    for index in range(count):
        token = load64(engine.tokens + 8 * index)
        if token & NO_ADDRESS == 0:
            mark_ready(worker, view(token, QUEUE))
        elif token & EVENT_TOKEN:
            # What a layer has kept may end without a completion, and has lasted until now.
            worker.now = monotonic_ns()
            handle_event(channel, token)
        elif token == TOKEN_HELPERS:
            take_from_helpers(channel)
        elif token != TOKEN_ALARM:
            worker.attention = 1


# Polling: before it sleeps, a worker polls the rings for a while, with kicks off. A driver that submits within that
# time needs no system call for a kick, and finds the worker awake. While requests are in flight in storage, the worker
# sleeps at once: a completion wakes it, and disks take longer than polling is worth. It also sleeps at once while all
# rings that were served lately are held by limits: whatever comes into them has to wait.


@compiled
def is_polling(worker):
    if worker.poll_ns == ALWAYS:
        return True
    return worker.policy == POLL and worker.in_flight == 0 and (not worker.held or can_poll(worker))


@compiled
def can_poll(worker):
    """Whether a queue that was served lately is not held: kicks are off for it, or will end the next sleep."""
    if worker.expects_kicks:
        return True
    address = worker.quiet
    while address and view(address, QUEUE).ready:
        address = view(address, QUEUE).next_quiet
    return address != 0


@compiled
def poll(worker, engine, time):
    """Poll the quiet queues until one has chains or the engine has events (True), or the time is over (False).

    A long time is divided into slices, at whose ends the engine is asked for events that it does not indicate (True).
    At `time`, when there is something to do, this returns too (True). That does not make the time for the rings longer,
    and if it happens often, does not keep the engine from being asked.
    """
    began = now = monotonic_ns()
    if worker.poll_end == 0:
        worker.poll_end = now + worker.poll_ns
    pause = min(min(now + POLL_SLICE_NS, worker.poll_end), time)
    found = poll_once(worker, engine)
    while not found and now < pause:
        relax()
        now = monotonic_ns()
        found = poll_once(worker, engine)
    worker.polled += now - began
    if found or now >= worker.poll_end:
        worker.poll_end = 0
        return found
    if now >= worker.ask_at:
        worker.ask_at = now + POLL_SLICE_NS
        worker.turns = ENGINE_TURNS
    return True


@compiled
def poll_once(worker, engine):
    """Whether a quiet queue has chains or the engine has events."""
    poll_quiet(worker)
    return worker.ready != 0 or has_events(engine)


@compiled
def poll_quiet(worker):
    """Look for chains in the rings whose kicks are off."""
    address = worker.quiet
    while address:
        queue = view(address, QUEUE)
        if queue.running and available(queue):
            mark_ready(worker, queue)
        address = queue.next_quiet


@compiled
def doze(worker, channel):
    """How many nanoseconds to sleep with kicks off, whatever happens; 0: there is something to do.

    While notifications are held back, or because a source has asked for a pause (block/sources/moderation.py). Other
    disks would wait with it. While requests are in flight, policy POLL is SLEEP without pauses: so the tuner finds out
    whether the driver loses by them.
    """
    poll_quiet(worker)
    if can_fetch(worker):
        return 0
    if not worker.unnotified:
        worker.pausing = 1
        return channel.pause
    left = worker.notify_at - monotonic_ns()
    if left <= 0:
        notify_all(worker)
    return max(left, 0)


@compiled
def ask_for_kicks(worker):
    """Before sleeping: switch kicks on for the queues served since the last sleep, and check each ring once more.

    Queues that wait for a slot keep kicks off: they are served as soon as there is one.
    """
    worker.expects_kicks = 0
    while worker.quiet:
        queue = view(worker.quiet, QUEUE)
        worker.quiet = queue.next_quiet
        queue.quiet = 0
        if queue.running and not queue.ready:
            worker.expects_kicks = 1
            enable_kicks(queue)
            if queue.log:
                call(worker.mark_ring, address_of(queue))
            if available(queue):
                mark_ready(worker, queue)


@compiled
def mark_ready_at(worker_address, queue_address):
    """`mark_ready` for Python."""
    mark_ready(view(worker_address, WORKER), view(queue_address, QUEUE))


@compiled
def serve_ready(worker, channel):
    """Fetch from each queue that was kicked or had chains left; those that still have some go to the end of the list.

    When the slots run out, the other queues keep their places: they come first when there are slots again.
    """
    if not (worker.ready or worker.held):
        return
    worker.now = monotonic_ns()
    if worker.held:
        release_held(worker)
    if not worker.ready:
        return
    tick = worker.now >> TICK_BITS
    last = worker.ready_last
    served = 0
    while worker.free >= 0 and served != last:
        served = worker.ready
        queue = view(served, QUEUE)
        worker.ready = queue.next_ready
        queue.ready = 0
        if queue.tick != tick:
            call(worker.begin_tick, served, tick, 0)
        if queue.running and fetch_available(worker, channel, queue):
            queue.turn = min(TURN, 2 * queue.turn)
            mark_ready(worker, queue)
        else:
            queue.turn = FIRST_TURN
    fetched = worker.completed + worker.in_flight
    count_power(worker.batches, fetched - worker.fetched)
    worker.fetched = fetched


@compiled
def release_held(worker):
    """Have those of the held queues fetched from whose time has come."""
    gate = view(worker.held, GATE)
    if gate.until <= worker.now:
        call(gate.release, address_of(worker), 0)


@compiled
def fetch_available(worker, channel, queue):
    """Fetch up to `queue.turn` chains; returns whether there are more.

    A turn is short, so that driver and device work at the same time instead of alternately. Kicks stay off until the
    worker sleeps, or, when slots run out, until a completion has freed one and all chains have been fetched.
    """
    keep_quiet(worker, queue)
    if queue.resubmits and not resubmit(worker, channel, queue):
        return queue.running != 0
    count = available(queue)
    if count > queue.size:
        break_ring(worker, queue, ring_rules.AVAIL_INDEX, -1)
        return False
    if queue.gate and count and not call(view(queue.gate, GATE).admit, address_of(worker), address_of(queue)):
        return False
    for _ in range(queue.turn):
        if not known(queue):
            break
        if worker.free < 0:
            return True
        if not fetch_one(worker, channel, queue):
            return False
    return available(queue) != 0


@compiled
def keep_quiet(worker, queue):
    """Switch kicks off until `ask_for_kicks`."""
    if not queue.quiet:
        disable_kicks(queue)
        if queue.log:
            call(worker.mark_ring, address_of(queue))
        queue.quiet = 1
        queue.next_quiet = worker.quiet
        worker.quiet = address_of(queue)


@compiled
def fetch_one(worker, channel, queue):
    """Take one chain and start its request; False if the ring is broken or held now."""
    request = view(worker.requests + worker.free * REQUEST_SIZE, REQUEST)
    io = io_at(channel, worker.free)
    rule = take_chain(worker, queue, request, io)
    if not begin_request(worker, channel, queue, request, io, rule):
        return False
    if queue.gate:
        return call(view(queue.gate, GATE).count, address_of(worker), address_of(queue), address_of(request)) != 0
    return True


@compiled
def begin_request(worker, channel, queue, request, io, rule):
    """Begin the request whose chain was gathered; False if the chain breaks `rule`, and so the ring."""
    if rule != ring_rules.OK:
        break_ring(worker, queue, rule, request.head)
        return False
    worker.free = request.next
    request.queue = address_of(queue)
    request.started = worker.now
    queue.in_flight += 1
    worker.in_flight += 1
    if queue.log:
        call(worker.record_buffers, address_of(queue), address_of(request))
    if queue.in_order:
        queue_up(worker, queue, request)
    status = execute(worker, channel, queue, request, io)
    if worker.trace:
        tracer = view(worker.trace, TRACER)
        status = call(tracer.fetched, address_of(worker), address_of(queue), address_of(request), status)
    if status != PENDING:
        answer_with(worker, queue, request, status)
    return True


@compiled
def take_chain(worker, queue, request, io):
    """Take the next chain: its head and its buffers; returns the number of the rule that it breaks, or OK."""
    if queue.packed:
        return call(worker.take_packed, address_of(queue), address_of(request), address_of(io))
    request.head = take_head(queue)
    if queue.in_flight >= queue.size:
        return ring_rules.TOO_MANY_IN_FLIGHT
    rule = gather(queue, request, io)
    if rule == ring_rules.OK and queue.inflight:
        tracking.fetch_split(queue, request.head)
    return rule


@compiled
def resubmit(worker, channel, queue):
    """Resubmit what the previous process had in flight, in its order; False if some is left or the ring stops."""
    while queue.resubmits:
        if worker.free < 0:
            return False
        request = view(worker.requests + worker.free * REQUEST_SIZE, REQUEST)
        io = io_at(channel, worker.free)
        rule = take_again(worker, queue, request, io)
        if not begin_request(worker, channel, queue, request, io, rule):
            return False
        queue.resubmits -= 1
    if queue.draining:
        queue.running = 0
        worker.attention = 1
    return queue.running != 0


@compiled
def take_again(worker, queue, request, io):
    """Take the next one of those chains, as `take_chain` does."""
    entry = load64(queue.resubmit)
    queue.resubmit += 8
    if queue.packed:
        request.entry = entry
        return call(worker.take_packed, address_of(queue), address_of(request), address_of(io))
    request.head = entry
    return gather(queue, request, io)


@compiled
def break_ring(worker, queue, rule, head):
    """Stop serving this queue until the driver has reset it; Python logs why and signals the error eventfd."""
    queue.running = queue.resubmits = 0
    queue.broken = rule
    queue.broken_head = head
    worker.attention = 1
