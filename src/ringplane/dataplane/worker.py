"""A worker: an I/O thread that runs the compiled loop, and calls functions for the control plane between two runs.

The control plane queues callables and writes the worker's eventfd. `run` returns, the callables are called on this
thread, and the loop is entered again. So compiled code is never reconfigured while it runs, and needs no locks. The
memory that the thread works with is in worker_state.py, its rings are in served_rings.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ringplane.block.helper_threads import Helpers
from ringplane.compiler.jit import load
from ringplane.dataplane.alarm import Alarm
from ringplane.dataplane.disk_reports import report_failures, report_sources
from ringplane.dataplane.loop import mark_ready_at, run
from ringplane.dataplane.pinning import Pinning
from ringplane.dataplane.queue import Queue, RingLayout
from ringplane.dataplane.served_rings import ServedRings
from ringplane.dataplane.signaller import Signaller, signal
from ringplane.dataplane.state import TOKEN_ALARM, TOKEN_CONTROL, TOKEN_HELPERS
from ringplane.dataplane.thread_clock import ThreadClock
from ringplane.dataplane.thread_counters import ThreadCounters
from ringplane.dataplane.trace_events import EVENT_NAMES, Tracer, TraceReader, load_tracing, room_for_events
from ringplane.dataplane.trace_layout import FETCH, IN_FLIGHT, Events
from ringplane.dataplane.worker_state import WorkerState
from ringplane.engines.choose_engine import make_engine
from ringplane.guest_memory.regions import MemoryTable
from ringplane.native import interrupt, sigbus
from ringplane.options.engine_names import AUTO
from ringplane.options.thread_options import POLL_US
from ringplane.system import libc

if TYPE_CHECKING:
    from ringplane.limits.limiter import Limiter

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SLOTS = 512
# The sleeps of the policy COALESCE last some 50 us. By default the kernel adds as much again.
TIMER_SLACK_NS = 1000


class WorkerEnded(RuntimeError):
    """The worker's thread has been stopped, or has failed (the log says why)."""


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
        self._disks = 0
        self._signaller: Signaller | None = None
        self._tracer: Tracer | None = None
        self._readers: set[TraceReader] = set()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        # Guards the two fields below, so that each call is either performed or refused.
        self._lock = threading.Lock()
        self._ended = False
        self._stopping = False
        with contextlib.ExitStack() as opened:
            self._control_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            opened.callback(os.close, self._control_fd)
            self.engine = make_engine(engine, slots)
            opened.callback(self.engine.close)
            self.state = WorkerState(self.engine, slots, poll_us)
            self._alarm = Alarm()
            opened.callback(self._alarm.close)
            self._helpers = Helpers(name, int(self.state.channel.ios.ctypes.data), slots)
            opened.pop_all()
        self.state.channel.connect(self._helpers.jobs_fd, self._helpers.done_fd)
        self.engine.watch(self._helpers.done_fd, TOKEN_HELPERS)
        self.engine.watch(self._control_fd, TOKEN_CONTROL)
        if self._alarm.address:
            self.engine.watch(self._alarm.fd, TOKEN_ALARM)
            self.state.record["alarm"] = self._alarm.address
        pinning = Pinning(self.engine, name, wanted=pin_memory)
        self.rings = ServedRings(self.state, self.engine, pinning, self._signal, self._trace_queue)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.clock = ThreadClock(self.state.record)
        self.counters = ThreadCounters(self.state, self.clock)

    # From any thread.

    def add_disk(self) -> None:
        """Count a disk with queues on this worker. From the second one on, no front end may block this thread."""
        self._disks += 1
        if self._disks == 2:
            self.prepare_to_share()
            if self._signaller is not None:
                self.state.record["signaller"] = self._signaller.address

    def remove_disk(self) -> None:
        """Count one disk less; none of its queues is served."""
        self._disks -= 1

    def prepare_to_share(self) -> None:
        """Make what a second disk needs now: later the process may have no right to make it."""
        if self._signaller is None:
            try:
                self._signaller = Signaller()
            except OSError as error:
                log.warning("%s: one front end can block all disks of this thread: %s", self.name, error)

    def load(self) -> None:
        """Compile or load all that the threads will call, so that they need no file for it after their start."""
        self._helpers.load()
        load(run)
        load(mark_ready_at)
        load(signal)
        sigbus.install()
        interrupt.install()

    def start(self) -> None:
        """Start the threads; without a call of `load` before, they load the code themselves."""
        self._helpers.start()
        self._thread.start()
        self.clock.start(self._thread)

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
        return self.call(lambda: self.rings.start(queue, layout, memory, kick_fd))

    def stop_queue(self, queue: Queue) -> Future[None]:
        """Stop fetching; the future is done when all requests in flight have been completed."""
        drained: Future[None] = Future()
        asked = self.call(lambda: self.rings.stop(queue, drained))
        asked.add_done_callback(lambda future: _pass_on_exception(future, drained))
        return drained

    def call_off_stop(self, queue: Queue, memory: MemoryTable, kick_fd: int) -> Future[bool]:
        """Call off a stop: fetch again at once; False if the queue has stopped already."""
        return self.call(lambda: self.rings.call_off_stop(queue, memory, kick_fd))

    def set_memory(self, queue: Queue, memory: MemoryTable) -> Future[None]:
        """Use another memory table from now on; requests in flight keep the mappings that they use."""
        return self.call(lambda: self.rings.set_memory(queue, memory))

    def limit(self, queues: Sequence[Queue], limiter: Limiter | None) -> Future[None]:
        """These limits hold for the queues from now on; what waits because of the previous ones asks again at once."""
        return self.call(lambda: self._limit(queues, limiter))

    def set_call_fd(self, queue: Queue, fd: int) -> Future[None]:
        """Notify the driver through `fd` from now on; -1: do not notify. The caller keeps ownership of the fd."""
        return self.call(lambda: queue.record.__setitem__("call_fd", fd))

    def signal(self, fd: int) -> Future[None]:
        """Signal a front end's eventfd like a driver's: it may block, and the control plane must not."""
        return self.call(lambda: self._signal(fd))

    def interrupt(self) -> None:
        """Interrupt the thread if it blocks in a write to a full notifier; otherwise this has no effect."""
        interrupt.interrupt(self._thread)

    def start_tracing(self, fetches: bool = True) -> Future[TraceReader]:
        """Trace requests from now on, until the last reader has been passed to `stop_tracing`.

        With `fetches` each fetch has an event, and so have at the beginning those of requests that are in flight.
        Otherwise these are in the event of the completion, and at the end in one per request that is in flight.
        """
        load_tracing()
        room = [room_for_events()]
        started = self.call(lambda: self._start_tracing(fetches, room[0]))
        # If it is cancelled, the call itself stays until the thread looks at it, which one that hangs does not.
        started.add_done_callback(lambda _: room.clear())
        return started

    def stop_tracing(self, reader: TraceReader) -> Future[None]:
        """No more events come for this reader; it can still read those that it has not read."""
        return self.call(lambda: self._stop_tracing(reader))

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
        self._alarm.close()
        os.close(self._control_fd)

    # On the worker's thread.

    def _main(self) -> None:
        try:
            self.engine.attach_thread()
            libc.set_timer_slack(TIMER_SLACK_NS)
            libc.name_thread(self.name)
            while not self._stopping:
                self._turn()
        except BaseException:
            # `_end` reports it to those who wait for this thread.
            log.exception("%s: the I/O thread has failed (internal error); its disks are no longer served", self.name)
        finally:
            self._end()

    def _turn(self) -> None:
        run(self.state.address)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._control_fd)
        while self._calls:
            _perform(*self._calls.popleft())
        report_sources(self.rings)
        if self.state.record["failing"]:
            self.state.record["failing"] = 0
            report_failures(self.rings)
        self.rings.follow_up()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
        for future in [*(future for future, _ in self._calls), *self.rings.abandon()]:
            if future.set_running_or_notify_cancel():
                future.set_exception(WorkerEnded(f"{self.name} has ended"))

    def _limit(self, queues: Sequence[Queue], limiter: Limiter | None) -> None:
        for queue in queues:
            queue.limit(limiter)
        self.rings.check_all()

    def _signal(self, fd: int) -> None:
        signal(int(self.state.record["signaller"]), fd, self.state.address_of_one)

    def _start_tracing(self, fetches: bool, events: Events) -> TraceReader:
        """`events`: for a tracer, if there is none."""
        if self._tracer is None:
            self._tracer = Tracer(self.state, events)
            self._tracer.start(self.rings)
        in_flight = self._tracer.in_flight(self.rings if fetches else (), FETCH)
        reader = TraceReader(self._tracer, fetches, in_flight)
        self._readers.add(reader)
        self._tracer.want_fetches(any(each.fetches for each in self._readers))
        return reader

    def _stop_tracing(self, reader: TraceReader) -> None:
        if self._tracer is None or reader not in self._readers:
            return
        self._readers.discard(reader)
        reader.end(self._tracer.in_flight(() if reader.fetches else self.rings, IN_FLIGHT))
        self._tracer.want_fetches(any(each.fetches for each in self._readers))
        if not self._readers:
            self._tracer.stop()
            self._tracer = None

    def _trace_queue(self, event: int, queue: Queue) -> None:
        log.debug("%s: %s", queue.name, EVENT_NAMES[event], extra=queue.log_fields)
        if self._tracer is not None:
            self._tracer.add(event, queue)


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
