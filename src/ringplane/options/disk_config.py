"""The options of a disk, put together, and the two descriptions of a disk that users give.

A layer or a source that has options declares them in a group of its own (declare.py has the form), and its group
becomes one of the bases of DiskOptions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ringplane.options.counted import counted
from ringplane.options.cpus import CPU_SETS
from ringplane.options.declare import Options, WrongOptions, option, values
from ringplane.options.delay_options import DelayOptions
from ringplane.options.device_options import DeviceOptions
from ringplane.options.engine_names import AUTO, ENGINES, THREAD_ENGINES
from ringplane.options.image_address import IMAGE, ImageAddress, RemoteImage, image_from
from ringplane.options.image_options import ImageOptions
from ringplane.options.kinds import NAMES, PATH, OneOf, Whole
from ringplane.options.limit_options import LimitOptions
from ringplane.options.name_options import NameOptions, default_names
from ringplane.options.nbd_options import NbdOptions
from ringplane.options.policy_options import PolicyOptions
from ringplane.options.record_options import RecordOptions
from ringplane.options.socket_options import SocketOptions
from ringplane.options.thread_options import IoThread, ThreadOptions
from ringplane.options.zone_options import ZoneOptions

MAX_THREADS = 64


class EngineOptions(Options):
    """How the bytes of a disk get to its storage."""

    engine: str = option(
        OneOf(*ENGINES),
        default=AUTO,
        help="I/O by io_uring or Linux AIO; memory: copies, for images on tmpfs; null: no I/O, for measurements.",
        doc='`"auto"`; `"memory"` (the image is on tmpfs or hugetlbfs, and the I/O thread copies the data); '
        '`"io_uring"`, `"aio"` (not `memory`; the engine of its I/O threads is used); `"null"` (nothing is read or '
        "written, for measurements)",
        doc_default='`"auto"`: `memory` if the image is in memory',
    )


class DiskOptions(
    RecordOptions,
    ZoneOptions,
    DelayOptions,
    PolicyOptions,
    LimitOptions,
    DeviceOptions,
    EngineOptions,
    NbdOptions,
    ImageOptions,
    SocketOptions,
    NameOptions,
):
    """All options that a disk has wherever it is described. A group comes before those whose options it needs."""


class DiskConfig(DiskOptions):
    """A disk to be served on named I/O threads.

    Queue `i` is served by thread `i`, counted from the start again when there are more queues than names. Raises
    ValueError unless the options fit together.
    """

    image: ImageAddress = option(
        IMAGE,
        kw_only=False,
        doc="the raw image file or block device, or the address of an image elsewhere ([remote.md](remote.md)); a "
        "relative path starts at the folder of the configuration file",
        doc_default="required",
    )
    io_threads: Sequence[str] = option(
        NAMES,
        kw_only=False,
        doc="names of the threads that serve its queues, see below",
        doc_default="all threads in turn",
    )
    socket_path: Path | None = option(
        PATH,
        default=None,
        doc="the UNIX socket to listen on; a relative path starts at the folder of the configuration file",
        doc_default="required",
    )

    def check(self) -> None:
        if self.nbd_reconnect_delay and getattr(self.image, "source", None) != "nbd":
            raise WrongOptions("{nbd_reconnect_delay} is for an image nbd://... or nbd+unix://...")
        if (self.socket_path is None) == (self.fd is None):
            raise WrongOptions("give either {socket_path} or {fd}")
        if self.fd is not None and (self.socket_mode, self.socket_group) != (None, None):
            raise WrongOptions("{socket_mode} and {socket_group} are for the socket of {socket_path}, not for {fd}")
        if not self.io_threads:
            raise WrongOptions("{io_threads}: names no I/O thread; name at least one")
        if len(self.io_threads) > self.num_queues:
            raise WrongOptions(
                "{io_threads}: names {threads} for {queues}; name at most one per queue",
                threads=counted(len(self.io_threads), "thread"),
                queues=counted(self.num_queues, "queue"),
            )


def named(disks: Iterable[DiskConfig]) -> list[DiskConfig]:
    """The same disks, each with a name."""
    disks = list(disks)
    names = default_names([disk.image for disk in disks], [disk.name for disk in disks])
    return [dataclasses.replace(disk, name=name) for disk, name in zip(disks, names, strict=True)]


class OwnThreads(ThreadOptions):
    """Equal I/O threads, as the command line describes them."""

    io_threads: int = option(Whole(1, MAX_THREADS), default=1, help="Number of I/O threads.")
    cpus: Sequence[Collection[int]] = option(
        CPU_SETS,
        default=(),
        several=tuple,
        help="CPUs of the I/O threads, for example 2-3 or 0,2; repeat it for the next I/O thread [default: all].",
    )

    def check(self) -> None:
        if len(self.cpus) not in (0, 1, self.io_threads):
            raise WrongOptions(
                "{cpus} is given {times} times; give it once, or once for each of {threads} I/O threads",
                times=len(self.cpus),
                threads=self.io_threads,
            )

    def threads(self, engine: str = AUTO) -> list[IoThread]:
        """With this engine."""
        sets: list[frozenset[int] | None] = [frozenset(each) for each in self.cpus] or [None]
        return [
            IoThread(f"ringplane-io-{number}", engine, sets[number % len(sets)], **values(self, ThreadOptions))
            for number in range(self.io_threads)
        ]


class OneDisk(DiskOptions, OwnThreads):
    """A disk that has its I/O threads for itself, as `ringplane.serve` and the command line describe it."""

    image_path: str | os.PathLike[str] | RemoteImage = option(
        IMAGE,
        kw_only=False,
        flags=("--image",),
        help="Raw image file or block device to serve, or the address of an image elsewhere (docs/remote.md).",
    )
    socket_path: str | os.PathLike[str] | None = option(
        PATH,
        kw_only=False,
        default=None,
        help="UNIX socket to listen on.",
    )

    def config(self) -> DiskConfig:
        path = None if self.socket_path is None else Path(self.socket_path)
        # More threads than queues have nothing to do.
        names = [thread.name for thread in self.own_threads()][: self.num_queues]
        return DiskConfig(image_from(self.image_path), names, socket_path=path, **values(self, DiskOptions))

    def own_threads(self) -> list[IoThread]:
        """Its I/O threads, with its engine."""
        return self.threads(self.engine if self.engine in THREAD_ENGINES else AUTO)
