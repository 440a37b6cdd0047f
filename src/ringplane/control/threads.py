"""The threads of one process that serve its disks: a control thread with one asyncio loop, and named I/O threads."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

from ringplane.control.trace_task import report_trace
from ringplane.dataplane.trace_events import TraceEvent
from ringplane.dataplane.worker import Worker
from ringplane.options.cpus import format_cpus
from ringplane.options.thread_options import IoThread
from ringplane.system.notes import doing
from ringplane.system.ready_thread import ReadyThread

# Seconds that coroutines which others wait for have at the end.
CALLS_PATIENCE = 1.0

Result = TypeVar("Result")


class Service(Protocol):
    """A task of the control thread."""

    @property
    def stopped(self) -> bool:
        """Whether `run` is about to return."""

    async def run(self) -> None: ...


class Threads:
    """One control thread with an asyncio loop, and a set of I/O threads. They end when the last service has stopped."""

    def __init__(self, io_threads: Sequence[IoThread], at_end: contextlib.ExitStack) -> None:
        """Prepare the I/O threads and load the data plane; no thread is started. `at_end` is closed after their end.

        Raises OSError when an engine is unavailable; nothing is left.
        """
        self.io_threads = io_threads
        self.workers: dict[str, Worker] = {}
        # Those that have not ended; changed on the control thread.
        self._services: dict[Service, asyncio.Task[None] | None] = {}
        self.at_end = at_end
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        with doing("set up the control thread"):
            self._loop = asyncio.new_event_loop()
        self._thread = ReadyThread("ringplane-control")
        try:
            self._make_workers()
        except BaseException:
            self.end()
            raise

    def _make_workers(self) -> None:
        for each in self.io_threads:
            with doing(f"set up the I/O thread {each.name}"):
                worker = self.workers[each.name] = Worker(
                    each.name, engine=each.engine, poll_us=each.poll_us, pin_memory=each.pin_memory
                )
                worker.load()

    def start(self) -> None:
        """Start all of them: the I/O threads run when this returns, and the control thread waits for `begin`.

        Raises OSError when a CPU affinity is refused or no thread can be started, WorkerEnded when a thread fails;
        `end` undoes it.
        """
        with doing("start the control thread"):
            self._thread.start()
        self._start_io_threads()

    def _start_io_threads(self) -> None:
        for worker in self.workers.values():
            worker.start()
        bound = [self.workers[each.name].call(partial(_run_on, each.cpus)) for each in self.io_threads]
        for each, ready in zip(self.io_threads, bound, strict=True):
            with doing(f"run the I/O thread {each.name} on the CPUs {format_cpus(each.cpus or ())}"):
                ready.result()

    def begin(self, services: Iterable[Service]) -> None:
        """Have the control thread run these services, and those that are added, until each has stopped."""
        self._services = dict.fromkeys(services)
        self._thread.begin(self._main)

    def trace(self, receive: Callable[[TraceEvent | str], None]) -> None:
        """Call `receive` with each trace event of any disk from now on, or a text about lost ones.

        It is called on the control thread.
        """
        if self._thread.is_alive:
            readers = [worker.start_tracing().result() for worker in self.workers.values()]
            self.start_task(lambda: report_trace(readers, receive))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the threads have ended; whether they have."""
        return self._thread.join(timeout)

    def end_if_unused(self) -> None:
        """If no service needs the threads any longer, return when they have ended; else at once."""
        if all(service.stopped for service in list(self._services)):
            self._thread.join()

    def end(self) -> None:
        """End threads that have not begun."""
        self._thread.dismiss()
        self._release()

    def _release(self) -> None:
        self._loop.close()
        for worker in self.workers.values():
            worker.stop()

    def soon(self, function: Callable[[], object]) -> None:
        """Have `function` called on the control thread, if it runs."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def call(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Future[Result]:
        """Have the coroutine of `work` run on the control thread; raises RuntimeError if that has ended."""
        coroutine = self._called(work)
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise

    def start_task(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Have the coroutine of `work` run on the control thread; it is cancelled when all services have stopped."""
        self.soon(lambda: self._start_task(work))

    # On the control thread.

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._release()
            self.at_end.close()

    def serve(self, service: Service) -> None:
        """Run one more service, while others run."""
        task = self._services[service] = self._loop.create_task(service.run())
        task.add_done_callback(lambda _: self._services.pop(service))

    async def ended(self, service: Service) -> None:
        """Return when this service has ended."""
        if task := self._services.get(service):
            await asyncio.wait([task])

    async def _serve(self) -> None:
        for service in list(self._services):
            self.serve(service)
        await self._until_unused()
        if self._calls:
            await asyncio.wait(self._calls, timeout=CALLS_PATIENCE)
            # One of them may have added a service.
            await self._until_unused()
        tasks = [*self._tasks, *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_unused(self) -> None:
        while running := [task for task in self._services.values() if task]:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    async def _called(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            return await work()
        finally:
            self._calls.discard(task)

    def _start_task(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        task = self._loop.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _run_on(cpus: Collection[int] | None) -> None:
    """Bind the calling thread; raises OSError if the kernel refuses."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
