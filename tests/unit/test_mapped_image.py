"""Engine `memory` on real tmpfs and hugetlbfs: holes stay holes, and changes of the image by others are harmless."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.block import mapped_image
from ringplane.block.image import ImageError
from ringplane.control.config import read_config
from ringplane.control.rehearsal import find_problems
from ringplane.control.start import serve
from ringplane.driver.driver import Driver, segments
from ringplane.driver.load import Load, check, fill, run_load
from ringplane.native import sigbus
from ringplane.system import libc
from ringplane.virtio.blk import VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES

from .rig import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    PATIENCE,
    WRITE_ZEROES,
    Answer,
    Line,
    RigFactory,
    cuts,
    is_mapped,
    loop_device,
    pattern,
    rig_factory,
)

SIZE = 1 << 20
PAGE = 4096
SECTORS = PAGE // 512
MEMORY_SIZE = 64 << 20
TRUNCATED = "pages of the image were lost"


def is_of_type(path: Path, magic: int) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return libc.file_system_type(fd) == magic
    finally:
        os.close(fd)


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not is_of_type(shm, libc.TMPFS_MAGIC):
        pytest.skip("/dev/shm is not a tmpfs here")
    folder = Path(tempfile.mkdtemp(prefix="ringplane-test-", dir=shm))
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def mounted(path: Path, kind: str, options: str) -> Iterator[Path]:
    """A mounted file system; needs root, and a container may still forbid it."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", kind, "-o", options, kind, path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{kind} cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        gc.collect()
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one MiB."""
    with mounted(tmp_path / "small", "tmpfs", f"size={SIZE}") as path:
        yield path


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs with eight free pages of two MiB."""
    control = Path("/proc/sys/vm/nr_hugepages")
    if not os.access(control, os.W_OK):
        pytest.skip("huge pages cannot be set aside without root")
    before = control.read_text()
    try:
        control.write_text(str(int(before) + 8))
        if int(control.read_text()) < int(before) + 8:
            pytest.skip("there is no memory for huge pages")
        with mounted(tmp_path / "huge", "hugetlbfs", "pagesize=2M") as path:
            yield path
    finally:
        control.write_text(before)


@pytest.fixture
def make_rig(tmpfs: Path) -> Iterator[RigFactory]:
    """Make rigs with images on tmpfs: with this content, or sparse with so many bytes."""
    with rig_factory(tmpfs, engine="memory") as factory:
        yield factory


def allocated(path: Path) -> int:
    """The number of bytes that are allocated for the image."""
    return os.stat(path).st_blocks * 512


def read(line: Line, sector: int, size: int) -> bytes:
    answer = line.do(IN, sector, room=size)
    assert answer == Answer(OK, size + 1, answer.data)
    return answer.data


def write(line: Line, sector: int, data: bytes) -> int:
    return line.do(OUT, sector, data).status


# Holes.


def test_reading_holes_gives_zeros_and_allocates_nothing(make_rig: RigFactory) -> None:
    line = make_rig(SIZE).line().start()
    assert read(line, 0, SIZE) == bytes(SIZE)
    for sector in range(0, SIZE // 512, 37):
        line.rig.guest.free = 1 << 21
        assert read(line, sector, 512) == bytes(512)
    assert allocated(line.rig.path) == 0


def test_writing_allocates_only_the_written_pages(make_rig: RigFactory) -> None:
    line = make_rig(SIZE).line().start()
    pages = 0
    for sector, size in ((0, 512), (3, 512), (8 * SECTORS, PAGE), (20 * SECTORS + 7, 1024), (SIZE // 512 - 1, 512)):
        assert write(line, sector, pattern(size, sector)) == OK
        assert read(line, sector, size) == pattern(size, sector)
        pages = {0: 1, 3: 1, 64: 2, 167: 4}.get(sector, 5)
        assert allocated(line.rig.path) == pages * PAGE
    # The rest of these pages is zeros.
    assert read(line, 1, 1024) == bytes(1024)
    assert read(line, SIZE // 512 - 8, 7 * 512) == bytes(7 * 512)


def test_a_request_partly_in_a_hole(make_rig: RigFactory) -> None:
    """One request over pages with and without memory."""
    rig = make_rig(SIZE)
    with open(rig.path, "r+b") as file:
        file.seek(5 * PAGE)
        file.write(b"x" * PAGE)
    line = rig.line().start()
    assert read(line, 4 * SECTORS, 3 * PAGE) == bytes(PAGE) + b"x" * PAGE + bytes(PAGE)
    assert allocated(rig.path) == PAGE
    assert write(line, 4 * SECTORS + 1, b"y" * 2 * PAGE) == OK
    assert allocated(rig.path) == 3 * PAGE
    assert rig.content()[4 * PAGE + 512 :][: 2 * PAGE] == b"y" * 2 * PAGE


def test_allocated_pages_are_detected(tmpfs: Path) -> None:
    path = tmpfs / "sparse"
    path.touch()
    expected = bytearray(64)
    randomness = random.Random(4)
    with open(path, "r+b") as file:
        file.truncate(64 * PAGE - 512)
        for _ in range(20):
            page = randomness.randrange(64)
            file.seek(page * PAGE + randomness.randrange(8) * 512)
            file.write(b"x")
            file.flush()
            expected[page] = 1
            assert mapped_image.pages_with_memory(file.fileno(), os.stat(path).st_size).tobytes() == bytes(expected)


def test_a_full_file_system_fails_only_that_write(small_tmpfs: Path, make_rig: RigFactory) -> None:
    line = make_rig(2 * SIZE, small_tmpfs / "disk.img").line().start()
    written = [number for number in range(2 * SIZE // PAGE) if write(line, number * SECTORS, page_of(number)) == OK]
    assert SIZE // PAGE // 2 < len(written) <= SIZE // PAGE
    assert written == list(range(len(written)))
    full = len(written)
    line.rig.guest.free = 1 << 24
    assert write(line, full * SECTORS, page_of(1)) == IOERR
    # Reads and writes of allocated pages still work; holes read as zeros.
    for number in written:
        assert read(line, number * SECTORS, PAGE) == page_of(number)
        assert write(line, number * SECTORS + 1, b"z" * 512) == OK
    assert read(line, full * SECTORS, PAGE) == bytes(PAGE)
    assert line.do(FLUSH).status == OK
    assert not line.rig.source.mapped.lost
    # A write of which only the beginning has space.
    assert write(line, (full - 1) * SECTORS, b"w" * 2 * PAGE) == IOERR
    os.truncate(line.rig.path, 2 * SIZE)
    assert read(line, (full - 2) * SECTORS, PAGE) == page_of(full - 2)[:512] + b"z" * 512 + page_of(full - 2)[1024:]


def page_of(number: int) -> bytes:
    return number.to_bytes(2, "little") * (PAGE // 2)


def test_a_punched_hole_that_cannot_be_filled_again(
    small_tmpfs: Path, make_rig: RigFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy would end with SIGBUS, because the page cannot be allocated again."""
    line = make_rig(pattern(SIZE // 2), small_tmpfs / "disk.img").line().start()
    assert read(line, 0, SIZE // 2) == pattern(SIZE // 2)
    punch(line.rig.path, 8 * PAGE, 4 * PAGE)
    with open(small_tmpfs / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(PAGE)):
            pass
    assert write(line, 8 * SECTORS, b"x" * PAGE) == IOERR
    assert read(line, 8 * SECTORS, 4 * PAGE) == bytes(4 * PAGE)
    assert write(line, 0, b"y" * 512) == OK
    os.unlink(small_tmpfs / "filler")
    assert write(line, 8 * SECTORS, b"x" * PAGE) == OK
    expected = bytearray(pattern(SIZE // 2))
    expected[8 * PAGE : 12 * PAGE] = b"x" * PAGE + bytes(3 * PAGE)
    expected[:512] = b"y" * 512
    assert line.rig.content() == expected
    assert read(line, 0, SIZE // 2) == expected
    assert len([record for record in caplog.records if TRUNCATED in record.message]) == 1


# Others change the image while it is served.


def punch(path: Path, offset: int, size: int) -> None:
    subprocess.run(["fallocate", "-p", "-o", str(offset), "-l", str(size), path], check=True)


def test_a_punched_hole_reads_as_zeros_and_takes_writes(make_rig: RigFactory) -> None:
    line = make_rig(pattern(SIZE)).line().start()
    assert read(line, 0, SIZE) == pattern(SIZE)
    expected = bytearray(pattern(SIZE))
    for number in range(5):
        line.rig.guest.free = 1 << 24
        start = (number * 7 + 1) * PAGE
        punch(line.rig.path, start, 3 * PAGE)
        expected[start : start + 3 * PAGE] = bytes(3 * PAGE)
        assert write(line, start // 512 + 9, b"x" * 1024) == OK
        expected[start + 9 * 512 : start + 11 * 512] = b"x" * 1024
        assert read(line, 0, SIZE) == expected
    assert line.rig.content() == expected
    assert not line.rig.source.mapped.lost


@pytest.mark.parametrize("end", [0, 512, PAGE, 100 * PAGE, 100 * PAGE + 512])
def test_requests_behind_a_truncated_end_fail_and_others_succeed(
    make_rig: RigFactory, end: int, caplog: pytest.LogCaptureFixture
) -> None:
    content = pattern(SIZE)
    line = make_rig(content).line().start()
    other = line.rig.line().start()
    os.truncate(line.rig.path, end)
    beyond = -(-end // PAGE) * SECTORS
    for each in (line, other):
        assert each.do(IN, beyond, room=PAGE).status == IOERR
        assert each.do(IN, SIZE // 512 - 1, room=512).status == IOERR
    if end >= PAGE:
        assert read(line, 0, PAGE) == content[:PAGE]
        assert line.do(IN, beyond - SECTORS, room=2 * PAGE).status == IOERR
        assert write(other, 1, b"x" * 512) == OK
        assert line.rig.content()[:1536] == content[:512] + b"x" * 512 + content[1024:1536]
    assert len([record for record in caplog.records if TRUNCATED in record.message]) == 1
    # With the old size again: zeros, and any data that is written.
    os.truncate(line.rig.path, SIZE)
    assert read(line, beyond, PAGE) == bytes(PAGE)
    assert write(line, beyond, b"y" * PAGE) == OK
    assert read(other, beyond, PAGE) == b"y" * PAGE
    assert line.rig.content()[beyond * 512 :][:PAGE] == b"y" * PAGE
    assert line.do(FLUSH).status == OK
    failed = f"disk: read of {PAGE} bytes at {beyond * 512} failed: the image ends before that"
    assert [record.message for record in caplog.records if TRUNCATED not in record.message] == [failed]


def test_truncating_an_idle_image_is_harmless(make_rig: RigFactory) -> None:
    """Extending it again, too: its pages are holes then, and are filled like others."""
    line = make_rig(pattern(SIZE)).line().start()
    os.truncate(line.rig.path, 0)
    os.truncate(line.rig.path, SIZE)
    assert read(line, 0, PAGE) == bytes(PAGE)
    assert write(line, 8, b"x" * PAGE) == OK
    assert line.rig.content() == bytes(PAGE) + b"x" * PAGE + bytes(SIZE - 2 * PAGE)


class Hammer:
    """A thread that reads and writes its own sectors, and verifies their contents."""

    def __init__(self, line: Line, sectors: range, safe: int) -> None:
        """Sectors from `safe` on may fail and may become zeros."""
        self.line, self.sectors, self.safe = line, sectors, safe
        self.model: dict[int, bytes] = {}
        self.failures = self.done = 0
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self.start = line.rig.guest.allocate(64 << 10, PAGE)
        self.random = random.Random(sectors.start)
        self.thread = threading.Thread(target=self.work)

    def work(self) -> None:
        try:
            while not self.stop.is_set():
                self.turn()
        except BaseException as error:
            self.wrong.append(repr(error))
            raise

    def turn(self) -> None:
        sector = self.random.choice(self.sectors)
        mine = PrivateMemory(self.line, self.start)
        if self.random.random() < 0.5:
            data = self.random.randbytes(512)
            status = mine.do(OUT, sector, data).status
            if status == OK:
                self.model[sector] = data
        else:
            answer = mine.do(IN, sector, room=512)
            status, expected = answer.status, self.model.get(sector, bytes(512))
            allowed = (expected,) if sector < self.safe else (expected, bytes(512))
            if status == OK and answer.data not in allowed:
                self.wrong.append(f"sector {sector}")
        self.done += 1
        self.failures += status != OK
        if status != OK and sector < self.safe:
            self.wrong.append(f"sector {sector} failed")


class PrivateMemory:
    """Guest memory that one thread uses repeatedly, because `Guest.allocate` is not thread-safe."""

    def __init__(self, line: Line, start: int) -> None:
        self.line, self.start = line, start

    def do(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> Answer:
        with ALLOCATION:
            guest = self.line.rig.guest
            before, guest.free = guest.free, self.start
            pending = self.line.put(kind, sector, data, room)
            guest.free = before
        self.line.kick()
        self.line.wait()
        return self.line.answer(pending)


ALLOCATION = threading.Lock()


def test_truncation_under_load(make_rig: RigFactory, caplog: pytest.LogCaptureFixture) -> None:
    """Two workers and four queues, while the image is repeatedly truncated to half and extended again."""
    half, total = SIZE // 1024, SIZE // 512
    rig = make_rig(SIZE, workers=2)
    lines = [rig.line(number % 2).start(event_idx=number > 1) for number in range(4)]
    # All of them share each page.
    hammers = [Hammer(line, range(number, total, 4), half) for number, line in enumerate(lines)]
    for hammer in hammers:
        hammer.thread.start()
    with open(rig.path, "r+b") as file:
        for _ in range(30):
            time.sleep(0.02)
            file.truncate(SIZE // 2)
            time.sleep(0.01)
            file.truncate(SIZE)
        # From now on a write makes the file longer again, as with other engines, but reads beyond its end fail.
        while not all(hammer.failures for hammer in hammers):
            file.truncate(SIZE // 2)
            time.sleep(0.001)
    for hammer in hammers:
        hammer.stop.set()
        hammer.thread.join(PATIENCE)
    assert [hammer.wrong for hammer in hammers] == [[]] * 4
    assert all(hammer.done > 100 for hammer in hammers)
    assert rig.source.mapped.lost
    assert len([record for record in caplog.records if TRUNCATED in record.message]) == 1
    os.truncate(rig.path, SIZE)
    content = rig.content()
    for hammer in hammers:
        for sector, data in hammer.model.items():
            if sector < half:
                assert content[sector * 512 :][:512] == data
    line = lines[0]
    assert write(line, total - 1, b"x" * 512) == OK
    assert read(line, total - 1, 512) == b"x" * 512


# Sizes and framings.


@pytest.mark.parametrize("size", [512, 3584, 4096, 4608, PAGE * 10 + 512, PAGE * 10 + 3584, SIZE - 512])
@pytest.mark.parametrize("sparse", [False, True])
def test_sizes_that_are_not_whole_pages(make_rig: RigFactory, size: int, sparse: bool) -> None:
    line = make_rig(size if sparse else pattern(size)).line().start()
    last = size // 512 - 1
    before = bytes(size) if sparse else pattern(size)
    assert read(line, 0, size) == before
    assert write(line, last, b"x" * 512) == OK
    assert read(line, last, 512) == b"x" * 512
    assert line.do(IN, last, room=1024).status == IOERR
    assert write(line, last + 1, b"y" * 512) == IOERR
    if last >= 1:
        assert write(line, last - 1, b"z" * 1024) == OK
        assert read(line, last - 1, 1024) == b"z" * 1024
    data = pattern(size, 5)
    assert write(line, 0, data) == OK
    assert read(line, 0, size) == data
    assert os.stat(line.rig.path).st_size == size
    assert line.rig.content() == data
    assert not line.rig.source.mapped.lost


@pytest.mark.parametrize("direct", [None, 0, 1])
def test_buffers_across_the_border_of_guest_memory(make_rig: RigFactory, direct: int | None) -> None:
    """Two adjacent regions: a buffer in both is two unaligned pieces, with holes and with allocated pages."""
    rig = make_rig(SIZE)
    line = rig.line().start(size=256)
    half, randomness = rig.guest.size // 2, random.Random(7)
    model = bytearray(SIZE)
    for number in range(60):
        size = 512 * randomness.randrange(1, 40)
        sector = randomness.randrange((SIZE - size) // 512)
        # The buffers lie across the border; the indirect table, which must not, lies behind it.
        rig.guest.free = half - randomness.randrange(1, size)
        if number % 2:
            data = randomness.randbytes(size)
            model[sector * 512 : sector * 512 + size] = data
            framing = cuts(size + 16, randomness, 20)
            assert line.do(OUT, sector, data, readable=framing, direct=direct, alignment=1) == Answer(OK, 1, b"")
        else:
            framing = cuts(size + 1, randomness, 20)
            answer = line.do(IN, sector, room=size, writable=framing, direct=direct, alignment=1)
            assert answer == Answer(OK, size + 1, bytes(model[sector * 512 : sector * 512 + size]))
    assert rig.content() == model


def test_more_segments_than_one_system_call_accepts(make_rig: RigFactory) -> None:
    """A hole is read and filled by preadv(2) and pwritev(2), which accept 1024."""
    line = make_rig(SIZE).line().start()
    data = pattern(1026 * 512, 6)
    assert line.do(OUT, 0, data, readable=[16, *[512] * 1026], direct=0) == Answer(OK, 1, b"")
    answer = line.do(IN, 0, room=1026 * 512 + 512 * 2, writable=[*[512] * 1025, 512 * 3, 1], direct=0)
    assert answer == Answer(OK, 1028 * 512 + 1, data + bytes(1024))


def test_a_read_only_image(make_rig: RigFactory, tmpfs: Path) -> None:
    path = tmpfs / "read-only.img"
    path.write_bytes(pattern(SIZE))
    os.truncate(path, 2 * SIZE)
    path.chmod(0o444)
    line = make_rig(2 * SIZE, path, read_only=True).line().start()
    assert read(line, 0, 2 * SIZE) == pattern(SIZE) + bytes(SIZE)
    assert write(line, 0, b"x" * 512) == IOERR
    assert allocated(path) == SIZE
    os.truncate(path, PAGE)
    assert line.do(IN, SECTORS, room=512).status == IOERR
    assert read(line, 0, PAGE) == pattern(SIZE)[:PAGE]


def test_many_requests_in_one_turn(make_rig: RigFactory) -> None:
    """Copies are prefetched and done in order, also if the image was truncated between two of them."""
    rig = make_rig(pattern(SIZE), slots=64)
    line = rig.line().start(size=256)
    for cut in (None, SIZE // 2):
        if cut:
            os.truncate(rig.path, cut)
        requests = [(sector, line.put(IN, sector, room=512)) for sector in range(0, SIZE // 512, SIZE // 512 // 60)]
        line.kick()
        line.wait()
        for sector, pending in requests:
            if cut and sector * 512 >= cut:
                assert line.answer(pending).status == IOERR
            else:
                assert line.answer(pending).data == pattern(SIZE)[sector * 512 :][:512]


# The images that it serves.


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def sparse_image(path: Path, size: int = 4 * SIZE) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def check_refused(image: Path, socket_path: Path) -> None:
    """Check that `memory` rejects the image, and that `auto` serves it with another engine."""
    with pytest.raises(ImageError) as raised:
        serve(image, socket_path, engine="memory")
    assert (
        str(raised.value)
        == f"{image}: engine memory serves only images on tmpfs and hugetlbfs; use --engine auto for this image"
    )
    assert not socket_path.exists()
    with serve(image, socket_path) as export, Driver(socket_path, memory_size=MEMORY_SIZE) as driver:
        assert "memory" not in export.disk.how
        driver.write(0, b"x" * 512)
        assert driver.read(0, 512) == b"x" * 512


def test_an_image_on_tmpfs_is_served_from_memory(tmpfs: Path, socket_path: Path) -> None:
    for engine in ("auto", "memory"):
        image = sparse_image(tmpfs / engine)
        with serve(image, socket_path, engine=engine) as export:
            assert export.disk.how == "engine memory"
            assert export.disk.source.notice == ""
            with Driver(socket_path, memory_size=MEMORY_SIZE) as driver:
                driver.write(512, b"x" * 512)
        assert image.read_bytes()[512:1024] == b"x" * 512


def test_other_engines_can_be_chosen_for_it(tmpfs: Path, socket_path: Path) -> None:
    with serve(sparse_image(tmpfs / "image"), socket_path, engine="aio") as export:
        assert "memory" not in export.disk.how
        with Driver(socket_path, memory_size=MEMORY_SIZE) as driver:
            driver.write(0, b"x" * 512)
            assert driver.read(0, 512) == b"x" * 512


def test_an_image_on_a_disk_is_rejected(tmp_path: Path, socket_path: Path) -> None:
    image = sparse_image(tmp_path / "image")
    if is_of_type(image, libc.TMPFS_MAGIC):
        pytest.skip("the temporary folder is a tmpfs")
    check_refused(image, socket_path)


def test_files_created_for_a_rejected_disk_are_removed(tmp_path: Path, socket_path: Path) -> None:
    if is_of_type(tmp_path, libc.TMPFS_MAGIC):
        pytest.skip("the temporary folder is a tmpfs")
    with pytest.raises(ImageError):
        serve(tmp_path / "new", socket_path, engine="memory", create=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_block_device_is_not_memory_even_if_its_node_is_on_a_tmpfs(tmp_path: Path, socket_path: Path) -> None:
    image = sparse_image(tmp_path / "image")
    with loop_device(image) as device:
        check_refused(device, socket_path)


# Huge pages.


def test_huge_pages(hugetlbfs: Path, socket_path: Path) -> None:
    image = sparse_image(hugetlbfs / "image", 8 << 20)
    with serve(image, socket_path, num_queues=2) as export:
        assert export.disk.how == "engine memory"
        with Driver(socket_path, 2, memory_size=MEMORY_SIZE) as driver:
            model, _ = fill(driver, queues=2)
            load = Load(block_size=[512, 4096, 65536], depth=16, queues=2, read_percent=50, requests=20_000)
            result = run_load(driver, replace_model(load, model))
            assert (result.errors, result.mismatches) == (0, 0)
            assert check(driver, model).mismatches == 0
            driver.write((8 << 20) - 512, b"x" * 512)
            driver.flush()
    with open(image, "rb") as file:
        assert file.read()[-512:] == b"x" * 512


def replace_model(load: Load, model: object) -> Load:
    import dataclasses

    return dataclasses.replace(load, verify=True, model=model)  # type: ignore[arg-type]


def test_more_huge_pages_than_there_are(hugetlbfs: Path, socket_path: Path) -> None:
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    image = sparse_image(hugetlbfs / "image", (free + 1) << 21)
    config = socket_path.with_name("disks.toml")
    config.write_text(f'[[disk]]\nimage = "{image}"\nsocket-path = "{socket_path}"\n')
    # `ringplane check` finds the same, and reserves nothing.
    problems = find_problems(read_config(config))
    with pytest.raises(ImageError, match=r"raise sysctl vm\.nr_hugepages") as raised:
        serve(image, socket_path)
    assert problems == [str(raised.value)]
    assert not socket_path.exists()


@pytest.mark.parametrize("flags", [0, 1], ids=["written", "may be holes"])
def test_zeros_in_huge_pages(hugetlbfs: Path, make_rig: RigFactory, flags: int) -> None:
    """hugetlbfs supports neither write(2) nor FALLOC_FL_ZERO_RANGE; holes are whole pages."""
    size, huge = 8 << 20, 2 << 20
    line = (
        make_rig(size, hugetlbfs / "disk.img").line().start(features=VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES)
    )
    model = bytearray(pattern(size))
    for start in range(0, size, SIZE):
        assert line.do(OUT, start // 512, bytes(model[start : start + SIZE])).status == OK
    for start, length in ((0, 512), (huge - 512, 1024), (512, 3 * huge), (huge, huge), (0, size)):
        assert line.do(WRITE_ZEROES, data=segments((start // 512, length // 512, flags))).status == OK
        model[start : start + length] = bytes(length)
        found = b"".join(line.do(IN, place // 512, room=SIZE).data for place in range(0, size, SIZE))
        assert found == model
        assert line.do(DISCARD, data=segments((start // 512, length // 512, 0))).status == OK
        assert line.do(OUT, start // 512, pattern(512)).status == OK
        model[start : start + 512] = pattern(512)


def test_an_image_that_cannot_be_mapped_is_served_by_system_calls(
    tmpfs: Path, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is larger than the address space."""
    size = 1 << 50
    image = sparse_image(tmpfs / "image", size)
    with pytest.raises(ImageError, match=r"cannot be mapped: .*; --engine auto serves it by system calls"):
        serve(image, socket_path, engine="memory")
    with serve(image, socket_path, num_queues=1) as export, Driver(socket_path, memory_size=MEMORY_SIZE) as driver:
        assert "engine memory" not in export.disk.how
        driver.write(size - PAGE, pattern(PAGE))
        driver.write_zeroes(size - PAGE, 512)
        driver.flush()
        assert driver.read(size - PAGE, PAGE) == bytes(512) + pattern(PAGE)[512:]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{image}: cannot be mapped: Cannot allocate memory; it is served by system calls, which take more CPU per I/O"
    ]


def test_truncated_huge_pages(hugetlbfs: Path, make_rig: RigFactory) -> None:
    line = make_rig(8 << 20, hugetlbfs / "disk.img").line().start()
    for megabyte in range(8):
        line.rig.guest.free = 1 << 20
        assert write(line, megabyte * 2048, bytes([megabyte + 1]) * SIZE) == OK
    os.truncate(line.rig.path, 4 << 20)
    line.rig.guest.free = 1 << 20
    assert line.do(IN, 4 * 2048, room=512).status == IOERR
    assert line.do(IN, 5 * 2048, room=SIZE).status == IOERR
    assert line.do(IN, 3 * 2048, room=SIZE).data == bytes([4]) * SIZE
    assert line.rig.source.mapped.lost


# SIGBUS elsewhere.

ELSEWHERE = """
import ctypes, mmap, os, signal, sys, tempfile
from pathlib import Path
{before}
from ringplane.native import sigbus
from ringplane.system import libc
file = tempfile.TemporaryFile(dir="/dev/shm")
file.truncate(8192)
guarded = libc.mmap_shared(file.fileno(), 8192, 0)
lost = ctypes.c_int64(0)
number = sigbus.guard(guarded, 8192, 4096, ctypes.addressof(lost))
file.truncate(4096)
# Ours is caught, again and again.
assert ctypes.string_at(guarded + 4096, 1) == bytes(1) and lost.value == 1
print("caught", flush=True)
other = tempfile.TemporaryFile(dir="/dev/shm")
other.truncate(8192)
mapped = mmap.mmap(other.fileno(), 8192)
other.truncate(0)
{after}
"""


def run_elsewhere(before: str, after: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(ELSEWHERE).format(before=textwrap.dedent(before), after=textwrap.dedent(after))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE * 3)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param("mapped[4096]", id="another mapping"),
        pytest.param("sigbus.release(number); file.truncate(0); ctypes.string_at(guarded, 1)", id="released"),
        pytest.param("os.kill(os.getpid(), signal.SIGBUS); signal.pause()", id="sent by a process"),
    ],
)
def test_sigbus_elsewhere_still_ends_the_process(after: str) -> None:
    done = run_elsewhere("", f"signal.alarm(10)\n{after}\nprint('alive')")
    assert done.stdout == "caught\n", done.stderr
    assert done.returncode == -signal.SIGBUS


def test_a_previous_handler_is_called() -> None:
    done = run_elsewhere("import faulthandler; faulthandler.enable()", "mapped[4096]")
    assert "Fatal Python error: Bus error" in done.stderr
    assert (done.stdout, done.returncode) == ("caught\n", -signal.SIGBUS)


HANDLER = """
import ctypes
libc_ = ctypes.CDLL(None)
libc_.mmap.restype = ctypes.c_void_p
libc_.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
calls = []
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def repair(number, info, context):
    address = ctypes.c_uint64.from_address(info + 16).value
    calls.append(address)
    libc_.mmap(address & ~4095, 4096, 3, 0x32, -1, 0)
action = (ctypes.c_uint64 * 19)()
action[0] = ctypes.cast(repair, ctypes.c_void_p).value
action[17] = 4 | 0x40000000
assert libc_.sigaction(signal.SIGBUS, action, None) == 0
"""


def test_a_previous_handler_that_continues_does_not_replace_ours() -> None:
    """A program that embeds ringplane may handle its own SIGBUS; ringplane's are still handled afterwards."""
    after = """
    view = (ctypes.c_char * 8192).from_buffer(mapped)
    assert ctypes.string_at(ctypes.addressof(view) + 4096, 1) == bytes(1) and len(calls) == 1, calls
    lost.value = 0
    file.truncate(0)
    assert ctypes.string_at(guarded, 1) == bytes(1)
    print(lost.value, len(calls))
    del view
    """
    done = run_elsewhere(HANDLER, after)
    assert (done.stdout, done.returncode) == ("caught\n1 1\n", 0), done.stderr


# Nothing is left.


def guards_in_use() -> int:
    assert sigbus._guards is not None
    return int((sigbus._guards._table["guards"][0]["end"] != 0).sum())


def test_the_mapping_ends_with_the_disk(tmpfs: Path, socket_path: Path) -> None:
    image = sparse_image(tmpfs / "image")
    with open(image) as file:
        export = serve(image, socket_path)
        mapped = export.disk.source.mapped
        assert mapped is not None
        base = int(mapped._record["base"][0])
        assert is_mapped(base, file.fileno())
        before = guards_in_use()
        export.stop()
        assert not is_mapped(base, file.fileno())
        assert guards_in_use() == before - 1


def test_repeated_starts_and_stops_leave_nothing_behind(tmpfs: Path, socket_path: Path) -> None:
    image = sparse_image(tmpfs / "image")

    def left() -> tuple[int, int, int, int]:
        gc.collect()
        mappings = sum(str(image) in line for line in Path("/proc/self/maps").read_text().splitlines())
        return len(os.listdir("/proc/self/fd")), mappings, guards_in_use(), threading.active_count()

    def once(number: int) -> None:
        with serve(image, socket_path, num_queues=1), Driver(socket_path, memory_size=SIZE * 4) as driver:
            assert driver.read(0, 512) == (b"%d" % (number - 1) * 512)[:512] if number else True
            driver.write(0, (b"%d" % number * 512)[:512])

    once(0)
    before = left()
    for number in range(1, 100):
        once(number)
    assert left() == before


def test_a_rejected_disk_beside_one_in_memory_leaves_nothing_behind(tmpfs: Path, socket_path: Path) -> None:
    from ringplane.control.start import serve_all
    from ringplane.options.disk_config import DiskConfig
    from ringplane.options.thread_options import IoThread

    good, bad = sparse_image(tmpfs / "good"), sparse_image(socket_path.with_name("bad"))
    if is_of_type(bad, libc.TMPFS_MAGIC):
        pytest.skip("the temporary folder is a tmpfs")
    disks = [
        DiskConfig(image=path, io_threads=["io0"], socket_path=path.with_suffix(".sock"), engine="memory")
        for path in (good, bad)
    ]
    with pytest.raises(ImageError):
        serve_all(disks, [IoThread("io0")])
    gc.collect()
    assert str(good) not in Path("/proc/self/maps").read_text()


# Everything together.


def test_verified_load_over_a_sparse_image(tmpfs: Path, socket_path: Path) -> None:
    image = sparse_image(tmpfs / "image", 16 * SIZE)
    sizes = [512, 1024, 4096, 8192, 65536]
    with (
        serve(image, socket_path, num_queues=4, io_threads=2) as export,
        Driver(socket_path, 4, memory_size=MEMORY_SIZE) as driver,
    ):
        assert export.disk.how == "engine memory"
        load = Load(
            block_size=sizes, depth=32, queues=4, read_percent=50, flush_every=100, requests=60_000, verify=True
        )
        result = run_load(driver, load)
    assert (result.errors, result.mismatches, result.wrong_lengths) == (0, 0, 0), result
    assert result.sectors_checked > 0
