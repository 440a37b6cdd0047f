"""Checks of an image on the host after the guest has ended: the file system, its files, and plain bytes."""

import hashlib
import subprocess
from pathlib import Path, PurePosixPath

from . import kernels


def check_filesystem(image: Path) -> None:
    """Check that the host's e2fsck finds nothing to repair."""
    e2fsck = kernels.program("e2fsck", "e2fsprogs")
    checked = subprocess.run([e2fsck, "-fn", image], capture_output=True, text=True)
    assert checked.returncode == 0, f"e2fsck on the host:\n{checked.stdout}{checked.stderr}"


def check_files(image: Path, folder: Path, root: str = "/", at_least: int = 2400) -> None:
    """Check the files below a folder in the image against the checksums that the guest left there as `sums`.

    In the guest, a disk that misplaces every sector in the same way for reads and writes would look right.
    """
    debugfs = kernels.program("debugfs", "e2fsprogs")
    folder.mkdir()
    subprocess.run([debugfs, "-R", f"rdump {root} {folder}", image], capture_output=True, check=True)
    copied = folder / PurePosixPath(root).name
    lines = (copied / "sums").read_text().splitlines()
    assert len(lines) >= at_least
    for line in lines:
        wanted, name = line.split(maxsplit=1)
        assert hashlib.sha256((copied / name).read_bytes()).hexdigest() == wanted, f"{name} differs in the image"


def sha256(image: Path, size: int | None = None, start: int = 0) -> str:
    """The checksum of an image or of a part of it, in the format of sha256sum for its standard input."""
    with image.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(-1 if size is None else size)).hexdigest() + "  -"
