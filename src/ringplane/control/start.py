"""The start of a process that serves disks: everything is opened, made and loaded, and then the threads start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ringplane.block.storage_limits import SYSFS, physical_block_below
from ringplane.control.adding import Adding
from ringplane.control.changes import Changes, plan
from ringplane.control.export import Export
from ringplane.control.handing_over import offer_successors
from ringplane.control.needed_units import units_of_any_disk, units_of_limits, units_of_parts, units_of_threads
from ringplane.control.opening import (
    Parts,
    listen,
    listen_for_successors,
    open_parts,
    report_created,
    take_over_parts,
)
from ringplane.control.planned import Planned, place
from ringplane.control.server import Server
from ringplane.control.threads import Threads
from ringplane.dataplane import tracer
from ringplane.dataplane.compile_data_plane import release_compiler, warm_up
from ringplane.dataplane.trace_events import load_tracing
from ringplane.log.event_bus import Events
from ringplane.opener.opener import LOCAL
from ringplane.options.declare import WrongOptions, taking
from ringplane.options.disk_config import DiskConfig, OneDisk
from ringplane.options.process_rules import check_process
from ringplane.options.thread_options import IoThread
from ringplane.system import procfs
from ringplane.system.signals import NONE, Signals
from ringplane.system.standard_fds import occupy
from ringplane.vhost_user.peers import gone

if TYPE_CHECKING:
    from ringplane.control.interface import Endpoint, Interface
    from ringplane.control.keeping import Keeping
    from ringplane.control.restoring import Restoring
    from ringplane.control.state_file import StateFile
    from ringplane.control.taking_over import Predecessor
    from ringplane.opener.remote_opener import RemoteOpener


class GiveUp(Protocol):
    """See `serve_all`."""

    def __call__(self, removing_in: Collection[Path], exchanging_in: Path | None = None, /) -> None: ...


class _Serving(OneDisk):
    """What `serve` takes: the options of a disk, and what it has in common with `serve_all`."""

    upgradable: bool = False
    upgrade: bool = False
    give_up: GiveUp | None = None
    signals: Signals = NONE
    interface: Interface | None = None
    metrics: Endpoint | None = None
    state: StateFile | None = None


@taking(_Serving)
def serve(disk: _Serving) -> Export:
    """Serve a raw image or block device as a vhost-user-blk disk, in the background of this program.

    Give either `socket_path` to listen at, or `fd`, an inherited socket. The other keywords are the options of
    `ringplane serve` with the same names (docs/config.md), with these values: sizes are numbers of bytes, `socket_mode`
    and `socket_group` are numbers, `features` is a dictionary of names and booleans, `zoned` is a
    `ringplane.options.zone_options.ZoneModel`, and `poll_us` is None for an I/O thread that never sleeps. `cpus` are
    the CPUs of each I/O thread, or those of all if there is only one set. `direct` is a wish: where the file system
    refuses O_DIRECT the page cache is used, as the export's `disk.source.direct` shows.

    When this returns, front ends can connect. An `upgradable` disk can be taken over by another process, with
    `upgrade`, and stops then (handover.py). `give_up`, `signals`, `interface`, `metrics`, `state`: see
    `serve_all`.

    Raises ImageError, ListenError, HandoverError, ValueError for arguments that make no sense, or OSError when the
    kernel lacks what the data plane needs; nothing is left behind.
    """
    server = serve_all(
        [disk.config()],
        disk.own_threads(),
        upgradable=disk.upgradable,
        upgrade=disk.upgrade,
        give_up=disk.give_up,
        signals=disk.signals,
        interface=disk.interface,
        metrics=disk.metrics,
        state=disk.state,
    )
    return server.exports[0]


def serve_all(
    disks: Sequence[DiskConfig],
    io_threads: Sequence[IoThread],
    *,
    upgradable: bool = False,
    upgrade: bool = False,
    give_up: GiveUp | None = None,
    signals: Signals = NONE,
    interface: Interface | None = None,
    metrics: Endpoint | None = None,
    opener: RemoteOpener | None = None,
    traced: bool = False,
    state: StateFile | None = None,
) -> Server:
    """Serve several disks on shared threads; like `serve` in all else. The server's `exports` are in their order.

    `give_up` is called when everything has been opened and loaded and no thread has begun yet, with the folders in
    which sockets are removed at the end: a program that is there for nothing else gives up its rights then. `signals`
    can interrupt the start: then it raises Interrupted, and nothing is left behind. They are woken up at the end. With
    an `interface` (ringplane/api/http.py) disks can be added and removed while the server runs: there need not be
    one at the start, and the server ends when it is stopped. `metrics` (ringplane/api/metrics_endpoint.py) are served
    as long as there is a disk or an interface. The `opener` opens files of disks that are added, which a program that
    has given up its rights cannot; it is closed at the end. What is changed while the server runs is kept in `state`
    for the next start: disks that were added are served then too, after `disks`. With `traced`, `Server.trace` needs no
    rights either.
    """
    occupy()
    if upgrade and any(config.socket_path is None for config in disks):
        raise WrongOptions("{upgrade} needs {socket_path}, by which the running process is found")
    if state is not None and any(config.socket_path is None for config in disks):
        raise WrongOptions("{state} needs {socket_path}, by which the disk is recognised")
    check_process(disks, io_threads, none=interface is not None)
    procfs.warn_if_missing()
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as at_last:
        if opener is not None:
            undo.callback(opener.close)
        interface_path = interface.path if interface is not None else None
        described = [config.socket_path for config in disks if config.socket_path is not None]
        ours = [*([interface_path] if interface_path is not None else []), *described]
        predecessor = at_last.enter_context(_predecessor(ours, signals)) if upgrade else None
        restoring = None
        if state is not None:
            undo.callback(state.close)
            state.open(predecessor.state if predecessor else None)
            restoring = _restoring(state, opener) if predecessor is None else None
        planned = _plan(disks, io_threads, predecessor, restoring, none=interface is not None)
        if interface is not None:
            inherited = predecessor.interface_listener(interface.path) if predecessor else None
            if inherited is not None:
                undo.callback(inherited.close)
            interface.prepare(inherited)
        if metrics is not None:
            metrics.prepare(predecessor.metrics_socket(metrics.options.listen) if predecessor else None)
            undo.callback(metrics.close)
        opens_some = any(each.added for each in planned)
        if opener is not None and opens_some:
            opener.wait_until_ready(signals)
        found = []
        for index, each in enumerate(planned):
            signals.check()
            parts: Parts | None
            if predecessor:
                # Its other files are opened as when it was added.
                opens = opener if each.added and opener is not None else LOCAL
                parts = take_over_parts(each.config, predecessor, index, undo, opens)
            elif restoring is not None and each.added:
                parts = restoring.open(each.config, undo, signals)
            else:
                parts = open_parts(each.config, undo, signals)
            if parts is not None:
                found.append((each, parts))
        planned, opened = [each for each, _ in found], [parts for _, parts in found]
        configs = [each.config for each in planned]
        if restoring is not None:
            restoring.report()
        units = [*units_of_threads(io_threads), *units_of_limits(configs)]
        for parts in opened:
            units += units_of_parts(parts)
        if interface is not None:
            units += units_of_any_disk()
        elif traced:
            units += tracer.UNITS
        warm_up(dict.fromkeys(units), signals)
        threads = Threads(io_threads)
        undo.callback(threads.end)
        threads.at_end.callback(signals.wake)
        if opener is not None:
            threads.at_end.callback(opener.close)
            if not opens_some:
                opener.wait_until_ready(signals)
        if state is not None:
            threads.at_end.callback(state.close)
        if traced:
            load_tracing()
        events = Events()
        adding = Adding(threads, events, opener)
        served = [adding.make_disk(*each) for each in zip(configs, opened, strict=True)]
        if interface is not None:
            _prepare_for_more(threads, opener.folders if opener is not None else ())
        # All code is loaded.
        release_compiler()
        # A process that has given up its rights can no longer remove what it has created.
        signals.check()
        # Front ends that connect from now on get an answer at once.
        listeners = [listen(each.config, parts, undo, opener if each.added else None) for each, parts in found]
        exports = list(map(adding.export, planned, served, listeners))
        server = Server(exports, threads, adding, events, [place(config) for config in disks])
        for export in server.exports:
            export.apply_limits()
        if interface is not None:
            server.interface = interface
            interface.open(server)
            undo.callback(interface.close)
        if metrics is not None:
            server.metrics = metrics
            metrics.open(server)
            threads.at_end.callback(metrics.close)
        successors = listen_for_successors(ours[0], undo) if upgradable and ours and not predecessor else None
        keeping = _keeping(server, state) if state is not None else None
        server.state = state
        if restoring is not None and keeping is not None:
            keeping.store_at_start()
        if give_up is not None:
            added = [each.config.socket_path for each in planned if each.added]
            folders = {path.parent for path in [*ours, *_removable(added, opener)]}
            give_up(folders, *([state.folder] if state is not None else []))
        if restoring is not None and keeping is not None:
            # Also with the rights that are left.
            keeping.store_at_start()
        threads.start_io_threads()
        if predecessor:
            successors = predecessor.take(server.exports, events, interface.listener if interface else None)
            events.emit("upgraded", previous_process=predecessor.pid)
        if keeping is not None:
            adding.changing.store = keeping.store
        threads.start([*server.exports, *([interface] if interface is not None else [])])
        undo.pop_all()
    if metrics is not None:
        threads.start_task(metrics.run)
    for config, parts in zip(configs, opened, strict=True):
        report_created(config, parts.source)
    if opener is not None:
        threads.start_task(partial(_report_end, opener))
    if keeping is not None and predecessor:
        threads.start_task(keeping.store_now)
    if successors:
        threads.at_end.callback(successors.close)
        threads.start_task(lambda: offer_successors(server, successors))
    return server


# Modules that few processes need: each takes memory.


def _predecessor(sockets: Sequence[Path], signals: Signals) -> Predecessor:
    from ringplane.control.taking_over import Predecessor

    return Predecessor(sockets, signals)


def _restoring(state: StateFile, opener: RemoteOpener | None) -> Restoring:
    from ringplane.control.restoring import Restoring

    return Restoring(state, opener)


def _keeping(server: Server, state: StateFile) -> Keeping:
    from ringplane.control.keeping import Keeping

    return Keeping(server, state)


def _plan(
    disks: Sequence[DiskConfig],
    io_threads: Sequence[IoThread],
    predecessor: Predecessor | None,
    restoring: Restoring | None,
    *,
    none: bool,
) -> list[Planned]:
    """The disks that are to be served. Raises WrongOptions, HandoverError."""
    if restoring is not None:
        return restoring.plan(disks, io_threads)
    planned = plan(disks, predecessor.changes if predecessor else Changes(), io_threads)
    if predecessor:
        check_process([each.config for each in planned], io_threads, none=none)
        predecessor.match(planned)
    return planned


def _removable(sockets: Iterable[Path | None], opener: RemoteOpener | None) -> Iterator[Path]:
    """Those of added disks that a confined process may remove at the end: below the folders for such disks."""
    return (path for path in sockets if path is not None and opener is not None and opener.allows(path))


async def _report_end(opener: RemoteOpener) -> None:
    """Log the end of the process that opens files when it happens."""
    await gone(opener.sock)
    opener.report_end()


def _prepare_for_more(threads: Threads, folders: Iterable[Path]) -> None:
    """Load what disks that are added later need, and find out what they ask the system: a confined process cannot."""
    procfs.boot_id()
    for folder in folders:
        physical_block_below(os.stat(folder).st_dev, SYSFS)
    for unit in units_of_any_disk():
        unit.address()
    for worker in threads.workers.values():
        worker.prepare_to_share()
