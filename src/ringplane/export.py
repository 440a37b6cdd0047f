"""A disk being served: `serve` starts it in the background of a program, an `Export` is the handle to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from ringplane import histogram, image
from ringplane.dataplane.state import KINDS, TRACE_CAPACITY
from ringplane.dataplane.trace import TraceEvent, TraceReader
from ringplane.dataplane.warm import warm_up
from ringplane.dataplane.worker import Worker
from ringplane.disk import Disk
from ringplane.engines.choose import AUTO
from ringplane.image import Image
from ringplane.listener import Listener
from ringplane.vhost_user.session import Session
from ringplane.vhost_user.transport import AsyncTransport

log = logging.getLogger(__name__)

Result = TypeVar("Result")

TRACE_INTERVAL = 0.05
TRACE_PORTION = 1000
ACCEPT_AGAIN = 0.1
DRAIN_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class Counter:
    """What was counted of one kind of request, over all queues and front ends of an export.

    `requests` have been answered, `errors` of them with a status other than OK; `bytes` were transferred.
    `histogram` counts nanoseconds from fetch to answer in the buckets of `ringplane.histogram`.
    """

    requests: int
    errors: int
    bytes: int
    histogram: npt.NDArray[np.int64]

    def percentile_us(self, percent: float) -> float:
        """The latency in microseconds that `percent` of the requests did not exceed; 0 without requests."""
        return histogram.percentile(self.histogram, percent) / 1000


class Export:
    """A disk served on a socket by threads of this process. Made by `serve`."""

    def __init__(self, disk: Disk, workers: list[Worker], listener: Listener) -> None:
        self.disk = disk
        self.socket_path = listener.path
        self._workers = workers
        self._listener = listener
        self._session: Session | None = None
        self._transport: AsyncTransport | None = None
        self._stopping = False
        self._finished = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="ringplane-control", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """`listening`, `attached` (to a front end) or `stopped`."""
        if self._finished.is_set():
            return "stopped"
        return "attached" if self._session else "listening"

    @property
    def in_flight(self) -> int:
        """Requests fetched from the rings and not yet answered."""
        return sum(queue.in_flight for queue in self.disk.queues)

    @property
    def counters(self) -> dict[str, Counter]:
        """By kind of request: `read`, `write`, `flush` and `other`."""
        total = [np.stack([queue.counters[kind] for queue in self.disk.queues]) for kind in range(len(KINDS))]
        return {
            name: Counter(
                int(rows["requests"].sum()),
                int(rows["errors"].sum()),
                int(rows["bytes"].sum()),
                rows["histogram"].sum(axis=0),
            )
            for name, rows in zip(KINDS, total, strict=True)
        }

    def drain(self) -> None:
        """Return when all that was fetched has been answered; nothing is fetched meanwhile."""
        drained = threading.Event()

        async def drain() -> None:
            try:
                if self._session:
                    await self._session.drain()
            finally:
                drained.set()

        self._soon(lambda: self._tasks.append(self._loop.create_task(drain())))
        # A stop drains too.
        while not drained.wait(DRAIN_LOOK) and not self._finished.is_set():
            pass

    def trace(self, receive: Callable[[TraceEvent | str], None]) -> None:
        """Call `receive` with each trace event from now on, or a sentence about lost ones, on the control thread."""
        if self.state == "stopped":
            return
        readers = [worker.start_tracing() for worker in self._workers]
        self._soon(lambda: self._tasks.append(self._loop.create_task(self._tell_trace(readers, receive))))

    async def _tell_trace(self, readers: list[TraceReader], receive: Callable[[TraceEvent | str], None]) -> None:
        told = 0

        def tell(limit: int) -> int:
            nonlocal told
            events = [event for reader in readers for event in reader.events(limit)]
            for event in events:
                receive(event)
            lost = sum(reader.lost for reader in readers)
            if lost > told:
                receive(f"{lost - told} trace events lost")
                told = lost
            return len(events)

        try:
            while True:
                # In small portions: messages of the front end and signals must not wait for a slow reader of these.
                await asyncio.sleep(0 if tell(TRACE_PORTION) else TRACE_INTERVAL)
        except OSError as error:
            log.warning("tracing has ended: %s", error)
        except asyncio.CancelledError:
            # At the stop, when all queues have been drained: the rest.
            tell(TRACE_CAPACITY)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the export has stopped (its one inherited connection may end by itself); whether it has."""
        return self._finished.wait(timeout)

    def request_stop(self) -> None:
        """Begin to stop and return at once; may be called from a signal handler."""
        if not self._stopping:
            self._stopping = True
            self._soon(self._close_sockets)

    def stop_when_readable(self, fd: int) -> None:
        """Begin to stop as soon as there is something to read from `fd` (a signal's wakeup fd, say)."""
        self._soon(lambda: self._loop.add_reader(fd, self._stop_by_fd, fd))

    def _stop_by_fd(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self.request_stop()

    def stop(self) -> None:
        """Fetch nothing more, answer what is in flight, let go of front end, socket and image. May be called again."""
        self.request_stop()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _soon(self, function: Callable[[], object]) -> None:
        """Have `function` called on the control thread, if there still is one."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    # On the control thread.

    def _main(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.run_until_complete(self._end_tasks())
            self._loop.close()
            for worker in self._workers:
                worker.stop()
            self.disk.image.close()
            self._finished.set()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self) -> None:
        """One front end after the other; those that connect meanwhile wait in the socket's queue."""
        listener = self._listener
        try:
            if listener.connected:
                await self._serve_front_end(listener.sock)
                return
            listener.sock.setblocking(False)
            while not self._stopping:
                sock = await self._accept(listener.sock)
                if sock is not None:
                    await self._serve_front_end(sock)
        finally:
            listener.close()

    async def _accept(self, listening: socket.socket) -> socket.socket | None:
        self._accepting = asyncio.ensure_future(self._loop.sock_accept(listening))
        try:
            return (await self._accepting)[0]
        except asyncio.CancelledError:
            pass
        except OSError as error:
            # Too many open files, say: the front end waits in the queue until that has passed.
            log.warning("cannot accept a front end: %s", error)
            await asyncio.sleep(ACCEPT_AGAIN)
        return None

    async def _serve_front_end(self, sock: socket.socket) -> None:
        self._transport = AsyncTransport(sock)
        self._session = Session(self._transport, self.disk)
        log.info("front end attached")
        try:
            if not self._stopping:
                await self._session.run()
        except Exception:
            log.exception("front end dropped, by a fault of ringplane's own; please report it")
        finally:
            self._transport.close()
            self._session = self._transport = None
            log.info("front end detached")

    def _close_sockets(self) -> None:
        if self._transport:
            self._transport.close()
        elif hasattr(self, "_accepting"):
            self._accepting.cancel()


def serve(
    image_path: str | os.PathLike[str],
    socket_path: str | os.PathLike[str] | None = None,
    *,
    fd: int | None = None,
    create: int | None = None,
    read_only: bool = False,
    direct: bool = True,
    share_rw: bool = False,
    num_queues: int | None = None,
    io_threads: int = 1,
    engine: str = AUTO,
    block_size: int = 512,
    serial: str | None = None,
) -> Export:
    """Serve a raw image or block device as a vhost-user-blk disk, in the background of this program.

    Give either `socket_path` to listen at, or `fd`, an inherited socket. `create` makes a sparse image of so many
    bytes first. `num_queues` defaults to one per CPU up to 4. `engine` is `io_uring`, `aio`, or `auto` for the best
    that is allowed. `direct` is a wish: where the file system refuses O_DIRECT the page cache is used, which the
    export's `disk.image.direct` tells. When this returns, front ends can connect.

    Raises ImageError, ListenError, or OSError when the kernel lacks what the data plane needs; nothing is left behind.
    """
    path = Path(image_path)
    if (socket_path is None) == (fd is None):
        raise ValueError("give either a socket path or an fd")
    if create is not None:
        image.create(path, create)
    with contextlib.ExitStack() as undo:
        if create is not None:
            undo.callback(path.unlink)
        opened = Image(path, read_only=read_only, direct=direct, share_rw=share_rw, block_size=block_size)
        undo.callback(opened.close)
        listener = Listener.at(Path(socket_path)) if socket_path is not None else Listener.inherited(fd or 0)
        undo.callback(listener.close)
        warm_up()
        workers = []
        for number in range(io_threads):
            workers.append(Worker(f"ringplane-io-{number}", engine=engine))
            undo.callback(workers[-1].stop)
            workers[-1].start()
        # Its first call returns when the data plane has been loaded.
        for worker in workers:
            worker.call(lambda: None).result()
        queues = num_queues if num_queues is not None else default_num_queues()
        disk = Disk(opened, workers, num_queues=queues, block_size=block_size, serial=serial)
        export = Export(disk, workers, listener)
        undo.pop_all()
    return export


def default_num_queues() -> int:
    """One per CPU, up to 4."""
    return min(4, os.cpu_count() or 1)
