"""Fixtures of the guest tests: a disk image, a back end that serves it, and guests that attach to it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from . import initramfs, kernels
from .back_end_processes import Backend, BackendFactory, launch, wait_for_socket
from .machines import QemuGuest, UmlGuest
from .workloads import Workload

IMAGE_SIZE = 512 << 20

PACKAGES = {
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "split": "coreutils",
    "blkdiscard": "util-linux",
    "fstrim": "util-linux",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "btrfs": "btrfs-progs",
    "blkzone": "util-linux",
    "sqlite3": "sqlite3",
    "postgres": "postgresql",
    "psql": "postgresql",
    "pgbench": "postgresql",
    "setpriv": "util-linux",
}

InitramfsFor = Callable[[kernels.Kernel, Sequence[str], Workload], bytes]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest: boots a Linux guest on a vhost-user disk (seconds to minutes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.guest)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[BackendFactory]:
    """Start back ends, and stop those that the test has not stopped itself."""
    started: list[Backend] = []
    with tempfile.TemporaryDirectory(prefix="ringplane-") as folder:  # a socket's path must be short

        def start(
            image: Path | str, num_queues: int = 2, extra: Sequence[str] = (), *, read_only: bool = False
        ) -> Backend:
            log = tmp_path / f"backend-{len(started)}.log"
            started.append(launch(Path(folder), log, image, num_queues, extra, read_only))
            wait_for_socket(started[-1])
            return started[-1]

        try:
            yield start
            for running in started:
                if not running.stopped:
                    running.stop()
        finally:
            for running in started:
                running.kill()
                print(f"log of {running.log.stem}:\n{running.logged()}")  # pytest shows it when the test fails


@pytest.fixture(scope="session")
def initramfs_for(tmp_path_factory: pytest.TempPathFactory) -> InitramfsFor:
    """Build one initramfs per session for each kernel and set of programs."""
    folder = tmp_path_factory.mktemp("initramfs")

    def build(kernel: kernels.Kernel, modules: Sequence[str], workload: Workload) -> bytes:
        parts = [kernel.image.name, *sorted(workload.programs), *workload.modules, *workload.files]
        built = folder / "-".join(Path(part).name for part in parts)
        if not built.exists():
            busybox = kernels.program("busybox", "busybox-static")
            programs = [kernels.program(name, PACKAGES[Path(name).name]) for name in workload.programs]
            files = [Path(name) for name in workload.files]
            built.write_bytes(initramfs.build(busybox, programs, kernel.modules, (*modules, *workload.modules), files))
        return built.read_bytes()

    return build


@pytest.fixture
def qemu(tmp_path: Path, initramfs_for: InitramfsFor) -> QemuGuest:
    kernel = kernels.qemu_kernel()
    kernels.program("qemu-system-x86_64", "qemu-system-x86")
    return QemuGuest(tmp_path, lambda workload: initramfs_for(kernel, initramfs.MODULES, workload), kernel.image)


@pytest.fixture
def uml(tmp_path: Path, initramfs_for: InitramfsFor) -> UmlGuest:
    kernel = kernels.uml_kernel()
    return UmlGuest(tmp_path, lambda workload: initramfs_for(kernel, initramfs.UML_MODULES, workload), kernel.image)


@pytest.fixture
def zoned_uml(tmp_path: Path, initramfs_for: InitramfsFor) -> UmlGuest:
    """User-mode Linux 6.12 with zoned disks."""
    kernel = kernels.zoned_uml_kernel()
    return UmlGuest(tmp_path, lambda workload: initramfs_for(kernel, (), workload), kernel.image)


@pytest.fixture
def disk_image(tmp_path: Path) -> Path:
    """A sparse raw image."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    return image
