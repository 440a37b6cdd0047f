"""Source `rbd`: an image of a Ceph cluster, by librbd. rbd_part.py has what is compiled, rbd_image.py the open image.

The image has one exclusive lock, which librbd takes at the first write and gives to another client that wants to write.
So both ends of a live migration can have the image open, and so can the two processes of a planned restart.

What waits for the cluster runs with a time limit, on a thread of its own, because none of it can be cancelled. How many
of these threads may be left is limited: some that open images of each cluster (rbd_cluster.py), one that asks or
changes each image, and one that closes it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ringplane.block.image import ImageError, NoAnswer
from ringplane.block.io import READ
from ringplane.block.sources import rbd_part, rbd_watching
from ringplane.block.sources.rbd_cluster import Access, Cluster, ClusterError, NoMonitor
from ringplane.block.sources.rbd_image import NoImage, OpenedImage, remove
from ringplane.block.sources.rbd_library import MissingLibrary
from ringplane.block.sources.rbd_part import OpenImage, RbdPart, Warnings
from ringplane.block.sources.rbd_watching import WATCHING
from ringplane.block.sources.service import Service, ServiceState
from ringplane.block.sources.source import Source
from ringplane.block.storage_limits import USUAL_BLOCK, Limits
from ringplane.opener.opener import LOCAL, Opener
from ringplane.options.disk_config import DiskConfig
from ringplane.options.engine_names import MEMORY, NULL
from ringplane.options.image_address import RemoteImage
from ringplane.options.rbd_address import RbdImage
from ringplane.system.confinement import is_confined, keep
from ringplane.system.digests import blake2b
from ringplane.system.seccomp import Only
from ringplane.system.signals import NONE, Signals
from ringplane.system.time_limits import NotBegun, NotInTime, TimedCalls

if TYPE_CHECKING:
    from ringplane.engines.choose_engine import Engine

log = logging.getLogger(__name__)

# Seconds that the cluster has to open an image, for a question about an open one, and to close it.
OPEN_PATIENCE, ASK_PATIENCE, CLOSE_PATIENCE = 30.0, 10.0, 5.0

# In what is offered to a successor: the name of the image, and what no other image of any cluster has.
TITLE, NUMBER = "rbd", "rbd-number"

# The library's threads connect to the daemons of the cluster again when these were restarted or moved.
SYSTEM_CALLS = {
    "socket": Only(0, (socket.AF_INET, socket.AF_INET6)),
    "connect": None,
    "setsockopt": Only(1, (socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6)),
    "uname": None,
}

UNITS = (rbd_part.submit, rbd_part.ready, rbd_part.ended, rbd_watching.header_changed)

# What is not closed yet: librbd may still use its memory.
_closing: set[object] = set()


def open_source(config: DiskConfig, signals: Signals = NONE, opener: Opener = LOCAL) -> Source:
    """Open the image, or create it if the options say so. Raises ImageError, Interrupted."""
    address = _address(config)
    if address.encrypt_format and is_confined():
        raise ImageError(
            f"{address.title}: librbd opens files to decrypt it, and this process may open none; start ringplane "
            "with this disk, or with --no-sandbox"
        )
    return _source(config, signals, create=config.create, opener=opener)


def reach(server: RemoteImage, signals: Signals) -> Callable[[], object]:
    """Connect to the cluster: a further image on a connection needs no file and no new right."""
    assert isinstance(server, RbdImage)
    access = Access.of(server, cache=False)
    cluster: Cluster = _in_words(
        server.of_server,
        Cluster.openings(access),
        OPEN_PATIENCE,
        lambda: Cluster.use(access),
        signals,
        Cluster.release,
    )
    keep(SYSTEM_CALLS)
    return lambda: _left_alone(server.of_server, cluster.release)


def is_reached(config: DiskConfig, opener: Opener) -> bool:
    """Whether there is a connection with the same user, configuration and options."""
    return Cluster.is_connected(Access.of(_address(config), cache=not config.direct))


def _left_alone(title: str, disconnect: Callable[[], object]) -> None:
    """Disconnect, unless that takes too long: the process ends."""
    try:
        TimedCalls().within(CLOSE_PATIENCE, disconnect)
    except (NotInTime, OSError):
        log.warning("%s: the cluster does not answer, so it is not disconnected", title)


def take_over_source(config: DiskConfig, offer: Mapping[str, Any], opener: Opener = LOCAL) -> Source:
    """Open the image that a running process serves with this size. Raises ImageError."""
    source = _source(config, NONE, opener=opener)
    # An older release offers only the name.
    if offer.get(NUMBER, source.number) != source.number:
        source.close()
        raise ImageError(
            f"{source.title}: is not the image that the running process serves: it is in another cluster, or another "
            "image has this name now; use the same configuration of Ceph, or restart without --upgrade"
        )
    source.begin_with_size(offer["size"])
    return source


def is_offered(config: DiskConfig, offer: Mapping[str, Any]) -> bool:
    """Whether the running process serves an image of this name; `take_over_source` finds out whether it is this one."""
    return offer.get(TITLE) == _address(config).title


def rehearse_source(config: DiskConfig) -> Source | None:
    """Open it for reading only; None if it would be created. Raises ImageError."""
    try:
        return _source(config, NONE, rehearsal=True)
    except NoImage:
        if config.create is None:
            raise
        return None


def _address(config: DiskConfig) -> RbdImage:
    assert isinstance(config.image, RbdImage)
    return config.image


def _source(
    config: DiskConfig,
    signals: Signals,
    *,
    create: int | None = None,
    rehearsal: bool = False,
    opener: Opener = LOCAL,
) -> RbdSource:
    address = _address(config)
    if config.engine in (MEMORY, NULL):
        raise ImageError(f"{address.title}: engine {config.engine} does not serve RBD images; leave it out")
    read_only = config.read_only or bool(address.snapshot)

    def opened() -> OpenedImage:
        return OpenedImage(
            address,
            read_only=read_only,
            cache=not config.direct,
            create=create,
            rehearsal=rehearsal,
            opener=opener,
        )

    calls = Cluster.openings(Access.of(address, cache=not config.direct))
    found = _in_words(address.title, calls, OPEN_PATIENCE, opened, signals, OpenedImage.discard)
    keep(SYSTEM_CALLS)
    source = RbdSource(found, read_only=read_only, block_size=config.block_size)
    if source.size % config.block_size:
        source.close()
        source.unlink()
        raise ImageError(
            f"{address.title}: its size of {source.size} bytes is not a multiple of the block size "
            f"{config.block_size}; use --block-size 512, or `rbd resize` it"
        )
    return source


def _in_words(
    title: str,
    calls: TimedCalls,
    patience: float,
    function: Callable[[], Any],
    signals: Signals = NONE,
    too_late: Any = None,
) -> Any:
    """The result of a function that waits for the cluster. Raises ImageError, Interrupted."""
    try:
        return calls.within(patience, function, signals, too_late)
    except NotBegun:
        raise NoAnswer(
            f"{title}: the cluster has not answered what it was asked before; `ceph -s` shows its state"
        ) from None
    except NotInTime:
        # What the library has begun still runs.
        keep(SYSTEM_CALLS)
        raise NoAnswer(
            f"{title}: the cluster does not answer within {patience:.0f} s; `ceph -s` shows its state"
        ) from None
    except NoMonitor as error:
        raise NoAnswer(f"{title}: {error}") from None
    except (ClusterError, MissingLibrary) as error:
        raise ImageError(f"{title}: {error}") from None
    except OSError as error:
        raise ImageError(f"{title}: {error.strerror or error}") from None


class RbdSource(Source):
    """The source of a disk."""

    units = UNITS

    def __init__(self, opened: OpenedImage, *, read_only: bool, block_size: int) -> None:
        """Take over the open image."""
        self._opened, self._block_size = opened, block_size
        self._closed = False
        address = opened.address
        self.title, self.size, self.read_only, self.created = address.title, opened.size, read_only, opened.created
        self.direct = not opened.cluster.access.cache
        self.start = opened.start
        self.has_cache = not self.direct
        # How many changes had ended when the cache was written.
        self._written = 0
        self.number = opened.number
        digest = blake2b(f"{self.number}@{address.snapshot}".encode(), digest_size=5).hexdigest()
        self.serial = f"ringplane-{digest}"
        self._warnings = Warnings()
        self._parts: list[RbdPart] = []
        self.service = self._service = Service(self._state)
        # Questions and changes; one that hangs may be left.
        self._calls = TimedCalls()
        # What is called when the size is another one than was noticed last.
        self._changed: Callable[[], None] = _nothing
        self._noticed = self.size

    def begin_with_size(self, size: int) -> None:
        """Serve this size at first: another process has served it so far."""
        self.size = self._noticed = size

    def prepare(self, engines: Sequence[Engine]) -> Source:
        self._image = OpenImage(self._opened.library, self._opened.image)
        self.flushes = self._image.flushes
        self._ask(lambda: self._opened.watch(self._notice))
        return self

    def _ask(self, function: Callable[[], Any]) -> Any:
        """The result of a function that asks the cluster. Raises ImageError."""
        return _in_words(self.title, self._calls, ASK_PATIENCE, function)

    def _notice(self) -> None:
        """The header of the image may have changed; called on the thread of all watches."""
        try:
            size = self._ask(self._opened.current_size)
        except ImageError:
            # Whoever asks again logs it.
            size = None
        if size != self._noticed:
            self._noticed = size
            self._changed()

    def _state(self) -> ServiceState:
        """Of what librbd does about lost connections nothing is known here."""
        return "blocklisted" if self._image.blocklisted else "ok"

    def part(self, slots: int) -> RbdPart:
        self._parts.append(RbdPart(self._image, self._warnings, slots))
        self._service.add(self._parts[-1].times)
        return self._parts[-1]

    def limits(self) -> Limits:
        """librbd drops discards of less than its granularity, and an optimal I/O is all objects of a stripe."""
        discard = 0 if self.read_only else self._opened.granularity
        return Limits(USUAL_BLOCK, USUAL_BLOCK, self._opened.stripe, discard=discard, punches=not self.read_only)

    def how(self, engines: str) -> str:
        return "librbd" if self.direct else "librbd, with its cache"

    def start_threads(self) -> None:
        WATCHING.start()

    def watch(self, changed: Callable[[], None]) -> None:
        """From now on; the image may have changed since it was opened."""
        self._changed = changed
        # What was noticed before, on the thread that an earlier disk has started, was not reported to anybody.
        self._noticed = self.size
        self._opened.look()

    def refresh_size(self) -> None:
        """In whole blocks."""
        if not self._opened.is_watched and not self._opened.address.snapshot:
            raise ImageError(
                f"{self.title}: {self._opened.cluster.access.name} may not watch it, so its size is that of the start; "
                "start again, or give it `profile rbd`"
            )
        self.size = self._ask(self._opened.current_size) // self._block_size * self._block_size

    def grow(self, size: int) -> None:
        if self.read_only:
            raise ImageError(f"{self.title}: is served read-only; use `rbd resize`")
        if size % self._block_size:
            raise ImageError(f"{self.title}: {size} bytes are not a multiple of the block size, {self._block_size}")
        self._ask(lambda: self._grow(size))

    def _grow(self, size: int) -> None:
        """rbd_resize(3) makes an image shorter too, which another client may have made longer."""
        if size < (present := self._opened.current_size()):
            raise ImageError(f"{self.title}: has {present} bytes already; `rbd resize --allow-shrink` makes it shorter")
        self._opened.call("rbd_resize", size)

    def sync(self) -> None:
        """rbd_flush(3), which waits for the cluster."""
        self.flushes.make(lambda: self._opened.call("rbd_flush"))

    def empty_cache(self) -> None:
        changes = self._changes()
        try:
            # A flush takes the exclusive lock, which another client may have by now.
            if changes != self._written and not self.read_only:
                self.sync()
                self._written = changes
        finally:
            self._opened.call("rbd_invalidate_cache")

    def _changes(self) -> int:
        """How many requests have ended that are not reads; no ring runs."""
        return sum(int(part.times.records["ended"][READ + 1 :].sum()) for part in self._parts)

    def hand_over(self) -> dict[str, Any]:
        return {TITLE: self.title, NUMBER: self.number}

    def close(self) -> None:
        """If the cluster does not answer in time, it is closed when the cluster does, or by the end of the process."""
        if self._closed:
            return
        self._closed = True
        self._changed = _nothing
        _closing.add(self)
        try:
            TimedCalls().within(CLOSE_PATIENCE, self._end)
        except NotInTime:
            log.warning("%s: the cluster does not answer, so the image is left open", self.title)
        except OSError:
            # No thread or no fd is left for it; the errors of `_end` itself are logged there.
            self._end()

    def _end(self) -> None:
        try:
            self._opened.close()
        except OSError as error:
            log.warning("%s: cannot be closed: %s", self.title, error.strerror)
        for part in self._parts:
            part.close()
        _closing.discard(self)

    def unlink(self) -> None:
        """Remove the image if this object created it; it is closed already."""
        if self.created:
            address, access = self._opened.address, self._opened.cluster.access
            with contextlib.suppress(ClusterError, OSError, NotInTime):
                TimedCalls().within(CLOSE_PATIENCE, lambda: remove(address, access))


def _nothing() -> None:
    """Nobody has to know."""
