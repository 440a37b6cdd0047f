"""Guest kernels and host programs: where to find them, and which packages to install if they are missing."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

CLOUD_KERNEL = (
    "a Debian cloud kernel is wanted: install linux-image-cloud-amd64, or unpack a linux-image-*-cloud-amd64 package "
    "with dpkg -x and name the folder in RINGPLANE_GUEST_KERNEL"
)


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the folder of its modules."""

    image: Path
    modules: Path


def need(found: T | None, wanted: str) -> T:
    """The path if it was found. Otherwise skip the test, or fail it if CI=true, where a skip would hide a lost test."""
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(wanted)
    pytest.skip(wanted)


def program(name: str, package: str) -> Path:
    # The PATH of an ordinary user lacks the folders of mkfs and e2fsck.
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Path(need(path, f"the program {name} is wanted: install the Debian package {package}"))


def modules_of(root: Path, version: str) -> Path | None:
    folders = (root / "lib/modules" / version, root / "usr/lib/modules" / version)
    return next((folder for folder in folders if folder.is_dir()), None)


def cloud_kernel(root: Path) -> Kernel | None:
    """The newest cloud kernel below a root folder that also contains its modules."""
    images = sorted((root / "boot").glob("vmlinuz-*-cloud-amd64"), key=lambda image: image.stat().st_mtime)
    for image in reversed(images):
        modules = modules_of(root, image.name.removeprefix("vmlinuz-"))
        if modules is not None:
            return Kernel(image, modules)
    return None


def qemu_kernel() -> Kernel:
    return need(cloud_kernel(Path(os.environ.get("RINGPLANE_GUEST_KERNEL", "/"))), CLOUD_KERNEL)


def zoned_uml_kernel() -> Kernel:
    """A user-mode Linux with zoned disks. Debian does not package one, so it was built from the source package."""
    folder = Path(os.environ.get("RINGPLANE_ZONED_KERNEL", "/nonexistent"))
    wanted = "a kernel for zoned disks is wanted: tests/guest/build-zoned-uml FOLDER makes one; name the folder in "
    image = need(folder / "linux" if (folder / "linux").exists() else None, wanted + "RINGPLANE_ZONED_KERNEL")
    return Kernel(image, folder / "modules")


def uml_kernel() -> Kernel:
    image = program("linux.uml", "user-mode-linux")
    version = subprocess.run([image, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    modules = Path("/usr/lib/uml/modules") / version
    wanted = f"the modules of linux.uml are wanted in {modules}: install the Debian package user-mode-linux"
    return Kernel(image, need(modules if modules.is_dir() else None, wanted))
