"""Recordings in the formats of other programs, read by readers of these formats."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from errno import EIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.recordings import blktrace_binary, dm_log_writes, fio_iolog
from ringplane.recordings.entries import (
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    UNFINISHED,
    WRITE,
    ZERO,
    Entry,
    Header,
)
from ringplane.recordings.reader import Recording
from ringplane.recordings.recording_format import RecordingError

from .recording_makers import recording_of

SIZE = 1 << 20


def recorded(*entries: dict[str, Any], header: Header | None = None) -> Recording:
    return recording_of(header or Header(SIZE), *entries)


def write(block: int, **fields: Any) -> dict[str, Any]:
    return {"kind": WRITE, "data": bytes([block]) * 512, "offset": 512 * block} | fields


class Logged(NamedTuple):
    """An entry of a log of dm-log-writes."""

    sector: int
    count: int
    flags: int
    data: bytes


def read_log(content: bytes) -> list[Logged]:
    """As replay-log does it (xfstests, src/log-writes/log-writes.c)."""
    magic, version, count, sector = struct.unpack_from("<QQQI", content)
    assert (magic, version) == (0x6A736677736872, 1)
    place, found = sector, []
    for _ in range(count):
        start, length, flags, text = struct.unpack_from("<QQQQ", content, place)
        # What it calls malformed: an entry of zeros, or one that is not padded with zeros.
        assert flags or length
        assert flags == 8 or content[place + 32] == 0
        data = content[place + 32 : place + 32 + text]
        place += sector
        if length and not flags & 4:
            data = content[place : place + length * sector]
            place += length * sector
        found.append(Logged(start, length, flags, data))
    assert place == len(content)
    return found


def log_of(recording: Recording) -> list[Logged]:
    file = io.BytesIO()
    dm_log_writes.export(recording, file)
    return read_log(file.getvalue())


def test_the_order_of_the_kernel_s_own_example() -> None:
    """Wa,Wb,Wc,Cc,Ca,FLUSH,FUAd,Cb,CFLUSH,CFUAd (drivers/md/dm-log-writes.c): c, a, flush, fua d, then the rest."""
    a, b, c, d = range(1, 5)
    log = log_of(
        recorded(
            write(c, began=0),
            write(a, began=0),
            write(b, began=0),
            {"kind": FLUSH, "began": 2},
            write(d, began=2, flags=FUA),
        )
    )
    assert [(entry.sector, entry.flags) for entry in log] == [(c, 0), (a, 0), (0, 1), (d, 2), (b, 0), (0, 8)]
    assert log[0].data == bytes([c]) * 512
    assert log[-1].data == b"dm-log-writes-end"


def test_each_kind_in_a_log() -> None:
    log = log_of(
        recorded(
            {"kind": ZERO, "offset": 512, "length": 1024},
            {"kind": DISCARD, "offset": 4096, "length": 1 << 19},
            {"kind": MARK, "data": b"here"},
            {"kind": MARK, "data": b"x" * 600},
            write(1, result=-EIO),
            {"kind": FLUSH},
            write(2, flags=UNFINISHED),
        )
    )
    assert log == [
        Logged(0, 0, 8, b"here"),
        Logged(0, 0, 8, b"x" * (512 - 33)),
        Logged(1, 2, 0, bytes(1024)),
        Logged(8, 1024, 4, b""),
        Logged(0, 0, 1, b""),
        Logged(0, 0, 8, b"dm-log-writes-end"),
    ]


def test_the_sectors_of_a_log_are_the_blocks_of_the_disk() -> None:
    header = Header(SIZE, block_size=4096)
    log = log_of(recorded({"kind": WRITE, "data": bytes(8192), "offset": 4096}, header=header))
    assert log[0] == Logged(1, 2, 0, bytes(8192))
    with pytest.raises(RecordingError, match="entry 0 is not whole sectors of 4096 bytes"):
        dm_log_writes.export(recorded(write(1), header=header), io.BytesIO())


def model_of_the_kernel(recording: Recording) -> list[Entry]:
    """The two lists of drivers/md/dm-log-writes.c, driven by the events in their order."""
    events: list[tuple[float, int, str, Entry]] = []
    for entry in recording:
        # A request begins after `began` ones have ended.
        events.append((entry.began - 0.5, entry.index, "map", entry))
        events.append((entry.index, 0, "end", entry))
    unflushed: list[Entry] = []
    logging: list[Entry] = []
    own: dict[int, list[Entry]] = {}
    for _, _, what, entry in sorted(events, key=lambda each: each[:2]):
        if what == "map" and entry.kind == FLUSH:
            own[entry.index], unflushed = unflushed, []
        elif what == "end" and entry.kind == FLUSH:
            logging += [*own.pop(entry.index), entry]
        elif what == "end" and (entry.fua or entry.kind == MARK):
            logging.append(entry)
        elif what == "end":
            unflushed.append(entry)
    return logging + unflushed


@st.composite
def histories(draw: st.DrawFn) -> Recording:
    """Requests of which several can be in flight."""
    entries = []
    for index in range(draw(st.integers(0, 30))):
        kind = draw(st.sampled_from([WRITE, WRITE, FLUSH, MARK]))
        began = draw(st.integers(max(0, index - 6), index))
        entry: dict[str, Any] = {"kind": kind, "began": index if kind == MARK else began, "begin_ns": index}
        if kind == WRITE:
            entry |= write(index, flags=draw(st.sampled_from([0, 0, FUA])))
        entries.append(entry)
    return recorded(*entries)


@given(histories())
def test_the_order_is_the_kernel_s(recording: Recording) -> None:
    assert list(dm_log_writes.in_order_of_stability(recording)) == model_of_the_kernel(recording)


@given(histories())
def test_what_is_stable_comes_before_what_makes_it_so(recording: Recording) -> None:
    """A write belongs to the flush that began first after it had ended, as in the kernel."""
    order = [entry.index for entry in dm_log_writes.in_order_of_stability(recording)]
    assert sorted(order) == list(range(len(recording)))
    for other in recording:
        flushes = [each for each in recording if each.covers(other)]
        if other.kind == WRITE and flushes:
            first = min(flushes, key=lambda each: (each.began, each.begin_ns))
            assert order.index(other.index) < order.index(first.index)


def test_a_flush_that_failed_makes_nothing_stable() -> None:
    log = log_of(recorded(write(1), {"kind": FLUSH, "result": -EIO}, write(2), {"kind": FLUSH}))
    assert [(entry.sector, entry.flags) for entry in log] == [(1, 0), (2, 0), (0, 1), (0, 8)]


MIXTURE = (
    write(1, begin_ns=5_000_000, end_ns=6_000_000, queue=1),
    write(2, begin_ns=4_000_000, end_ns=6_500_000, began=0, flags=FUA),
    {"kind": MARK, "data": b"here", "begin_ns": 7_000_000, "end_ns": 7_000_000},
    {"kind": FLUSH, "begin_ns": 7_000_000, "end_ns": 9_000_000},
    {"kind": DISCARD, "offset": 4096, "length": 8192, "begin_ns": 9_000_500, "end_ns": 9_001_000, "result": -EIO},
)


def exported(export: Callable[[Recording, Any], int], path: Path, recording: Recording) -> Path:
    with path.open("wb") as file:
        export(recording, file)
    return path


def test_an_iolog_of_fio(tmp_path: Path) -> None:
    text = exported(fio_iolog.export, tmp_path / "log", recorded(*MIXTURE)).read_text()
    assert text.splitlines() == [
        "fio version 3 iolog",
        "0 disk add",
        "0 disk open",
        "1 disk write 1024 512",
        "1001 disk write 512 512",
        "3001 disk datasync 0 0",
        "5001 disk trim 4096 8192",
        "5001 disk close",
    ]


LARGE: tuple[dict[str, Any], ...] = (
    {"kind": ZERO, "offset": 4096, "length": (2 << 20) + 512},
    {"kind": DISCARD, "length": (4 << 30) + 512},
)


def test_large_ranges_in_an_iolog(tmp_path: Path) -> None:
    """fio allocates a buffer of the largest write for each request in flight."""
    text = exported(fio_iolog.export, tmp_path / "log", recorded(*LARGE, header=Header(8 << 30))).read_text()
    assert text.splitlines()[3:] == [
        f"1 disk write 4096 {1 << 20}",
        f"1 disk write {4096 + (1 << 20)} {1 << 20}",
        f"1 disk write {4096 + (2 << 20)} 512",
        f"1 disk trim 0 {(4 << 30) + 512}",
        "1 disk close",
    ]


def test_large_ranges_in_a_trace(tmp_path: Path) -> None:
    """It has 32 bits for a length."""
    content = exported(
        blktrace_binary.export, tmp_path / "trace", recorded(*LARGE, header=Header(8 << 30))
    ).read_bytes()
    found = [struct.unpack_from("<QII", content, place + 16) for place in range(64, len(content), 48)]
    queued = [(sector * 512, size) for sector, size, action in found if action & 0xFFFF == 1]
    assert queued == [
        *((4096 + (each << 20), 1 << 20) for each in range(2)),
        (4096 + (2 << 20), 512),
        *((each << 31, 1 << 31) for each in range(2)),
        (4 << 30, 512),
    ]
    assert len(found) == 3 * len(queued)


def test_the_structs_of_blktrace(tmp_path: Path) -> None:
    """Field by field, as in include/uapi/linux/blktrace_api.h; tests/program has its programs."""
    content = exported(blktrace_binary.export, tmp_path / "trace", recorded(*MIXTURE)).read_bytes()
    found, place = [], 0
    while place < len(content):
        magic, _, time, sector, size, action, pid, device, cpu, error, extra = struct.unpack_from(
            "<IIQQIIIIIHH", content, place
        )
        assert (magic, device, cpu) == (0x65617407, 120 << 20, 0)
        found.append((time, sector, size, action & 0xFFFF, action >> 16, pid, error, content[place + 48 :][:extra]))
        place += 48 + extra
    w, q, d, c, notify = 2, 16, 64, 128, 1024
    assert found == [
        (0, 0, 0, 0, notify, 1, 0, b"queue-0".ljust(16, b"\0")),
        (0, 0, 0, 0, notify, 2, 0, b"queue-1".ljust(16, b"\0")),
        (0, 2, 512, 1, w | q | 1 << 15, 1, 0, b""),
        (0, 2, 512, 7, w | d | 1 << 15, 1, 0, b""),
        (1_000_000, 1, 512, 1, w | q, 2, 0, b""),
        (1_000_000, 1, 512, 7, w | d, 2, 0, b""),
        (2_000_000, 1, 512, 8, w | c, 2, 0, b""),
        (2_500_000, 2, 512, 8, w | c | 1 << 15, 1, 0, b""),
        (3_000_000, 0, 0, 2, notify, 1, 0, b"here"),
        (3_000_000, 0, 0, 1, w | q | 4, 1, 0, b""),
        (3_000_000, 0, 0, 7, w | d | 4, 1, 0, b""),
        (5_000_000, 0, 0, 8, w | c | 4, 1, 0, b""),
        (5_000_500, 8, 8192, 1, w | q | 1 << 13, 1, 0, b""),
        (5_000_500, 8, 8192, 7, w | d | 1 << 13, 1, 0, b""),
        (5_001_000, 8, 8192, 8, w | c | 1 << 13, 1, EIO, b""),
    ]


@pytest.mark.parametrize("export", [dm_log_writes.export, fio_iolog.export, blktrace_binary.export])
def test_an_empty_recording(tmp_path: Path, export: Callable[[Recording, Any], int]) -> None:
    assert exported(export, tmp_path / "out", recorded()).stat().st_size >= 0
