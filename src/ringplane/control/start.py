"""The start of a process that serves disks: everything is opened, made and loaded, and then the threads start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from ringplane.compiler.units import Unit
from ringplane.control.export import Export
from ringplane.control.handing_over import offer_successors
from ringplane.control.opening import (
    Parts,
    listen,
    listen_for_successors,
    open_parts,
    report_created,
    take_over_parts,
)
from ringplane.control.server import Server
from ringplane.control.taking_over import Predecessor
from ringplane.control.threads import Threads
from ringplane.dataplane.compile_data_plane import release_compiler, warm_up
from ringplane.dataplane.request_types import request_types_of, units_of_types
from ringplane.device.disk import Disk
from ringplane.engines.choose_engine import units_of
from ringplane.guest_memory.address_space import AddressSpace
from ringplane.options.declare import WrongOptions, taking
from ringplane.options.disk_config import DiskConfig, OneDisk, named
from ringplane.options.process_rules import check_process
from ringplane.options.thread_options import IoThread
from ringplane.system import procfs
from ringplane.system.signals import NONE, Signals
from ringplane.system.standard_fds import occupy

# See `serve_all`.
GiveUp = Callable[[Collection[Path]], None]


class _Serving(OneDisk):
    """What `serve` takes: the options of a disk, and what it has in common with `serve_all`."""

    upgradable: bool = False
    upgrade: bool = False
    give_up: GiveUp | None = None
    signals: Signals = NONE


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
    `upgrade`, and stops then (handover.py). `give_up`, `signals`: see `serve_all`.

    Raises ImageError, ListenError, HandoverError, ValueError for arguments that make no sense, or OSError when the
    kernel lacks what the data plane needs; nothing is left behind.
    """
    server = serve_all(
        [disk.config()],
        disk.threads(),
        upgradable=disk.upgradable,
        upgrade=disk.upgrade,
        give_up=disk.give_up,
        signals=disk.signals,
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
) -> Server:
    """Serve several disks on shared threads; like `serve` in all else. The server's `exports` are in their order.

    `give_up` is called when everything has been opened and loaded and no thread has begun yet, with the folders in
    which sockets are removed at the end: a program that is there for nothing else gives up its rights then. `signals`
    can interrupt the start: then it raises Interrupted, and nothing is left behind. They are woken up at the end.
    """
    occupy()
    if upgrade and any(config.socket_path is None for config in disks):
        raise WrongOptions("{upgrade} needs {socket_path}, by which the running process is found")
    check_process(disks, io_threads)
    disks = named(disks)
    procfs.warn_if_missing()
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as at_last:
        predecessor = at_last.enter_context(Predecessor(disks, signals)) if upgrade else None
        opened = []
        for index, config in enumerate(disks):
            signals.check()
            opened.append(
                take_over_parts(config, predecessor, index, undo) if predecessor else open_parts(config, undo, signals)
            )
        warm_up(_needed_units(opened, io_threads), signals)
        threads = Threads(io_threads)
        undo.callback(threads.end)
        threads.at_end.callback(signals.wake)
        space = AddressSpace(len(disks))
        served = [_disk(config, parts, threads) for config, parts in zip(disks, opened, strict=True)]
        # All code is loaded.
        release_compiler()
        # A process that has given up its rights can no longer remove what it has created.
        signals.check()
        # Front ends that connect from now on get an answer at once.
        listeners = [listen(config, parts, undo) for config, parts in zip(disks, opened, strict=True)]
        exports = [Export(*each, threads, space.quota()) for each in zip(disks, served, listeners, strict=True)]
        successors = listen_for_successors(disks, undo) if upgradable and not predecessor else None
        if give_up is not None:
            give_up({config.socket_path.parent for config in disks if config.socket_path})
        threads.start_io_threads()
        if predecessor:
            successors = predecessor.take(exports)
        threads.start(exports)
        undo.pop_all()
    for config, parts in zip(disks, opened, strict=True):
        report_created(config, parts.source)
    if successors:
        threads.at_end.callback(successors.close)
        threads.start_task(lambda: offer_successors(exports, successors))
    return Server(exports, threads)


def _needed_units(opened: Iterable[Parts], io_threads: Iterable[IoThread]) -> list[Unit]:
    """The units of this configuration."""
    units = [unit for thread in io_threads for unit in units_of(thread.engine)]
    for parts in opened:
        units += parts.source.units
        units += (unit for layer in parts.layers for unit in layer.units)
        units += units_of_types(request_types_of(parts.layers))
    return list(dict.fromkeys(units))


def _disk(config: DiskConfig, parts: Parts, threads: Threads) -> Disk:
    return Disk(parts.source, [threads.workers[name] for name in config.io_threads], config, parts.layers)
