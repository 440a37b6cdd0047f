"""All disks that one process serves, as one object; disks are added and removed while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ringplane.block.image import ImageError
from ringplane.block.sources.choose_source import NotReached
from ringplane.compiler.bad_code import BadCode
from ringplane.control.adding import Adding, Other
from ringplane.control.changes import Changes, place_of, without
from ringplane.control.export import Export, closed
from ringplane.control.listener import Listener, ListenError
from ringplane.control.not_served import ADVICE, NotServed, not_served
from ringplane.control.opening import report_created
from ringplane.control.operation_errors import NoSuchDisk, Unavailable, WrongState, WrongValue
from ringplane.control.planned import place
from ringplane.control.threads import Threads
from ringplane.control.turns import PATIENCE, Turns
from ringplane.dataplane.trace_events import TraceEvent
from ringplane.log.event_bus import Events
from ringplane.opener.opener import OpenerEnded
from ringplane.options.counted import counted
from ringplane.options.declare import WrongOptions, dashed
from ringplane.options.disk_config import DiskConfig
from ringplane.options.name_options import default_name
from ringplane.options.process_rules import ProcessRules, named_identity
from ringplane.system.aside import NoThread, aside, begin_aside
from ringplane.system.notes import in_words

if TYPE_CHECKING:
    from ringplane.control.interface import Endpoint, Interface
    from ringplane.control.state_file import StateFile
    from ringplane.control.trace_recording import TraceRecorder

log = logging.getLogger(__name__)

# Seconds that the removal of sockets, and the end of recordings, may take when the process ends at once.
ABANDON_PATIENCE = 5.0

# Names of disks in an error.
MOST_NAMES = 10

# How many disks are opened at the same time: storage that does not answer holds up as many, and no other ones.
ADDED_AT_ONCE = 8


def _right_names(names: Sequence[str]) -> str:
    """Those that could be meant, in an error."""
    if len(names) > MOST_NAMES:
        return f"list the disks: there are {len(names)}"
    return f"the disks are: {', '.join(names)}" if names else "there is no disk"


def _present(export: Export) -> DiskConfig:
    """With the limits that it has now, or that its group has."""
    return dataclasses.replace(export.config, limits=export.limits)


def _nothing(_: int) -> None:
    """Nobody has to know of a successor."""


class Server:
    """Disks on one control thread and a shared set of I/O threads.

    It ends when its last disk has stopped; with an interface, through which disks can be added, when it is stopped.
    """

    def __init__(
        self,
        exports: Sequence[Export],
        threads: Threads,
        adding: Adding,
        events: Events,
        described: Collection[str],
    ) -> None:
        """`described`: the places (planned.py) of all disks that the process was started with."""
        # Replaced, never changed: other threads read it.
        self.exports = tuple(exports)
        self.threads = threads
        self.events = events
        self.interface: Interface | None = None
        self.metrics: Endpoint | None = None
        # Where the next process finds this one.
        self.successors: Listener | None = None
        self.state: StateFile | None = None
        # Called on the control thread with the ID of a process that takes over, before it serves; must not block.
        self.at_takeover: Callable[[int], object] = _nothing
        self.described = frozenset(described)
        # Disks that were added to a previous process and cannot be served now: the next start tries again.
        self.unserved = Changes()
        # Why, by their places.
        self.unserved_because: Mapping[str, str] = {}
        self.changing = adding.changing
        self._adding = adding
        self._adds = Turns("the process", ADDED_AT_ONCE)
        # Not yet among the exports.
        self._opening: list[DiskConfig] = []
        self._removals: dict[Export, asyncio.Task[None]] = {}
        self._stopping = False

    # From any thread.

    @property
    def endpoints(self) -> list[Interface | Endpoint]:
        """Those that there are, beside the disks."""
        return [each for each in (self.interface, self.metrics) if each is not None]

    @property
    def not_served(self) -> Sequence[NotServed]:
        """Disks that were added to a previous process and cannot be served now."""
        return [not_served(table, self.unserved_because) for table in self.unserved.added]

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping

    def trace(self, receive: Callable[[TraceEvent | str], None]) -> None:
        """Call `receive` with each trace event of any disk from now on, or a text about lost ones.

        It is called on the control thread.
        """
        self.threads.trace(receive)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all disks have stopped; whether they have."""
        return self.threads.wait(timeout)

    def refresh_size(self) -> None:
        """Have the sizes of all images looked at again; may be called from a signal handler."""
        for export in self.exports:
            export.refresh_size()

    def make_way(self) -> None:
        """Have front ends detached for which others wait; may be called from a signal handler."""
        for export in self.exports:
            export.make_way()

    def request_stop(self) -> None:
        """Begin to stop all disks and return at once; may be called from a signal handler."""
        self._stopping = True
        self._adding.stop()
        if self.interface is not None:
            self.interface.request_stop()
        for export in self.exports:
            export.request_stop()

    def stop(self) -> None:
        """Stop all disks, then the threads. May be called again."""
        self.request_stop()
        self.threads.wait()

    def abandon(self) -> None:
        """Remove what others can see, the sockets' files, end recordings, and nothing else: the process ends at once.

        Storage that hangs is not waited for.
        """
        recordings = [export.operations.recording for export in self.exports]
        done: list[Future[None]] = []
        with contextlib.suppress(NoThread):
            for work in [self._remove_sockets, *(each.end_at_once for each in recordings if each.layer is not None)]:
                done.append(begin_aside(work))
        wait(done, ABANDON_PATIENCE)

    @cached_property
    def trace_recorder(self) -> TraceRecorder:
        """What records traces for clients of the API, which has imported it."""
        from ringplane.control.trace_recording import TraceRecorder

        return TraceRecorder(self.threads)

    def _remove_sockets(self) -> None:
        listeners = [export.listener for export in self.exports]
        listeners += [self.interface.listener] if self.interface is not None else []
        listeners += [self.successors] if self.successors is not None else []
        # Those that the process which opens files removes take longest.
        for listener in sorted(listeners, key=lambda listener: listener.opener is not None):
            listener.remove_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # On the control thread. Raises OperationError.

    def find(self, name: str) -> Export:
        """The disk of this name."""
        for export in self.exports:
            if export.name == name:
                return export
        for unserved in self.not_served:
            if unserved.name == name:
                raise NoSuchDisk(f"was added at run time and is not served: {unserved.why}", name, ADVICE)
        raise NoSuchDisk("no disk has this name", name, _right_names([export.name for export in self.exports]))

    def spread(self) -> Sequence[str]:
        """The I/O threads of a disk that is added without naming some."""
        return self._adding.spread([*(export.config for export in self.exports), *self._opening])

    async def add(self, config: DiskConfig) -> Export:
        """Serve one more disk."""
        later = "it continues; list the disks to see when it is served"
        return await self._adds.take("adding a disk", partial(self._add, config), later=later)

    async def remove(self, name: str, *, detach: bool = False) -> None:
        """Stop serving a disk and release all of it; an attached front end is detached only with `detach`.

        One that is not served is not served after the next start either.
        """
        unserved = [table for table in self.unserved.added if table.get("name") == name]
        if unserved and all(export.name != name for export in self.exports):
            await self._forget(name, place_of(unserved[0]))
            return
        export = self.find(name)
        if export.front_end and not detach:
            raise WrongState(f"a front end ({export.front_end}) is attached", name, "detach it, or add detach=true")
        if export not in self._removals:
            self._removals[export] = asyncio.ensure_future(self._remove(export))
            # Nobody may be waiting for its end any more.
            self._removals[export].add_done_callback(lambda removal: removal.cancelled() or removal.exception())
        removal = self._removals[export]
        await asyncio.wait([removal], timeout=PATIENCE)
        if not removal.done():
            raise self._not_removed(export)
        removal.result()

    def _not_removed(self, export: Export) -> Unavailable:
        if self.state is not None and export not in self.exports:
            why = f"removed, but that is not stored yet in {self.state.path}: storage does not answer"
            return Unavailable(why, export.name, "it is stored when it does; do not end this process before")
        requests = export.in_flight
        what = f"{counted(requests, 'request')} in flight" if requests else "its image is being closed"
        return Unavailable(f"{what}: storage does not answer", export.name, "the disk is removed when it does")

    async def release_sockets(self) -> None:
        """Another process has taken over; with the same path, it has the interface's socket too.

        When this returns, clients of interface and metrics are accepted by that process alone.
        """
        self.changing.end()
        if self.interface is not None:
            self.interface.listener.owned = False
        await asyncio.gather(*(each.release() for each in self.endpoints))

    async def _add(self, config: DiskConfig) -> Export:
        async with self.changing.one():
            with self._reserved(config) as (named, others):
                return await self._serve_one_more(named, others)

    @contextlib.contextmanager
    def _reserved(self, config: DiskConfig) -> Iterator[tuple[DiskConfig, Sequence[Other]]]:
        """The disk with a name, and all disks that it must not collide with; in this `with` it is one of them."""
        others: list[Other] = [
            *((_present(export), export.image) for export in self.exports),
            *((other, named_identity(other.image)) for other in self._opening),
        ]
        if config.name is None:
            taken = {other.name for other, _ in others if other.name is not None}
            taken |= {str(table.get("name")) for table in self.unserved.added}
            config = dataclasses.replace(config, name=default_name(config.image, taken))
        self._opening.append(config)
        try:
            yield config, others
        finally:
            self._opening.remove(config)

    async def _serve_one_more(self, config: DiskConfig, others: Sequence[Other]) -> Export:
        try:
            export = await self._opened(config, others)
        except WrongOptions as error:
            raise WrongValue(error.spelled(dashed), dashed(error.options[0])) from None
        except NotReached as error:
            raise WrongState(error.what, "image", error.right) from None
        except (ImageError, ListenError) as error:
            raise WrongState(str(error)) from None
        except OpenerEnded as error:
            raise Unavailable(str(error)) from None
        except BadCode as error:
            # Of a policy.
            raise WrongValue(str(error), "policy") from None
        except OSError as error:
            raise Unavailable(f"the disk cannot be opened: {in_words(error)}") from None
        export.apply_limits()
        self.exports = (*self.exports, export)
        self.unserved = without(self.unserved, place(config))
        self.threads.serve(export)
        if self._stopping:
            export.request_stop()
        report_created(config, export.disk.source)
        log.info("%s: added: %s", export.name, export.disk.source.title, extra={"disk": export.name})
        self.events.emit("added", export.name, image=str(export.disk.source.title))
        return export

    async def _opened(self, config: DiskConfig, others: Sequence[Other]) -> Export:
        """Raises the same as Adding.open. Until its limits are applied, nothing may be awaited after this."""
        export, undo = await aside(partial(self._adding.open, config, others))
        try:
            self._check_opened(export)
        except WrongOptions as error:
            if error.options[0] == "image":
                # The other disk serves it, although it was created for this one.
                export.disk.source.keep()
            await closed(undo.close)
            raise
        undo.pop_all()
        return export

    def _check_opened(self, export: Export) -> None:
        """Meanwhile another disk may have been added with its image, or the limits of its group changed.

        Raises WrongOptions.
        """
        rules = ProcessRules()
        for other in self.exports:
            rules.add_opened(f"disk {other.name}", _present(other), other.image)
        for error in rules.add_opened("the new disk", export.config, export.image):
            raise error

    async def _forget(self, name: str, where: str) -> None:
        async with self.changing.one():
            log.info("%s: was not served, and is removed", name)
            self.unserved = without(self.unserved, where)

    async def _remove(self, export: Export) -> None:
        try:
            async with self.changing.one():
                log.info("%s: is removed", export.name, extra={"disk": export.name})
                export.request_stop()
                await self.threads.ended(export)
                self.exports = tuple(each for each in self.exports if each is not export)
                self.events.emit("removed", export.name)
        finally:
            del self._removals[export]
