"""Discard, write zeroes and secure erase: their effect on the image, and the status of invalid requests."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.block.sources.memory import MemorySource
from ringplane.dataplane.state import KINDS, MAX_RANGE_SECTORS, MAX_RANGES
from ringplane.virtio.blk import VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_SECURE_ERASE, VIRTIO_BLK_F_WRITE_ZEROES

from .rig import (
    DISCARD,
    IOERR,
    OK,
    OUT,
    SECURE_ERASE,
    UNSUPP,
    WRITE_ZEROES,
    Answer,
    Line,
    Rig,
    RigFactory,
    eventually,
    fetch_only,
    held,
    pattern,
    rig_factory,
)

UNMAP = 1
FEATURES = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
PAGE = 4096
SIZE = 64 * PAGE
DISK = pattern(SIZE)


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path, memory_path: Path) -> Iterator[RigFactory]:
    """Make rigs with images that contain DISK, on tmpfs for engine memory."""
    folder = memory_path if request.param == "memory" else tmp_path
    with rig_factory(folder, DISK, engine=request.param) as factory:
        yield factory


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder on tmpfs."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def line(make_rig: RigFactory) -> Line:
    return make_rig().line().start(features=FEATURES)


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<qII", sector, count, flags)


def pages(first: int, count: int, flags: int = 0) -> bytes:
    return segment(first * 8, count * 8, flags)


def blocks(rig: Rig) -> int:
    """The number of bytes that are allocated for the image."""
    return os.stat(rig.path).st_blocks * 512


def zeroed(content: bytes, *ranges: tuple[int, int]) -> bytes:
    """The content with zeros in these ranges of pages."""
    changed = bytearray(content)
    for first, count in ranges:
        changed[first * PAGE : (first + count) * PAGE] = bytes(count * PAGE)
    return bytes(changed)


def test_a_discarded_range_frees_its_space(line: Line) -> None:
    before = blocks(line.rig)
    assert line.do(DISCARD, data=pages(4, 16)) == Answer(OK, 1, b"")
    assert line.rig.content() == zeroed(DISK, (4, 16))
    assert before - blocks(line.rig) == 16 * PAGE


def test_several_segments_are_one_request(line: Line) -> None:
    before = blocks(line.rig)
    assert line.do(DISCARD, data=pages(0, 1) + pages(63, 1) + pages(8, 2)).status == OK
    assert line.rig.content() == zeroed(DISK, (0, 1), (63, 1), (8, 2))
    assert before - blocks(line.rig) == 4 * PAGE
    counter = line.queue.counters[KINDS.index("discard")]
    assert (int(counter["requests"]), int(counter["bytes"])) == (1, 4 * PAGE)


def test_the_largest_number_of_range_segments(line: Line) -> None:
    every = b"".join(segment(sector, 1) for sector in range(0, 2 * MAX_RANGES, 2))
    assert line.do(WRITE_ZEROES, data=every).status == OK
    expected = bytearray(DISK)
    for sector in range(0, 2 * MAX_RANGES, 2):
        expected[sector * 512 : sector * 512 + 512] = bytes(512)
    assert line.rig.content() == expected
    assert line.do(WRITE_ZEROES, data=every + segment(1, 1)).status == UNSUPP
    assert line.rig.content() == expected


@pytest.mark.parametrize("flags", [0, UNMAP])
@pytest.mark.parametrize(("sector", "count"), [(0, 1), (3, 17), (8, 8), (0, SIZE // 512), (SIZE // 512 - 1, 1)])
def test_zeros(line: Line, flags: int, sector: int, count: int) -> None:
    before = blocks(line.rig)
    assert line.do(WRITE_ZEROES, data=segment(sector, count, flags)) == Answer(OK, 1, b"")
    start, end = sector * 512, (sector + count) * 512
    assert line.rig.content() == DISK[:start] + bytes(end - start) + DISK[end:]
    if not flags:
        assert blocks(line.rig) == before, "storage was given back although that was not allowed"


def test_write_zeroes_with_unmap_makes_a_hole(line: Line) -> None:
    before = blocks(line.rig)
    assert line.do(WRITE_ZEROES, data=pages(8, 8, UNMAP)).status == OK
    assert before - blocks(line.rig) == 8 * PAGE


def test_a_discarded_range_can_be_written_again(line: Line) -> None:
    assert line.do(DISCARD, data=pages(0, 64)).status == OK
    assert line.do(OUT, 8, pattern(PAGE, 7)).status == OK
    assert line.rig.content() == bytes(PAGE) + pattern(PAGE, 7) + bytes(SIZE - 2 * PAGE)
    assert line.do(0, 0, room=3 * PAGE).data == bytes(PAGE) + pattern(PAGE, 7) + bytes(PAGE)


def test_reading_a_hole_keeps_it(line: Line) -> None:
    assert line.do(DISCARD, data=pages(0, 64)).status == OK
    assert line.do(0, 0, room=SIZE).data == bytes(SIZE)
    assert blocks(line.rig) == 0


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(segment(SIZE // 512, 1), IOERR, id="beyond the end"),
        pytest.param(segment(SIZE // 512 - 1, 2), IOERR, id="over the end"),
        pytest.param(segment(0, 0xFFFFFFFF), IOERR, id="endless"),
        pytest.param(segment(0, MAX_RANGE_SECTORS + 1), IOERR, id="longer than offered"),
        pytest.param(segment(-1, 1), IOERR, id="sector of 2^64 - 1"),
        pytest.param(segment(1 << 62, 1), IOERR, id="sector of 2^62"),
        pytest.param(segment(0, 1, 2), UNSUPP, id="reserved flag"),
        pytest.param(segment(0, 1, 0x80000000), UNSUPP, id="last flag"),
        pytest.param(segment(0, 1) + segment(SIZE // 512, 1), IOERR, id="second segment"),
        pytest.param(segment(0, 1) + segment(0, 1, 4), UNSUPP, id="flag of the second segment"),
        pytest.param(b"", IOERR, id="nothing"),
        pytest.param(segment(0, 1)[:-1], IOERR, id="a byte too short"),
        pytest.param(segment(0, 1) + b"\0", IOERR, id="a byte too long"),
        pytest.param(segment(SIZE // 512, 0), OK, id="no sectors, at the end"),
    ],
)
def test_invalid_requests_change_nothing(line: Line, kind: int, data: bytes, status: int) -> None:
    assert line.do(kind, data=data) == Answer(status, 1, b"")
    assert line.rig.content() == DISK
    assert line.do(kind, data=pages(0, 1)).status == OK


def test_discard_has_no_unmap_flag(line: Line) -> None:
    assert line.do(DISCARD, data=pages(0, 1, UNMAP)).status == UNSUPP
    assert line.rig.content() == DISK


def test_ranges_are_whole_blocks(make_rig: RigFactory) -> None:
    line = make_rig(block_size=4096).line().start(features=FEATURES)
    assert line.do(WRITE_ZEROES, data=segment(0, 1)).status == IOERR
    assert line.do(WRITE_ZEROES, data=segment(1, 8)).status == IOERR
    assert line.do(WRITE_ZEROES, data=segment(8, 8)).status == OK


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES, SECURE_ERASE])
def test_requests_that_were_not_negotiated_are_unsupported(make_rig: RigFactory, kind: int) -> None:
    every = FEATURES | VIRTIO_BLK_F_SECURE_ERASE
    own = {DISCARD: VIRTIO_BLK_F_DISCARD, WRITE_ZEROES: VIRTIO_BLK_F_WRITE_ZEROES}.get(kind, VIRTIO_BLK_F_SECURE_ERASE)
    line = make_rig().line().start(features=every & ~own)
    assert line.do(kind, data=pages(0, 1)).status == UNSUPP
    assert line.rig.content() == DISK


def test_secure_erase_of_a_file_is_an_error(make_rig: RigFactory) -> None:
    line = make_rig().line().start(features=VIRTIO_BLK_F_SECURE_ERASE)
    assert line.do(SECURE_ERASE, data=pages(0, 1)).status == IOERR
    assert line.rig.content() == DISK


def test_the_framing_of_segments_has_no_meaning(line: Line) -> None:
    data = pages(0, 1) + pages(2, 1)
    assert line.do(DISCARD, data=data, readable=[7, 9 + 5, 20, 7]).status == OK
    assert line.rig.content() == zeroed(DISK, (0, 1), (2, 1))


def test_a_drain_waits_for_the_helpers(line: Line) -> None:
    with held(line.worker):
        for number in range(20):
            line.put(WRITE_ZEROES, data=pages(3 * number, 1))
        line.kick()
        fetch_only(line.worker)
    line.stop()
    assert line.rig.content() == zeroed(DISK, *((3 * number, 1) for number in range(20)))


def test_a_failure_of_the_storage_is_reported(make_rig: RigFactory, caplog: pytest.LogCaptureFixture) -> None:
    rig = make_rig()
    line = rig.line().start(features=FEATURES)
    fd = os.open(rig.path, os.O_RDONLY)
    rig.source.backing._record["fd"] = fd
    if isinstance(rig.source, MemorySource):
        rig.source.mapped._record["lost"], rig.source.mapped._record["fd"] = 1, fd
    assert line.do(WRITE_ZEROES, data=pages(0, 1)).status == IOERR
    # Advice, which may be ignored.
    assert line.do(DISCARD, data=pages(0, 1)).status == OK
    line.stop()
    assert eventually(
        lambda: "discard of 4096 bytes at 0 failed: Bad file descriptor; discard is advice" in caplog.text
    )
    os.close(fd)
    assert rig.content() == DISK


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([DISCARD, WRITE_ZEROES, OUT]),
            st.integers(0, SIZE // 512 - 1),
            st.integers(1, 64),
            st.integers(0, 1),
        ),
        max_size=20,
    )
)
def test_any_sequence_agrees_with_the_model(line: Line, steps: list[tuple[int, int, int, int]]) -> None:
    """One request at a time; a discarded range of a file reads as zeros."""
    model = bytearray(line.rig.content())
    for number, (kind, sector, count, flags) in enumerate(steps):
        count = min(count, SIZE // 512 - sector)
        place = slice(sector * 512, (sector + count) * 512)
        if kind == OUT:
            data = pattern(count * 512, number)
            assert line.do(OUT, sector, data).status == OK
        else:
            data = bytes(count * 512)
            assert line.do(kind, data=segment(sector, count, flags if kind == WRITE_ZEROES else 0)).status == OK
        model[place] = data
        assert line.do(0, sector, room=count * 512).data == data
    assert line.rig.content() == model
