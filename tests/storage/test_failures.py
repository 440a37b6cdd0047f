"""Storage that fails: errors for the driver and in the log; everything else continues."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringplane.control.start import serve_all
from ringplane.driver import Driver
from ringplane.driver.driver import FEATURES, Answer, Ticket, segments
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.virtio.blk import (
    SECTOR,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
)
from unit.rig import small_tmpfs
from unit.test_operations import Idle, attach, do
from unit.waiting import is_idle

from .fuse import HOLD, FuseFile, Operation, Short, mounted, obey
from .serving import PATIENCE, Disk, Served, serving, wait_until

MIB = 1 << 20
SIZE = 4 * MIB
BLOCK = 4096
IOERR, OK = VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK
ENGINES = ["io_uring", "aio"]
# Disks beside one that hangs, which use the page cache.
BUFFERED = 3

engines = pytest.mark.parametrize("engine", ENGINES)
ways = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


@pytest.fixture
def make_fuse(tmp_path: Path) -> Iterator[Callable[..., FuseFile]]:
    with contextlib.ExitStack() as stack:
        yield lambda size=SIZE, name="mounted", **options: stack.enter_context(
            mounted(FuseFile(tmp_path / name, size, **options))
        )


@pytest.fixture
def fuse(make_fuse: Callable[..., FuseFile]) -> FuseFile:
    return make_fuse()


def sparse(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def pattern(number: int, size: int = BLOCK) -> bytes:
    return number.to_bytes(4, "little") * (size // 4)


def write(driver: Driver, offset: int, data: bytes) -> int:
    return driver.request(VIRTIO_BLK_T_OUT, offset // SECTOR, data).status


def read(driver: Driver, offset: int, size: int = BLOCK) -> Answer:
    return driver.request(VIRTIO_BLK_T_IN, offset // SECTOR, read=size)


def flush(driver: Driver, queue: int = 0) -> int:
    return driver.request(VIRTIO_BLK_T_FLUSH, 0, queue=queue).status


def submit(driver: Driver, kind: int, offset: int, data: bytes = b"", room: int = 0, queue: int = 0) -> Any:
    return driver._submit_request(kind, offset // SECTOR, data, room, queue)


def is_done(driver: Driver, submitted: Any) -> bool:
    ticket: Ticket = submitted[1]
    driver._reap(driver.queues[ticket.queue])
    return ticket.used is not None


def only(kind: str, answer: int | Short, start: int = 0, end: int = 1 << 62) -> Callable[[Operation], Any]:
    """A rule: operations of this kind that touch these bytes get this answer."""
    return lambda each: (
        answer if each.kind == kind and each.offset < end and each.offset + max(1, each.size) > start else None
    )


def lines(served: Served, text: str) -> list[str]:
    return [line for line in served.logged().splitlines() if text in line]


def logged_once(served: Served, text: str) -> None:
    """Check that the log has this text exactly once; it may appear a moment after the completion."""
    wait_until(lambda: lines(served, text), f"not logged: {text}")
    assert len(lines(served, text)) == 1, served.logged()


# A file system without space.


@contextlib.contextmanager
def small_disk(folder: Path, kind: str, *options: str, mount: str = "loop") -> Iterator[Path]:
    """A file system on a loop device."""
    folder.mkdir()
    device = sparse(folder.with_suffix(".disk"), {"btrfs": 128, "xfs": 320}.get(kind, 8) * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", *options, device], check=True)
    subprocess.run(["mount", "-o", mount, device, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Use up all free space."""
    path = folder / "filler"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (64 * 1024, BLOCK):
        with contextlib.suppress(OSError):
            while os.write(fd, bytes(size)):
                pass
    # With delayed allocation, the space is only used after this.
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)
    return path


def check_full(served: Served, filler: Path, why: str) -> None:
    """Check a disk of which only the first half has space: which requests fail, which succeed, and recovery."""
    with served.driver() as driver:
        for offset in range(0, SIZE // 4, BLOCK):
            assert write(driver, offset, pattern(offset)) == OK
        assert flush(driver) == OK
        filler_made = fill(filler)
        for offset in range(SIZE // 2, SIZE, BLOCK):
            assert write(driver, offset, pattern(offset)) == IOERR
        # Allocated ranges still work; a hole reads as zeros and stays a hole.
        for offset in range(0, SIZE // 4, BLOCK):
            assert read(driver, offset).data == pattern(offset)
        assert write(driver, BLOCK, pattern(7)) == OK
        assert read(driver, SIZE // 2).data == bytes(BLOCK)
        assert flush(driver) == OK
        logged_once(served, why)
        filler_made.unlink()
        for offset in range(SIZE // 2, SIZE // 2 + SIZE // 8, BLOCK):
            assert write(driver, offset, pattern(offset + 1)) == OK
        assert flush(driver) == OK
        for offset in range(SIZE // 2, SIZE // 2 + SIZE // 8, BLOCK):
            assert read(driver, offset).data == pattern(offset + 1)
        assert read(driver, BLOCK).data == pattern(7)
    wait_until(lambda: lines(served, "more writes have failed"), "the rest was not logged")
    assert f": {SIZE // 2 // BLOCK - 1} more writes have failed; the last one: write" in served.logged()


@pytest.mark.parametrize("engine", ["memory", *ENGINES])
def test_a_full_tmpfs(tmp_path: Path, engine: str) -> None:
    with small_tmpfs(tmp_path / "small", mib=2) as folder:
        image = sparse(folder / "disk.img")
        with serving(Disk(image, engine=engine), engine="io_uring" if engine == "memory" else engine) as served:
            assert f"engine {engine}" in served.announced
            check_full(served, folder, f"write of {BLOCK} bytes at {SIZE // 2} failed: No space left on device")


@engines
def test_a_full_ext4(tmp_path: Path, engine: str) -> None:
    with small_disk(tmp_path / "small", "ext4", "-O", "^has_journal") as folder:
        image = sparse(folder / "disk.img")
        with serving(Disk(image), engine=engine) as served:
            check_full(served, folder, f"write of {BLOCK} bytes at {SIZE // 2} failed: No space left on device")


@engines
def test_a_btrfs_quota(tmp_path: Path, engine: str) -> None:
    """EDQUOT."""
    with small_disk(tmp_path / "small", "btrfs") as folder:
        image = folder / "volume" / "disk.img"
        limit = ["btrfs", "qgroup", "limit", str(SIZE // 2), image.parent]
        for command in (["btrfs", "subvolume", "create", image.parent], ["btrfs", "quota", "enable", folder], limit):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        sparse(image)
        with serving(Disk(image), engine=engine) as served, served.driver() as driver:
            statuses = [write(driver, offset, pattern(offset)) for offset in range(0, SIZE, BLOCK)]
            written = statuses.index(IOERR)
            assert set(statuses[written:]) == {IOERR}
            for number in range(written):
                assert read(driver, number * BLOCK).data == pattern(number * BLOCK)
            logged_once(served, f"write of {BLOCK} bytes at {written * BLOCK} failed: Disk quota exceeded")
            subprocess.run([*limit[:3], "none", image.parent], check=True)
            assert write(driver, SIZE - BLOCK, pattern(1)) == OK


@engines
def test_a_file_size_limit(tmp_path: Path, engine: str) -> None:
    """RLIMIT_FSIZE: EFBIG, and a SIGXFSZ that must not end the process."""
    image = sparse(tmp_path / "disk.img")
    with serving(Disk(image), engine=engine) as served, served.driver() as driver:
        resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (SIZE // 2, resource.RLIM_INFINITY))
        assert write(driver, SIZE // 2 - BLOCK, pattern(1)) == OK
        assert write(driver, SIZE // 2, pattern(2)) == IOERR
        assert write(driver, SIZE // 2 - BLOCK, pattern(3, 2 * BLOCK)) == IOERR
        resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert write(driver, SIZE // 2, pattern(4)) == OK
        assert flush(driver) == OK
        assert image.read_bytes()[SIZE // 2 - BLOCK : SIZE // 2 + BLOCK] == pattern(3) + pattern(4)
        logged_once(served, f"write of {BLOCK} bytes at {SIZE // 2} failed: File too large")


# A device that fails.


@engines
@ways
def test_one_bad_sector(fuse: FuseFile, engine: str, direct: bool) -> None:
    """Adjacent requests become one I/O: only the request with the bad sector fails, and the log says so once."""
    with serving(Disk(fuse.path, direct=direct), engine=engine) as served, served.driver() as driver:
        for kind in ("read", "write"):
            for error in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT):
                for attempt in range(2):
                    fuse.rule = only(kind, error, 5 * BLOCK, 5 * BLOCK + SECTOR)
                    check_bad_place(fuse, driver, kind, 100 * error + attempt)
                logged_once(served, f"{kind} of {BLOCK} bytes at {5 * BLOCK} failed: {os.strerror(error)}")


def check_bad_place(fuse: FuseFile, driver: Driver, kind: str, seed: int) -> None:
    data = [pattern(16 * seed + number) for number in range(16)]
    if kind == "write":
        asked = [submit(driver, VIRTIO_BLK_T_OUT, number * BLOCK, data[number]) for number in range(16)]
    else:
        asked = [submit(driver, VIRTIO_BLK_T_IN, number * BLOCK, room=BLOCK) for number in range(16)]
    answers = [driver._answer(*each) for each in asked]
    assert [number for number in range(16) if answers[number].status != OK] == [5]
    fuse.rule = obey
    if kind == "write":
        assert all(fuse.content[n * BLOCK : (n + 1) * BLOCK] == data[n] for n in range(16) if n != 5)
        assert write(driver, 5 * BLOCK, data[5]) == OK


@engines
def test_short_reads(fuse: FuseFile, engine: str) -> None:
    """A short read is continued; it is an error only when nothing more can be read.

    `test_a_file_size_limit` has short writes: the kernel turns the short writes of a FUSE file system into errors.
    """
    with serving(Disk(fuse.path), engine=engine) as served, served.driver() as driver:
        data = os.urandom(64 * 1024)
        assert write(driver, 0, data) == OK
        fuse.rule = only("read", Short(SECTOR * 5))
        assert read(driver, 0, len(data)).data == data
        fuse.rule = only("read", Short(0))
        assert read(driver, 0, len(data)).status == IOERR
        logged_once(served, f"read of {len(data)} bytes at 0 failed: the image ends before that")
        fuse.rule = obey
        assert read(driver, 0, len(data)).data == data


# An image that others change.


@engines
@ways
def test_an_image_is_truncated(tmp_path: Path, engine: str, direct: bool) -> None:
    image = sparse(tmp_path / "disk.img")
    with serving(Disk(image, direct=direct), engine=engine) as served, served.driver() as driver:
        assert write(driver, 0, pattern(1, 2 * BLOCK)) == OK
        os.truncate(image, BLOCK)
        assert read(driver, 0).data == pattern(1)
        assert [read(driver, offset).status for offset in (BLOCK, SIZE // 2)] == [IOERR] * 2
        assert read(driver, 0, 2 * BLOCK).status == IOERR
        assert flush(driver) == OK
        logged_once(served, "failed: the image ends before that")
        os.truncate(image, SIZE)
        assert read(driver, BLOCK).data == bytes(BLOCK)
        assert write(driver, BLOCK, pattern(2)) == OK


def test_an_image_is_replaced(tmp_path: Path) -> None:
    """The opened file is served, whatever its path leads to now; on SIGHUP the log says so."""
    image = sparse(tmp_path / "disk.img")
    with serving(Disk(image)) as served, served.driver() as driver:
        assert write(driver, 0, pattern(1)) == OK
        os.rename(sparse(tmp_path / "new.img", 2 * SIZE), image)
        assert write(driver, BLOCK, pattern(2)) == OK
        assert [read(driver, offset).data for offset in (0, BLOCK)] == [pattern(1), pattern(2)]
        served.process.send_signal(signal.SIGHUP)
        wait_until(lambda: lines(served, f"has {SIZE} bytes, unchanged"), "SIGHUP was not handled")
        assert lines(
            served, "disk: its path leads to another file now, or to none; the opened one is served until a restart"
        )
        assert image.read_bytes()[: 2 * BLOCK] == bytes(2 * BLOCK)


# Flushes that fail.


@engines
@ways
def test_a_failed_flush_is_never_forgotten(fuse: FuseFile, engine: str, direct: bool) -> None:
    """The storage fails it once; afterwards fsync(2) would succeed."""
    with serving(Disk(fuse.path, 2, direct=direct), engine=engine) as served:
        with served.driver(queues=2) as driver:
            assert write(driver, 0, pattern(1)) == OK
            fuse.rule = only("sync", errno.EIO)
            assert flush(driver) == IOERR
            fuse.rule = obey
            assert [flush(driver, queue) for queue in (0, 1, 0)] == [IOERR] * 3
            assert read(driver, 0).data == pattern(1)
            assert write(driver, 0, pattern(2)) == OK
        with served.driver(queues=2) as driver:
            # The next front end gets the error too.
            assert flush(driver) == IOERR
        logged_once(served, "a flush failed: Input/output error; earlier writes may be lost")
    with serving(Disk(fuse.path, direct=direct), engine=engine) as served, served.driver() as driver:
        assert flush(driver) == OK


@engines
def test_each_flush_reports_a_lost_page(make_fuse: Callable[..., FuseFile], engine: str) -> None:
    """The kernel reports lost pages once per open file: of several concurrent flushes, only one would fail."""
    fuse = make_fuse(write_back=True)
    with serving(Disk(fuse.path, 2, direct=False), engine=engine) as served, served.driver(queues=2) as driver:
        for queue in range(2):
            assert driver.request(VIRTIO_BLK_T_OUT, 8 * queue, pattern(1), queue=queue).status == OK
        fuse.rule = only("write", errno.EIO)
        flushes = [submit(driver, VIRTIO_BLK_T_FLUSH, 0, queue=queue) for queue in (0, 1) * 8]
        assert [driver._answer(*each).status for each in flushes] == [IOERR] * 16
        fuse.rule = obey
        assert [flush(driver, queue) for queue in range(2)] == [IOERR] * 2


@engines
def test_each_write_reports_its_own_lost_page(make_fuse: Callable[..., FuseFile], engine: str) -> None:
    """The same if the driver does not flush."""
    fuse = make_fuse(write_back=True)
    features = FEATURES & ~VIRTIO_BLK_F_FLUSH
    with (
        serving(Disk(fuse.path, direct=False), engine=engine) as served,
        served.driver(feature_bits=features) as driver,
    ):
        assert write(driver, 0, pattern(1)) == OK
        assert fuse.content[:BLOCK] == pattern(1)
        fuse.rule = only("write", errno.EIO, 0, BLOCK)
        writes = [submit(driver, VIRTIO_BLK_T_OUT, number * BLOCK, pattern(2)) for number in range(16)]
        statuses = [driver._answer(*each).status for each in writes]
        # Timing decides which of the others share an fdatasync(2) with it; writes that succeeded are on the storage.
        assert statuses[0] == IOERR
        for number in range(1, 16):
            if statuses[number] == OK:
                assert fuse.content[number * BLOCK : (number + 1) * BLOCK] == pattern(2)


@engines
def test_waiting_flushes_share_the_next_sync(fuse: FuseFile, engine: str) -> None:
    """A sync that has begun does not cover writes that are completed meanwhile, so flushes never join it."""
    with serving(Disk(fuse.path), engine=engine) as served, served.driver() as driver:
        fuse.rule = only("sync", HOLD)
        first = submit(driver, VIRTIO_BLK_T_FLUSH, 0)
        wait_until(lambda: fuse.held, "no sync came")
        others = [submit(driver, VIRTIO_BLK_T_FLUSH, 0) for _ in range(5)]
        # Requests of a ring are fetched in order: when this one is completed, all others are waiting.
        assert read(driver, 0).status == OK
        fuse.answer_one()
        assert driver._answer(*first).status == OK
        wait_until(lambda: fuse.held, "no second sync came")
        assert not any(is_done(driver, each) for each in others)
        fuse.answer_one(errno.EIO)
        assert [driver._answer(*each).status for each in others] == [IOERR] * 5
        assert not fuse.held
        assert flush(driver) == IOERR


# A device that hangs.


@engines
@ways
def test_a_device_that_hangs(make_fuse: Callable[..., FuseFile], tmp_path: Path, engine: str, direct: bool) -> None:
    """Its requests wait, those of other disks on the same I/O thread do not, and nothing busy-waits."""
    fuse = make_fuse()
    images = [sparse(tmp_path / f"{number}.img") for number in range(1 + BUFFERED)]
    disks = [Disk(fuse.path, direct=direct), *(Disk(image, direct=image == images[0]) for image in images)]
    with serving(*disks, engine=engine) as served, contextlib.ExitStack() as stack:
        others = [stack.enter_context(served.driver(number)) for number in range(1, len(disks))]
        for kind in ("read", "write", "sync", "allocate"):
            # Linux AIO does I/O through the page cache inside io_submit(2) (docs/security.md).
            all_hang = engine == "aio" and not direct and kind in ("read", "write")
            with served.driver() as driver:
                check_hanging(served, fuse, driver, kind, [] if all_hang else others)
            for other in others:
                check_served(other)


def check_hanging(served: Served, fuse: FuseFile, driver: Driver, kind: str, others: list[Driver]) -> None:
    ask: dict[str, Callable[[int], Any]] = {
        "read": lambda number: submit(driver, VIRTIO_BLK_T_IN, number * 2 * BLOCK, room=BLOCK),
        "write": lambda number: submit(driver, VIRTIO_BLK_T_OUT, number * 2 * BLOCK, pattern(1)),
        "sync": lambda number: submit(driver, VIRTIO_BLK_T_FLUSH, 0),
        "allocate": lambda number: submit(driver, VIRTIO_BLK_T_DISCARD, 0, segments((number * 16, 8, 0))),
    }
    logged = len(lines(served, "requests in flight"))
    fuse.rule = only(kind, HOLD)
    asked = [ask[kind](number) for number in range(32)]
    wait_until(lambda: fuse.held, "nothing came")
    for other in held_up_by_nothing(others) if kind == "write" else others:
        check_served(other)
    wait_until(lambda: is_idle(served.process.pid), "it is busy waiting")
    assert not any(is_done(driver, each) for each in asked)
    stopping = threading.Thread(target=driver.stop)
    stopping.start()
    if others:
        wait_until(lambda: len(lines(served, "requests in flight")) > logged, "the log does not say what it waits for")
    fuse.release()
    stopping.join(PATIENCE)
    assert not stopping.is_alive()
    assert all(is_done(driver, each) and each[0].written()[-1] == OK for each in asked)


def held_up_by_nothing(others: list[Driver]) -> list[Driver]:
    """Those of the disks whose writes are done while writes of another one hang.

    io_uring gives writes through the page cache to threads of the kernel, and begins none while one of a file with the
    same hash has not ended (io_wq_hash_work); there are 64 hashes (docs/security.md).
    """
    asked = [submit(other, VIRTIO_BLK_T_OUT, 0, pattern(1)) for other in others]

    def done() -> list[Driver]:
        return [other for other, each in zip(others, asked, strict=True) if is_done(other, each)]

    # That all of them have this hash is improbable: 1 in 64 ** BUFFERED.
    wait_until(lambda: not others or (len(done()) > 1 and others[0] in done()), "writes of other disks are held up")
    return done()


@engines
def test_a_stop_that_a_hanging_device_holds_up(fuse: FuseFile, engine: str) -> None:
    """It says what it waits for; a second signal after that ends it, and what was completed is there."""
    with serving(Disk(fuse.path), engine=engine, status=1) as served, served.driver() as driver:
        assert write(driver, 0, pattern(1)) == OK
        fuse.rule = only("read", HOLD)
        submit(driver, VIRTIO_BLK_T_IN, 64 * BLOCK, room=BLOCK)
        wait_until(lambda: fuse.held, "nothing came")
        for _ in range(3):
            served.process.send_signal(signal.SIGINT)
        wait_until(lambda: lines(served, "ends the process without them"), "it does not say what can be done")
        assert served.process.poll() is None
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: lines(served, "stopped by a second signal: 1 request"), "it does not say that it ends")
        wait_until(lambda: not (served.folder / "0.sock").exists(), "its socket stays")
        fuse.release()
        assert fuse.content[:BLOCK] == pattern(1)


def test_disks_whose_storage_hangs_are_removed_beside_others(
    make_fuse: Callable[..., FuseFile], tmp_path: Path
) -> None:
    """close(2) waits for what is in the page cache. Six disks end later, and hold up nothing else."""
    hanging = [make_fuse(name=f"mounted-{number}", write_back=True) for number in range(6)]

    def disk(image: Path, name: str) -> DiskConfig:
        return DiskConfig(image, ("io0",), socket_path=tmp_path / f"{name}.sock", name=name, direct=False, num_queues=1)

    disks = [disk(fuse.path, f"hangs-{number}") for number, fuse in enumerate(hanging)]
    disks += [disk(sparse(tmp_path / f"{name}.img"), name) for name in ("a", "b")]
    interface = Idle(tmp_path / "interface")
    with serve_all(disks, [IoThread("io0")], interface=interface) as server, contextlib.ExitStack() as at_last:
        for fuse in hanging:
            at_last.callback(fuse.release)
        well, other = server.exports[6:]
        for fuse, export in zip(hanging, server.exports, strict=False):
            with attach(export) as driver:
                assert write(driver, 0, pattern(1)) == OK
            fuse.rule = only("write", HOLD)
        removals = [
            server.threads.call(lambda export=export: server.remove(export.name, detach=True))
            for export in server.exports[:6]
        ]
        wait_until(lambda: all(fuse.held for fuse in hanging), "nothing was written when the images were closed")
        with attach(well) as driver:
            check_served(driver)
        well.flush()
        do(server, lambda: server.remove(other.name, detach=True))
        assert not any(removal.done() for removal in removals)
        for fuse in hanging:
            fuse.release()
        for removal in removals:
            removal.result(PATIENCE)
        assert server.exports == (well,)
    assert all(fuse.content[:BLOCK] == pattern(1) for fuse in hanging)


def check_served(driver: Driver) -> None:
    for number in range(50):
        assert write(driver, number * BLOCK, pattern(number)) == OK
        assert read(driver, number * BLOCK).data == pattern(number)
        assert flush(driver) == OK
