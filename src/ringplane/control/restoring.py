"""The start of a process that has a state (state_file.py): what of it can be used, and a line for all that cannot.

What the process is started with is always served, or nothing is. What was added at run time is served as far as that is
possible: one image that has gone must not stop all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ringplane.block.image import ImageError, NoAnswer
from ringplane.block.layers.policy_layer import load_policies
from ringplane.control.allowed_policies import AllowedPolicies, none
from ringplane.control.changes import Changes, Table, plan
from ringplane.control.listener import ListenError, remove_stale
from ringplane.control.not_served import ADVICE
from ringplane.control.opening import Parts, open_parts
from ringplane.control.origin import Origin
from ringplane.control.planned import Planned, place
from ringplane.control.present_changes import changes_of, table_of
from ringplane.control.server import Server
from ringplane.control.state_file import StateFile
from ringplane.opener.opener import OpenerEnded
from ringplane.opener.remote_opener import RemoteOpener
from ringplane.options.declare import WrongOptions, dashed
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import ImageAddress, RemoteImage
from ringplane.options.limit_options import Limits, check_limits
from ringplane.options.policy_options import PolicyUse, policies_from_tables
from ringplane.options.thread_options import IoThread
from ringplane.system.notes import in_words
from ringplane.system.signals import NONE, Signals

log = logging.getLogger(__name__)


class Restoring(Origin):
    """What a process restores; an Origin."""

    def __init__(self, state: StateFile, signals: Signals = NONE, allows: Callable[[Path], bool] = none) -> None:
        """`allows`: which files of policies may be read, beside those of disks that are described."""
        super().__init__(signals)
        self._state, self._allows = state, allows
        # Of what is lost, and of what is kept for the next start.
        self._problems: list[str] = []
        self._kept: list[str] = []

    def plan(self, disks: Sequence[DiskConfig], io_threads: Sequence[IoThread]) -> list[Planned]:
        """See Origin."""
        changes = self._read()
        self._policies = AllowedPolicies(disks, self._allows, trusted=self._state.trusted)
        policies = self._usable_policies(changes.policies)
        changes = dataclasses.replace(changes, limits=self._usable(changes.limits), policies=policies)
        self._described_servers = {disk.image.server for disk in disks if isinstance(disk.image, RemoteImage)}
        try:
            return plan(disks, changes, io_threads, self._note_unusable)
        except WrongOptions as error:
            # If it is not because of the changes, this raises it again.
            planned = plan(disks, _without_described(changes, disks), io_threads, self._note_unusable)
            problem = (
                f"{error.spelled(dashed)}; disks that are described have their names, limits and policies as described"
            )
            self._problems.append(f"{self._state.path}: {problem}")
            return planned

    def _note_unusable(self, table: Table, error: WrongOptions) -> None:
        self._note(str(table.get("name")), error.spelled(dashed))

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

    def _usable_policies(self, policies: Mapping[str, Sequence[Table]]) -> dict[str, Sequence[Table]]:
        usable = {}
        for where, tables in policies.items():
            try:
                uses = policies_from_tables(tables)
                self._check_policies(uses)
                load_policies(uses)
                usable[where] = tables
            except (ValueError, ImageError) as error:
                self._problems.append(f"{where}: its policies are not restored: {error}")
        return usable

    def attempt(self, planned: Planned, step: Callable[[], object]) -> bool:
        """See Origin."""
        if not planned.added:
            return super().attempt(planned, step)
        try:
            step()
        except OpenerEnded as error:
            self._keep(planned, str(error))
        except (ImageError, ListenError) as error:
            self._leave_out(planned, str(error))
        except OSError as error:
            self._leave_out(planned, in_words(error))
        else:
            return True
        return False

    def _leave_out(self, planned: Planned, problem: str) -> None:
        """A file that has gone is not waited for; a server may be there again at the next start."""
        if isinstance(planned.config.image, RemoteImage):
            self._keep(planned, problem)
        else:
            self._note(planned.name, problem)

    def _keep(self, planned: Planned, problem: str) -> None:
        self._kept.append(f"{planned.name}: was added at run time and is not served: {problem}; {ADVICE}")
        added = [*self.unserved.added, table_of(planned.config)]
        paused = [*self.unserved.paused, *([place(planned.config)] if planned.paused else [])]
        self.unserved = Changes(added=added, paused=paused)
        self.unserved_because = {**self.unserved_because, place(planned.config): problem}

    def open(self, number: int, planned: Planned, undo: contextlib.ExitStack, opener: RemoteOpener | None) -> Parts:
        """See Origin."""
        if planned.added:
            return self._open_added(planned.config, undo, opener)
        return super().open(number, planned, undo, opener)

    def _open_added(self, config: DiskConfig, undo: contextlib.ExitStack, opener: RemoteOpener | None) -> Parts:
        assert config.socket_path is not None
        self._check_allowed(config.image, config.socket_path, opener)
        self._check_policies(config.policy)
        parts = self._open_unless_silent(config, undo, opener)
        if opener is not None:
            # The process that opens files replaces nothing.
            remove_stale(config.socket_path)
        return parts

    def _open_unless_silent(self, config: DiskConfig, undo: contextlib.ExitStack, opener: RemoteOpener | None) -> Parts:
        """What does not answer is waited for once: a service manager limits the time of a start.

        Raises as `open_parts`.
        """
        server = config.image.server if isinstance(config.image, RemoteImage) else None
        if server in self.silent:
            raise NoAnswer(f"{config.image}: its server does not answer")
        if opener is not None and opener.hangs:
            raise OpenerEnded(f"{config.image}: storage that another disk needs does not answer")
        try:
            return open_parts(config, undo, self._signals, opener)
        except NoAnswer:
            self.silent.add(server)
            raise

    def _check_allowed(self, image: ImageAddress, socket_path: Path, opener: RemoteOpener | None) -> None:
        """A confined process writes the state, so it may not name files that this process alone can open.

        Raises ImageError.
        """
        if opener is None and not self._state.trusted:
            raise ImageError(f"{image}: is not below a folder of --allow-folder, because there is none")
        if isinstance(image, RemoteImage) and not self._state.trusted:
            self._check_server(image, opener)
        for path in (image, socket_path):
            if opener is not None and isinstance(path, Path) and not opener.allows(path):
                raise ImageError(f"{path}: is not below a folder of --allow-folder")

    def _check_policies(self, uses: Iterable[PolicyUse]) -> None:
        """As `_check_allowed`. Raises ImageError."""
        if problem := self._policies.refused(uses):
            raise ImageError(problem)

    def _check_server(self, image: RemoteImage, opener: RemoteOpener | None) -> None:
        """Raises ImageError."""
        reached = opener is not None and opener.reaches(image.server)
        if not reached and image.server not in self._described_servers:
            raise ImageError(f"{image}: is not on a server of --allow-server; add {shlex.quote(image.of_server)} there")

    def _note(self, name: str, problem: str) -> None:
        self._problems.append(f"{name}: was added at run time and is not served any more: {problem}")

    def report(self) -> None:
        """See Origin: also keep a copy of it, before the state is written again."""
        for problem in (*self._kept, *self._problems):
            log.warning("%s", problem)
        if self._problems:
            log.warning("the state as it was is kept as %s", self._state.keep())

    def store(self, server: Server) -> None:
        """See Origin."""
        self._state.store(changes_of(server))


def _without_described(changes: Changes, disks: Sequence[DiskConfig]) -> Changes:
    """Without the names, limits and policies of these."""
    described = set(map(place, disks))
    limits = {where: limits for where, limits in changes.limits.items() if where not in described}
    policies = {where: tables for where, tables in changes.policies.items() if where not in described}
    return dataclasses.replace(changes, names={}, limits=limits, policies=policies)
