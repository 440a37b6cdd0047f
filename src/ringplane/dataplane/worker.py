"""A worker: an I/O thread that runs the compiled loop, and calls functions for the control plane between two runs.

The control plane queues callables and writes the worker's eventfd. `run` returns, the callables are called on this
thread, and the loop is entered again. So compiled code is never reconfigured while it runs, and needs no locks.
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

from ringplane.compiler.cache import DATA_PLANE, mark_cached
from ringplane.compiler.jit import load
from ringplane.dataplane import ring_rules
from ringplane.dataplane.helper_threads import Helpers
from ringplane.dataplane.loop import FIRST_TURN, mark_ready, run
from ringplane.dataplane.queue import NO_MEMORY, Queue, RingLayout
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
from ringplane.engines.choose import make_engine
from ringplane.engines.ranges import RANGE
from ringplane.guest_memory.regions import BadMemory, MemoryTable
from ringplane.log.logs import DiskLog
from ringplane.native import interrupt, sigbus
from ringplane.native.uio import IOVEC
from ringplane.options.engines import AUTO
from ringplane.options.io_thread import POLL_US
from ringplane.system import libc, procfs
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
BOUNCE_BUFFERS = 16
# What /proc/PID/fd shows for an eventfd (proc(5)).
EVENTFD = "anon_inode:[eventfd]"
# The sleeps of the policy COALESCE last some 50 us. By default the kernel adds as much again.
TIMER_SLACK_NS = 1000


class WorkerEnded(RuntimeError):
    """The worker's thread has been stopped, or has failed (the log says why)."""


@dataclass(slots=True)
class _Retired:
    """A memory table that was replaced while requests in flight used it."""

    number: int
    table: MemoryTable


class Worker:
    """An I/O thread that serves any number of queues with one engine."""

    def __init__(
        self,
        name: str,
        slots: int = SLOTS,
        engine: str = AUTO,
        poll_us: int | None = POLL_US,
        pin_memory: bool = False,
    ) -> None:
        """`slots`: how many requests can be in flight at a time. Raises OSError when the engine cannot be set up.

        `poll_us`: how many microseconds to poll the rings at most before sleeping; None: never sleep.
        `pin_memory`: keep the guests' memory registered with the kernel, if the engine supports it.
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
        # Guards the two fields below, so that each call is either performed or refused.
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
        # Not touched, and so without memory, until the first discard.
        self._ranges = np.zeros((slots, MAX_RANGES), RANGE)
        self._requests["ranges"] = self._ranges.ctypes.data + np.arange(slots) * self._ranges.strides[0]
        # The same, until the first migration.
        self._log_iovecs = np.zeros((slots, MAX_IOVECS), IOVEC)
        self._requests["log_iovecs"] = self._log_iovecs.ctypes.data + np.arange(slots) * self._log_iovecs.strides[0]
        self._state["waiting_first"] = self._state["copy_first"] = self._state["held"] = -1
        self._state["one"] = 1
        self._state["engine"] = self.engine.address
        self._state["requests"] = self._requests.ctypes.data
        self._make_bounce_buffers()

    def _set_policies(self, poll_us: int | None) -> None:
        """Set which polling policies the worker may choose from (tune.py)."""
        state = self._state
        self._tallies = np.zeros(POLICIES, TALLY)
        state["tallies"] = self._tallies.ctypes.data
        if poll_us is None:
            state["policy"], state["poll_ns"], state["sample_end"] = POLL, ALWAYS, NEVER
        else:
            state["poll_ns"] = 1000 * poll_us
            state["policies"] = 1 << SLEEP | self.engine.fine_timeouts << COALESCE | (poll_us > 0) << POLL
            # No trial before the first requests come.
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
        """Count a disk with queues on this worker. From the second one on, no front end may block this thread."""
        self._disks += 1
        if self._disks == 2:
            try:
                self._signaller = Signaller()
            except OSError as error:
                log.warning("%s: one front end can block all disks of this thread: %s", self.name, error)
                return
            self._state["signaller"] = self._signaller.address

    def load(self) -> None:
        """Compile or load all that the threads will call, so that they need no file for it after their start."""
        self._helpers.load()
        load(run, int(self._state.ctypes.data))
        load(mark_ready, self._state[0], np.zeros(1, QUEUE)[0])
        load(signal, 0, 0, 0)
        mark_cached(DATA_PLANE)
        sigbus.install()
        interrupt.install()

    def start(self) -> None:
        """Start the threads; without a call of `load` before, they load the code themselves."""
        self._helpers.start()
        self._thread.start()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Call `function` on the worker's thread, between two runs; the future gets its result or exception.

        The future raises WorkerEnded if the thread has ended, or ends before the call.
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
        """Serve the queue from now on. The future raises BadMemory if the ring is not inside the memory."""
        return self.call(lambda: self._start_queue(queue, layout, memory, kick_fd))

    def stop_queue(self, queue: Queue) -> Future[None]:
        """Stop fetching; the future is done when all requests in flight have been completed."""
        drained: Future[None] = Future()
        asked = self.call(lambda: self._stop_queue(queue, drained))
        asked.add_done_callback(lambda future: _pass_on_exception(future, drained))
        return drained

    def set_memory(self, queue: Queue, memory: MemoryTable) -> Future[None]:
        """Use another memory table from now on; requests in flight keep the mappings that they use."""
        return self.call(lambda: self._set_memory(queue, memory))

    def set_call_fd(self, queue: Queue, fd: int) -> Future[None]:
        """Notify the driver through `fd` from now on; -1: do not notify. The caller keeps ownership of the fd."""
        return self.call(lambda: queue.record.__setitem__("call_fd", fd))

    def signal(self, fd: int) -> Future[None]:
        """Signal a front end's eventfd like a driver's: it may block, and the control plane must not."""
        return self.call(lambda: self._signal(fd))

    def interrupt(self) -> None:
        """Interrupt the thread if it blocks in a write to a full notifier; otherwise this has no effect."""
        interrupt.interrupt(self._thread)

    def start_tracing(self) -> TraceReader:
        """Trace requests from now on."""
        return self.call(self._start_tracing).result()

    def stop(self) -> None:
        """Stop the threads and release everything. All queues must have been stopped."""
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
            # `_end` reports it to those who wait for this thread.
            log.exception("%s: the I/O thread has failed (internal error); its disks are no longer served", self.name)
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
            queue.prepare()
            self._prepare_queue(queue, layout, memory)
            self._watch_kicks(queue, kick_fd)
        except BaseException:
            # A ring that does not start keeps no mapping.
            queue.memory, queue.layout = NO_MEMORY, None
            raise
        queue.record["file"] = self.engine.add_file(queue.fd)
        self._queues[queue.address] = queue
        self._pin()
        queue.record["running"] = 1
        # As if kicked: requests may have been in the ring before its kick fd was watched.
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
        record["flush_ranges"] = layout.write_through and queue.device.through_worker
        record["dsync"] = layout.write_through and not queue.device.uses_page_cache
        record["packed"] = layout.packed
        if layout.packed:
            queue.set_packed_base(layout.base)
        else:
            record["last_avail"] = record["seen_avail"] = layout.base
            # Requests in flight, if any, are not used yet, so the used ring resumes at its own index.
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
            raise BadMemory(f"the size of a split ring is a power of two, not {layout.size}")
        if desc % DESC_ALIGNMENT or avail % AVAIL_ALIGNMENT or used % USED_ALIGNMENT:
            # A region may be mapped at any address, but the atomic loads and stores of the ring need alignment.
            raise BadMemory("the ring is not aligned in memory")
        record = queue.record
        record["desc"], record["avail"], record["used"] = desc, avail, used
        record["regions"], record["region_count"], record["last_region"] = memory.address, memory.count, 0
        queue.memory, queue.layout = memory, layout

    def _check_all_queues(self) -> None:
        """Rebuild the list of ready queues with all running ones: to check a ring in vain costs nothing."""
        self._state["ready"] = self._state["ready_last"] = self._state["quiet"] = 0
        for queue in self._queues.values():
            queue.record["ready"] = queue.record["quiet"] = 0
            if queue.running:
                mark_ready(self._state[0], queue.record)

    def _stop_queue(self, queue: Queue, drained: Future[None]) -> None:
        record = queue.record
        # What the previous process had in flight has to be completed before the ring can stop.
        record["running"] = record["running"] and record["resubmits"] > 0
        record["ready"] = record["quiet"] = 0
        record["draining"] = 1
        if self._queues.get(queue.address) is queue:
            self._unwatch_kicks(queue)
        self._check_all_queues()
        self._draining.setdefault(queue.address, []).append(drained)
        if queue.in_flight:
            log.debug("%s: draining %d requests", queue.name, queue.in_flight, extra=_about(queue))

    def _watch_kicks(self, queue: Queue, kick_fd: int) -> None:
        check_eventfd(kick_fd, "kick fd")
        os.set_blocking(kick_fd, False)
        self.engine.watch(kick_fd, queue.address)
        queue.kick_fd = kick_fd

    def _unwatch_kicks(self, queue: Queue) -> None:
        if queue.kick_fd >= 0:
            self.engine.unwatch(queue.kick_fd)
            # The next poller of this eventfd must not find old kicks in it.
            with contextlib.suppress(OSError):
                # The front end may have cleared O_NONBLOCK, which belongs to the shared file; RWF_NOWAIT does not.
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
        queue.memory, queue.layout = NO_MEMORY, None
        self._pin()
        self._trace_queue(TRACE_STOP, queue)

    def _set_memory(self, queue: Queue, memory: MemoryTable) -> None:
        if queue.address not in self._queues or queue.layout is None:
            return
        old = queue.memory
        try:
            self._place_ring(queue, queue.layout, memory)
        except BadMemory as error:
            # A front end may remove memory and add it again: until then the ring keeps its place in the old table.
            log.warning(
                "%s: suspended: the ring is not in the shared memory: %s", queue.name, error, extra=_about(queue)
            )
            if queue.running:
                queue.suspended = True
                queue.record["running"] = 0
                self._signal_error(queue)
            return
        self._retire(queue, old)
        self._pin()
        if queue.suspended:
            log.info("%s: resumed: the ring is in the shared memory again", queue.name, extra=_about(queue))
            queue.suspended = False
            queue.record["running"] = 1
            self._check_all_queues()

    def _retire(self, queue: Queue, table: MemoryTable) -> None:
        """Keep a replaced table until the requests in flight that use it have ended."""
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
        """Register the memory that requests may use with the kernel. If that fails, guests are served without it."""
        if not self._pin_memory:
            return
        tables = [queue.memory for queue in self._queues.values() if queue.device.through_worker]
        tables += [retired.table for retired in self._retired]
        try:
            self.engine.pin({region.mapping for table in tables for region in table.regions})
        except OSError as error:
            log.warning("%s: cannot pin the guests' memory; continuing without: %s", self.name, error)
            self._pin_memory = False
            with contextlib.suppress(OSError):
                self.engine.pin(())

    def _report_broken_rings(self) -> None:
        for queue in self._queues.values():
            rule = int(queue.record["broken"])
            if rule != ring_rules.OK and not queue.broken_reported:
                queue.broken_reported = True
                head = int(queue.record["broken_head"])
                where = f" (chain {head})" if head >= 0 else ""
                log.warning(
                    "%s: ring broken by the driver: %s%s",
                    queue.name,
                    ring_rules.MESSAGES[rule],
                    where,
                    extra=_about(queue),
                )
                self._signal_error(queue)

    def _report_lost_mappings(self) -> None:
        for device in {queue.device for queue in self._queues.values()}:
            if device.lost_mapping and not device.lost_reported:
                device.lost_reported = True
                DiskLog(log, device.name).warning(
                    "pages of the image were lost (it was truncated, or no memory is left for them); from now on "
                    "it is served with system calls, and reads beyond its end fail"
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
        log.debug("%s: %s", queue.name, EVENT_NAMES[event], extra=_about(queue))
        if self._trace is not None:
            self._trace.add(event, queue.array)


def _about(queue: Queue) -> dict[str, str]:
    return {"disk": queue.device.name}


def check_eventfd(fd: int, name: str) -> None:
    """Raise OSError if the fd is not an eventfd: others can fill up or block."""
    kind = procfs.kind_of(fd)
    if kind != EVENTFD if kind else not _looks_like_eventfd(fd):
        raise OSError(errno.EINVAL, f"the {name} is not an eventfd")


def _looks_like_eventfd(fd: int) -> bool:
    """Without /proc: whether the fd has the inode that all eventfds share, and that no file, pipe or socket has."""
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        return os.path.sameopenfile(fd, eventfd)
    finally:
        os.close(eventfd)


def _perform(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    finally:
        # The exception's traceback holds this frame, and the future holds the exception. Without this del the cycle,
        # and the memory that `function` refers to, would stay until the next garbage collection.
        del future, function


def _pass_on_exception(source: Future[None], target: Future[None]) -> None:
    error = source.exception()
    if error is not None:
        target.set_exception(error)


def _load_u16(address: int) -> int:
    return int(ctypes.c_uint16.from_address(address).value)
