"""A disk that is added to a running process: the checks of a start, and its steps, for one disk."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ringplane.control.changing import Changing
from ringplane.control.export import Export
from ringplane.control.limiting import Limiting
from ringplane.control.listener import Listener
from ringplane.control.needed_units import units_of_limits, units_of_parts
from ringplane.control.new_recording import new_recording
from ringplane.control.opening import Parts, listen, open_parts
from ringplane.control.operation_errors import STOPPING, WrongState
from ringplane.control.planned import Planned
from ringplane.control.spreading import spread
from ringplane.control.threads import Threads
from ringplane.dataplane.compile_data_plane import warm_up
from ringplane.device.disk import Disk
from ringplane.guest_memory.address_space import AddressSpace
from ringplane.log.event_bus import Events
from ringplane.opener.opener import LOCAL
from ringplane.options.disk_config import DiskConfig
from ringplane.options.process_rules import ProcessRules
from ringplane.system.confinement import is_confined

if TYPE_CHECKING:
    from ringplane.opener.remote_opener import RemoteOpener


# A disk, and what identifies its image (process_rules.py).
Other = tuple[DiskConfig, object]


class Adding:
    """Makes exports for a process with these threads."""

    def __init__(self, threads: Threads, events: Events, opener: RemoteOpener | None = None) -> None:
        """Without an `opener` this process opens files itself."""
        self._threads, self._events, self._opener = threads, events, opener
        self._space = AddressSpace()
        self._limiting = Limiting()
        self.changing = Changing()
        self._stopped = False

    def stop(self) -> None:
        """The process stops: nobody would remove the socket of a disk that is opened now. Any thread may call."""
        self._stopped = True

    def make_disk(self, config: DiskConfig, parts: Parts, undo: contextlib.ExitStack) -> Disk:
        """The device of a disk whose parts are open; `undo` closes these itself. Raises ImageError."""
        workers = [self._threads.workers[name] for name in config.io_threads]
        assert config.name is not None
        disk = Disk(parts.source, workers, config, parts.layers, self._events.of(config.name))
        undo.callback(disk.leave_workers)
        if config.limits:
            disk.prepare_limits()
        return disk

    def export(self, planned: Planned, disk: Disk, listener: Listener) -> Export:
        """What serves it."""
        return Export(
            planned,
            disk,
            listener,
            self._threads,
            self._space.quota(),
            self._limiting,
            self.changing,
            self._events.of(disk.name),
            lambda path: new_recording(path, planned.config, disk.source, self._opener),
            self._opener or LOCAL,
        )

    def spread(self, disks: Iterable[DiskConfig]) -> Sequence[str]:
        """The I/O threads of one more disk."""
        return spread(self._threads.io_threads, disks)

    def open(self, config: DiskConfig, others: Iterable[Other]) -> tuple[Export, contextlib.ExitStack]:
        """Open everything of a disk that is served beside these, and listen. It may block; nothing is left if it fails.

        Leaving the ExitStack closes or removes everything again; it may block too.
        Raises WrongOptions, ImageError, ListenError, OpenerEnded, OSError; and WrongState if the process may not, or
        stops meanwhile.
        """
        self._check(config, others)
        with contextlib.ExitStack() as undo:
            parts = open_parts(config, undo, opener=self._opener)
            for layer in parts.layers:
                layer.check_paths()
            if not is_confined():
                # All code was loaded before that (start.py).
                warm_up([*units_of_parts(parts), *units_of_limits([config])])
            disk = self.make_disk(config, parts, undo)
            if self._stopped:
                raise WrongState(*STOPPING)
            disk.start_threads()
            export = self.export(
                Planned(dataclasses.replace(config, record=None), added=True),
                disk,
                listen(config, parts, undo, self._opener),
            )
            return export, undo.pop_all()

    def _check(self, config: DiskConfig, others: Iterable[Other]) -> None:
        """Raises WrongOptions, WrongState."""
        if is_confined() and self._opener is None:
            raise WrongState(
                "this process may not open files any more, so no disk can be added",
                "image",
                "start ringplane with --allow-folder FOLDER, which allows disks whose images and sockets are below it, "
                "or with this disk",
            )
        rules = ProcessRules()
        for thread in self._threads.io_threads:
            rules.add_thread(thread)
        for other, image in others:
            rules.add_disk(f"disk {other.name}", other, image)
        for error in rules.add_disk("the new disk", config):
            raise error
