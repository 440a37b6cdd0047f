"""The start of a process that has a state (state_file.py): what of it can be used, and a line for all that cannot.

What the process is started with is always served, or nothing is. What was added at run time is served as far as that is
possible: one image that has gone must not stop all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence

from ringplane.block.image import ImageError
from ringplane.control.changes import Changes, described, planned, read_added
from ringplane.control.listener import ListenError, remove_stale
from ringplane.control.opening import Parts, open_parts
from ringplane.control.planned import Planned, place
from ringplane.control.state_file import StateFile
from ringplane.opener.opener import OpenerEnded
from ringplane.opener.remote_opener import RemoteOpener
from ringplane.options.declare import WrongOptions, dashed
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import RemoteImage
from ringplane.options.limit_options import Limits, check_limits
from ringplane.options.process_rules import ProcessRules
from ringplane.options.thread_options import IoThread
from ringplane.system.notes import in_words
from ringplane.system.signals import Signals

log = logging.getLogger(__name__)


class Restoring:
    """What a process restores."""

    def __init__(self, state: StateFile, opener: RemoteOpener | None) -> None:
        self._state, self._opener = state, opener
        self._problems: list[str] = []

    def plan(self, disks: Sequence[DiskConfig], io_threads: Sequence[IoThread]) -> list[Planned]:
        """The disks that are to be served. Raises WrongOptions if those that are described do not fit together."""
        changes = self._read()
        changes = dataclasses.replace(changes, limits=self._usable(changes.limits))
        configs, rules = described(disks, changes), ProcessRules()
        for thread in io_threads:
            rules.add_thread(thread)
        for config in configs:
            for error in rules.add_disk(str(config.image), config):
                raise error.of(f"{config.image}: ")
        count, places = len(configs), set(map(place, configs))
        for table in changes.added:
            try:
                config = read_added(table, changes, io_threads, configs)
                if place(config) in places:
                    continue
                for error in rules.add_disk(f"disk {config.name}", config):
                    raise error
                configs.append(config)
            except WrongOptions as error:
                self._note(str(table.get("name")), error.spelled(dashed))
        return planned(configs, count, changes)

    def _read(self) -> Changes:
        try:
            return self._state.read()
        except ValueError as error:
            self._problems.append(f"{self._state.path}: {error}; what was changed at run time is lost")
            return Changes()

    def _usable(self, limits: Mapping[str, Limits]) -> dict[str, Limits]:
        usable = {}
        for where, each in limits.items():
            try:
                check_limits(each)
                usable[where] = each
            except ValueError as error:
                self._problems.append(f"{where}: its limits are not restored: {error}")
        return usable

    def open(self, config: DiskConfig, undo: contextlib.ExitStack, signals: Signals) -> Parts | None:
        """Open a disk that was added; None, and nothing is left of it, if that is impossible. Raises Interrupted."""
        with contextlib.ExitStack() as own:
            try:
                self._check_allowed(config)
                parts = open_parts(config, own, signals, self._opener)
                if self._opener is not None:
                    assert config.socket_path is not None
                    remove_stale(config.socket_path)
            except (ImageError, ListenError, OpenerEnded) as error:
                self._note(str(config.name), str(error))
                return None
            except OSError as error:
                self._note(str(config.name), in_words(error))
                return None
            undo.enter_context(own.pop_all())
        return parts

    def _check_allowed(self, config: DiskConfig) -> None:
        """A confined process writes the state, so it may not name files that this process alone can open.

        Raises ImageError.
        """
        assert config.socket_path is not None
        if self._opener is not None:
            for place in (config.image, config.socket_path):
                if isinstance(place, RemoteImage) or not self._opener.allows(place):
                    raise ImageError(f"{place}: is not below a folder of --allow-folder")
        elif not self._state.trusted:
            raise ImageError(f"{config.image}: is not below a folder of --allow-folder, because there is none")

    def _note(self, name: str, problem: str) -> None:
        self._problems.append(f"{name}: was added at run time and is not served any more: {problem}")

    def report(self) -> None:
        """Log what cannot be used, and keep a copy of it, before the state is written again. Raises StateError."""
        for problem in self._problems:
            log.warning("%s", problem)
        if self._problems:
            log.warning("the state as it was is kept as %s", self._state.keep())
