"""The raw image or block device behind a disk: creating, opening, locking, its size and O_DIRECT's requirements.

Only the sources (sources/image_source.py) use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shlex
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from ringplane.block.formats import find_format
from ringplane.block.image_lock import lock
from ringplane.native.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from ringplane.native.fs import BLKGETSIZE64, BLKROGET
from ringplane.opener.opener import LOCAL, Opener, OpenerEnded
from ringplane.options.image_options import BLOCK_SIZES, LOCK_OFF, LOCK_ON, ImageOptions
from ringplane.system import libc
from ringplane.system.fd import Fd
from ringplane.system.signals import NONE, Signals

log = logging.getLogger(__name__)

# The largest sector of block devices, and so the largest block that O_DIRECT may require.
LARGEST_SECTOR = 64 << 10

# Zeros are written in pieces of at most this size.
ZEROS_SIZE = 1 << 20


# The options of an image that is opened as it is.
PLAIN = ImageOptions()


class ImageError(Exception):
    """The image cannot be served; the text is one line for the person who named it."""


class NoAnswer(ImageError):
    """The server of the image does not answer in time, and would not for other images either."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """O_DIRECT's alignment in bytes: `memory` for a buffer's address, `block` for a buffer's length and the offset."""

    memory: int
    block: int


UNALIGNED = Alignment(1, 1)


def create(path: Path, size: int, opener: Opener = LOCAL) -> None:
    """Create a sparse image of `size` bytes; raises ImageError if the path exists. A failure leaves no file behind."""
    try:
        opener.create(path, size)
    except OverflowError as error:
        raise _not_so_long(path, size, error) from None
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL):
            raise _not_so_long(path, size, error) from None
        raise _cannot_be_created(path, error) from None


def create_nameless(path: Path, size: int, *, direct: bool) -> int | None:
    """The fd of a file like that of `create`, but without a name: it disappears when it is closed.

    None if the file system does not have such files (open(2), O_TMPFILE). Raises ImageError if `create` would.
    """
    try:
        if path.is_symlink():
            raise FileExistsError
        fd = os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR) and os.access(path.parent, os.W_OK, effective_ids=True):
            return None
        raise _cannot_be_created(path, error) from None
    try:
        _set_size(fd, path, size)
    except ImageError:
        os.close(fd)
        raise
    if direct:
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    return fd


def _cannot_be_created(path: Path, error: OSError) -> ImageError:
    if isinstance(error, FileExistsError):
        why = "is a symbolic link whose target does not exist" if not path.exists() else "exists already"
        return ImageError(f"{path}: {why}; nothing is created over it")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ImageError(f"{path}: the folder {path.parent} does not exist; create it or choose another path")
    if isinstance(error, PermissionError):
        return ImageError(f"{path}: user {os.geteuid()} may not create a file in the folder {path.parent}")
    return ImageError(f"{path}: cannot be created: {error.strerror}")


def _set_size(fd: int, path: Path, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as error:
        raise _not_so_long(path, size, error) from None


def _not_so_long(path: Path, size: int, error: Exception) -> ImageError:
    why = getattr(error, "strerror", None) or "no file can be that long"
    return ImageError(f"{path}: cannot be made {size} bytes long: {why}")


def open_or_create(path: Path, options: ImageOptions, signals: Signals = NONE, opener: Opener = LOCAL) -> Image:
    """Open an image, or create it if it is missing and the options say so: a service says so at each start.

    Raises ImageError, Interrupted; no new file is left behind.
    """
    if options.create is None or not _create_missing(path, options.create, opener):
        return Image(path, options, signals=signals, opener=opener)
    try:
        image = Image(path, options, signals=signals, opener=opener)
    except BaseException:
        _remove(path, opener)
        raise
    image.created = True
    return image


def _create_missing(path: Path, size: int, opener: Opener) -> bool:
    """Create an image if nothing is there; whether it was created. Raises as `create`."""
    try:
        create(path, size, opener)
        return True
    except ImageError:
        # Not looked at before: what came too late of an earlier request to the opener is removed only by the next one.
        if path.exists():
            return False
        raise


def _remove(path: Path, opener: Opener) -> None:
    """A process that has given up the right to do so leaves it, and reports the first error."""
    with contextlib.suppress(OSError, OpenerEnded):
        opener.unlink(path)


def take_over(path: Path, options: ImageOptions, fd: Fd, size: int) -> Image:
    """The image that the previous process has opened and locked; it serves so many bytes of it. Raises ImageError."""
    if not options.read_only and fcntl.fcntl(fd.number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ImageError(f"{path}: the running process has not opened it for writing")
    image = Image(path, options, fd=os.dup(fd.number))
    image.size = size
    return image


def is_open(path: Path, fd: Fd) -> bool:
    """Whether the path leads to this open file. Raises OSError."""
    return os.path.samestat(os.stat(path), os.fstat(fd.number))


def rehearse(path: Path, options: ImageOptions) -> Image | None:
    """Like `open_or_create`, but for reading only; a new image has no name. None if there are no nameless files there.

    Raises the same errors.
    """
    if options.create is None or path.exists():
        return Image(path, options, rehearsal=True)
    fd = create_nameless(path, options.create, direct=options.direct)
    if fd is None:
        return None
    image = Image(path, options, fd=fd)
    image.created = True
    return image


class Image:
    """An open image. It is always raw: formats are never probed."""

    def __init__(
        self,
        path: Path,
        options: ImageOptions = PLAIN,
        *,
        fd: int | None = None,
        rehearsal: bool = False,
        signals: Signals = NONE,
        opener: Opener = LOCAL,
    ) -> None:
        """Open and lock; raises ImageError, OpenerEnded and, while it waits for locks of others, Interrupted.

        A `rehearsal` raises the same errors, but opens it for reading only.

        O_DIRECT is a wish: if the file system refuses it, `direct` of the object is False afterwards. With `fd` it is
        open already, locked by the process that we take over from; the fd is ours from now on.
        """
        self.path = path
        self.read_only = options.read_only
        self.created = False
        self._options, self._opener = options, opener
        if fd is None:
            self.fd, self.direct = _open(path, self.read_only or rehearsal, options.direct, opener)
        else:
            self.fd, self.direct = fd, bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self._others: list[int] = []
        try:
            self.size = _size(self.fd, path)
            if not self.read_only:
                _check_writable(self.fd, path)
            if rehearsal and not self.read_only and not os.access(path, os.W_OK, effective_ids=True):
                raise _not_permitted(path, self.read_only)
            if fd is None:
                _lock(self.fd, path, options, signals)
            self.alignment = self._find_alignment() if self.direct else UNALIGNED
            _check_block_size(self, options.block_size)
        except BaseException:
            os.close(self.fd)
            raise

    def _find_alignment(self) -> Alignment:
        """O_DIRECT's alignment; if no read with it succeeds, switch it off: UNALIGNED. Raises ImageError."""
        found = _alignment(self.fd)
        if found is not None:
            return found
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct = False
        try:
            os.pread(self.fd, BLOCK_SIZES[0], 0)
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be read: {error.strerror}") from None
        return UNALIGNED

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file, not a block device."""
        return stat.S_ISREG(os.fstat(self.fd).st_mode)

    def open_again(self) -> int:
        """The fd of another open file of the same image, for reading and writing; closed with this one.

        Raises ImageError.
        """
        try:
            self._others.append(self._opener.open_again(self.fd, self.path, direct=self.direct))
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be opened again for another thread: {error.strerror}") from None
        if not os.path.sameopenfile(self._others[-1], self.fd):
            raise ImageError(
                f"{self.path}: is another file now, so that the image cannot be opened again for another thread, which "
                "needs /proc then; mount /proc, or give the disk one I/O thread"
            )
        return self._others[-1]

    @property
    def is_replaced(self) -> bool:
        """Whether its path does not lead to the opened file any more."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except OSError:
            return True

    @property
    def direct_was_refused(self) -> bool:
        """Whether the page cache is used against the wish of the options."""
        return self._options.direct and not self.direct

    def current_size(self) -> int:
        """The size that it has now, in whole blocks. Raises ImageError."""
        block_size = self._options.block_size
        return _size(self.fd, self.path) // block_size * block_size

    def is_blank(self) -> bool:
        """Whether it has no data, as far as the file system reports holes."""
        return next_data(self.fd, 0) >= self.size

    def erase(self, start: int, end: int) -> None:
        """Make these bytes of a file read as zeros: by a hole if possible, else they are written. Raises OSError."""
        try:
            libc.fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, end - start)
            return
        except OSError:
            pass
        with mmap.mmap(-1, ZEROS_SIZE) as zeros, memoryview(zeros) as view:
            while (start := next_data(self.fd, start)) < end:
                with view[: end - start] as piece:
                    start += os.pwritev(self.fd, [piece], start)

    def unlink(self) -> None:
        """Remove the file if `open_or_create` has created it."""
        if self.created:
            _remove(self.path, self._opener)

    def grow(self, size: int) -> None:
        """Make a regular file this long; `refresh_size` picks it up. Raises ImageError, also if it is longer now."""
        if not self.is_file:
            raise ImageError(f"{self.path}: is a block device; change its size elsewhere, then resize without one")
        if self.read_only:
            raise ImageError(f"{self.path}: is served read-only; change its size elsewhere, then resize without one")
        if size < os.fstat(self.fd).st_size:
            raise ImageError(
                f"{self.path}: is longer than {size} bytes, and shrinking it would destroy data; if that is "
                "intended, use truncate(1), then resize without a size"
            )
        if size % self._options.block_size:
            raise ImageError(
                f"{self.path}: {size} bytes are not a multiple of the block size, {self._options.block_size}"
            )
        _set_size(self.fd, self.path, size)

    def close(self) -> None:
        """Close, which gives up the locks; a second call does nothing."""
        while self._others:
            os.close(self._others.pop())
        if self.fd >= 0:
            # close(2) may hang, but frees the number at once: a late call on another thread must not use it.
            fd, self.fd = self.fd, -1
            os.close(fd)


def _open(path: Path, read_only: bool, direct: bool, opener: Opener) -> tuple[int, bool]:
    if direct:
        # Any error is suppressed: one that is not about O_DIRECT comes again below.
        with contextlib.suppress(OSError):
            return opener.open(path, read_only=read_only, direct=True), True
    try:
        return opener.open(path, read_only=read_only, direct=False), False
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; --create SIZE (in a configuration file: create) makes one") from None
    except IsADirectoryError:
        raise _not_an_image(path) from None
    except PermissionError:
        raise _not_permitted(path, read_only) from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened: {error.strerror}") from None


def _not_permitted(path: Path, read_only: bool) -> ImageError:
    if read_only:
        return ImageError(f"{path}: may not be opened by user {os.geteuid()}; change its owner or mode")
    return ImageError(f"{path}: may not be opened for writing; --read-only serves it without")


def _not_an_image(path: Path) -> ImageError:
    return ImageError(f"{path}: neither a regular file nor a block device; choose another path")


def _size(fd: int, path: Path) -> int:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if stat.S_ISBLK(status.st_mode):
        return int(struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])
    raise _not_an_image(path)


def _check_writable(fd: int, path: Path) -> None:
    """Raise ImageError for a read-only block device: open(2) allows writing, and only the first write would fail."""
    if stat.S_ISBLK(os.fstat(fd).st_mode) and struct.unpack("i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0]:
        raise ImageError(f"{path}: this block device is read-only; --read-only serves it")


def _check_block_size(image: Image, block_size: int) -> None:
    if image.size == 0 and not image.is_file:
        raise ImageError(f"{image.path}: this block device has a size of 0; attach its storage first")
    if image.size == 0:
        raise ImageError(f"{image.path}: is empty; truncate(1) gives it a size, --create SIZE makes a new image")
    if image.size % block_size:
        raise ImageError(
            f"{image.path}: its size of {image.size} bytes is not a multiple of the block size {block_size}; "
            f"{_how_to_fit(image, block_size)}"
        )
    if image.alignment.block > block_size:
        largest = BLOCK_SIZES[-1]
        fits = image.alignment.block <= largest and image.size % largest == 0
        raise ImageError(
            f"{image.path}: its storage transfers only blocks of {image.alignment.block} bytes with O_DIRECT; "
            f"use {f'--block-size {largest} or ' if fits else ''}--buffered"
        )


def _how_to_fit(image: Image, block_size: int) -> str:
    """The advice for an image that does not consist of whole blocks."""
    found = find_format(image.fd, image.size)
    if found and (command := found.command_for(image.path)):
        return f"it looks like a {found.name}; make a raw image with: {command}"
    if not image.is_file:
        smallest = BLOCK_SIZES[0]
        return f"use --block-size {smallest}{' --buffered' if image.alignment.block > smallest else ''}"
    short = -image.size % block_size
    return f"add {short} bytes with: truncate -s +{short} {shlex.quote(str(image.path))}"


def next_data(fd: int, offset: int) -> int:
    """Where the next data of a file begins from `offset` on; beyond its end if there is none; `offset` if unknown."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return sys.maxsize if error.errno == errno.ENXIO else offset


def _lock(fd: int, path: Path, options: ImageOptions, signals: Signals) -> None:
    """Lock if the options want it; raises ImageError, Interrupted."""
    if options.lock == LOCK_OFF:
        return
    try:
        locked = lock(fd, options, signals)
    except OSError as error:
        # Some network file systems have no locks, and some jails forbid them.
        why = f"{path}: cannot be locked (fcntl(2), F_OFD_SETLK: {error.strerror})"
        if options.lock == LOCK_ON or not options.read_only:
            raise ImageError(
                f"{why}; --lock off serves it without a lock: then take care that nothing else writes to it"
            ) from None
        log.info("%s: it is served read-only without a lock; nothing may write to it meanwhile", why)
        return
    if not locked:
        raise ImageError(
            f"{path}: is in use already; it can be shared if all open it --read-only, "
            "or if all use --share-rw (a migration)"
        )


def _alignment(fd: int) -> Alignment | None:
    """The alignment that the kernel reports (statx(2), STATX_DIOALIGN, since 6.1), or else the one that reads show.

    Reads do not show the required memory alignment, because a hole in the image is read without any I/O; a whole block
    is always enough. None if no read with O_DIRECT succeeds.
    """
    stated = libc.direct_io_alignment(fd)
    if stated is not None:
        return Alignment(*stated)
    with mmap.mmap(-1, LARGEST_SECTOR) as memory, memoryview(memory) as view:
        for block in (LARGEST_SECTOR >> halvings for halvings in range(7, -1, -1)):
            with contextlib.suppress(OSError), view[:block] as part:
                os.preadv(fd, [part], 0)
                return Alignment(block, block)
    return None
