"""The zone file: it stores the write pointers of an emulated zoned disk, beside the image.

It has a header, which is written last when it is created, then two arrays of pointers (layers/zones.py says what each
is for), each at the start of a page.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shlex
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringplane.block.image import ImageError
from ringplane.block.layers.zones import ZONE, ZONES
from ringplane.block.sources.source import Source
from ringplane.opener.opener import LOCAL, Opener, OpenerEnded
from ringplane.options.zone_options import ZoneModel
from ringplane.system import procfs
from ringplane.virtio import blk_zones
from ringplane.virtio.blk import SECTOR
from ringplane.virtio.blk_zones import REPORT_SIZE

MAGIC = b"ringplane zones1"
PAGE = 4096

# boot: the machine's boot id when this file was last opened for writing; in_use: not closed since. Sizes in bytes.
HEADER = np.dtype(
    [
        ("magic", "S16"),
        ("boot", "S36"),
        ("in_use", "u1"),
        ("padding", "u1", (3,)),
        ("size", "<i8"),
        ("capacity", "<i8"),
        ("count", "<i8"),
        ("conventional", "<i8"),
    ]
)

OPEN = (blk_zones.VIRTIO_BLK_ZS_IOPEN, blk_zones.VIRTIO_BLK_ZS_EOPEN)

# An append must be complete or fail as a whole, so its size is limited.
MAX_APPEND_SECTORS = 2048


class ZoneFile:
    """The zones of a source; `address` is the address of their ZONES struct."""

    def __init__(
        self,
        source: Source,
        model: ZoneModel,
        *,
        block_size: int,
        read_only: bool = False,
        shared: bool = False,
        opener: Opener = LOCAL,
    ) -> None:
        """Open the file, or create it for a source without data; raises ImageError, OSError and OpenerEnded.

        The pointers of the writes that the last process completed count, or, after a crash of the machine, those of its
        stable writes. Data in the image beyond them is erased. `shared`: another process still writes; it hands over
        its zones (`resume_from`) when it has stopped.
        """
        self.model, self.source, self.block_size = model, source, block_size
        self.read_only = read_only or source.read_only
        self.path, self.count = _divide(source, model)
        self._opener = opener
        self.created = not self.path.exists()
        if self.created:
            _check_blank(source, self.path)
            opener.create(self.path, _file_size(self.count))
        with contextlib.ExitStack() as undo:
            undo.callback(self.unlink)
            self._fd = opener.open(self.path, read_only=self.read_only, direct=False)
            undo.callback(os.close, self._fd)
            if _is_unfinished(self._fd):
                _check_blank(source, self.path)
                self._fill()
            self._map()
            self._load(shared)
            undo.pop_all()

    def _fill(self) -> None:
        """Write what a new file has, its header last, and all its space, so that the mapping cannot run out of space.

        Written, because not every file system can allocate space.
        """
        model, header = self.model, np.zeros(1, HEADER)
        header[0]["magic"], header[0]["size"], header[0]["capacity"] = MAGIC, model.size, model.capacity
        header[0]["count"], header[0]["conventional"] = self.count, model.conventional
        for content, start in ((bytes(_file_size(self.count)), 0), (header.tobytes(), 0)):
            _write(self._fd, content, start)
            os.fsync(self._fd)
        self._opener.store_name(self.path)

    def _map(self) -> None:
        size = _file_size(self.count)
        if os.fstat(self._fd).st_size != size:
            raise ImageError(f"{self.path}: the size is not that of {self.count} zones of {self.model.size} bytes")
        access = mmap.ACCESS_READ if self.read_only else mmap.ACCESS_WRITE
        self._memory = mmap.mmap(self._fd, size, access=access)
        self._header: npt.NDArray[np.void] = np.frombuffer(self._memory, HEADER, 1)
        self._reached = np.frombuffer(self._memory, np.int64, self.count, PAGE)
        self._stable = np.frombuffer(self._memory, np.int64, self.count, PAGE + _array_size(self.count))

    def _load(self, shared: bool) -> None:
        header = self._header[0]
        if bytes(header["magic"]) != MAGIC:
            raise ImageError(f"{self.path}: not a zone file of ringplane")
        described = (header["size"], header["capacity"], header["count"], header["conventional"])
        model = self.model
        if described != (model.size, model.capacity, self.count, model.conventional):
            raise ImageError(
                f"{self.path}: describes other zones: {header['count']} of {header['size']} bytes "
                f"with a capacity of {header['capacity']}, {header['conventional']} of them conventional"
            )
        boot = procfs.boot_id()
        # If it is unknown whether the machine was restarted, only what was flushed counts.
        crashed = header["in_use"] and (not boot or bytes(header["boot"]) != boot)
        pointers = (self._stable if crashed else self._reached).copy()
        if not ((pointers >= 0) & (pointers <= model.capacity // SECTOR)).all():
            raise ImageError(f"{self.path}: damaged: a write pointer is outside its zone")
        self._make_structs(pointers)
        if self.read_only or shared:
            return
        if header["in_use"]:
            self._forget_unwritten(pointers)
        self._reached[:] = self._stable[:] = pointers
        header["boot"], header["in_use"] = boot, 1
        os.fdatasync(self._fd)

    def _make_structs(self, pointers: npt.NDArray[np.int64]) -> None:
        model = self.model
        self._table = np.zeros(self.count, ZONE)
        self._table["start"] = np.arange(self.count) * (model.size // SECTOR)
        self._table["pointer"] = pointers
        # No zone is open when the device starts.
        self._table["state"] = np.where(
            pointers == 0,
            blk_zones.VIRTIO_BLK_ZS_EMPTY,
            np.where(
                pointers == model.capacity // SECTOR, blk_zones.VIRTIO_BLK_ZS_FULL, blk_zones.VIRTIO_BLK_ZS_CLOSED
            ),
        )
        self._table["state"][: model.conventional] = blk_zones.VIRTIO_BLK_ZS_NOT_WP
        self._snapshot = np.zeros(self.count, np.int64)
        self._zones: npt.NDArray[np.void] = np.zeros(1, ZONES)
        self.address = int(self._zones.ctypes.data)
        zones = self._zones[0]
        zones["size"], zones["capacity"], zones["count"] = model.size // SECTOR, model.capacity // SECTOR, self.count
        zones["conventional"], zones["fd"] = model.conventional, self._fd
        zones["max_open"], zones["max_active"] = model.max_open, model.max_active
        zones["max_append"], zones["block_mask"] = self.max_append_sectors, self.block_size - 1
        self._scratch = np.zeros(REPORT_SIZE, np.uint8)
        zones["scratch"] = self._scratch.ctypes.data
        zones["active"] = int((self._table["state"] == blk_zones.VIRTIO_BLK_ZS_CLOSED).sum())
        zones["table"], zones["snapshot"] = self._table.ctypes.data, self._snapshot.ctypes.data
        zones["reached"], zones["stable"] = self._reached.ctypes.data, self._stable.ctypes.data

    def attach(self, backing: int, notes: int) -> None:
        """Connect the ZONES struct with the BACKING at this address, and with an int64 per slot (zoned.py)."""
        self._zones["backing"], self._zones["notes"] = backing, notes

    @property
    def failed(self) -> bool:
        """Whether a sync has failed, so that later ones cannot be trusted."""
        return bool(self._zones["failed"][0])

    @property
    def max_append_sectors(self) -> int:
        return min(MAX_APPEND_SECTORS, self.model.capacity // SECTOR)

    def _forget_unwritten(self, pointers: npt.NDArray[np.int64]) -> None:
        """Sectors beyond a pointer read as zeros (section 5.2.6.2), even if a write or reset was interrupted there."""
        size = self.model.size
        for index in range(self.model.conventional, self.count):
            start = index * size + int(pointers[index]) * SECTOR
            self.source.erase(start, (index + 1) * size)

    def sync(self) -> None:
        """Like `sync` of layers/zones.py, while no request is in flight; raises OSError."""
        if self.read_only:
            return
        if failed := int(self._zones[0]["failed"]):
            raise OSError(-failed, f"an earlier sync failed: {os.strerror(-failed)}")
        try:
            self.source.sync()
            self._stable[:] = self._reached
            os.fdatasync(self._fd)
        except OSError as error:
            # A later fdatasync(2) may succeed, although the data is lost (flush.py).
            self._zones["failed"] = -(error.errno or errno.EIO)
            raise

    def snapshot(self) -> bytes:
        """The field `failed`, then all states, then all pointers, as int64; only while no request is in flight."""
        values = (self._zones["failed"], self._table["state"], self._table["pointer"])
        return b"".join(each.tobytes() for each in values)

    def resume_from(self, saved: bytes) -> None:
        """Take over the zones (`snapshot`) of a process that has stopped writing; raises ImageError."""
        if len(saved) != 8 * (1 + 2 * self.count):
            raise ImageError(f"{self.path}: the zones handed over by the other process do not match")
        values = np.frombuffer(saved, np.int64)
        state, pointer = values[1:].reshape(2, self.count)
        self._zones["failed"] = values[0]
        self._table["state"], self._table["pointer"] = state, pointer
        self._zones["open"] = np.isin(state, OPEN).sum()
        self._zones["active"] = np.isin(state, (*OPEN, blk_zones.VIRTIO_BLK_ZS_CLOSED)).sum()

    def abandon(self) -> None:
        """Close the file without changing it, because another process continues with it."""
        fd, self._fd = self._fd, -1
        os.close(fd)

    def close(self) -> None:
        """Sync, mark the file as cleanly closed, and close it; no queue may be running.

        A second call does nothing. Raises OSError if storage fails: then the next start recovers.
        """
        if self._fd < 0:
            return
        try:
            self.sync()
            if not self.read_only:
                self._header[0]["in_use"] = 0
                os.fdatasync(self._fd)
        finally:
            self.abandon()

    def unlink(self) -> None:
        """Remove the file if this object created it.

        A process that has given up the right to do so leaves it, and reports the first error.
        """
        if self.created:
            with contextlib.suppress(OSError, OpenerEnded):
                self._opener.unlink(self.path)


def path_beside(image: Path) -> Path:
    return image.with_name(f"{image.name}.zones")


def check(source: Source, model: ZoneModel, *, block_size: int) -> None:
    """Raises ImageError and OSError as a ZoneFile would, but creates and changes nothing."""
    path, _ = _divide(source, model)
    if not path.exists() or _is_unfinished_at(path):
        _check_blank(source, path)
        return
    ZoneFile(source, model, block_size=block_size, read_only=True).abandon()
    if not source.read_only and not os.access(path, os.W_OK, effective_ids=True):
        raise ImageError(f"{path}: not writable by this user; change its owner or mode, or serve the disk read-only")


def check_not_zoned(source: Source) -> None:
    """Raises ImageError for the image of a zoned disk: data written without its zones would be lost."""
    if source.file and path_beside(source.file).exists():
        raise ImageError(
            f"{source.title}: this is a zoned disk, because {path_beside(source.file).name} exists; "
            "serve it with --zoned, or remove that file to make it a disk without zones"
        )


def _divide(source: Source, model: ZoneModel) -> tuple[Path, int]:
    """The path of the zone file, and the number of zones; raises ImageError if there can be none."""
    if source.file is None:
        raise ImageError(f"{source.title}: this is not a file, and only a file can be served as a zoned disk")
    if source.size % model.size:
        more = -source.size % model.size
        raise ImageError(
            f"{source.title}: the size is not a multiple of the zone size of {model.size} bytes; "
            f"add {more} bytes with: truncate -s +{more} {shlex.quote(source.title)}"
        )
    count = source.size // model.size
    if model.conventional >= count:
        raise ImageError(
            f"{source.title}: with {count} zones at most {count - 1} can be conventional, not {model.conventional}"
        )
    return path_beside(source.file), count


def _check_blank(source: Source, path: Path) -> None:
    if source.read_only:
        raise ImageError(f"{source.title}: {path.name} is missing, which a read-only zoned disk needs")
    if not source.is_blank():
        raise ImageError(
            f"{source.title}: the image has data, but {path.name} with its write pointers is missing; "
            "create a zoned disk as a new image (--create)"
        )


def _is_unfinished(fd: int) -> bool:
    """Whether its creation was interrupted: then it has no header, and nothing was served with it."""
    return not any(os.pread(fd, HEADER.itemsize, 0))


def _is_unfinished_at(path: Path) -> bool:
    with path.open("rb") as file:
        return _is_unfinished(file.fileno())


def _write(fd: int, content: bytes, start: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(fd, left, start)
        left, start = left[written:], start + written


def _array_size(count: int) -> int:
    return -(-8 * count // PAGE) * PAGE


def _file_size(count: int) -> int:
    return PAGE + 2 * _array_size(count)
