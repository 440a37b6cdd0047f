"""An I/O thread: runs the compiled loop, and between two runs does what the control plane asks of it.

The control plane hands over callables and writes the worker's eventfd; `run` returns, the callables are called on
this thread, and the loop is entered again. So compiled code is never reconfigured while it runs, without locks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ringplane.dataplane import rules
from ringplane.dataplane.helpers import Helpers
from ringplane.dataplane.loop import FIRST_TURN, mark_ready, run
from ringplane.dataplane.queue import Queue, RingLayout
from ringplane.dataplane.signaller import Signaller, signal
from ringplane.dataplane.state import (
    ALWAYS,
    BOUNCE_ALIGNMENT,
    BOUNCE_SIZE,
    COALESCE,
    MAX_IOVECS,
    MAX_RANGES,
    NEVER,
    POLICIES,
    POLL,
    QUEUE,
    REQUEST,
    SLEEP,
    TALLY,
    TOKEN_CONTROL,
    TOKEN_HELPERS,
    TRACE_START,
    TRACE_STOP,
    WORKER,
    WORKER_ONE,
)
from ringplane.dataplane.trace import EVENT_NAMES, TraceReader, TraceRing
from ringplane.engines.choose import AUTO, make_engine
from ringplane.engines.ranges import RANGE
from ringplane.memory import BadMemory, MemoryTable
from ringplane.native import interrupt, libc, sigbus
from ringplane.native.jit import load
from ringplane.native.syscalls import IOVEC
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_INDIRECT_DESC
from ringplane.virtio.packed import EVENT_SIZE
from ringplane.virtio.split import (
    AVAIL_ALIGNMENT,
    DESC_ALIGNMENT,
    USED_ALIGNMENT,
    USED_IDX,
    avail_bytes,
    desc_bytes,
    used_bytes,
)

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SLOTS = 512
# Longer than it takes to wake up a driver that sleeps (20 to 40 us in a virtual machine), so that such drivers too find
# us awake; measured in docs/performance.md.
POLL_US = 50
BOUNCE_BUFFERS = 16
# A nap lasts some 50 us: what the kernel adds to it by default is as long.
TIMER_SLACK_NS = 1000


class WorkerEnded(RuntimeError):
    """The worker's thread has been stopped, or has failed (the log says why)."""


@dataclass(slots=True)
class _Retired:
    """A memory table that was replaced while requests that use it were in flight."""

    number: int
    table: MemoryTable


class Worker:
    """A thread that serves any number of queues with one engine."""

    def __init__(
        self,
        name: str,
        slots: int = SLOTS,
        engine: str = AUTO,
        poll_us: int | None = POLL_US,
        pin_memory: bool = False,
    ) -> None:
        """`slots`: how many requests can be in flight at a time. Raises OSError when the engine cannot be set up.

        `poll_us`: for how many microseconds at most to look at the rings before sleeping; None: never sleep.
        `pin_memory`: keep the guests' memory registered with the kernel, where the engine can.
        """
        self.name = name
        self._pin_memory = pin_memory
        self._queues: dict[int, Queue] = {}
        self._draining: dict[int, list[Future[None]]] = {}
        self._retired: list[_Retired] = []
        self._retirements = 0
        self._disks = 0
        self._signaller: Signaller | None = None
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        # Guards what follows, so that no call comes too late to be carried out or refused.
        self._lock = threading.Lock()
        self._ended = False
        self._stopping = False
        self._control_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self.engine = make_engine(engine, slots)
        except BaseException:
            os.close(self._control_fd)
            raise
        self._make_state(slots)
        try:
            self._helpers = Helpers(name, self._requests.ctypes.data, slots)
        except BaseException:
            self.engine.close()
            os.close(self._control_fd)
            raise
        self._state["jobs_fd"], self._state["done_fd"] = self._helpers.jobs_fd, self._helpers.done_fd
        self.engine.watch(self._helpers.done_fd, TOKEN_HELPERS)
        self._set_policies(poll_us)
        self.engine.watch(self._control_fd, TOKEN_CONTROL)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def _make_state(self, slots: int) -> None:
        self._state: npt.NDArray[np.void] = np.zeros(1, WORKER)
        self._requests = np.zeros(slots, REQUEST)
        self._iovecs = np.zeros((slots, MAX_IOVECS), IOVEC)
        self._trace: TraceRing | None = None
        self._requests["slot"] = np.arange(slots)
        self._requests["next"] = np.arange(1, slots + 1)
        self._requests["next"][-1] = -1
        self._requests["iovecs"] = self._iovecs.ctypes.data + np.arange(slots) * self._iovecs.strides[0]
        self._requests["joined"] = -1
        # Untouched, so without memory, until somebody discards.
        self._ranges = np.zeros((slots, MAX_RANGES), RANGE)
        self._requests["ranges"] = self._ranges.ctypes.data + np.arange(slots) * self._ranges.strides[0]
        # The same, until a guest is migrated.
        self._log_iovecs = np.zeros((slots, MAX_IOVECS), IOVEC)
        self._requests["log_iovecs"] = self._log_iovecs.ctypes.data + np.arange(slots) * self._log_iovecs.strides[0]
        self._state["waiting_first"] = self._state["copy_first"] = self._state["held"] = -1
        self._state["one"] = 1
        self._state["engine"] = self.engine.address
        self._state["requests"] = self._requests.ctypes.data
        self._make_bounce_buffers()

    def _set_policies(self, poll_us: int | None) -> None:
        """What the worker may do before it sleeps; which of it pays it finds out."""
        state = self._state
        self._tallies = np.zeros(POLICIES, TALLY)
        state["tallies"] = self._tallies.ctypes.data
        if poll_us is None:
            state["policy"], state["poll_ns"], state["sample_end"] = POLL, ALWAYS, NEVER
        else:
            state["poll_ns"] = 1000 * poll_us
            state["policies"] = 1 << SLEEP | self.engine.fine_timeouts << COALESCE | (poll_us > 0) << POLL
            # At rest until the first requests come.
            state["until_trial"] = 1

    def _make_bounce_buffers(self) -> None:
        self._bounce = np.zeros(BOUNCE_BUFFERS * BOUNCE_SIZE + BOUNCE_ALIGNMENT, np.uint8)
        start = -(-self._bounce.ctypes.data // BOUNCE_ALIGNMENT) * BOUNCE_ALIGNMENT
        following = 0
        for number in range(BOUNCE_BUFFERS):
            address = start + number * BOUNCE_SIZE
            link = address - self._bounce.ctypes.data
            self._bounce[link : link + 8].view(np.int64)[0] = following
            following = address
        self._state["bounce_free"] = following

    # From any thread.

    def add_disk(self) -> None:
        """One more will have queues here; from the second on no front end may make this thread wait."""
        self._disks += 1
        if self._disks == 2:
            try:
                self._signaller = Signaller()
            except OSError as error:
                log.warning("%s: a front end can hold up the other disks of this thread: %s", self.name, error)
                return
            self._state["signaller"] = self._signaller.address

    def load(self) -> None:
        """Compile or load all that the threads will call, so that from their start on they need no file for it."""
        self._helpers.load()
        load(run, int(self._state.ctypes.data))
        load(mark_ready, self._state[0], np.zeros(1, QUEUE)[0])
        load(signal, 0, 0, 0)
        sigbus.install()
        interrupt.install()

    def start(self) -> None:
        """Start the threads; what `load` was not called for they load themselves."""
        self._helpers.start()
        self._thread.start()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have `function` called on the worker's thread, between two runs; its result or exception is the future's.

        The future raises WorkerEnded if the thread has ended, or ends before it comes to it.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(WorkerEnded(f"{self.name} has ended"))
            else:
                self._calls.append((future, function))
                os.eventfd_write(self._control_fd, 1)
        return future

    def start_queue(self, queue: Queue, layout: RingLayout, memory: MemoryTable, kick_fd: int) -> Future[None]:
        """Serve the queue from now on. The future raises BadMemory where the ring is not inside the memory."""
        return self.call(lambda: self._start_queue(queue, layout, memory, kick_fd))

    def stop_queue(self, queue: Queue) -> Future[None]:
        """Fetch nothing more; the future is done when all requests in flight have been answered."""
        drained: Future[None] = Future()
        asked = self.call(lambda: self._stop_queue(queue, drained))
        asked.add_done_callback(lambda future: _pass_on_exception(future, drained))
        return drained

    def set_memory(self, queue: Queue, memory: MemoryTable) -> Future[None]:
        """Translate with another table from now on; requests in flight keep the mappings that they use."""
        return self.call(lambda: self._set_memory(queue, memory))

    def set_call_fd(self, queue: Queue, fd: int) -> Future[None]:
        """Notify the driver through `fd` from now on, -1 for not at all. The fd stays the caller's."""
        return self.call(lambda: queue.record.__setitem__("call_fd", fd))

    def signal(self, fd: int) -> Future[None]:
        """Signal a front end's eventfd, as the driver of a queue is called: the control plane must not wait for it."""
        return self.call(lambda: self._signal(fd))

    def interrupt(self) -> None:
        """Have the thread go on that waits for room in a notifier; a thread that does anything else just goes on."""
        interrupt.interrupt(self._thread)

    def start_tracing(self) -> TraceReader:
        """Trace requests from now on."""
        return self.call(self._start_tracing).result()

    def stop(self) -> None:
        """Stop the thread and give everything back. All queues must have been stopped."""
        self._stopping = True
        if self._thread.ident is not None:
            self.call(lambda: None)
            self._thread.join()
        with self._lock:
            self._ended = True
        self._helpers.close()
        self.engine.close()
        if self._signaller is not None:
            self._signaller.close()
            self._signaller = None
        os.close(self._control_fd)

    # On the worker's thread.

    def _main(self) -> None:
        try:
            self.engine.attach_thread()
            libc.set_timer_slack(TIMER_SLACK_NS)
            while not self._stopping:
                self._turn()
        except BaseException:
            # Whoever waits for this thread must hear of it.
            log.exception("%s: the I/O thread has failed; its disks are not served any more", self.name)
        finally:
            self._end()

    def _turn(self) -> None:
        run(int(self._state.ctypes.data))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._control_fd)
        while self._calls:
            _perform(*self._calls.popleft())
        self._report_broken_rings()
        self._report_lost_mappings()
        self._report_failures()
        self._finish_drains()
        self._drop_retired_memory()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
        left = [future for future, _ in self._calls] + [drained for some in self._draining.values() for drained in some]
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(WorkerEnded(f"{self.name} has ended"))

    def _start_queue(self, queue: Queue, layout: RingLayout, memory: MemoryTable, kick_fd: int) -> None:
        try:
            self._prepare_queue(queue, layout, memory)
            self._watch_kicks(queue, kick_fd)
        except BaseException:
            # Of a ring that does not start no mapping is kept.
            queue.memory, queue.layout = MemoryTable(), None
            raise
        queue.record["file"] = self.engine.add_file(queue.fd)
        self._queues[queue.address] = queue
        self._pin()
        queue.record["running"] = 1
        # Start-up kick: requests may have been in the ring before we watched.
        self._check_all_queues()
        self._trace_queue(TRACE_START, queue)

    def _prepare_queue(self, queue: Queue, layout: RingLayout, memory: MemoryTable) -> None:
        record = queue.record
        record["size"] = layout.size
        self._place_ring(queue, layout, memory)
        record["features"] = layout.features
        record["event_idx"] = bool(layout.features & VIRTIO_F_EVENT_IDX)
        record["indirect"] = bool(layout.features & VIRTIO_F_INDIRECT_DESC)
        record["in_order"] = bool(layout.features & VIRTIO_F_IN_ORDER)
        record["oldest"] = -1
        record["write_through"] = layout.write_through
        record["flush_writes"] = layout.write_through and queue.device.uses_page_cache
        record["dsync"] = layout.write_through and not queue.device.uses_page_cache
        record["packed"] = layout.packed
        if layout.packed:
            queue.set_packed_base(layout.base)
        else:
            record["last_avail"] = record["seen_avail"] = layout.base
            # What is in flight, if anything, is not used yet: what the used ring says is where it goes on.
            record["next_used"] = record["signalled_used"] = _load_u16(int(record["used"]) + USED_IDX)
        queue.track(layout.inflight)
        queue.set_log(layout.log)
        record["broken"] = record["draining"] = 0
        record["turn"] = FIRST_TURN
        queue.broken_reported = queue.suspended = False

    def _place_ring(self, queue: Queue, layout: RingLayout, memory: MemoryTable) -> None:
        desc = memory.user_to_host(layout.desc, desc_bytes(layout.size))
        avail = memory.user_to_host(layout.avail, EVENT_SIZE if layout.packed else avail_bytes(layout.size))
        used = memory.user_to_host(layout.used, EVENT_SIZE if layout.packed else used_bytes(layout.size))
        if not layout.packed and layout.size & (layout.size - 1):
            raise BadMemory(f"a split ring has a power of two of descriptors, not {layout.size}")
        if desc % DESC_ALIGNMENT or avail % AVAIL_ALIGNMENT or used % USED_ALIGNMENT:
            # A region may be mapped at any address; the loads and stores of the ring may not go anywhere.
            raise BadMemory("the ring is not aligned in memory")
        record = queue.record
        record["desc"], record["avail"], record["used"] = desc, avail, used
        record["regions"], record["region_count"], record["last_region"] = memory.address, memory.count, 0
        queue.memory, queue.layout = memory, layout

    def _check_all_queues(self) -> None:
        """Rebuild the list of queues to look at, with all that run: a look too many costs nothing."""
        self._state["ready"] = self._state["ready_last"] = self._state["quiet"] = 0
        for queue in self._queues.values():
            queue.record["ready"] = queue.record["quiet"] = 0
            if queue.running:
                mark_ready(self._state[0], queue.record)

    def _stop_queue(self, queue: Queue, drained: Future[None]) -> None:
        record = queue.record
        # What the last process had in flight has to be answered before the ring can stop.
        record["running"] = record["running"] and record["resubmits"] > 0
        record["ready"] = record["quiet"] = 0
        record["draining"] = 1
        if self._queues.get(queue.address) is queue:
            self._unwatch_kicks(queue)
        self._check_all_queues()
        self._draining.setdefault(queue.address, []).append(drained)
        if queue.in_flight:
            log.debug("%s: draining %d requests", queue.name, queue.in_flight)

    def _watch_kicks(self, queue: Queue, kick_fd: int) -> None:
        check_eventfd(kick_fd, "kick fd")
        os.set_blocking(kick_fd, False)
        self.engine.watch(kick_fd, queue.address)
        queue.kick_fd = kick_fd

    def _unwatch_kicks(self, queue: Queue) -> None:
        if queue.kick_fd >= 0:
            self.engine.unwatch(queue.kick_fd)
            # Whoever polls this eventfd next shall not find our old kicks in it.
            with contextlib.suppress(OSError):
                # O_NONBLOCK is the file's, so the front end may have taken it away again; RWF_NOWAIT is ours.
                os.preadv(queue.kick_fd, [bytearray(8)], -1, os.RWF_NOWAIT)
            queue.kick_fd = -1

    def _finish_drains(self) -> None:
        for address, waiting in list(self._draining.items()):
            queue = self._queues.get(address)
            if queue is not None and (queue.in_flight or queue.running):
                continue
            del self._draining[address]
            if queue is not None:
                self._forget_queue(queue)
            for drained in waiting:
                if drained.set_running_or_notify_cancel():
                    drained.set_result(None)

    def _forget_queue(self, queue: Queue) -> None:
        del self._queues[queue.address]
        queue.device.failures.take(queue.failures)
        self.engine.remove_file(int(queue.record["file"]))
        queue.record["draining"] = 0
        queue.memory, queue.layout = MemoryTable(), None
        self._pin()
        self._trace_queue(TRACE_STOP, queue)

    def _set_memory(self, queue: Queue, memory: MemoryTable) -> None:
        if queue.address not in self._queues or queue.layout is None:
            return
        old = queue.memory
        try:
            self._place_ring(queue, queue.layout, memory)
        except BadMemory as error:
            # A front end may remove memory to add it again: until then the ring stays where it was, on the old table.
            log.warning("%s: suspended, its ring is not in the shared memory: %s", queue.name, error)
            if queue.running:
                queue.suspended = True
                queue.record["running"] = 0
                self._signal_error(queue)
            return
        self._retire(queue, old)
        self._pin()
        if queue.suspended:
            log.info("%s: goes on, its ring is in the shared memory again", queue.name)
            queue.suspended = False
            queue.record["running"] = 1
            self._check_all_queues()

    def _retire(self, queue: Queue, table: MemoryTable) -> None:
        """Keep a replaced table until the requests in flight that were translated with it have ended."""
        mine = (self._requests["queue"] == queue.address) & (self._requests["retired_memory"] == 0)
        if mine.any():
            self._retirements += 1
            self._requests["retired_memory"][mine] = self._retirements
            self._retired.append(_Retired(self._retirements, table))

    def _drop_retired_memory(self) -> None:
        if self._retired:
            needed = set(self._requests["retired_memory"].tolist())
            kept = [retired for retired in self._retired if retired.number in needed]
            if len(kept) < len(self._retired):
                self._retired = kept
                self._pin()

    def _pin(self) -> None:
        """Keep registered with the kernel what requests may be about; a guest whose memory cannot be is served too."""
        if not self._pin_memory:
            return
        tables = [queue.memory for queue in self._queues.values() if queue.device.through_worker]
        tables += [retired.table for retired in self._retired]
        try:
            self.engine.pin({region.mapping for table in tables for region in table.regions})
        except OSError as error:
            log.warning("%s: cannot pin the guests' memory, and goes on without: %s", self.name, error)
            self._pin_memory = False
            with contextlib.suppress(OSError):
                self.engine.pin(())

    def _report_broken_rings(self) -> None:
        for queue in self._queues.values():
            rule = int(queue.record["broken"])
            if rule != rules.OK and not queue.broken_reported:
                queue.broken_reported = True
                head = int(queue.record["broken_head"])
                where = f" (chain {head})" if head >= 0 else ""
                log.warning("%s: ring broken by the driver: %s%s", queue.name, rules.MESSAGES[rule], where)
                self._signal_error(queue)

    def _report_lost_mappings(self) -> None:
        for device in {queue.device for queue in self._queues.values()}:
            if device.lost_mapping and not device.lost_reported:
                device.lost_reported = True
                log.warning(
                    "%s: parts of the image have gone (it was truncated, or there is no memory left for them); "
                    "it is served by system calls from now on, and reads beyond its end fail",
                    device.name,
                )

    def _report_failures(self) -> None:
        if self._state["failing"]:
            self._state["failing"] = 0
            for queue in self._queues.values():
                queue.device.failures.take(queue.failures)

    def _signal_error(self, queue: Queue) -> None:
        if queue.err_fd >= 0:
            self._signal(queue.err_fd)

    def _signal(self, fd: int) -> None:
        signal(int(self._state["signaller"][0]), fd, int(self._state.ctypes.data) + WORKER_ONE)

    def _start_tracing(self) -> TraceReader:
        if self._trace is None:
            self._trace = TraceRing(self._state)
            self._state["trace"] = self._trace.address
        return TraceReader(self._trace)

    def _trace_queue(self, event: int, queue: Queue) -> None:
        log.debug("%s: %s", queue.name, EVENT_NAMES[event])
        if self._trace is not None:
            self._trace.add(event, queue.array)


def check_eventfd(fd: int, name: str) -> None:
    """Raise OSError for any other kind of fd, which can fill up or block. (Without /proc there is no telling.)"""
    with contextlib.suppress(FileNotFoundError):
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
            raise OSError(errno.EINVAL, f"the {name} is not an eventfd")


def _perform(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    finally:
        # The exception's traceback holds this frame: with the future, which holds the exception, it would stay, and
        # with it the memory that `function` is about, until somebody looks for garbage.
        del future, function


def _pass_on_exception(source: Future[None], target: Future[None]) -> None:
    error = source.exception()
    if error is not None:
        target.set_exception(error)


def _load_u16(address: int) -> int:
    return int(ctypes.c_uint16.from_address(address).value)
