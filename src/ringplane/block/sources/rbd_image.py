"""An open RBD image with its pool and its connection: how it is opened, who uses it, and how it is closed.

librbd frees an image that is closed under a call of another thread. So each call of the control plane enters through
`OpenedImage.call`, and `close` waits until all have returned. The I/O threads call librbd without that (rbd_part.py):
when a source is closed, no queue runs.

Each function here may wait for the cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable
from typing import Any

from ringplane.block.formats import PIECE
from ringplane.block.image import ImageError
from ringplane.block.sources import rbd_watching
from ringplane.block.sources.rbd_cluster import Access, Cluster, Pool
from ringplane.block.sources.rbd_library import ENCRYPTION_FORMATS, RESULT, ImageInfo, Library, LuksOptions
from ringplane.block.sources.rbd_watching import WATCHING, Watch
from ringplane.opener.opener import LOCAL, Opener, OpenerEnded
from ringplane.options.rbd_address import RbdImage
from ringplane.system.use_counts import Users

# librbd drops what is smaller than this of a discard.
GRANULARITY_OPTION = "rbd_discard_granularity_bytes"

# The functions that open an image, tried in this order. Only the first one watches the header, which needs the right to
# write; without the watch the size stays that of the moment.
WATCHED = "rbd_open"
OPEN_FOR_WRITING, OPEN_FOR_READING, OPEN_UNWATCHED = (
    (WATCHED,),
    (WATCHED, "rbd_open_read_only"),
    ("rbd_open_read_only",),
)
NOT_ALLOWED = (errno.EPERM, errno.EACCES, errno.EROFS)

# A size is a number of 64 bits, and one of the data plane has a sign.
LARGEST_SIZE = (1 << 63) - 1


class NoImage(ImageError):
    """There is no image of this name."""


class OpenedImage:
    """An open image."""

    def __init__(
        self,
        address: RbdImage,
        *,
        read_only: bool,
        cache: bool,
        create: int | None,
        rehearsal: bool = False,
        opener: Opener = LOCAL,
    ) -> None:
        """`rehearsal`: the cluster must not change. Raises ImageError, ClusterError, MissingLibrary, OSError."""
        self.address, self._opener = address, opener
        self._functions = OPEN_FOR_WRITING if not read_only else OPEN_FOR_READING
        if address.snapshot or rehearsal:
            self._functions = OPEN_UNWATCHED
        self.created = False
        self._users = Users()
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
                raise NoImage(_why_no_image(self.address)) from None
        self._create(create)
        return self._open()

    def _open(self) -> int:
        name, snapshot = self.address.image.encode(), self.address.snapshot.encode() or None
        for function in self._functions:
            self.is_watched = function == WATCHED
            try:
                return self.library.created(function, self.pool.handle, name, RESULT, snapshot)
            except OSError as error:
                if function == self._functions[-1] or error.errno not in NOT_ALLOWED:
                    raise
        raise AssertionError(self._functions)

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
        """Nothing of it stays in the cache: another process may write there until the disk is served here."""
        room = ctypes.create_string_buffer(min(PIECE, self.size))
        size = self.library.call("rbd_read", self.image, 0, len(room), room) if self.size else 0
        if self.cluster.access.cache:
            self.library.call("rbd_invalidate_cache", self.image)
        return room.raw[:size]

    def call(self, name: str, *arguments: Any) -> int:
        """The result of a function whose first argument is the image. Raises OSError, also if it is being closed."""
        with self._users.one():
            return self.library.call(name, self.image, *arguments)

    def current_size(self) -> int:
        """Raises OSError, and ImageError for a size that no disk can have."""
        with self._users.one():
            size = self.library.created("rbd_get_size", self.image, RESULT)
        if size > LARGEST_SIZE:
            raise ImageError(f"{self.address.title}: its size of {size} bytes cannot be served")
        return size

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called when the header changes, which has the size, if it is watched."""
        if not self.is_watched:
            return
        with self._users.one():
            watch = WATCHING.add(changed)
            try:
                handle = self.library.created(
                    "rbd_update_watch", self.image, RESULT, rbd_watching.callback(), watch.address
                )
            except BaseException:
                WATCHING.remove(watch)
                raise
            self._watch = watch, handle

    def look(self) -> None:
        """Have the function of `watch` called as if the header had changed."""
        if self._watch:
            WATCHING.look(self._watch[0])

    def close(self) -> None:
        """Close it when all calls have returned. Raises OSError; it is closed then too."""
        self._users.end()
        with contextlib.ExitStack() as rest:
            rest.callback(self.cluster.release)
            rest.callback(self.pool.close)
            if self._watch:
                rest.callback(WATCHING.remove, self._watch[0])
            rest.callback(self.library.call, "rbd_close", self.image)
            if self._watch:
                rest.callback(self.library.call, "rbd_update_unwatch", self.image, self._watch[1])

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
