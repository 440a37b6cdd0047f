"""The file beside the image of an emulated zoned disk that keeps its zones' write pointers.

A header, then two arrays of pointers (engines/zones.py says what each is for), each beginning at a page.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringplane.engines.ranges import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from ringplane.engines.zones import ZONE, ZONES
from ringplane.image import Image, ImageError
from ringplane.native import libc
from ringplane.values import ZoneModel
from ringplane.virtio import zoned
from ringplane.virtio.blk import SECTOR

MAGIC = b"ringplane zones1"
PAGE = 4096

# boot: of the machine when this file was last written to; in_use: it was not closed since. Sizes in bytes.
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

OPEN = (zoned.VIRTIO_BLK_ZS_IOPEN, zoned.VIRTIO_BLK_ZS_EOPEN)

# Appends are whole or not at all, so not too large.
MAX_APPEND_SECTORS = 2048


class ZoneFile:
    """The zones of an image; `address` is that of their ZONES struct."""

    def __init__(self, image: Image, model: ZoneModel, *, block_size: int, shared: bool = False) -> None:
        """Open the file, or make it for an image without data; raises ImageError and OSError.

        What the last process has told of its writes counts, or, after a crash of the machine, what it had on stable
        storage. What is in the image beyond that is forgotten. `shared`: another process still writes, and hands over
        its zones (`resume_from`) when it has ended to.
        """
        self.model, self.image = model, image
        self.path = path_beside(image.path)
        self.count = _count(image, model, block_size)
        self.created = not self.path.exists()
        if self.created:
            _check_blank(image)
            _create(self.path, model, self.count)
        self._fd = os.open(self.path, os.O_CLOEXEC | (os.O_RDONLY if image.read_only else os.O_RDWR))
        try:
            self._map()
            self._load(shared)
        except BaseException:
            os.close(self._fd)
            if self.created:
                self.path.unlink()
            raise

    def _map(self) -> None:
        size = _file_size(self.count)
        if os.fstat(self._fd).st_size != size:
            raise ImageError(f"{self.path}: has not the size that belongs to {self.count} zones of {self.model.size}")
        access = mmap.ACCESS_READ if self.image.read_only else mmap.ACCESS_WRITE
        self._memory = mmap.mmap(self._fd, size, access=access)
        self._header: npt.NDArray[np.void] = np.frombuffer(self._memory, HEADER, 1)
        self._reached = np.frombuffer(self._memory, np.int64, self.count, PAGE)
        self._stable = np.frombuffer(self._memory, np.int64, self.count, PAGE + _array_size(self.count))

    def _load(self, shared: bool) -> None:
        header = self._header[0]
        if bytes(header["magic"]) != MAGIC:
            raise ImageError(f"{self.path}: is no file of zones")
        described = (header["size"], header["capacity"], header["count"], header["conventional"])
        model = self.model
        if described != (model.size, model.capacity, self.count, model.conventional):
            raise ImageError(
                f"{self.path}: describes other zones: {header['count']} of {header['size']} bytes "
                f"with a capacity of {header['capacity']}, {header['conventional']} of them conventional"
            )
        boot = _boot()
        crashed = bytes(header["boot"]) != boot and header["in_use"]
        pointers = (self._stable if crashed else self._reached).copy()
        if not ((pointers >= 0) & (pointers <= model.capacity // SECTOR)).all():
            raise ImageError(f"{self.path}: is damaged, a write pointer is outside of its zone")
        self._make_structs(pointers)
        if self.image.read_only or shared:
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
        # No zone is open when the device begins.
        self._table["state"] = np.where(
            pointers == 0,
            zoned.VIRTIO_BLK_ZS_EMPTY,
            np.where(pointers == model.capacity // SECTOR, zoned.VIRTIO_BLK_ZS_FULL, zoned.VIRTIO_BLK_ZS_CLOSED),
        )
        self._table["state"][: model.conventional] = zoned.VIRTIO_BLK_ZS_NOT_WP
        self._snapshot = np.zeros(self.count, np.int64)
        self._zones: npt.NDArray[np.void] = np.zeros(1, ZONES)
        self.address = int(self._zones.ctypes.data)
        zones = self._zones[0]
        zones["size"], zones["capacity"], zones["count"] = model.size // SECTOR, model.capacity // SECTOR, self.count
        zones["conventional"], zones["fd"] = model.conventional, self._fd
        zones["max_open"], zones["max_active"] = model.max_open, model.max_active
        zones["max_append"] = self.max_append_sectors
        zones["active"] = int((self._table["state"] == zoned.VIRTIO_BLK_ZS_CLOSED).sum())
        zones["table"], zones["snapshot"] = self._table.ctypes.data, self._snapshot.ctypes.data
        zones["reached"], zones["stable"] = self._reached.ctypes.data, self._stable.ctypes.data

    @property
    def max_append_sectors(self) -> int:
        return min(MAX_APPEND_SECTORS, self.model.capacity // SECTOR)

    def _forget_unwritten(self, pointers: npt.NDArray[np.int64]) -> None:
        """Sectors behind a pointer read as zeros (section 5.2.6.2), also if a write or reset was cut off there."""
        size = self.model.size
        for index in range(self.model.conventional, self.count):
            start = int(pointers[index]) * SECTOR
            with contextlib.suppress(OSError):
                mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                libc.fallocate(self.image.fd, mode, index * size + start, size - start)

    def sync(self) -> None:
        """As `engines.zones.sync`, while no request is in flight; raises OSError."""
        if self.image.read_only:
            return
        if failed := int(self._zones[0]["failed"]):
            raise OSError(-failed, f"{os.strerror(-failed)}, some time ago")
        os.fdatasync(self.image.fd)
        self._stable[:] = self._reached
        os.fdatasync(self._fd)

    def snapshot(self) -> bytes:
        """While no request is in flight: what has failed, and of each zone its state and pointer; all int64."""
        values = (self._zones["failed"], self._table["state"], self._table["pointer"])
        return b"".join(each.tobytes() for each in values)

    def resume_from(self, saved: bytes) -> None:
        """With the zones of a process that has stopped to write. Raises ImageError for those of another disk."""
        if len(saved) != 8 * (1 + 2 * self.count):
            raise ImageError(f"{self.path}: other zones are handed over")
        values = np.frombuffer(saved, np.int64)
        state, pointer = values[1:].reshape(2, self.count)
        self._zones["failed"] = values[0]
        self._table["state"], self._table["pointer"] = state, pointer
        self._zones["open"] = np.isin(state, OPEN).sum()
        self._zones["active"] = np.isin(state, (*OPEN, zoned.VIRTIO_BLK_ZS_CLOSED)).sum()

    def abandon(self) -> None:
        """Let go of the file, as another process goes on with it."""
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """Write down that nothing is unknown, and let go of the file; no queue may be running.

        A second call does nothing. Raises OSError where storage fails: then the next start looks after it.
        """
        if self._fd < 0:
            return
        try:
            self.sync()
            if not self.image.read_only:
                self._header[0]["in_use"] = 0
                os.fdatasync(self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1

    def unlink(self) -> None:
        """Remove it if it was made by this object."""
        if self.created:
            self.path.unlink(missing_ok=True)


def path_beside(image: Path) -> Path:
    return image.with_name(f"{image.name}.zones")


def check_not_zoned(image: Path) -> None:
    """Raises ImageError for the image of a zoned disk: what is written without regard to its zones is lost in them."""
    if path_beside(image).exists():
        raise ImageError(
            f"{image}: is a zoned disk, as {path_beside(image).name} tells; "
            "serve it with --zoned, or remove that file to make it a common one"
        )


def _count(image: Image, model: ZoneModel, block_size: int) -> int:
    """How many zones there are; raises ImageError where the image cannot be zoned so."""
    if not image.is_file:
        raise ImageError(f"{image.path}: only a file can be served as a zoned disk, and this is a block device")
    if image.size % model.size:
        more = -image.size % model.size
        raise ImageError(
            f"{image.path}: its size is no multiple of the zones' {model.size} bytes; "
            f"add {more} bytes with: truncate -s +{more} {image.path}"
        )
    count = image.size // model.size
    if model.conventional >= count:
        raise ImageError(f"{image.path}: has {count} zones, so not all of {model.conventional} can be conventional")
    return count


def _check_blank(image: Image) -> None:
    if image.read_only:
        raise ImageError(f"{image.path}: there is no {path_beside(image.path).name}, which a read-only disk needs")
    try:
        os.lseek(image.fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
        raise
    raise ImageError(
        f"{image.path}: has data, but there is no {path_beside(image.path).name} that tells where its zones' "
        "write pointers are; a zoned disk begins with a new image (--create)"
    )


def _create(path: Path, model: ZoneModel, count: int) -> None:
    """Whole or not at all, and with all its space, so that the mapping cannot run out of it."""
    header = np.zeros(1, HEADER)
    header[0]["magic"], header[0]["size"], header[0]["capacity"] = MAGIC, model.size, model.capacity
    header[0]["count"], header[0]["conventional"] = count, model.conventional
    new = path.with_name(f"{path.name}.new")
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _file_size(count))
        os.pwrite(fd, header.tobytes(), 0)
        os.fsync(fd)
        os.rename(new, path)
    except BaseException:
        os.unlink(new)
        raise
    finally:
        os.close(fd)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The name too must be there after a power cut, if data is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _array_size(count: int) -> int:
    return -(-8 * count // PAGE) * PAGE


def _file_size(count: int) -> int:
    return PAGE + 2 * _array_size(count)


def _boot() -> bytes:
    """Another one after each start of the machine (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
