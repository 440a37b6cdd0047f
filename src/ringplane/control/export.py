"""A disk being served: `serve` starts it in the background of a program, and an `Export` is its handle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from ringplane.block.formats import describe, find_format
from ringplane.block.image import Image, ImageError
from ringplane.block.image import create as create_image
from ringplane.block.zonefile import ZoneFile, check_not_zoned
from ringplane.control.handover import Predecessor, offer_successors, socket_beside
from ringplane.control.listener import Listener, ListenError
from ringplane.control.server import Server
from ringplane.dataplane import histogram
from ringplane.dataplane.state import KINDS
from ringplane.dataplane.trace import TraceEvent
from ringplane.dataplane.warm import warm_up
from ringplane.dataplane.worker import WorkerEnded
from ringplane.device.disk import Disk
from ringplane.guest_memory.address_space import AddressSpace, Quota
from ringplane.log.logs import DiskLog
from ringplane.options.disk_config import DiskConfig
from ringplane.options.engines import AUTO, ENGINES, THREAD_ENGINES
from ringplane.options.io_thread import POLL_US, IoThread
from ringplane.options.values import LOCK_AUTO, MAX_QUEUES, ZoneModel
from ringplane.system import procfs
from ringplane.system.signals import NONE, Signals
from ringplane.system.standard_fds import occupy
from ringplane.vhost_user import peers
from ringplane.vhost_user.session import Session
from ringplane.vhost_user.snapshot import SessionSnapshot
from ringplane.vhost_user.transport import AsyncTransport, wake

log = logging.getLogger(__name__)

# See `serve_all`.
GiveUp = Callable[[Collection[Path]], None]

ACCEPT_AGAIN = 0.1

# Seconds after which a front end that waits for another one is logged.
WAITING_PATIENCE = 1.0
WAITS = "a second front end (%s) waits until the first one (%s) detaches; SIGUSR1 detaches the first one"

DRAIN_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class Counter:
    """Counters of one kind of request, over all queues and front ends of an export.

    `requests` have been answered, `errors` of them with a status other than OK; `bytes` were transferred.
    `histogram` counts nanoseconds from fetch to answer in the buckets of `ringplane.dataplane.histogram`.
    """

    requests: int
    errors: int
    bytes: int
    histogram: npt.NDArray[np.int64]

    def percentile_us(self, percent: float) -> float:
        """The latency in microseconds that `percent` of the requests did not exceed; 0 without requests."""
        return histogram.percentile(self.histogram, percent) / 1000


@dataclass(frozen=True, slots=True)
class _Opened:
    """The parts of a disk."""

    image: Image
    zones: ZoneFile | None
    # None: at a path, where it appears when the disk can be served.
    listener: Listener | None
    # By this start, because it did not exist.
    created: bool


class Export:
    """A disk served on a socket by threads of this process. Made by `serve` and `serve_all`."""

    def __init__(self, config: DiskConfig, disk: Disk, listener: Listener, server: Server, quota: Quota) -> None:
        self.config = config
        self.socket_path = listener.path
        self.server = server
        self.disk = disk
        self._logger = DiskLog(log, disk.name)
        self._listener = listener
        self._quota = quota
        self._accepting: asyncio.Future[None] | None = None
        # Cleared while no front end may be accepted, because another process may take over.
        self._go = asyncio.Event()
        self._go.set()
        self._session: Session | None = None
        self._transport: AsyncTransport | None = None
        # Who is attached, for log lines; and who was accepted meanwhile, to be served next.
        self._attached = ""
        self._next: socket.socket | None = None
        self._stopping = False
        self._finished = threading.Event()

    @property
    def state(self) -> str:
        """`listening`, `attached` (to a front end) or `stopped`."""
        if self._finished.is_set():
            return "stopped"
        return "attached" if self._session else "listening"

    @property
    def device(self) -> int:
        """The number of this disk in trace events."""
        return int(self.disk.queues[0].record["device"])

    @property
    def in_flight(self) -> int:
        """Requests fetched from the rings and not yet completed."""
        return sum(queue.in_flight for queue in self.disk.queues)

    @property
    def counters(self) -> dict[str, Counter]:
        """By kind of request: `read`, `write`, `flush` and `other`."""
        # Queues that were never started share counters that stay 0.
        counted = {id(queue.counters): queue.counters for queue in self.disk.queues}
        total = [np.stack([each[kind] for each in counted.values()]) for kind in range(len(KINDS))]
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
        """Return when all fetched requests have completed; nothing is fetched meanwhile."""
        drained = threading.Event()
        self.server.start_task(lambda: self._drain(drained))
        # A stop drains too.
        while not drained.wait(DRAIN_LOOK) and not self._finished.is_set():
            pass

    def refresh_size(self) -> None:
        """Pick up the new size of the image; the front end is notified if it has changed."""
        self.server.start_task(self._refresh_size)

    def make_way(self) -> None:
        """Detach the attached front end if another one waits."""
        self.server.soon(self._make_way)

    def trace(self, receive: Callable[[TraceEvent | str], None]) -> None:
        """Call `receive` with each trace event from now on, or a text about lost ones, on the control thread."""
        if self.state == "stopped":
            return

        def receive_ours(event: TraceEvent | str) -> None:
            if isinstance(event, str) or event.device == self.device:
                receive(event)

        self.server.trace(receive_ours)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the export has stopped (its one inherited connection may end by itself); whether it has."""
        return self._finished.wait(timeout)

    def request_stop(self) -> None:
        """Begin to stop and return at once; may be called from a signal handler."""
        if not self._stopping:
            self._stopping = True
            self.server.soon(self._close_sockets)

    def stop(self) -> None:
        """Fetch nothing more, complete what is in flight, release front end, socket and image. May be called again.

        The last disk of a server takes the threads along.
        """
        self.request_stop()
        self._finished.wait()
        self.server.end_if_unused()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # On the control thread.

    async def run(self) -> None:
        """Serve until stopped; called by the server. A failure here affects only this disk."""
        try:
            await self._serve()
        except Exception:
            self._logger.exception("stopped serving because of an internal error; please report it")
        finally:
            self.disk.close()
            self._finished.set()

    async def _serve(self) -> None:
        """One front end after the other; others that connect meanwhile wait in the socket's queue."""
        listener = self._listener
        try:
            if listener.connected:
                await self._serve_front_end(listener.sock)
                return
            if self._session is not None:
                self._logger.info("resumed a front end of the previous process")
                await self._run_session(self._session)
            listener.sock.setblocking(False)
            while not self._stopping:
                sock = await self._take_next()
                if sock is not None:
                    await self._serve_front_end(sock)
        finally:
            self._drop_next()
            listener.close()

    async def _take_next(self) -> socket.socket | None:
        """The front end to be served next; None if it has disconnected."""
        if self._next is None:
            return await self._accept()
        await self._wait_while_frozen()
        sock, self._next = self._next, None
        return sock

    async def _watch_next(self) -> None:
        """While a front end is attached, accept the next one, so that the log can name both."""
        while not self._stopping:
            self._next = self._next or await self._accept()
            if self._next is not None:
                await self._report_waiting(self._next)
                self._drop_next()

    async def _report_waiting(self, sock: socket.socket) -> None:
        """Return when it no longer waits. A front end that reconnects waits only briefly for its old connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAITING_PATIENCE):
                await peers.gone(sock)
                return
        waiting = peers.describe(sock)
        self._logger.warning(WAITS, waiting, self._attached)
        await peers.gone(sock)
        self._logger.info("the second front end (%s) has gone; it was not served", waiting)

    def _drop_next(self) -> None:
        if self._next is not None:
            self._next.close()
            self._next = None

    async def _accept(self) -> socket.socket | None:
        listening = self._listener.sock
        try:
            await self._wait_for_one(listening)
            # Nothing else runs between this and the session, so no front end is accepted after `freeze`.
            return None if self._stopping else listening.accept()[0]
        except BlockingIOError:
            # It has disconnected again.
            pass
        except OSError as error:
            # For example too many open files: the front end waits in the queue until that has passed.
            self._logger.warning("cannot accept a front end: %s", error)
            await asyncio.sleep(ACCEPT_AGAIN)
        return None

    async def _wait_for_one(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._accepting = loop.create_future()
        loop.add_reader(listening, wake, self._accepting)
        try:
            await self._accepting
        finally:
            loop.remove_reader(listening)
        await self._wait_while_frozen()

    async def _wait_while_frozen(self) -> None:
        while not self._go.is_set():
            await self._go.wait()

    async def _serve_front_end(self, sock: socket.socket) -> None:
        if self._stopping:
            sock.close()
            return
        self._attached = peers.describe(sock)
        self._transport = AsyncTransport(sock)
        try:
            self._session = Session(self._transport, self.disk, self._quota)
        except OSError as error:
            # For example too many open files: the next one may succeed.
            self._logger.warning("cannot serve a front end: %s", error)
            self._transport.close()
            self._transport = None
            return
        self._logger.info("front end attached (%s)", self._attached)
        await self._run_session(self._session)

    async def _run_session(self, session: Session) -> None:
        watching = None if self._listener.connected else asyncio.create_task(self._watch_next())
        try:
            if not self._stopping:
                await session.run()
        except Exception:
            self._logger.exception("front end dropped because of an internal error; please report it")
        finally:
            if self._transport:
                self._transport.close()
            self._session = self._transport = None
            self.disk.report_failures()
            self._logger.info("front end detached")
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])

    # For control/handover.py.

    @property
    def listener(self) -> Listener:
        return self._listener

    @property
    def session(self) -> Session | None:
        return self._session

    @property
    def next_front_end(self) -> socket.socket | None:
        """The front end that waits until the attached one detaches."""
        return self._next

    async def freeze(self) -> None:
        """Stop all activity until `thaw`: no front end is accepted; raises the same as `Session.freeze`."""
        self._go.clear()
        try:
            if self._session:
                await self._session.freeze()
        except BaseException:
            self._go.set()
            raise

    async def thaw(self) -> None:
        """Continue after `freeze`."""
        if self._session:
            await self._session.thaw()
        self._go.set()

    async def abandon(self) -> None:
        """After `freeze`: stop, and leave everything unchanged to the process that takes over."""
        self._listener.owned = False
        if self.disk.zones:
            self.disk.zones.abandon()
        if self._session:
            await self._session.abandon()
        self.request_stop()
        self._go.set()

    def resume_waiting(self, fd: int) -> None:
        """Serve later a front end that waits in the previous process; the fd stays the caller's. Raises OSError."""
        self._next = socket.socket(fileno=os.dup(fd))

    def resume_from(self, saved: SessionSnapshot) -> None:
        """Serve from the start a front end that another process hands over; raises the same as Session.resume_from."""
        sock = socket.socket(fileno=os.dup(saved.socket.number))
        self._attached = peers.describe(sock)
        self._transport = AsyncTransport(sock)
        self._session = Session(self._transport, self.disk, self._quota)
        self._session.resume_from(saved)

    async def _drain(self, drained: threading.Event) -> None:
        try:
            if self._session:
                await self._session.drain()
        except WorkerEnded as error:
            self._logger.warning("cannot be drained: %s", error)
        finally:
            drained.set()

    async def _refresh_size(self) -> None:
        if self.disk.image.is_replaced:
            self._logger.warning(
                "its path leads to another file now, or to none; the opened one is served until a restart"
            )
        try:
            if not await self.disk.refresh_size():
                self._logger.info("has %d bytes, unchanged", self.disk.image.size)
                return
            self._logger.info("has %d bytes now", self.disk.image.size)
            if self._session:
                await self._session.notify_config_change()
        except (ImageError, OSError, WorkerEnded) as error:
            self._logger.warning("its new size cannot be served: %s", error)

    def _make_way(self) -> None:
        if self._transport is None:
            return
        if self._next is None:
            self._logger.info("front end (%s) stays attached: no other one waits", self._attached)
            return
        self._logger.warning("front end (%s) is detached on request, because another one waits", self._attached)
        self._transport.close()

    def _close_sockets(self) -> None:
        if self._transport:
            self._transport.close()
        elif self._accepting:
            wake(self._accepting)


def serve(
    image_path: str | os.PathLike[str],
    socket_path: str | os.PathLike[str] | None = None,
    *,
    socket_mode: int | None = None,
    socket_group: int | None = None,
    fd: int | None = None,
    create: int | None = None,
    read_only: bool = False,
    direct: bool = True,
    share_rw: bool = False,
    lock: str = LOCK_AUTO,
    num_queues: int = MAX_QUEUES,
    io_threads: int = 1,
    cpus: Sequence[Collection[int]] = (),
    engine: str = AUTO,
    poll_us: int | None = POLL_US,
    pin_memory: bool = False,
    block_size: int = 512,
    physical_block_size: int | None = None,
    serial: str | None = None,
    features: Mapping[str, bool] | None = None,
    zoned: ZoneModel | None = None,
    upgradable: bool = False,
    upgrade: bool = False,
    give_up: GiveUp | None = None,
    signals: Signals = NONE,
) -> Export:
    """Serve a raw image or block device as a vhost-user-blk disk, in the background of this program.

    Give either `socket_path` to listen at, or `fd`, an inherited socket. The file at `socket_path` gets `socket_mode`
    and the group (its number) `socket_group` before anybody can connect; a group without a mode means 0o660.
    `create` makes a sparse image of so many bytes where there is none; an image that exists is served as it is. A front
    end uses as many of the `num_queues` as it wants. `cpus` are the CPUs of each I/O thread, or those of all if there
    is only one set. `engine` is one of `ringplane.options.engines.ENGINES`; `auto` is the best that image and
    kernel allow. `poll_us`: for how many microseconds at most an I/O thread looks at the rings before it sleeps; None:
    it never sleeps. `pin_memory` saves pinning the guest's pages for each request by keeping all of them pinned, with
    io_uring. `direct` is a wish: where the file system refuses O_DIRECT the page cache is used, as the
    export's `disk.image.direct` shows. `features` switches those of `ringplane.options.values.FEATURES` on or off.
    `physical_block_size` is reported to the guest instead of that of the storage.
    `zoned` makes a host-managed zoned disk of a new image, or serves an existing one. When this returns, front ends can
    connect. An `upgradable` disk can be taken over by another process, with `upgrade`, and stops then (handover.py).
    `lock` is one of `ringplane.options.values.LOCKS`: QEMU's locks are taken `on` all images, on
    none (`off`), or (`auto`) on all but those that are read-only and on a file system without locks.
    `give_up`, `signals`: see `serve_all`.

    Raises ImageError, ListenError, HandoverError, ValueError for arguments that make no sense, or OSError when the
    kernel lacks what the data plane needs; nothing is left behind.
    """
    threads = _io_threads(io_threads, cpus, engine, poll_us, pin_memory)
    config = DiskConfig(
        image=Path(image_path),
        io_threads=[thread.name for thread in threads],
        socket_path=Path(socket_path) if socket_path is not None else None,
        socket_mode=socket_mode,
        socket_group=socket_group,
        fd=fd,
        create=create,
        read_only=read_only,
        direct=direct,
        share_rw=share_rw,
        lock=lock,
        num_queues=num_queues,
        engine=engine,
        block_size=block_size,
        physical_block_size=physical_block_size,
        serial=serial,
        features=features or {},
        zoned=zoned,
    )
    server = serve_all(
        [config], threads, upgradable=upgradable, upgrade=upgrade, give_up=give_up, signals=signals
    )  # fmt: skip
    return server.exports[0]


def serve_all(
    disks: Sequence[DiskConfig],
    io_threads: Sequence[IoThread],
    *,
    upgradable: bool = False,
    upgrade: bool = False,
    give_up: GiveUp | None = None,
    signals: Signals = NONE,
) -> Server:
    """Serve several disks on shared threads; like `serve` in all else. The server's `exports` are in their order.

    `give_up` is called when everything has been opened and loaded and no thread has begun yet, with the folders in
    which sockets are removed at the end: a program that is there for nothing else gives up its rights then. `signals`
    can interrupt the start: then it raises Interrupted, and nothing is left behind. They are woken up at the end.
    """
    occupy()
    names = [thread.name for thread in io_threads]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the I/O threads {names} have the same name")
    for config in disks:
        if not config.io_threads or not set(config.io_threads) <= set(names):
            raise ValueError(f"{config.image}: {list(config.io_threads)} are not among the I/O threads {names}")
    procfs.warn_if_missing()
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as at_last:
        predecessor = at_last.enter_context(Predecessor(disks, signals)) if upgrade else None
        opened = []
        for index, config in enumerate(disks):
            signals.check()
            opened.append(_take_over(config, predecessor, index, undo) if predecessor else _open(config, undo))
        warm_up(signals)
        server = Server(io_threads)
        undo.callback(server.stop)
        server.at_end.callback(signals.wake)
        space = AddressSpace(len(disks))
        served = [_disk(config, parts, server) for config, parts in zip(disks, opened, strict=True)]
        # A process that has given up its rights can no longer remove what it has created.
        signals.check()
        # Front ends that connect from now on get an answer at once.
        listeners = [_listen(config, parts, undo) for config, parts in zip(disks, opened, strict=True)]
        exports = [Export(*each, server, space.quota()) for each in zip(disks, served, listeners, strict=True)]
        successors = _listen_for_successors(disks, undo) if upgradable and not predecessor else None
        if give_up is not None:
            give_up({config.socket_path.parent for config in disks if config.socket_path})
        server.start_io_threads()
        if predecessor:
            successors = predecessor.take(exports)
        server.start(exports)
        undo.pop_all()
    for config, parts in zip(disks, opened, strict=True):
        _report_created(config, parts)
    if successors:
        server.at_end.callback(successors.close)
        server.start_task(lambda: offer_successors(server, successors))
    return server


def _listen_for_successors(disks: Sequence[DiskConfig], undo: contextlib.ExitStack) -> Listener | None:
    """Beside the first disk's socket, if it has one, and if path length (unix(7)) and permissions allow it."""
    path = disks[0].socket_path
    if path is None:
        return None
    try:
        listener = Listener.at(socket_beside(path), mode=0o600)
    except ListenError as error:
        log.warning("no other process will be able to take over with --upgrade: %s", error)
        return None
    undo.callback(listener.close)
    return listener


def _take_over(config: DiskConfig, predecessor: Predecessor, index: int, undo: contextlib.ExitStack) -> _Opened:
    """Like `_open`, from the process that serves it now."""
    fd, size = predecessor.image(index)
    image = Image(config.image, read_only=config.read_only, block_size=config.block_size, fd=fd)
    undo.callback(image.close)
    image.size = size
    zones = None
    if config.zoned:
        zones = ZoneFile(image, config.zoned, block_size=config.block_size, shared=True)
        undo.callback(zones.abandon)
    listener = predecessor.listener(index)
    undo.callback(listener.close)
    return _Opened(image, zones, listener, created=False)


def _open(config: DiskConfig, undo: contextlib.ExitStack) -> _Opened:
    """Open the parts of a disk; `undo` closes or removes them."""
    created = _create_if_missing(config, undo)
    opened = Image(
        config.image,
        read_only=config.read_only,
        direct=config.direct,
        share_rw=config.share_rw,
        lock=config.lock,
        block_size=config.block_size,
    )
    undo.callback(opened.close)
    if found := find_format(opened.fd, opened.size):
        log.warning("%s", describe(found, config.image))
    zones = None
    if config.zoned:
        zones = ZoneFile(opened, config.zoned, block_size=config.block_size, new=created)
        undo.callback(_remove, zones)
        undo.callback(zones.close)
    else:
        check_not_zoned(config.image)
    if config.socket_path:
        Listener.rehearse(config.socket_path, config.socket_mode, config.socket_group)
        return _Opened(opened, zones, None, created)
    listener = Listener.inherited(config.fd or 0)
    undo.callback(listener.close)
    return _Opened(opened, zones, listener, created)


def _disk(config: DiskConfig, opened: _Opened, server: Server) -> Disk:
    return Disk(
        opened.image,
        [server.workers[name] for name in config.io_threads],
        num_queues=config.num_queues,
        block_size=config.block_size,
        physical_block_size=config.physical_block_size,
        serial=config.serial,
        engine=config.engine,
        switches=config.features,
        zones=opened.zones,
    )


def _listen(config: DiskConfig, opened: _Opened, undo: contextlib.ExitStack) -> Listener:
    if opened.listener:
        return opened.listener
    assert config.socket_path
    listener = Listener.at(config.socket_path, config.socket_mode, config.socket_group)
    undo.callback(listener.close)
    return listener


def _create_if_missing(config: DiskConfig, undo: contextlib.ExitStack) -> bool:
    """Returns whether it was: a service has `create` at each start, and later starts leave the image as it is."""
    if config.create is None or config.image.exists():
        return False
    create_image(config.image, config.create)
    undo.callback(_remove, config.image)
    return True


def _report_created(config: DiskConfig, opened: _Opened) -> None:
    if opened.created:
        log.info("%s: created", config.image)
    elif config.create not in (None, opened.image.size):
        log.warning(
            "%s: exists with %d bytes, not the %d of create; it is served as it is",
            config.image, opened.image.size, config.create,
        )  # fmt: skip


def _remove(made: Path | ZoneFile) -> None:
    """Remove what was made; a process that has given up the right to do so leaves it, and reports the first error."""
    with contextlib.suppress(OSError):
        made.unlink()


def _io_threads(
    count: int, cpus: Sequence[Collection[int]], engine: str, poll_us: int | None, pin_memory: bool
) -> list[IoThread]:
    """Raises ValueError."""
    if engine not in ENGINES:
        raise ValueError(f"{engine!r} is not an engine; the engines are {', '.join(ENGINES)}")
    if len(cpus) not in (0, 1, count):
        raise ValueError(f"CPUs are given {len(cpus)} times; give them once, or once for each of {count} I/O threads")
    sets: Sequence[frozenset[int] | None] = [frozenset(each) for each in cpus] or [None]
    mine = engine if engine in THREAD_ENGINES else AUTO
    return [
        IoThread(f"ringplane-io-{number}", mine, sets[number % len(sets)], poll_us, pin_memory)
        for number in range(count)
    ]
