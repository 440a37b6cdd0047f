"""The start of a process that serves disks: everything is opened, made and loaded, and then the threads start.

A step may fail, or a signal may interrupt it. Then nothing of the steps before it is left. What they have made belongs
to one of these, which are closed in this order:

    origin      as soon as the start has succeeded or failed: guests of a process that still serves do not wait longer
    undo        if the start fails: the disks (each has a stack of its own, because others may be served without it),
                the interface and the threads; otherwise these end by themselves
    at_end      when the process has ended, also if its start fails: the opener, the state, the sockets of metrics and
                of successors
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ringplane.block.image import ImageError, NoAnswer
from ringplane.block.sources.choose_source import reach
from ringplane.block.storage_limits import SYSFS, physical_block_below
from ringplane.control.adding import Adding
from ringplane.control.handing_over import offer_successors
from ringplane.control.needed_units import (
    units_of_any_disk,
    units_of_limits,
    units_of_metrics,
    units_of_parts,
    units_of_threads,
)
from ringplane.control.opening import report_created
from ringplane.control.origin import Origin
from ringplane.control.planned import Planned, place
from ringplane.control.server import Server
from ringplane.control.starting_disk import StartingDisk
from ringplane.control.threads import Threads
from ringplane.dataplane import tracer
from ringplane.dataplane.compile_data_plane import release_compiler, warm_up
from ringplane.dataplane.trace_events import load_tracing
from ringplane.log.event_bus import Events
from ringplane.options.declare import Options, WrongOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import load_schemes
from ringplane.options.process_rules import check_process
from ringplane.options.thread_options import IoThread
from ringplane.system import libc, procfs
from ringplane.system.signals import NONE, Signals
from ringplane.system.standard_fds import occupy
from ringplane.vhost_user.peers import gone

if TYPE_CHECKING:
    from ringplane.control.interface import Endpoint, Interface
    from ringplane.control.state_file import StateFile
    from ringplane.opener.remote_opener import RemoteOpener

log = logging.getLogger(__name__)

REMOVED = "{socket_path}: the disk at {path} was removed at run time"
REMOVED_BEFORE = f"{REMOVED} from the running process; add it there again, or serve it without {{upgrade}}"
REMOVED_IN_STATE = f"{REMOVED}, according to {{state}}; use another file there, or remove this one"


class GiveUp(Protocol):
    """See `serve_all`."""

    def __call__(self, removing_in: Collection[Path], exchanging_in: Path | None = None, /) -> None: ...


class Process(Options):
    """What a process has beside its disks and I/O threads; `serve_all` (start.py) describes it."""

    upgradable: bool = False
    upgrade: bool = False
    give_up: GiveUp | None = None
    signals: Signals = NONE
    interface: Interface | None = None
    metrics: Endpoint | None = None
    opener: RemoteOpener | None = None
    state: StateFile | None = None
    traced: bool = False
    trusted: bool = True


def start(disks: Sequence[DiskConfig], io_threads: Sequence[IoThread], process: Process, *, least: int) -> Server:
    """Serve these disks, but for those that were removed at run time; `least` have to be left.

    If this raises, nothing is left behind.
    """
    with contextlib.ExitStack() as undo:
        steps = Start(disks, io_threads, process, least, undo)
        steps.check()
        with steps.origin() as origin:
            server = steps.run(origin)
        undo.pop_all()
    return server


class Start:
    """The steps of a start."""

    def __init__(
        self,
        disks: Sequence[DiskConfig],
        io_threads: Sequence[IoThread],
        process: Process,
        least: int,
        undo: contextlib.ExitStack,
    ) -> None:
        self._disks, self._io_threads, self._least, self._undo = disks, io_threads, least, undo
        self._process, self._signals = process, process.signals
        self._interface, self._metrics, self._state = process.interface, process.metrics, process.state
        self._opener = process.opener
        self._starting: list[StartingDisk] = []
        self._at_end = undo.enter_context(contextlib.ExitStack())
        self._at_end.callback(self._signals.wake)
        if self._opener is not None:
            self._at_end.callback(self._opener.close)

    def check(self) -> None:
        """Raises WrongOptions for what does not fit together."""
        occupy()
        if self._process.upgrade and any(config.socket_path is None for config in self._disks):
            raise WrongOptions("{upgrade} needs {socket_path}, by which the running process is found")
        if self._state is not None and any(config.socket_path is None for config in self._disks):
            raise WrongOptions("{state} needs {socket_path}, by which the disk is recognised")
        check_process(self._disks, self._io_threads, least=self._least)
        procfs.warn_if_missing()

    def origin(self) -> Origin:
        """What this process begins with. Raises HandoverError, Interrupted."""
        allows = partial(_allows, self._opener)
        # Modules that few processes need: each takes memory.
        if self._process.upgrade:
            from ringplane.control.taking_over import Predecessor

            return Predecessor(self._sockets, self._signals, allows, trusted=self._process.trusted)
        if self._state is not None:
            from ringplane.control.restoring import Restoring

            return Restoring(self._state, self._signals, allows)
        return Origin(self._signals)

    @property
    def _sockets(self) -> list[Path]:
        """Those that are described. A process is found by the first one."""
        disks = [config.socket_path for config in self._disks if config.socket_path is not None]
        return disks if self._interface is None else [self._interface.path, *disks]

    def run(self, origin: Origin) -> Server:
        """All that comes then."""
        self._open_state(origin)
        planned = self._plan(origin)
        self._prepare_sockets(origin)
        self._reach_servers(origin)
        self._open(planned, origin)
        self._compile()
        threads = self._make_threads()
        server = self._make_server(threads, origin)
        self._open_sockets(server)
        self._listen_for_successors(server, origin)
        self._keep_changes(server)
        self._give_up_rights(server, origin)
        self._start_threads(server)
        origin.take(server)
        self._begin(server)
        return server

    def _open_state(self, origin: Origin) -> None:
        origin.check_state(self._state.path if self._state is not None else None)
        if self._state is not None:
            self._at_end.callback(self._state.close)
            self._state.open(origin.state)
            self._undo.callback(self._state.remove_created)

    def _reach_servers(self, origin: Origin) -> None:
        """Those whose images can be added later; one that does not answer, or rejects us, must not stop the others."""
        for server in self._interface.options.allow_servers if self._interface is not None else ():
            try:
                self._at_end.callback(reach(server, self._signals))
            except NoAnswer as error:
                origin.silent.add(server.server)
                log.warning("%s; to add disks there, restart ringplane when it answers", error)
            except ImageError as error:
                log.warning("%s; to add disks there, restart ringplane when this is mended", error)

    def _plan(self, origin: Origin) -> list[Planned]:
        planned = origin.plan(self._disks, self._io_threads)
        served = {place(each.config) for each in planned}
        removed = [disk for disk in self._disks if place(disk) not in served]
        if len(self._disks) - len(removed) < self._least:
            sentence = REMOVED_BEFORE if self._process.upgrade else REMOVED_IN_STATE
            raise WrongOptions(sentence, path=removed[0].socket_path)
        for disk in removed:
            log.info("%s: not served, because this disk was removed at run time", disk.socket_path)
        return planned

    def _prepare_sockets(self, origin: Origin) -> None:
        """Find out whether it will be possible to listen, before anything is created."""
        if self._interface is not None:
            inherited = origin.interface_listener(self._interface.path)
            if inherited is not None:
                self._undo.callback(inherited.close)
            self._interface.prepare(inherited)
        if self._metrics is not None:
            self._metrics.prepare(origin.metrics_socket(self._metrics.options.listen))
            self._at_end.callback(self._metrics.close)

    def _open(self, planned: Iterable[Planned], origin: Origin) -> None:
        """Open or create all disks."""
        for number, each in enumerate(planned):
            undo = self._undo.enter_context(contextlib.ExitStack())
            self._starting.append(StartingDisk(number, each, undo, self._opener_of(each)))
        self._attempt(origin, lambda disk: disk.open(origin))

    def _attempt(self, origin: Origin, step: Callable[[StartingDisk], object]) -> None:
        """Do this for all disks; those with which it fails, and which others are served without, are left out."""
        for each in tuple(self._starting):
            self._signals.check()
            if not origin.attempt(each.planned, partial(step, each)):
                self._starting.remove(each)
                each.undo.close()

    def _opener_of(self, planned: Planned) -> RemoteOpener | None:
        """What opens the files of a disk; None: this process. Those of a disk that was added are opened as then."""
        if self._opener is None or not planned.added:
            return None
        self._opener.wait_until_ready(self._signals)
        return self._opener

    def _compile(self) -> None:
        configs = [each.planned.config for each in self._starting]
        units = [*units_of_threads(self._io_threads), *units_of_limits(configs)]
        for each in self._starting:
            units += units_of_parts(each.parts)
        if self._interface is not None:
            units += units_of_any_disk()
        elif self._process.traced:
            units += tracer.UNITS
        if self._metrics is not None:
            units += units_of_metrics()
        warm_up(dict.fromkeys(units), self._signals)

    def _make_threads(self) -> Threads:
        """None of them runs yet."""
        threads = Threads(self._io_threads, self._at_end)
        self._undo.callback(threads.end)
        if self._opener is not None:
            self._opener.wait_until_ready(self._signals)
            threads.start_task(partial(_report_end, self._opener))
        return threads

    def _make_server(self, threads: Threads, origin: Origin) -> Server:
        events = Events()
        adding = Adding(threads, events, self._opener)
        self._attempt(origin, lambda disk: disk.make(adding))
        self._load_rest(threads)
        # What is created from now on cannot be removed after rights have been given up.
        self._signals.check()
        self._attempt(origin, lambda disk: disk.listen(adding))
        origin.report()
        exports = [each.export for each in self._starting]
        server = Server(exports, threads, adding, events, [place(config) for config in self._disks])
        server.interface, server.metrics, server.state = self._interface, self._metrics, self._state
        server.unserved, server.unserved_because = origin.unserved, origin.unserved_because
        for export in exports:
            export.apply_limits()
        return server

    def _load_rest(self, threads: Threads) -> None:
        """All code that is used later is loaded now."""
        if self._process.traced:
            load_tracing()
        if self._interface is not None:
            _prepare_for_more(threads, self._opener.folders if self._opener is not None else ())
        release_compiler()
        libc.trim_heap()

    def _open_sockets(self, server: Server) -> None:
        """Those of interface and metrics."""
        if self._interface is not None:
            self._interface.open(server)
            self._undo.callback(self._interface.close)
        if self._metrics is not None:
            self._metrics.open(server)
            server.threads.start_task(self._metrics.run)

    def _listen_for_successors(self, server: Server, origin: Origin) -> None:
        if not self._sockets or not (self._process.upgradable or self._process.upgrade):
            return
        listener = server.successors = origin.successors(self._sockets[0], self._at_end)
        if listener is not None:
            server.threads.start_task(lambda: offer_successors(server, listener))

    def _keep_changes(self, server: Server) -> None:
        if self._state is None:
            return
        # Few processes need it.
        from ringplane.control.keeping import Keeping

        keeping = Keeping(server, self._state)
        server.changing.store = keeping.store
        if self._process.upgrade:
            # Not before: until then it is the other process that stores there.
            server.threads.start_task(keeping.store_now)

    def _give_up_rights(self, server: Server, origin: Origin) -> None:
        origin.store(server)
        if self._process.give_up is None:
            return
        added = (export.config.socket_path for export in server.exports if export.added)
        folders = {path.parent for path in [*self._sockets, *_removable(added, self._opener)]}
        self._process.give_up(folders, *([self._state.folder] if self._state is not None else []))
        # Also with the rights that are left.
        origin.store(server)

    def _start_threads(self, server: Server) -> None:
        """All that will ever serve: if one cannot be started, a running process has not let go of its disks yet."""
        server.threads.start()
        for export in server.exports:
            export.disk.start_threads()
        for endpoint in server.endpoints:
            endpoint.start()

    def _begin(self, server: Server) -> None:
        for export in server.exports:
            report_created(export.config, export.disk.source)
        server.threads.begin([*server.exports, *([self._interface] if self._interface is not None else [])])


def _allows(opener: RemoteOpener | None, path: Path) -> bool:
    """Whether a file of policies may be read that is not described."""
    return opener is not None and opener.allows(path)


def _removable(sockets: Iterable[Path | None], opener: RemoteOpener | None) -> Iterator[Path]:
    """Those of added disks that a confined process may remove at the end: below the folders for such disks."""
    return (path for path in sockets if path is not None and opener is not None and opener.allows(path))


async def _report_end(opener: RemoteOpener) -> None:
    """Log the end of the process that opens files when it happens."""
    await gone(opener.sock)
    opener.report_end()


def _prepare_for_more(threads: Threads, folders: Iterable[Path]) -> None:
    """Load what disks that are added later need, and find out what they ask the system: a confined process cannot."""
    from ringplane.block.layers import recording_file  # noqa: F401
    from ringplane.control import policing  # noqa: F401
    from ringplane.limits import limiter  # noqa: F401

    load_schemes()
    procfs.boot_id()
    for folder in folders:
        physical_block_below(os.stat(folder).st_dev, SYSFS)
    for unit in units_of_any_disk():
        unit.address()
    for worker in threads.workers.values():
        worker.prepare_to_share()
