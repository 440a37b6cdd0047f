"""The start of a process that serves disks: everything is opened, made and loaded, and then the threads start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ringplane.block.layers.zoned import ZonedPart
from ringplane.block.sources.choose import kind_of_source
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
from ringplane.dataplane import zone_requests
from ringplane.dataplane.warm import warm_up
from ringplane.device.disk import Disk
from ringplane.engines.choose import units_of
from ringplane.guest_memory.address_space import AddressSpace
from ringplane.options.disk_config import DiskConfig
from ringplane.options.engines import AUTO, ENGINES, THREAD_ENGINES
from ringplane.options.io_thread import POLL_US, IoThread
from ringplane.options.values import LOCK_AUTO, MAX_QUEUES, ZoneModel
from ringplane.system import procfs
from ringplane.system.signals import NONE, Signals
from ringplane.system.standard_fds import occupy

# See `serve_all`.
GiveUp = Callable[[Collection[Path]], None]


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
    threads = make_io_threads(io_threads, cpus, engine, poll_us, pin_memory)
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
    _check_names(disks, [thread.name for thread in io_threads])
    procfs.warn_if_missing()
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as at_last:
        predecessor = at_last.enter_context(Predecessor(disks, signals)) if upgrade else None
        opened = []
        for index, config in enumerate(disks):
            signals.check()
            opened.append(
                take_over_parts(config, predecessor, index, undo) if predecessor else open_parts(config, undo)
            )
        warm_up(_needed_units(disks, opened, io_threads), signals)
        threads = Threads(io_threads)
        undo.callback(threads.end)
        threads.at_end.callback(signals.wake)
        space = AddressSpace(len(disks))
        served = [_disk(config, parts, threads) for config, parts in zip(disks, opened, strict=True)]
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
        report_created(config, parts)
    if successors:
        threads.at_end.callback(successors.close)
        threads.start_task(lambda: offer_successors(exports, successors))
    return Server(exports, threads)


def _needed_units(disks: Iterable[DiskConfig], opened: Iterable[Parts], io_threads: Iterable[IoThread]) -> list[Unit]:
    """The units of this configuration. Raises ImageError."""
    units = [unit for thread in io_threads for unit in units_of(thread.engine)]
    for config, parts in zip(disks, opened, strict=True):
        units += kind_of_source(parts.image, config.engine).units
        units += (*ZonedPart.units, *zone_requests.UNITS) if parts.zones else ()
    return list(dict.fromkeys(units))


def _check_names(disks: Sequence[DiskConfig], names: Sequence[str]) -> None:
    """Raises ValueError."""
    if len(set(names)) < len(names):
        raise ValueError(f"two of the I/O threads {names} have the same name")
    for config in disks:
        if not config.io_threads or not set(config.io_threads) <= set(names):
            raise ValueError(f"{config.image}: {list(config.io_threads)} are not among the I/O threads {names}")


def _disk(config: DiskConfig, parts: Parts, threads: Threads) -> Disk:
    return Disk(
        parts.image,
        [threads.workers[name] for name in config.io_threads],
        num_queues=config.num_queues,
        block_size=config.block_size,
        physical_block_size=config.physical_block_size,
        serial=config.serial,
        engine=config.engine,
        switches=config.features,
        zones=parts.zones,
    )


def make_io_threads(
    count: int, cpus: Sequence[Collection[int]], engine: str, poll_us: int | None, pin_memory: bool
) -> list[IoThread]:
    """The I/O threads of a single disk. Raises ValueError."""
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
