"""What a source of a disk is for the control plane; `stack.py` has what its parts are for compiled code.

A source is where the bytes of a disk are. Nobody else knows how they are reached: what is opened, locked, mapped or
connected belongs to the source, and whoever needs something of it calls a method. The life of a source:

| step | when | it may |
|---|---|---|
| `open_source` (choose_source.py) | at the start, on the main thread, before any code is compiled | block, open files |
| `prepare` (`ringplane check`: `check`) | when the I/O threads are made, and code can be loaded | block, open files |
| `part` | once for each I/O thread of the disk, before the threads run | block, open files |
| `refresh_size`, `grow`, `sync` | while the disk is served, on a thread of the control plane for such calls | block |
| `resize` | then, on the control thread | not block |
| `hand_over` | when a successor prepares itself, while this process still serves | not block |
| `let_go` | then, when no I/O is in flight; `take_back` if the successor does not take over | not block |
| `close` | when no queue runs | block |

When threads run, the process has given up its rights: no files can be opened any more, by path or at all. A disk that
is added then takes the first three steps on a thread that may block, and its source opens and creates files only
through the `Opener` that `open_source` gets (opener/): another process does it, below certain folders.

A service on another machine fits this without other methods:

- Its I/Os end later. An fd that says so is one of the `events` of its parts (stack.py), and is closed with the source.
- It has no fd, or sockets of its own. `hand_over` returns what the successor needs: any values, and any fds as `Fd`.
  Without fds the successor connects again, in `take_over_source`; both are connected until this process closes its
  source, and only one of them submits I/Os.
- Opening takes long, and fails late. The opener gets the `Signals` of the start, waits with `signals.wait` and gives up
  after a time of its own, with an ImageError; whatever was opened for other disks is then closed. What fails after that
  is the result of I/Os, and `SourcePart.warning` is its log line.
- The size changes elsewhere. `watch` gives the source a function to call then, from any thread; `refresh_size` asks for
  the new size.
- A flush is a request. Those of drivers are block I/Os that the compiled part sends; `sync`, which blocks, is for the
  control plane. So a source must store, where both see it, that one has failed (`Flushes`, block/flushes.py).
- Closing may hang. It is done on a thread that may block, and only delays the end of its own disk; a source that cannot
  cancel its requests limits this time itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ringplane.block.flushes import Flushes
from ringplane.block.image import ImageError
from ringplane.block.sources.service import Service
from ringplane.block.stack import SourcePart
from ringplane.block.storage_limits import Limits
from ringplane.compiler.units import Unit

if TYPE_CHECKING:
    from ringplane.engines.choose_engine import Engine


class Source:
    """One open source. A subclass sets the fields, and defines what its source needs."""

    # What is compiled before `prepare`.
    units: ClassVar[tuple[Unit, ...]] = ()

    # How messages for users call it: a path, a URI.
    title: str
    # Bytes: whole logical blocks.
    size: int
    read_only: bool
    # The serial number that the guest sees unless the options have one: the same at every start.
    serial: str
    # By this object, because there was none: it has no data.
    created: bool = False
    # Its flushes; a source without such a record has the two members of this name below instead.
    flushes: Flushes
    # Whether one I/O thread serves all its queues. Asked after `prepare`.
    one_thread: bool = False
    # Whether I/O bypasses the page cache of this machine.
    direct: bool = True
    # Whether this process alone has a cache of the data (`empty_cache`).
    has_cache: bool = False
    # What users should know about how it was opened, which is not quite what they asked for; empty: nothing.
    notice: str = ""
    # Its first bytes, from a service on another machine: for a log line about other formats than raw; empty: unknown.
    start: bytes = b""
    # The regular file that it is, so that a layer can store its state in another file beside it; None: it is something
    # else. `erase` and `is_blank` are for such a layer.
    file: Path | None = None
    # Where it is on another machine: for metrics.
    service: Service | None = None

    def check(self, engines: Sequence[Engine]) -> Limits | None:
        """Raise the ImageError that `prepare` would, but reserve nothing; returns the `limits`, or None: unknown.

        For `ringplane check`, where the source was opened for reading, or is one that does not exist yet.
        """
        return self.limits()

    def prepare(self, engines: Sequence[Engine]) -> Source:
        """Make what compiled code needs; the engines are those of the I/O threads. Raises ImageError.

        Returns this source, or another one that serves in its place. Both are closed in the end.
        """
        return self

    def part(self, slots: int) -> SourcePart:
        """The part for one more I/O thread, on which `slots` I/Os can be in progress at a time.

        Raises ImageError, OpenerEnded.
        """
        raise NotImplementedError

    def limits(self) -> Limits:
        """What it supports besides reads and writes, and its preferred sizes. Raises OSError."""
        return Limits()

    def how(self, engines: str) -> str:
        """How I/O is done, for users; `engines` names those of the I/O threads."""
        raise NotImplementedError

    def start_threads(self) -> None:
        """Start those that it needs. Another process may serve it until `watch` is called. Raises NoThread."""

    def watch(self, changed: Callable[[], None]) -> None:
        """The disk is served from now on: call `changed`, from any thread, when the size may have changed.

        If it cannot notice that, it does nothing.
        """

    @property
    def trouble(self) -> str:
        """In one word why all I/O fails now, or waits; empty: it does not."""
        return self.service.state if self.service is not None and self.service.state != "ok" else ""

    @property
    def replaced(self) -> str:
        """Why opening it now would open something else, as a sentence for the log; empty: it would not."""
        return ""

    def refresh_size(self) -> None:
        """Find out the size; the parts keep the previous one until `resize`. Raises ImageError."""
        raise NotImplementedError

    def grow(self, size: int) -> None:
        """Make it this long, which `refresh_size` then finds. Raises ImageError, also if that is impossible here."""
        raise ImageError(f"{self.title}: its size can be changed only where it is stored; then resize without a size")

    def resize(self, size: int) -> None:
        """Prepare for this size; I/Os for the larger one of the two may be in flight. Raises OSError."""

    @property
    def flush_failed(self) -> bool:
        """Whether a flush has failed, so that every later one must fail: earlier writes may be lost."""
        return self.flushes.failed

    def set_flush_failed(self) -> None:
        """Make every flush fail from now on."""
        self.flushes.set_failed()

    def sync(self) -> None:
        """Make completed writes stable. Raises OSError, also if an earlier flush failed."""

    def empty_cache(self) -> None:
        """Let other processes see all completed writes, and see what they write from now on; no ring runs.

        Only if `has_cache`. Raises OSError.
        """

    def is_blank(self) -> bool:
        """Whether it certainly has no data: all of it reads as zeros."""
        return self.created

    def erase(self, start: int, end: int) -> None:
        """Make these bytes read as zeros, while no I/O is in flight. Raises OSError."""
        raise NotImplementedError

    def hand_over(self) -> dict[str, Any]:
        """What a successor needs to make this source: values of JSON, and fds (`Fd`), which stay ours.

        The keys are those of the source alone; `take_over_source` and `is_offered` (choose_source.py) find them.
        """
        return {}

    def let_go(self) -> None:
        """Leave what `hand_over` has returned alone, because the successor uses it from now on.

        Raises ImageError if that is not what is in use now.
        """

    def take_back(self) -> None:
        """The successor does not use it after all; also after `let_go` has raised."""

    def close(self) -> None:
        """Close it, which gives up its locks; a second call does nothing."""

    def unlink(self) -> None:
        """Remove what this object has created, if it may."""

    def keep(self) -> None:
        """Have `unlink` remove nothing, because another disk uses what was created."""
        self.created = False
