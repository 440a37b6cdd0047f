"""The rings that a worker serves: how one starts, drains, stops, and gets other memory.

All of it is called on the worker's thread, between two runs of the compiled loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from ringplane.dataplane import ring_rules
from ringplane.dataplane.limit_gate import release
from ringplane.dataplane.loop import mark_ready_at
from ringplane.dataplane.pinning import Pinning
from ringplane.dataplane.place_ring import place_ring, prepare_ring
from ringplane.dataplane.queue import Queue, RingLayout
from ringplane.dataplane.retired_memory import RetiredMemory
from ringplane.dataplane.ring_states import RingEvent, RingState
from ringplane.dataplane.trace_layout import START, STOP
from ringplane.dataplane.worker_state import WorkerState
from ringplane.engines.aio import Aio
from ringplane.engines.uring import Uring
from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import MemoryTable
from ringplane.system import eventfd

log = logging.getLogger(__name__)


class ServedRings:
    """The queues of a worker from the start of their rings until these are drained."""

    def __init__(
        self,
        state: WorkerState,
        engine: Aio | Uring,
        pinning: Pinning,
        signal: Callable[[int], None],
        trace: Callable[[int, Queue], None],
    ) -> None:
        """`signal` signals a front end's eventfd; `trace` traces an event of a queue."""
        self._state = state
        self._engine = engine
        self._pinning = pinning
        self._signal = signal
        self._trace = trace
        self._queues: dict[int, Queue] = {}
        self._draining: dict[int, list[Future[None]]] = {}
        self.retired = RetiredMemory(state.slots.requests)

    def __iter__(self) -> Iterator[Queue]:
        return iter(self._queues.values())

    def start(self, queue: Queue, layout: RingLayout, memory: MemoryTable, kick_fd: int) -> None:
        """Serve the queue. Raises BadMemory if the ring is not inside the memory, OSError if an fd is unsuitable."""
        queue.ring_state.check(RingEvent.START)
        with contextlib.ExitStack() as undo:
            undo.callback(queue.drop_memory)
            queue.prepare()
            prepare_ring(queue, layout, memory)
            queue.stack.attach(self._engine)
            undo.callback(queue.stack.detach, self._engine)
            self._watch_kicks(queue, kick_fd)
            undo.pop_all()
        self._queues[queue.address] = queue
        self._pin()
        queue.ring_state.apply(RingEvent.START)
        # As if kicked: requests may have been in the ring before its kick fd was watched.
        self.check_all()
        self._trace(START, queue)

    def stop(self, queue: Queue, drained: Future[None]) -> None:
        """Stop fetching; `drained` is done when all requests in flight have been completed."""
        self._notice(queue)
        self._end_holds()
        # What the previous process had in flight has to be completed before the ring can stop.
        waits = queue.state is RingState.RUNNING and queue.record["resubmits"] > 0
        queue.ring_state.apply(RingEvent.STOP_AFTER_RESUBMITTING if waits else RingEvent.STOP)
        self._unwatch_kicks(queue)
        self.check_all()
        self._draining.setdefault(queue.address, []).append(drained)
        if queue.in_flight:
            log.debug("%s: draining %d requests", queue.name, queue.in_flight, extra=queue.log_fields)

    def abandon_kept(self, queue: Queue) -> None:
        """Of a ring that stops, end the requests that a layer keeps: nobody is there who could have them resumed.

        They get no used entry. Where the front end keeps an in-flight region they are in it, as after a crash, and the
        next one to serve the ring does them again. On a ring that is used in order that is so for all that follow.
        """
        if queue.address not in self._draining:
            return
        kept = {slot: layer for layer in queue.stack.layers for slot in layer.kept(self._state.channel.ios)}
        requests = self._state.slots.requests
        ours = [slot for slot in kept if requests["queue"][slot] == queue.address]
        for slot in self._unusable(queue, ours) if queue.record["in_order"] else ours:
            if slot in kept:
                kept[slot].forget(self._state.channel.address, slot)
            self._release(queue, slot)

    def _unusable(self, queue: Queue, kept: list[int]) -> list[int]:
        """The requests from the first kept one on, if all of them have ended or are kept."""
        requests, slot = self._state.slots.requests, int(queue.record["oldest"])
        if not kept or slot not in kept:
            # Older ones end by themselves.
            return []
        found = []
        while slot >= 0:
            if slot not in kept and not requests["ended"][slot]:
                return []
            found.append(slot)
            slot = int(requests["following"][slot])
        queue.record["oldest"] = -1
        return found

    def _release(self, queue: Queue, slot: int) -> None:
        """As `release` of answer.py, for a request without an answer."""
        request, worker = self._state.slots.requests[slot], self._state.record
        request["queue"] = request["retired_memory"] = 0
        request["next"], worker["free"] = worker["free"], slot
        queue.record["in_flight"] -= 1
        worker["in_flight"] -= 1
        # What was fetched and not completed.
        worker["fetched"] -= 1

    def call_off_stop(self, queue: Queue, memory: MemoryTable, kick_fd: int) -> bool:
        """Fetch again, whatever is in flight, although the ring was to stop; False if it has been drained."""
        self._notice(queue)
        drains = self._draining.pop(queue.address, [])
        if not drains:
            return False
        for drained in drains:
            drained.cancel()
        queue.ring_state.apply(RingEvent.CONTINUE)
        self._watch_kicks(queue, kick_fd)
        # It may have been removed meanwhile.
        self.set_memory(queue, memory)
        self.check_all()
        return True

    def set_memory(self, queue: Queue, memory: MemoryTable) -> None:
        """Use another memory table; requests in flight keep the mappings that they use."""
        self._notice(queue)
        queue.ring_state.check(RingEvent.MEMORY_CHANGED)
        self._end_holds()
        old, layout, before = queue.memory, queue.layout, queue.state
        assert layout is not None, "a ring that is served has a layout"
        try:
            place_ring(queue, layout, memory)
        except BadMemory as error:
            # The ring keeps its place in the old table.
            if queue.ring_state.apply(RingEvent.MEMORY_REMOVED) is not before:
                self._report_removed(queue, error)
            return
        self.retired.retire(queue, old)
        self._pin()
        if queue.ring_state.apply(RingEvent.MEMORY_CHANGED) is RingState.RUNNING and before.suspended:
            log.info("%s: resumed: the ring is in the shared memory again", queue.name, extra=queue.log_fields)
            self.check_all()

    def _report_removed(self, queue: Queue, error: BadMemory) -> None:
        log.warning(
            "%s: suspended: the ring is not in the shared memory: %s", queue.name, error, extra=queue.log_fields
        )
        self._signal_error(queue)

    def check_all(self) -> None:
        """Rebuild the list of ready queues with all running ones: to check a ring in vain costs nothing."""
        self._end_holds()
        record = self._state.record
        record["ready"] = record["ready_last"] = record["quiet"] = 0
        for queue in self:
            queue.record["ready"] = queue.record["quiet"] = 0
            if queue.record["running"]:
                mark_ready_at(self._state.address, queue.address)

    def _end_holds(self) -> None:
        """Have the queues asked again that limits hold, while they run: it is counted for how long they were held."""
        record = self._state.record
        if record["held"]:
            record["now"] = time.monotonic_ns()
            release(self._state.address, 1)

    def follow_up(self) -> None:
        """Act on what a run of the loop has left behind: broken rings, drained rings, memory that nobody needs."""
        for queue in self:
            self._notice(queue)
        self._finish_drains()
        if self.retired.drop_unused():
            self._pin()

    def abandon(self) -> list[Future[None]]:
        """The thread ends, whatever is still served; returns the futures of rings that were not drained."""
        for queue in self:
            queue.ring_state.apply(RingEvent.ABANDON)
        return [drained for some in self._draining.values() for drained in some]

    def _watch_kicks(self, queue: Queue, kick_fd: int) -> None:
        eventfd.check_eventfd(kick_fd, "kick fd")
        os.set_blocking(kick_fd, False)
        self._engine.watch(kick_fd, queue.address)
        queue.kick_fd = kick_fd

    def _unwatch_kicks(self, queue: Queue) -> None:
        if queue.kick_fd >= 0:
            self._engine.unwatch(queue.kick_fd)
            eventfd.empty(queue.kick_fd)
            queue.kick_fd = -1

    def _finish_drains(self) -> None:
        for address, waiting in list(self._draining.items()):
            queue = self._queues.get(address)
            if queue is not None and (queue.in_flight or queue.state is RingState.RESUBMITTING):
                continue
            del self._draining[address]
            if queue is not None:
                self._forget(queue)
            for drained in waiting:
                if drained.set_running_or_notify_cancel():
                    drained.set_result(None)

    def _forget(self, queue: Queue) -> None:
        del self._queues[queue.address]
        queue.device.failures.take(queue.failures)
        queue.stack.detach(self._engine)
        queue.drop_memory()
        queue.ring_state.apply(RingEvent.DRAINED)
        self._pin()
        self._trace(STOP, queue)

    def _pin(self) -> None:
        """Pin the memory that requests may use."""
        used = [queue.memory for queue in self if queue.stack.uses_engine]
        self._pinning.pin([*used, *self.retired.tables])

    def _notice(self, queue: Queue) -> None:
        """Learn what the loop has done to the ring."""
        if queue.ring_state.notice() is RingEvent.BREAK:
            self._report_broken(queue)

    def _report_broken(self, queue: Queue) -> None:
        head = int(queue.record["broken_head"])
        where = f" (chain {head})" if head >= 0 else ""
        what = ring_rules.MESSAGES[int(queue.record["broken"])]
        log.warning("%s: ring broken by the driver: %s%s", queue.name, what, where, extra=queue.log_fields)
        queue.device.emit("ring-broken", queue=queue.number, rule=what, chain=head if head >= 0 else None)
        self._signal_error(queue)

    def _signal_error(self, queue: Queue) -> None:
        if queue.err_fd >= 0:
            self._signal(queue.err_fd)
