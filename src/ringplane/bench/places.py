"""Places for images: a directory, a new file, a loop device, an existing target here, or an image elsewhere.

Images that are created are removed afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ringplane.bench.errors import BenchError
from ringplane.bench.results import Storage
from ringplane.block.image import ImageError, create
from ringplane.options.image_address import ImageAddress, RemoteImage, parse_image
from ringplane.options.sizes import format_size

LOOP = "loop:"
# The images of a bench need room for a part that is checked and one that is measured, at any depth.
SMALLEST = 32 << 20
# File systems in memory.
MEMORY = ("tmpfs", "ramfs", "hugetlbfs")


@dataclass(frozen=True, slots=True)
class Place:
    """A place for the images of a bench.

    `how` is folder (files in a new folder inside `path`), loop (such files, each behind a loop device), new (`path` and
    `path`.2 and so on), existing (`path`, a file or block device) or remote (the image at `address`). All back ends
    share an image that exists. Only a remote one can be measured without writing to it (not `writable`).
    """

    how: Literal["folder", "loop", "new", "existing", "remote"]
    address: ImageAddress
    storage: Storage
    writable: bool = True

    @property
    def path(self) -> Path:
        """Of a place on this machine."""
        assert isinstance(self.address, Path)
        return self.address

    @property
    def is_remote(self) -> bool:
        return isinstance(self.address, RemoteImage)

    @property
    def is_shared(self) -> bool:
        """Whether all back ends use the same image."""
        return self.how in ("existing", "remote")

    @property
    def identity(self) -> Hashable:
        """Equal for two places that are the same."""
        return self.address.identity if isinstance(self.address, RemoteImage) else (self.how, self.address.resolve())


def parse(text: str, *, destroy: bool = False) -> Place:
    """Parse DIRECTORY, loop:DIRECTORY, IMAGE (with `destroy` it may exist) or ADDRESS; raises BenchError."""
    try:
        address = parse_image(text)
    except ValueError as error:
        raise BenchError(str(error)) from None
    return _remote(address, destroy) if isinstance(address, RemoteImage) else _local(text, destroy)


def _remote(address: RemoteImage, destroy: bool) -> Place:
    if address.without_secrets != address:
        raise BenchError(f"{address.title}: a report shows the command, and no key may be in it; use keyfile=PATH")
    return Place("remote", address, Storage(address.title, address.source, address.source.upper()), writable=destroy)


def _local(text: str, destroy: bool) -> Place:
    path = Path(text.removeprefix(LOOP))
    if text.startswith(LOOP):
        if not path.is_dir():
            raise BenchError(f"{text}: the directory {path} does not exist; create it first")
        return Place("loop", path, Storage(f"loop device on {path}", "loop", file_system(path)))
    if path.is_dir():
        return Place("folder", path, _storage(str(path), path))
    if not path.exists() and not path.is_symlink():
        if not path.parent.is_dir():
            raise BenchError(f"{path}: the directory {path.parent} does not exist; create it first")
        return Place("new", path, _storage(str(path), path.parent))
    if not destroy:
        raise BenchError(
            f"{path}: exists already; name a directory or a new file, or add --destroy-data to overwrite it: ALL DATA "
            "IN IT IS LOST"
        )
    return Place("existing", path, _existing(path))


def _storage(name: str, folder: Path) -> Storage:
    medium = file_system(folder)
    return Storage(f"{name} ({medium})", "tmpfs" if medium in MEMORY else "disk", medium)


def _existing(path: Path) -> Storage:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    if stat.S_ISREG(mode):
        return _storage(str(path), path.resolve().parent)
    if not stat.S_ISBLK(mode):
        raise BenchError(f"{path}: is neither a regular file nor a block device; name another place")
    _refuse_used_device(path)
    return Storage(
        f"{path} (block device)", "loop" if path.resolve().name.startswith("loop") else "disk", "block device"
    )


def _refuse_used_device(path: Path) -> None:
    """Raise BenchError for a block device that is mounted or otherwise used by the kernel (O_EXCL, open(2))."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        busy = error.errno == errno.EBUSY
        why = "is mounted or in use; name an unused device" if busy else f"cannot be opened: {error.strerror}"
        raise BenchError(f"{path}: {why}") from None


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on, as in /proc/self/mountinfo (proc(5)); "unknown" if it is not."""
    device = os.stat(path).st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    found = "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == numbers:
            found = fields[fields.index("-") + 1]
    return found


@contextlib.contextmanager
def images_of(place: Place, count: int, size: int) -> Iterator[Sequence[ImageAddress]]:
    """What `count` back ends serve: images of `size` bytes here, or one image elsewhere. Raises BenchError."""
    if place.is_remote:
        yield [place.address] * count
        return
    with images(place, count, size) as paths:
        yield paths


@contextlib.contextmanager
def images(place: Place, count: int, size: int) -> Iterator[list[Path]]:
    """`count` images of `size` bytes in a place on this machine, removed afterwards.

    Of an existing target, that one `count` times. Raises BenchError.
    """
    if place.how == "existing":
        yield [place.path] * count
        return
    with contextlib.ExitStack() as stack:
        if place.how == "new":
            paths = [place.path, *(Path(f"{place.path}.{number}") for number in range(2, count + 1))]
        else:
            folder = stack.enter_context(_folder(place.path))
            paths = [folder / f"{number}.img" for number in range(1, count + 1)]
        for path in paths:
            stack.enter_context(_file(path, size))
        yield [stack.enter_context(loop_device(path)) for path in paths] if place.how == "loop" else paths


def rehearse(place: Place, count: int, size: int) -> None:
    """Raise BenchError if the images cannot be created; called before measuring anything."""
    if not place.is_shared:
        check_room(place.path if place.path.is_dir() else place.path.parent, count * size)
        with images(place, 1, 1 << 20):
            pass


@contextlib.contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix="ringplane-bench-", dir=parent))
    except OSError as error:
        raise BenchError(f"{parent}: no images can be created there: {error.strerror}; name another place") from None
    try:
        yield folder
    finally:
        folder.rmdir()


def check_room(folder: Path, needed: int) -> None:
    """Raise BenchError if so many bytes are not free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BenchError(
            f"{folder}: the images need {format_size(needed)}, but only {format_size(free)} are free; choose a smaller "
            "--size"
        )


@contextlib.contextmanager
def _file(path: Path, size: int) -> Iterator[None]:
    try:
        create(path, size)
    except ImageError as error:
        raise BenchError(str(error)) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """A loop device over a file, with direct I/O if the file system supports it; raises BenchError."""
    if not shutil.which("losetup"):
        raise BenchError("losetup is not installed, and loop devices need it: apt install mount")
    device = _attach(path)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=False, capture_output=True)


def _attach(path: Path) -> Path:
    why = ""
    for direct in ("on", "off"):
        command = ["losetup", "--find", "--show", f"--direct-io={direct}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return Path(done.stdout.strip())
        why = (done.stderr.strip().splitlines() or [f"losetup exited with status {done.returncode}"])[-1]
        _detach_from(path)
    hint = "" if os.geteuid() == 0 else "; loop devices need root"
    raise BenchError(f"{path}: a loop device cannot be set up: {why}{hint}")


def _detach_from(path: Path) -> None:
    """Detach the loop device of a file: if direct I/O is refused, losetup may leave it attached."""
    done = subprocess.run(
        ["losetup", "--noheadings", "--output", "NAME", "--associated", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    for device in done.stdout.split():
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
