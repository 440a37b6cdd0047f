"""Source `rbd`: an image of a Ceph cluster, by librbd. rbd_part.py has what is compiled, rbd_cluster.py the connection.

The image has one exclusive lock, which librbd takes at the first write and gives to another client that wants to write.
So both ends of a live migration can have the image open, and so can the two processes of a planned restart.

What waits for the cluster runs with a time limit, on a thread of its own, because none of it can be cancelled.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ringplane.block.formats import PIECE
from ringplane.block.image import ImageError
from ringplane.block.sources import rbd_part, rbd_watching
from ringplane.block.sources.rbd_cluster import Access, Cluster, ClusterError, Pool
from ringplane.block.sources.rbd_library import (
    ENCRYPTION_FORMATS,
    RESULT,
    ImageInfo,
    Library,
    LuksOptions,
    MissingLibrary,
)
from ringplane.block.sources.rbd_part import OpenImage, RbdPart, Warnings
from ringplane.block.sources.rbd_watching import WATCHING, Watch
from ringplane.block.sources.source import Source
from ringplane.block.storage_limits import USUAL_BLOCK, Limits
from ringplane.opener.opener import LOCAL, Opener, OpenerEnded
from ringplane.options.disk_config import DiskConfig
from ringplane.options.engine_names import MEMORY, NULL
from ringplane.options.image_address import RemoteImage
from ringplane.options.rbd_address import RbdImage
from ringplane.system.confinement import keep
from ringplane.system.digests import blake2b
from ringplane.system.seccomp import Only
from ringplane.system.signals import NONE, Signals
from ringplane.system.time_limits import within

if TYPE_CHECKING:
    from ringplane.engines.choose_engine import Engine

log = logging.getLogger(__name__)

# Seconds that the cluster has to open an image, for a question about an open one, and to close it.
OPEN_PATIENCE, ASK_PATIENCE, CLOSE_PATIENCE = 30.0, 10.0, 5.0

# librbd drops what is smaller than this of a discard.
GRANULARITY_OPTION = "rbd_discard_granularity_bytes"

# The library's threads connect to the daemons of the cluster again when these were restarted or moved.
SYSTEM_CALLS = {
    "socket": Only(0, (socket.AF_INET, socket.AF_INET6)),
    "connect": None,
    "setsockopt": Only(1, (socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6)),
    "uname": None,
}

UNITS = (rbd_part.submit, rbd_part.ready, rbd_part.ended, rbd_watching.header_changed)

# What could not be closed in time: librbd may still use its memory.
_left: list[object] = []


def open_source(config: DiskConfig, signals: Signals = NONE, opener: Opener = LOCAL) -> Source:
    """Open the image, or create it if the options say so. Raises ImageError, Interrupted."""
    return _source(config, signals, create=config.create, opener=opener)


def reach(server: RemoteImage, signals: Signals) -> Callable[[], object]:
    """Connect to the cluster: a further image on a connection needs no file and no new right."""
    assert isinstance(server, RbdImage)
    access = Access.of(server, cache=False)
    cluster: Cluster = _in_words(server.of_server, OPEN_PATIENCE, lambda: Cluster.use(access), signals, Cluster.release)
    keep(SYSTEM_CALLS)
    return lambda: _left_alone(server.of_server, cluster.release)


def is_reached(config: DiskConfig, opener: Opener) -> bool:
    """Whether there is a connection with the same user, configuration and options."""
    return Cluster.is_connected(Access.of(_address(config), cache=not config.direct))


def _left_alone(title: str, disconnect: Callable[[], object]) -> None:
    """Disconnect, unless that takes too long: the process ends."""
    try:
        within(CLOSE_PATIENCE, disconnect)
    except (TimeoutError, OSError):
        log.warning("%s: the cluster does not answer, so it is not disconnected", title)


def take_over_source(config: DiskConfig, offer: Mapping[str, Any], opener: Opener = LOCAL) -> Source:
    """Open the image that a running process serves with this size. Raises ImageError."""
    source = _source(config, NONE, opener=opener)
    source.size = offer["size"]
    return source


def is_offered(config: DiskConfig, offer: Mapping[str, Any]) -> bool:
    """Whether the running process serves this image."""
    return offer.get("rbd") == _address(config).title


def rehearse_source(config: DiskConfig) -> Source | None:
    """Open it for reading only; None if it would be created. Raises ImageError."""
    try:
        return _source(config, NONE, rehearsal=True)
    except _NoImage:
        if config.create is None:
            raise
        return None


class _NoImage(ImageError):
    """There is no image of this name."""


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

    def opened() -> _Opened:
        return _Opened(address, read_only=read_only or rehearsal, cache=not config.direct, create=create, opener=opener)

    found = _in_words(address.title, OPEN_PATIENCE, opened, signals, _Opened.discard)
    keep(SYSTEM_CALLS)
    source = RbdSource(found, read_only=read_only)
    if source.size % config.block_size:
        source.close()
        source.unlink()
        raise ImageError(
            f"{address.title}: its size of {source.size} bytes is not a multiple of the block size "
            f"{config.block_size}; use --block-size 512, or `rbd resize` it"
        )
    return source


def _in_words(
    title: str, patience: float, function: Callable[[], Any], signals: Signals = NONE, too_late: Any = None
) -> Any:
    """The result of a function that waits for the cluster. Raises ImageError, Interrupted."""
    try:
        return within(patience, function, signals, too_late)
    except TimeoutError:
        raise ImageError(
            f"{title}: the cluster does not answer within {patience:.0f} s; `ceph -s` shows its state"
        ) from None
    except (ClusterError, MissingLibrary) as error:
        raise ImageError(f"{title}: {error}") from None
    except OSError as error:
        raise ImageError(f"{title}: {error.strerror or error}") from None


class _Opened:
    """An open image with its pool and its connection. All of it may wait for the cluster."""

    def __init__(
        self, address: RbdImage, *, read_only: bool, cache: bool, create: int | None, opener: Opener = LOCAL
    ) -> None:
        """Raises ImageError, ClusterError, MissingLibrary, OSError."""
        self.address, self.read_only, self._opener = address, read_only, opener
        self.created = False
        self._watch: tuple[Watch, int] | None = None
        with contextlib.ExitStack() as undo:
            self.cluster = Cluster.use(Access.of(address, cache=cache))
            undo.callback(self.cluster.release)
            self.library: Library = self.cluster.library
            self.pool: Pool = self.cluster.pool(address.pool, address.namespace)
            undo.callback(self.pool.close)
            undo.callback(self._remove_created)
            self.image = self._open_or_create(create)
            undo.callback(self.library.call, "rbd_close", self.image)
            self._load_encryption()
            self._find_out()
            undo.pop_all()

    def _open_or_create(self, create: int | None) -> int:
        try:
            return self._open()
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise _refused(self.address, self.cluster, "open", error) from None
            if create is None or self.address.snapshot:
                raise _NoImage(_why_no_image(self.address)) from None
        self._create(create)
        return self._open()

    def _open(self) -> int:
        name, snapshot = self.address.image.encode(), self.address.snapshot.encode() or None
        function = "rbd_open_read_only" if self.read_only else "rbd_open"
        return self.library.created(function, self.pool.handle, name, RESULT, snapshot)

    def _create(self, size: int) -> None:
        """Raises ImageError."""
        options = self.library.created("rbd_image_options_create", RESULT)
        try:
            self.library.call("rbd_create4", self.pool.handle, self.address.image.encode(), size, options)
            self.created = True
        except OSError as error:
            # Somebody else may have created it meanwhile.
            if error.errno != errno.EEXIST:
                raise _refused(self.address, self.cluster, "create", error) from None
        finally:
            self.library.call("rbd_image_options_destroy", options)

    def _remove_created(self) -> None:
        if self.created:
            with contextlib.suppress(OSError):
                self.library.call("rbd_remove", self.pool.handle, self.address.image.encode())

    def _load_encryption(self) -> None:
        """Raises ImageError."""
        address = self.address
        if not address.encrypt_format:
            return
        assert address.encrypt_key_file
        try:
            with open(self._opener.open(address.encrypt_key_file, read_only=True, direct=False), "rb") as file:
                passphrase = file.read()
        except (OSError, OpenerEnded) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ImageError(f"{address.encrypt_key_file}: cannot be read: {why}") from None
        if not self.library.has("rbd_encryption_load"):
            raise ImageError(f"{address.title}: this version of librbd does not support encryption; it needs Ceph 16")
        options = LuksOptions(0, passphrase, len(passphrase))
        kind = ENCRYPTION_FORMATS[address.encrypt_format]
        try:
            self.library.call("rbd_encryption_load", self.image, kind, ctypes.byref(options), ctypes.sizeof(options))
        except OSError as error:
            raise ImageError(_why_not_decrypted(address, error)) from None

    def _find_out(self) -> None:
        info = ImageInfo()
        self.library.call("rbd_stat", self.image, ctypes.byref(info), ctypes.sizeof(info))
        self.stripe = info.object_size * self.library.created("rbd_get_stripe_count", self.image, RESULT)
        self.granularity = int(self.cluster.option(GRANULARITY_OPTION))
        self.size = self.current_size()
        self.start = self._read_start()
        image = self.library.text("rbd_get_id", self.image)
        self.number = "/".join((self.cluster.fsid, str(self.pool.number), self.address.namespace, image))

    def _read_start(self) -> bytes:
        room = ctypes.create_string_buffer(min(PIECE, self.size))
        size = self.library.call("rbd_read", self.image, 0, len(room), room) if self.size else 0
        return room.raw[:size]

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called when the header changes, which has the size; a snapshot does not change."""
        if not self.address.snapshot:
            watch = WATCHING.add(changed)
            callback = rbd_watching.callback()
            self._watch = watch, self.library.created("rbd_update_watch", self.image, RESULT, callback, watch.address)

    def current_size(self) -> int:
        return self.library.created("rbd_get_size", self.image, RESULT)

    def close(self) -> None:
        if self._watch:
            self.library.call("rbd_update_unwatch", self.image, self._watch[1])
            WATCHING.remove(self._watch[0])
        self.library.call("rbd_close", self.image)
        self.pool.close()
        self.cluster.release()

    def discard(self) -> None:
        """Close it, and remove it if it was created: nobody waits for it any more."""
        self.close()
        if self.created:
            remove(self.address, self.cluster.access)


def remove(address: RbdImage, access: Access) -> None:
    """Remove the image, which is not open any more. Raises ClusterError, OSError."""
    cluster = Cluster.use(access)
    with contextlib.ExitStack() as undo:
        undo.callback(cluster.release)
        pool = cluster.pool(address.pool, address.namespace)
        undo.callback(pool.close)
        cluster.library.call("rbd_remove", pool.handle, address.image.encode())


def _why_no_image(address: RbdImage) -> str:
    if address.snapshot:
        return f"{address.title}: there is no such image or snapshot; `rbd snap ls` lists snapshots"
    return f"{address.title}: there is no such image; `rbd ls` lists images, and --create SIZE makes one"


def _refused(address: RbdImage, cluster: Cluster, what: str, error: OSError) -> ImageError:
    """`what`: to open or to create it."""
    why = f"cannot {what} it: {error.strerror}; `ceph -s` shows the state of the cluster"
    if error.errno in (errno.EPERM, errno.EACCES):
        why = f"{cluster.access.name} may not {what} it; its caps need `profile rbd pool={address.pool}`"
    elif error.errno == errno.ESHUTDOWN:
        why = "the cluster has blocklisted this client; `ceph osd blocklist ls` lists clients"
    return ImageError(f"{address.title}: {why}")


def _why_not_decrypted(address: RbdImage, error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        why = f"the passphrase in {address.encrypt_key_file} is wrong"
    elif error.errno == errno.EINVAL:
        why = f"it is not encrypted with {address.encrypt_format}"
    else:
        why = f"cannot be decrypted: {error.strerror}"
    return f"{address.title}: {why}"


class RbdSource(Source):
    """The source of a disk."""

    units = UNITS

    def __init__(self, opened: _Opened, *, read_only: bool) -> None:
        """Take over the open image."""
        self._opened: _Opened | None = opened
        self._open = opened
        address = opened.address
        self.title, self.size, self.read_only, self.created = address.title, opened.size, read_only, opened.created
        self.direct = not opened.cluster.access.cache
        self.start = opened.start
        digest = blake2b(f"{opened.number}@{address.snapshot}".encode(), digest_size=5).hexdigest()
        self.serial = f"ringplane-{digest}"
        self._warnings = Warnings()
        self._parts: list[RbdPart] = []
        # What is called when the size has changed, and the size then.
        self._changed: Callable[[], None] = lambda: None
        self._noticed = self.size

    def prepare(self, engines: Sequence[Engine]) -> Source:
        self._image = OpenImage(self._open.library, self._open.image)
        _in_words(self.title, ASK_PATIENCE, lambda: self._open.watch(self._notice))
        return self

    def _notice(self) -> None:
        """The header of the image has changed."""
        with contextlib.suppress(OSError):
            size = self._open.current_size()
            if size != self._noticed:
                self._noticed = size
                self._changed()

    def part(self, slots: int) -> RbdPart:
        self._parts.append(RbdPart(self._image, self._warnings, slots))
        return self._parts[-1]

    def limits(self) -> Limits:
        """librbd drops discards of less than its granularity, and an optimal I/O is all objects of a stripe."""
        discard = 0 if self.read_only else self._open.granularity
        return Limits(USUAL_BLOCK, USUAL_BLOCK, self._open.stripe, discard=discard, punches=not self.read_only)

    def how(self, engines: str) -> str:
        return "librbd" if self.direct else "librbd, with its cache"

    def watch(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        WATCHING.start()

    def refresh_size(self) -> None:
        self.size = _in_words(self.title, ASK_PATIENCE, self._open.current_size)

    def grow(self, size: int) -> None:
        if size < self.size:
            raise ImageError(
                f"{self.title}: has {self.size} bytes already; `rbd resize --allow-shrink` makes it shorter"
            )
        library, image = self._open.library, self._open.image
        _in_words(self.title, ASK_PATIENCE, lambda: library.call("rbd_resize", image, size))

    @property
    def flush_failed(self) -> bool:
        return self._image.flush_failed

    def set_flush_failed(self) -> None:
        self._image.set_flush_failed()

    def sync(self) -> None:
        """rbd_flush(3), which waits for the cluster."""
        if self.flush_failed:
            raise OSError(errno.EIO, "a flush failed before")
        try:
            self._open.library.call("rbd_flush", self._open.image)
        except OSError:
            self.set_flush_failed()
            raise
        if self.flush_failed:
            # One of a guest, meanwhile.
            raise OSError(errno.EIO, "a flush failed meanwhile")

    def hand_over(self) -> dict[str, Any]:
        return {"rbd": self.title}

    def close(self) -> None:
        """If the cluster does not answer in time, the image is closed by it: the client's watch ends."""
        if self._opened is None:
            return
        opened, self._opened = self._opened, None
        self._changed = lambda: None
        try:
            within(CLOSE_PATIENCE, opened.close)
        except TimeoutError:
            _left.extend((self, opened))
            log.warning("%s: the cluster does not answer, so the image is left open", self.title)
            return
        except OSError as error:
            log.warning("%s: cannot be closed: %s", self.title, error.strerror)
        for part in self._parts:
            part.close()

    def unlink(self) -> None:
        """Remove the image if this object created it; it is closed already."""
        if self.created:
            address, access = self._open.address, self._open.cluster.access
            with contextlib.suppress(ClusterError, OSError):
                within(CLOSE_PATIENCE, lambda: remove(address, access))
