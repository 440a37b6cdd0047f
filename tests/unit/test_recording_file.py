"""The file of a recording: what is written is read again, whatever happens to the file meanwhile."""

from __future__ import annotations

import io
import json
import os
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.recordings.entries import (
    CHANGES,
    DISCARD,
    END,
    FAILED,
    FLUSH,
    FUA,
    MARK,
    UNFINISHED,
    WRITE,
    ZERO,
    Entry,
    Header,
)
from ringplane.recordings.reader import Recording, open_recording
from ringplane.recordings.recording_format import HEAD, START, RecordingError, sealed
from ringplane.recordings.writer import RecordingWriter

SIZE = 1 << 20
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**63), 2**63 - 1)

headers = st.builds(
    Header,
    size=st.just(SIZE),
    block_size=st.sampled_from([512, 4096]),
    write_cache=st.booleans(),
    token=texts,
    disk=texts,
    image=texts,
    started=texts,
    started_ns=numbers,
)


@st.composite
def additions(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of `add`, but `began`."""
    kind = draw(st.sampled_from([*CHANGES, FLUSH, MARK]))
    times = st.integers(0, 2**63 - 1)
    some = {
        "begin_ns": draw(times),
        "end_ns": draw(times),
        "flags": draw(numbers),
        "queue": draw(st.integers(0, 0xFFFF)),
    }
    length = draw(st.integers(0, 100))
    if kind in CHANGES:
        some |= {"offset": draw(st.integers(0, SIZE - length)), "length": length}
    data = draw(st.binary(min_size=length, max_size=length)) if kind in (WRITE, MARK) else b""
    return some | {"kind": kind, "data": data, "result": draw(st.integers(-4095, 0))}


def written(header: Header, entries: list[dict[str, Any]], *, end: bool = True) -> bytes:
    file = io.BytesIO()
    writer = RecordingWriter(file, header)
    for entry in entries:
        writer.add(**entry)
    if end:
        writer.end()
    return file.getvalue()


def read(content: bytes) -> Recording:
    return Recording(memoryview(content))


def shown(entry: Entry) -> dict[str, Any]:
    names = ("kind", "begin_ns", "end_ns", "flags", "queue", "result")
    some: dict[str, Any] = {name: getattr(entry, name) for name in names} | {"data": bytes(entry.data)}
    return some | ({"offset": entry.offset, "length": entry.length} if entry.kind in CHANGES else {})


@given(headers, st.lists(additions()))
def test_what_is_written_is_read(header: Header, entries: list[dict[str, Any]]) -> None:
    recording = read(written(header, entries))
    assert recording.header == header
    assert [shown(entry) for entry in recording] == entries
    assert [entry.index for entry in recording] == list(range(len(entries))) == [each.began for each in recording]
    assert [*recording] == recording[:] == [recording[number] for number in range(len(recording))]
    assert recording.complete
    assert recording.warning == ""


@given(headers, st.lists(additions(), min_size=1, max_size=5), st.data())
def test_what_was_cut_off_is_read_up_to_its_last_whole_entry(
    header: Header, entries: list[dict[str, Any]], data: st.DataObject
) -> None:
    whole = written(header, entries)
    size = data.draw(st.integers(0, len(whole) - 1))
    # A file system that has not stored the last blocks may show zeros in their place.
    filled = whole[:size] + bytes(data.draw(st.sampled_from([0, 8, 4096])))
    try:
        recording = read(filled)
    except RecordingError:
        assert size < len(written(header, [], end=False))
        return
    ends = [len(written(header, entries[:count], end=False)) for count in range(len(entries) + 1)]
    assert len(recording) >= sum(end <= size for end in ends[1:])
    assert len(recording) <= sum(end <= len(filled) for end in ends[1:])
    assert not recording.complete
    assert "cut off" in recording.warning
    assert f": {len(recording)}" in recording.warning


@settings(max_examples=300)
@given(headers, st.lists(additions(), min_size=1, max_size=4), st.data())
def test_damage_is_noticed_or_is_in_the_data(
    header: Header, entries: list[dict[str, Any]], data: st.DataObject
) -> None:
    """A recording that was made to do harm cannot name places outside the disk or outside the file."""
    content = bytearray(written(header, entries))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        recording = read(bytes(content))
    except RecordingError:
        return
    for index, entry in enumerate(recording):
        assert entry.index == index
        assert 0 <= entry.began <= index
        if entry.kind in CHANGES:
            assert 0 <= entry.offset <= entry.offset + entry.length <= recording.header.size


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": 0},
        {"kind": FAILED + 1},
        {"index": 1},
        {"began": 1},
        {"began": -1},
        {"offset": -1},
        {"offset": SIZE - 7},
        {"offset": 2**63 - 1, "length": 2**63 - 1},
        {"length": 16},
        {"size": -8},
        {"size": 2**63 - 1},
        {"begin_ns": -1},
        {"end_ns": -1},
        {"queue": -1},
        {"queue": 1 << 16},
        {"result": 1},
        {"result": -(2**63)},
        {"kind": END, "result": -EIO},
        {"kind": FAILED, "result": 0},
        {"kind": ZERO},
    ],
)
def test_an_entry_that_does_not_fit_ends_the_recording(fields: dict[str, int]) -> None:
    good = {"kind": WRITE, "index": 0, "began": 0, "begin_ns": 0, "end_ns": 0, "offset": 0, "length": 8}
    good |= {"flags": 0, "result": 0, "queue": 0, "size": 8}
    start = written(Header(SIZE), [], end=False)
    assert len(read(start + sealed(*good.values()) + bytes(8))) == 1
    recording = read(start + sealed(*(good | fields).values()) + bytes(8))
    assert (len(recording), recording.complete) == (0, False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a recording"),
        (b"ringrec\0", "not a recording"),
        (b"\x7fELF" + bytes(100), "not a recording"),
        (START.pack(b"ringrec\0", 2, 0), "version 2"),
        (START.pack(b"ringrec\0", 1, 8) + b"{}", "ends before"),
        (START.pack(b"ringrec\0", 1, -8) + b"{}", "ends before"),
        (START.pack(b"ringrec\0", 1, 8) + b"nothing!", "damaged"),
        (START.pack(b"ringrec\0", 1, 2) + b"{}", "damaged"),
        (START.pack(b"ringrec\0", 1, 2) + b"[]", "damaged"),
        (START.pack(b"ringrec\0", 1, 12) + b'{"size": ""}', "damaged"),
        (START.pack(b"ringrec\0", 1, 12) + b'{"size": -1}', "damaged"),
        (START.pack(b"ringrec\0", 1, 14) + b'{"size": true}', "damaged"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(RecordingError, match=words) as raised:
        open_recording(tmp_path / "file")
    assert str(raised.value).startswith(f"{tmp_path}/file: ")


def test_a_recording_that_failed(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        writer = RecordingWriter(file, Header(SIZE))
        writer.add(WRITE, data=b"12345", offset=10, began=0, flags=FUA)
        writer.add(FAILED, result=-ENOSPC)
        # What others append is not read.
        writer.add(FLUSH)
    recording = open_recording(tmp_path / "file")
    assert len(recording) == 1
    assert not recording.complete
    assert os.strerror(ENOSPC) in recording.warning


def test_what_an_entry_says() -> None:
    file = io.BytesIO()
    writer = RecordingWriter(file, Header(SIZE))
    write = writer.add(WRITE, data=b"x")
    flush = writer.add(FLUSH)
    late = writer.add(WRITE, data=b"x", flags=FUA)
    other = writer.add(FLUSH, began=2)
    failed = writer.add(FLUSH, result=-EIO)
    mark = writer.mark("käse")
    rest = writer.add(DISCARD, length=512, flags=UNFINISHED)
    recording = read(file.getvalue())
    pairs = [(over, under) for over in recording for under in recording if over.covers(under)]
    assert {(over.index, under.index) for over, under in pairs} == {(flush, write), (other, write), (other, flush)}
    assert [entry.index for entry in recording if entry.fua] == [late]
    assert [entry.index for entry in recording if entry.unfinished] == [rest]
    assert recording[mark].text == "käse"
    assert recording[failed].result == -EIO


def test_entries_outlive_the_file_and_what_has_read_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(written(Header(SIZE), [{"kind": WRITE, "data": b"12345678"}]))
    entry = open_recording(path)[0]
    path.unlink()
    assert bytes(entry.data) == b"12345678"


def test_the_description_shows_this_layout(tmp_path: Path) -> None:
    """A reader as somebody would write it who knows docs/recordings.md only."""
    content = written(Header(SIZE, disk="d"), [{"kind": WRITE, "data": b"12345", "offset": 512}])
    assert content[:8] == b"ringrec\0"
    assert int.from_bytes(content[8:16], "little") == 1
    length = int.from_bytes(content[16:24], "little")
    assert json.loads(content[24 : 24 + length])["size"] == SIZE
    place = 24 + (length + 7) // 8 * 8
    fields = [int.from_bytes(content[place + 8 * number :][:8], "little", signed=True) for number in range(12)]
    assert fields[:11] == [1, 0, 0, 0, 0, 512, 5, 0, 0, 0, 5]
    xor = 0
    for field in fields:
        xor ^= field
    assert xor.to_bytes(8, "little") == b"ringrec!"
    assert content[place + 96 : place + 104] == b"12345\0\0\0"
    assert content[place + 104 :][: HEAD.size] == sealed(END, 1, 1, *[0] * 8)
