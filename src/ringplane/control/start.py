"""What programs call to serve disks: one of them (`serve`), or several on shared threads (`serve_all`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

from ringplane.control.export import Export
from ringplane.control.planned import place
from ringplane.control.server import Server
from ringplane.control.start_steps import Process, start
from ringplane.options.declare import taking
from ringplane.options.disk_config import DiskConfig, OneDisk
from ringplane.options.thread_options import IoThread


class _One(OneDisk, Process):
    """What `serve` takes."""


class _Several(Process):
    """What `serve_all` takes."""

    disks: Sequence[DiskConfig] = field(kw_only=False)
    io_threads: Sequence[IoThread] = field(kw_only=False)


@taking(_One)
def serve(disk: _One) -> Export:
    """Serve a raw image or block device as a vhost-user-blk disk, in the background of this program.

    Give either `socket_path` to listen at, or `fd`, an inherited socket. The other keywords are the options of
    `ringplane serve` with the same names (docs/config.md), with these values: sizes are numbers of bytes, `socket_mode`
    and `socket_group` are numbers, `features` is a dictionary of names and booleans, `zoned` is a
    `ringplane.options.zone_options.ZoneModel`, and `poll_us` is None for an I/O thread that never sleeps. `cpus` are
    the CPUs of each I/O thread, or those of all if there is only one set. `direct` is a wish: where the file system
    refuses O_DIRECT the page cache is used, as the export's `disk.source.direct` shows.

    When this returns, front ends can connect. An `upgradable` disk can be taken over by another process, with
    `upgrade`, and stops then (handover.py). `give_up`, `signals`, `interface`, `metrics`, `opener`, `state`, `traced`,
    `trusted`: see `serve_all`.

    Raises ImageError, ListenError, HandoverError, StateError, ValueError for arguments that make no sense, or OSError
    when the kernel lacks what the data plane needs; nothing is left behind, except an empty `state` if there was none.
    """
    config = disk.config()
    exports = start([config], disk.own_threads(), disk, least=1).exports
    # Others were added at run time.
    return next(export for export in exports if place(export.config) == place(config))


@taking(_Several)
def serve_all(several: _Several) -> Server:
    """Serve several disks on shared threads; like `serve` in all else. The server's `exports` are in their order.

    `give_up` is called when everything has been opened and loaded and no thread has begun yet, with the folders in
    which sockets are removed at the end: a program that is there for nothing else gives up its rights then. `signals`
    can interrupt the start: then it raises Interrupted. They are woken up at the end. With
    an `interface` (ringplane/api/http.py) disks can be added and removed while the server runs: there need not be
    one at the start, and the server ends when it is stopped. `metrics` (ringplane/api/metrics_endpoint.py) are served
    as long as there is a disk or an interface. The `opener` opens files of disks that are added, which a program that
    has given up its rights cannot; it is closed at the end. What is changed while the server runs is kept in `state`
    for the next start: disks that were added are served then too, after `disks`, and those that were removed are not.
    With `traced`, `Server.trace` needs no rights either. Without `trusted`, a process that is taken over may name only
    such files of policies as a confined one can have.
    """
    least = 1 if several.interface is None else 0
    return start(several.disks, several.io_threads, several, least=least)
