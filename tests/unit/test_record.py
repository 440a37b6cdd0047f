"""The layer `record`: all that changes the disk is recorded, in the order in which it ended, and nothing is lost."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import EIO, ENOSPC, ETIMEDOUT
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.layers import recording_file, recording_slowness
from ringplane.block.layers.layer import Layer
from ringplane.block.layers.record import RecordLayer, RecordPart
from ringplane.block.layers.recording_file import RecordingFile
from ringplane.control import disk_recording, operations
from ringplane.control.operation_errors import OperationError
from ringplane.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.opener.opener import LOCAL
from ringplane.options.declare import WrongOptions
from ringplane.options.delay_options import Delay
from ringplane.options.policy_options import PolicyUse
from ringplane.options.zone_options import parse_zones
from ringplane.recordings import entries
from ringplane.recordings.entries import Entry, Header
from ringplane.recordings.marks import new_token
from ringplane.recordings.reader import Recording, open_recording
from ringplane.recordings.recording_format import HEAD
from ringplane.system.aside import aside

from .gate import Gate
from .rig import (
    DISCARD,
    FLUSH,
    IN,
    OK,
    OUT,
    PATIENCE,
    SLOTS,
    WRITE_ZEROES,
    Answer,
    RigFactory,
    eventually,
    pattern,
    rig_factory,
    small_tmpfs,
)

SIZE = 1 << 20
DISK = pattern(SIZE)
# The smallest ring buffer that has room for two of the largest entries.
ROOM = 2 << 20

Events = list[tuple[str, dict[str, object]]]


class Recorder:
    """A recording that is being made, and the parts of its layer."""

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.path = path
        self.events: Events = []
        self.file = RecordingFile(path, Header(size, token=new_token()), LOCAL, ROOM)
        self.layer = RecordLayer(self.file)

    def part(self) -> RecordPart:
        return self.layer.part(0, SLOTS)

    def start(self) -> None:
        self.layer.start_threads(lambda kind, **fields: self.events.append((kind, fields)))

    def kinds(self) -> list[str]:
        """Those of the events."""
        return [kind for kind, _ in self.events]

    def end(self) -> Recording:
        """When no I/O is in progress."""
        self.layer.close()
        return open_recording(self.path)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path / "disk.rec")
    made.start()
    yield made
    made.end()


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


def played(recording: Sequence[Entry], content: bytes = DISK) -> bytes:
    """A disk with this content, after what was recorded."""
    disk = bytearray(content)
    for entry in recording:
        assert entry.result == 0
        end = entry.offset + entry.length
        if entry.kind == entries.WRITE:
            disk[entry.offset : end] = entry.data
        elif entry.kind in entries.CHANGES:
            disk[entry.offset : end] = bytes(entry.length)
    return bytes(disk)


def test_each_kind_of_request(make_rig: RigFactory, recorder: Recorder) -> None:
    line = make_rig(layers=[recorder.part()]).line().start(features=1 << 13 | 1 << 14)
    data = pattern(1024, 1)
    ranges = b"".join(
        start.to_bytes(8, "little") + bytes([2, 0, 0, 0, unmap, 0, 0, 0]) for start, unmap in ((8, 0), (64, 1))
    )
    assert line.do(OUT, 2, data) == Answer(OK, 1, b"")
    assert line.do(IN, 2, room=1024) == Answer(OK, 1025, data)
    assert line.do(FLUSH) == Answer(OK, 1, b"")
    assert line.do(WRITE_ZEROES, 0, ranges) == Answer(OK, 1, b"")
    assert line.do(DISCARD, 0, ranges[:12] + bytes(4)) == Answer(OK, 1, b"")
    line.stop()
    recording = recorder.end()
    shown = [(entry.kind, entry.began, entry.offset, entry.length, entry.flags) for entry in recording]
    assert shown == [
        (entries.WRITE, 0, 1024, 1024, 0),
        (entries.FLUSH, 1, 0, 0, 0),
        (entries.ZERO, 2, 4096, 1024, 0),
        (entries.ZERO, 2, 32768, 1024, entries.UNMAP),
        (entries.DISCARD, 4, 4096, 1024, 0),
    ]
    assert bytes(recording[0].data) == data
    assert all(0 < entry.begin_ns <= entry.end_ns for entry in recording)
    assert recording.complete


def test_writes_without_a_cache_are_recorded_as_such(make_rig: RigFactory, recorder: Recorder) -> None:
    line = make_rig(layers=[recorder.part()]).line().start(write_through=True)
    assert line.do(OUT, 2, bytes(512)) == Answer(OK, 1, b"")
    line.stop()
    assert [entry.fua for entry in recorder.end()] == [True]


# All lines wait until everything has ended.
ALL_ENDED = -1


@settings(max_examples=20)
@given(
    steps=st.lists(st.sampled_from([IN, OUT, OUT, FLUSH, ALL_ENDED]), min_size=1, max_size=60),
    threads=st.integers(1, 2),
)
def test_any_mixture_of_several_threads(make_rig: RigFactory, tmp_path: Path, steps: list[int], threads: int) -> None:
    """What was recorded makes the same disk of the previous one, and says what covers what."""
    path = tmp_path / "mixture.rec"
    path.unlink(missing_ok=True)
    recorder = Recorder(path)
    rig = make_rig(workers=threads)
    lines = [rig.line(number, [recorder.part()]).start() for number in range(threads)]
    recorder.start()
    # How many entries there were when everything had ended.
    ended = [0]
    for place, kind in enumerate(steps):
        if kind == ALL_ENDED:
            for line in lines:
                line.wait()
            ended.append(sum(step in (OUT, FLUSH) for step in steps[:place]))
            continue
        data = pattern(1024, place) if kind == OUT else b""
        lines[place % threads].put(kind, 2 * place, data, 1024 if kind == IN else 0)
        lines[place % threads].kick()
    for line in lines:
        line.wait()
        line.stop()
    recording = recorder.end()
    assert played(recording) == rig.content()
    assert len(recording) == sum(step in (OUT, FLUSH) for step in steps)
    assert recording.complete
    check_order(recording, ended)


def check_order(recording: Sequence[Entry], ended: Sequence[int]) -> None:
    """`began` agrees with the times, and with the moments at which so many had `ended` and nothing was in flight."""
    for entry in recording:
        before = max(count for count in ended if count <= entry.index)
        assert before <= entry.began <= entry.index
        for other in recording[: entry.index]:
            if other.queue == entry.queue and other.index < entry.began:
                assert other.end_ns <= entry.begin_ns
            elif other.queue == entry.queue:
                assert other.end_ns >= entry.begin_ns
        assert entry.kind != entries.FLUSH or all(entry.covers(other) for other in recording[:before])


def test_what_was_in_flight_is_known(make_rig: RigFactory, recorder: Recorder) -> None:
    """A write that storage has not completed is not covered by a flush that began, or ended, meanwhile."""
    gate = Gate()
    line = make_rig(layers=[recorder.part(), gate]).line().start()
    gate.let(1)
    line.do(OUT, 0, bytes(512))
    late = line.put(OUT, 1, bytes(512))
    line.kick()
    assert eventually(lambda: gate.kept == 1)
    line.put(FLUSH)
    line.kick()
    assert eventually(lambda: bool(line.ring.collect()))
    gate.let(1)
    line.wait()
    assert line.answer(late).status == OK
    line.do(FLUSH)
    line.stop()
    os.close(gate.fd)
    first, flush, second, last = recorder.end()
    assert [entry.kind for entry in (first, flush, second, last)] == [1, 5, 1, 5]
    assert [entry.began for entry in (first, flush, second, last)] == [0, 1, 1, 3]
    assert flush.covers(first)
    assert not flush.covers(second)
    assert last.covers(second)


def test_what_has_not_ended_at_the_end_is_unfinished(make_rig: RigFactory, recorder: Recorder) -> None:
    """It has the data, and nothing of it is a mark. The I/Os end without the layer."""
    part, gate = recorder.part(), Gate()
    line = make_rig(layers=[part, gate]).line().start()
    gate.let(1)
    line.do(OUT, 0, bytes(512))
    late = (recorder.file.token.encode() + b"late").ljust(4096, b"\0")
    writes = [line.put(OUT, 8, late, readable=[16, 1000, 3096]), line.put(OUT, 16, pattern(512))]
    line.kick()
    assert eventually(lambda: gate.kept == 2)
    channel, engine = line.worker.state.channel, line.worker.engine
    assert line.worker.call(lambda: part.leave(channel.address)).result(PATIENCE)
    line.worker.call(lambda: line.queue.stack.remove(part, channel.ios, engine)).result(PATIENCE)
    recording = recorder.end()
    gate.let(2)
    line.wait()
    assert [line.answer(write).status for write in writes] == [OK, OK]
    line.stop()
    os.close(gate.fd)
    first, *others = recording
    assert not first.unfinished
    assert sorted((entry.offset, bytes(entry.data)) for entry in others) == [(4096, late), (8192, pattern(512))]
    assert [(entry.kind, entry.flags, entry.result, entry.began) for entry in others] == [
        (entries.WRITE, entries.UNFINISHED, 0, 1)
    ] * 2
    assert recording.complete


def test_the_thread_of_an_io_fails(make_rig: RigFactory, recorder: Recorder) -> None:
    """What it had in flight is in no recording, and so the end of the recording says that something is missing."""
    part, gate = recorder.part(), Gate()
    line = make_rig(layers=[part, gate]).line().start()
    line.put(OUT, 0, bytes(512))
    line.kick()
    assert eventually(lambda: gate.kept == 1)
    recording = recorder.end()
    assert not recording.complete
    assert os.strerror(EIO) in recording.warning
    assert recorder.kinds() == ["recording-started", "recording-failed"]
    gate.let(1)
    line.wait()
    line.stop()
    os.close(gate.fd)


class SlowFile:
    """A pipe in place of the file of a recording: its storage hangs until `read_all` is called."""

    def __init__(self, file: RecordingFile) -> None:
        self._file = file
        self._start = file.path.read_bytes()
        self._take, self._give = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(self._give, fcntl.F_SETPIPE_SZ, 4096)
        file._record["fd"] = self._give
        self._taken: list[bytes] = []
        self._reading = threading.Thread(target=self._read)

    def _read(self) -> None:
        while piece := os.read(self._take, 1 << 16):
            self._taken.append(piece)

    @property
    def waiting(self) -> int:
        """Bytes that are not in the pipe yet."""
        return self._file.waiting

    def read_all(self) -> None:
        self._reading.start()

    def end(self) -> Recording:
        """When no I/O is in progress."""
        self._file.close()
        return self.content()

    def content(self) -> Recording:
        """When the recording has ended."""
        os.close(self._give)
        self._reading.join(PATIENCE)
        os.close(self._take)
        return Recording(memoryview(self._start + b"".join(self._taken)))


def test_requests_wait_while_the_file_cannot_keep_up(tmp_path: Path, make_rig: RigFactory) -> None:
    """None is lost, and none is answered before it is recorded; reads continue meanwhile."""
    recorder = Recorder(tmp_path / "slow.rec")
    file = SlowFile(recorder.file)
    line = make_rig(layers=[recorder.part()]).line().start()
    recorder.start()
    data = [pattern(100 << 10, number) for number in range(40)]
    for each in data:
        line.put(OUT, 0, each)
    line.kick()
    assert eventually(lambda: file.waiting > ROOM - (101 << 10))
    line.turn_is_over()
    answered = line.ring.collect()
    assert 0 < len(answered) < len(data)
    assert line.queue.in_flight == len(data) - len(answered)
    read = line.put(IN, 1024, room=512)
    line.kick()
    assert eventually(lambda: read in line.ring.collect())
    file.read_all()
    line.wait()
    line.stop()
    recording = file.end()
    assert sorted(bytes(entry.data) for entry in recording) == sorted(data)


def test_requests_of_several_threads_wait_for_room(tmp_path: Path, make_rig: RigFactory) -> None:
    """All of them continue when there is some."""
    recorder = Recorder(tmp_path / "slow.rec")
    file, parts = SlowFile(recorder.file), [recorder.part() for _ in range(2)]
    rig = make_rig(workers=2)
    lines = [rig.line(number, [part]).start() for number, part in enumerate(parts)]
    recorder.start()
    # Those of one thread have no room either.
    data = [pattern(100 << 10, number) for number in range(60)]
    for number, each in enumerate(data):
        lines[number % 2].put(OUT, 0, each)
    for line in lines:
        line.kick()
    assert eventually(lambda: all(part.record[0]["first"] >= 0 for part in parts))
    file.read_all()
    for line in lines:
        line.wait()
        line.stop()
    assert sorted(bytes(entry.data) for entry in file.end()) == sorted(data)


def test_a_file_that_takes_nothing_is_reported(
    tmp_path: Path, make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once; and that it does again."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(recording_file, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(recording_slowness, "LONGEST_SILENCE", 0.05)
    recorder = Recorder(tmp_path / "slow.rec")
    file = SlowFile(recorder.file)
    line = make_rig(layers=[recorder.part()]).line().start()
    recorder.start()
    line.do(OUT, 0, bytes(100 << 10))
    assert eventually(lambda: recorder.kinds() == ["recording-started", "recording-waits"])
    assert recorder.events[-1][1] == {"file": str(recorder.path), "waiting": file.waiting}
    file.read_all()
    assert eventually(lambda: recorder.kinds() == ["recording-started", "recording-waits", "recording-continues"])
    line.stop()
    assert len(file.end()) == 1
    (warning,) = (each for each in caplog.messages if "has not answered" in each)
    assert warning.startswith(f"{recorder.path}: the storage of the recording has not answered for ")


def test_a_recording_is_given_up(tmp_path: Path, make_rig: RigFactory) -> None:
    """If its file takes nothing: what waits for room continues, and the end of the file says what is missing."""
    recorder = Recorder(tmp_path / "slow.rec")
    file, part = SlowFile(recorder.file), recorder.part()
    line = make_rig(layers=[part]).line().start()
    recorder.start()
    writes = [line.put(OUT, 0, pattern(100 << 10, number)) for number in range(40)]
    line.kick()
    assert eventually(lambda: part.record[0]["first"] >= 0)
    channel, engine = line.worker.state.channel, line.worker.engine
    assert not line.worker.call(lambda: part.leave(channel.address)).result(PATIENCE)
    recorder.file.give_up(ETIMEDOUT)
    assert line.worker.call(lambda: part.leave(channel.address)).result(PATIENCE)
    line.worker.call(lambda: line.queue.stack.remove(part, channel.ios, engine)).result(PATIENCE)
    line.wait()
    assert [line.answer(write).status for write in writes] == [OK] * len(writes)
    line.stop()
    assert recorder.kinds()[-1] == "recording-failed"
    recorder.layer.abandon()
    assert not recorder.file.wait(0)
    file.read_all()
    assert recorder.file.wait(PATIENCE)
    assert 0 < len(file.content()) < len(writes)


def test_a_write_that_is_larger_than_the_ring_buffer(make_rig: RigFactory, tmp_path: Path) -> None:
    """It becomes several entries that began at the same time."""
    recorder = Recorder(tmp_path / "large.rec", 8 << 20)
    rig = make_rig(8 << 20, layers=[recorder.part()])
    line = rig.line().start()
    recorder.start()
    data = pattern(5 << 20, 3)
    assert line.do(OUT, 8, data, readable=[16, 1000, len(data) - 1000]) == Answer(OK, 1, b"")
    line.stop()
    recording = recorder.end()
    assert {entry.began for entry in recording} == {0}
    assert played(recording, bytes(8 << 20)) == rig.content()


def test_marks_from_a_guest(make_rig: RigFactory, recorder: Recorder) -> None:
    """In one buffer or several, in a block of 512 or 4096 bytes. What only looks similar is none."""
    line = make_rig(layers=[recorder.part()]).line().start()
    token = recorder.file.token.encode()
    blocks = [
        (token + b"first").ljust(512, b"\0"),
        (token + "zweite \N{SNOWMAN}\nrest".encode()).ljust(4096, b"\0"),
        token + b"x" * (512 - len(token)),
        token.ljust(512, b"\0"),
        token[:-1].ljust(512, b"\0"),
        token.lower().ljust(512, b"\0"),
        (token + b"too long").ljust(8192, b"\0"),
    ]
    for number, block in enumerate(blocks):
        cuts = [16, len(block)] if number % 2 else [16, 5, 20, len(block) - 25]
        assert line.do(OUT, 0, block, readable=cuts) == Answer(OK, 1, b"")
    line.stop()
    recording = recorder.end()
    texts = [entry.text for entry in recording if entry.kind == entries.MARK]
    assert texts == ["first", "zweite \N{SNOWMAN}", "x" * (512 - len(token)), ""]
    # Each is written, too.
    assert [bytes(entry.data) for entry in recording if entry.kind == entries.WRITE] == blocks
    assert recording.complete


def test_a_process_that_hands_over_does_not_wait_for_the_file(tmp_path: Path, make_rig: RigFactory) -> None:
    """Nor does the end of the disk. All that was answered is in the recording when its storage continues."""
    recorder = Recorder(tmp_path / "slow.rec")
    file, part = SlowFile(recorder.file), recorder.part()
    line = make_rig(layers=[part]).line().start()
    recorder.start()
    for number in range(4):
        assert line.do(OUT, 0, pattern(100 << 10, number)) == Answer(OK, 1, b"")
    line.stop()
    recorder.layer.abandon()
    recorder.layer.close()
    assert file.waiting
    assert part.fd >= 0
    file.read_all()
    assert eventually(lambda: part.fd < 0)
    assert len(file.content()) == 4


@pytest.fixture
def little_room(tmp_path: Path) -> Iterator[Path]:
    if os.getuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    with small_tmpfs(tmp_path / "small", 1) as folder:
        yield folder


@pytest.mark.parametrize("tail", [0, 4096 - 96, 8, 4000])
def test_a_full_file_system_ends_the_recording_and_not_the_disk(
    make_rig: RigFactory, little_room: Path, tail: int, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(little_room / "disk.rec")
    line = make_rig(layers=[recorder.part()]).line().start()
    recorder.start()
    # Others use the room too, so that the last entry finds none, or little.
    (little_room / "other").write_bytes(bytes((512 << 10) + tail))
    data = pattern(64 << 10, 1)
    for _ in range(32):
        assert line.do(OUT, 0, data) == Answer(OK, 1, b"")
    assert eventually(lambda: len(recorder.events) == 2)
    assert line.do(FLUSH) == Answer(OK, 1, b"")
    line.stop()
    kind, fields = recorder.events[-1]
    assert (kind, fields["error"]) == ("recording-failed", os.strerror(ENOSPC))
    recording = recorder.end()
    assert 0 < len(recording) < 32
    assert all(bytes(entry.data) == data for entry in recording)
    assert not recording.complete
    assert os.strerror(ENOSPC) in recording.warning
    assert [each for each in caplog.messages if "cannot be written" in each]


def test_a_served_disk(tmp_path: Path) -> None:
    """As a user makes it, with load on several queues and I/O threads; nothing in the disk differs afterwards."""
    path = tmp_path / "disk.rec"
    options: dict[str, Any] = {"create": 16 << 20, "record": path, "io_threads": 2, "num_queues": 2}
    with (
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", **options) as export,
        Driver(tmp_path / "socket") as driver,
    ):
        run_load(driver, Load(depth=16, requests=300, read_percent=30, verify=True))
        token = open_recording(path).header.token
        driver.write(0, (token.encode() + b"here").ljust(4096, b"\0"))
        driver.flush()
        assert export.counters["write"].requests > 1
    recording = open_recording(path)
    assert recording.complete
    assert recording.header.image == str(tmp_path / "disk.img")
    assert recording.header.size == 16 << 20
    assert [entry.text for entry in recording if entry.kind == entries.MARK] == ["here"]
    assert played(recording, bytes(16 << 20)) == (tmp_path / "disk.img").read_bytes()


def test_a_recording_has_what_policies_let_through(tmp_path: Path) -> None:
    """A flush that is only acknowledged covers nothing, whether the policy or the recording comes first."""
    policies = [PolicyUse("lying_flush")]
    for number, (at_start, later) in enumerate([(policies, ()), ((), policies)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with ringplane.serve(folder / "img", folder / "socket", create=1 << 20, policy=at_start) as export:
            export.start_recording(folder / "rec")
            if later:
                export.set_policies(later)
            with Driver(folder / "socket") as driver:
                driver.write(4096, pattern(4096))
                driver.flush()
                export.set_policies([])
                driver.flush()
            export.end_recording()
            assert export.counters["flush"].requests == 2
        write, flush = open_recording(folder / "rec")
        assert (write.kind, flush.kind, flush.began) == (entries.WRITE, entries.FLUSH, 1)


def test_no_recording_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "disk.rec").write_text("precious")
    with pytest.raises(ImageError, match=r"disk\.rec: exists already.*with {time} in its name"):
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", create=1 << 20, record=tmp_path / "disk.rec")
    assert (tmp_path / "disk.rec").read_text() == "precious"


def test_each_start_can_have_a_recording_of_its_own(tmp_path: Path) -> None:
    """The same options each time, as in a configuration file."""
    for number in range(3):
        with (
            ringplane.serve(
                tmp_path / "disk.img", tmp_path / "socket", create=1 << 20, record=tmp_path / "{name}-{time}.rec"
            ) as export,
            Driver(tmp_path / "socket") as driver,
        ):
            driver.write(0, bytes([number]) * 512)
            export.stop()
    # In the order of their names, too.
    paths = sorted(tmp_path.glob("disk-*.rec"))
    assert [bytes(open_recording(path)[0].data[:1]) for path in paths] == [b"\0", b"\1", b"\2"]
    assert all(re.fullmatch(r"disk-\d{8}T\d{6}\.\d{3}Z\.rec", path.name) for path in paths)


def test_a_field_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(WrongOptions, match=r"record: \{pid\} is unknown; \{name\} and \{time\} are replaced"):
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", create=1 << 20, record=tmp_path / "{pid}.rec")


def test_a_failed_start_leaves_no_recording(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="socket"):
        ringplane.serve(
            tmp_path / "disk.img", tmp_path / "none" / "socket", create=1 << 20, record=tmp_path / "disk.rec"
        )
    assert not (tmp_path / "disk.rec").exists()


@pytest.mark.parametrize("other", [{"read_only": True}, {"zoned": "64K"}])
def test_what_cannot_be_recorded(tmp_path: Path, other: dict[str, Any]) -> None:
    other = {name: parse_zones(value) if name == "zoned" else value for name, value in other.items()}
    with pytest.raises(WrongOptions, match="exclude each other"):
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", record=tmp_path / "disk.rec", **other)


def test_a_recorded_disk_keeps_its_size(tmp_path: Path) -> None:
    with (
        ringplane.serve(
            tmp_path / "disk.img", tmp_path / "socket", create=1 << 20, record=tmp_path / "disk.rec"
        ) as export,
        pytest.raises(OperationError, match="recorded"),
    ):
        export.resize(2 << 20)


@pytest.fixture(params=[None, Delay(write=0.2)], ids=["plain", "delay"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ringplane.Export]:
    """A disk with another layer or none."""
    options: dict[str, Any] = {"create": 16 << 20, "io_threads": 2, "num_queues": 2, "delay": request.param}
    with ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", **options) as export:
        yield export


def test_recordings_begin_and_end_while_a_guest_uses_the_disk(served: ringplane.Export, tmp_path: Path) -> None:
    """Each has all that changed the disk meanwhile."""
    disk = served.disk.source.title
    with Driver(tmp_path / "socket", queues=2) as driver, ThreadPoolExecutor() as pool:
        for number in range(3):
            path = tmp_path / f"{number}.rec"
            loading = pool.submit(run_load, driver, Load(depth=8, queues=2, read_percent=30, requests=100, seed=number))
            served.pause()
            before = Path(disk).read_bytes()
            token = served.start_recording(path)
            served.resume()
            served.mark("one \N{SNOWMAN}")
            loading.result()
            driver.write(0, bytes([number]) * 512)
            served.mark("two")
            served.end_recording()
            recording = open_recording(path)
            assert recording.header.token == token
            assert recording.complete
            assert [entry.text for entry in recording if entry.kind == entries.MARK] == ["one \N{SNOWMAN}", "two"]
            assert played(recording, before) == Path(disk).read_bytes()
            assert len(recording) > 2


def test_a_mark_after_the_end_of_the_recording_is_refused(served: ringplane.Export, tmp_path: Path) -> None:
    """As after ENOSPC: what is promised then is in no recording."""
    served.start_recording(tmp_path / "disk.rec")
    served.mark("one")
    layer = served.operations.recording.layer
    assert layer is not None
    layer.file.failed = "No space left on device"
    with pytest.raises(OperationError, match="nothing is recorded any more: No space left on device") as caught:
        served.mark("two")
    assert caught.value.right == "end the recording; another one needs another file"


def test_a_recording_has_the_physical_blocks_that_the_guest_sees(served: ringplane.Export, tmp_path: Path) -> None:
    served.start_recording(tmp_path / "disk.rec")
    served.end_recording()
    header = open_recording(tmp_path / "disk.rec").header
    assert header.physical_block_size == served.disk.limits.physical_block


def test_recordings_begin_and_end_under_load(served: ringplane.Export, tmp_path: Path) -> None:
    """No request is lost, and what is recorded is what was written."""
    ended = threading.Event()

    def begin_and_end() -> int:
        number = 0
        while not (ended.is_set() and number):
            served.start_recording(tmp_path / f"{number}.rec")
            served.end_recording()
            number += 1
        return number

    with Driver(tmp_path / "socket", queues=2) as driver, ThreadPoolExecutor() as pool:
        beginning = pool.submit(begin_and_end)
        result = run_load(driver, Load(depth=8, queues=2, read_percent=50, requests=300, verify=True))
        ended.set()
        count = beginning.result()
    assert result.errors == 0
    assert all(open_recording(tmp_path / f"{number}.rec").complete for number in range(count))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "DRAIN_PATIENCE", 0.2)
    monkeypatch.setattr(disk_recording, "FILE_PATIENCE", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_request_hangs_while_a_recording_is_begun_and_ended(served: ringplane.Export, tmp_path: Path) -> None:
    """None begins, and the guest continues; one that is made ends. A flush needs nothing of what hangs."""
    hang = [PolicyUse("hang", {"operation": "write"})]
    with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
        served.set_policies(hang)
        hanging = [driver.begin(OUT, 0, pattern(512))]
        assert eventually(lambda: served.in_flight == 1)
        with pytest.raises(OperationError, match=r"nothing was done: 1 request in flight did not end in 0\.2 s"):
            served.start_recording(tmp_path / "disk.rec")
        assert not (tmp_path / "disk.rec").exists()
        assert driver.read(0, 512) == bytes(512)
        served.flush()
        served.set_policies([])
        assert driver.end(hanging.pop()).status == OK
        served.start_recording(tmp_path / "disk.rec")
        driver.write(4096, pattern(4096))
        served.set_policies(hang)
        hanging = [driver.begin(OUT, 0, pattern(512, 1))]
        assert eventually(lambda: served.in_flight == 1)
        served.end_recording()
        served.set_policies([])
        assert driver.end(hanging.pop()).status == OK
        driver.write(8192, pattern(4096))
    recording = open_recording(tmp_path / "disk.rec")
    # What the policy kept has not reached the storage.
    assert [(entry.offset, entry.flags) for entry in recording] == [(4096, 0)]
    assert recording.complete


@pytest.mark.usefixtures("impatient")
def test_the_file_hangs_at_the_end_of_a_recording(served: ringplane.Export, tmp_path: Path) -> None:
    """The guest continues, and the disk can be recorded again."""
    served.start_recording(tmp_path / "slow.rec")
    layer = served.operations.recording.layer
    assert layer is not None
    file = SlowFile(layer.file)
    with Driver(tmp_path / "socket", memory_size=64 << 20, timeout=PATIENCE) as driver:
        writes = [driver.begin(OUT, 0, pattern(512 << 10, number)) for number in range(40)]
        assert eventually(lambda: file.waiting > (15 << 20))
        with pytest.raises(OperationError, match=r"slow\.rec: its storage does not answer; .* missing from it"):
            served.end_recording()
        assert all(driver.end(write).status == OK for write in writes)
        served.start_recording(tmp_path / "next.rec")
        driver.write(0, pattern(512))
        served.end_recording()
    assert len(open_recording(tmp_path / "next.rec")) == 1
    file.read_all()
    assert layer.file.wait(PATIENCE)
    assert 0 < len(file.content()) < 40
    kind, *_, result, _, _, _ = HEAD.unpack((tmp_path / "slow.rec").read_bytes()[-HEAD.size :])
    assert (kind, result) == (entries.FAILED, -ETIMEDOUT)


@pytest.mark.usefixtures("impatient")
def test_a_mark_without_room_does_not_hold_up_the_end_of_the_recording(
    served: ringplane.Export, tmp_path: Path
) -> None:
    served.start_recording(tmp_path / "slow.rec")
    layer = served.operations.recording.layer
    assert layer is not None
    file = SlowFile(layer.file)

    def fill() -> None:
        while True:
            served.mark("x" * 1000)

    with Driver(tmp_path / "socket", memory_size=64 << 20, timeout=PATIENCE) as driver:
        writes = [driver.begin(OUT, 0, pattern(512 << 10, number)) for number in range(40)]
        assert eventually(lambda: file.waiting > (15 << 20))
        with pytest.raises(OperationError, match=r"slow\.rec: its storage does not answer, and there is no room"):
            fill()
        with pytest.raises(OperationError, match=r"slow\.rec: its storage does not answer"):
            served.end_recording()
        assert all(driver.end(write).status == OK for write in writes)
    file.read_all()
    assert layer.file.wait(PATIENCE)


def test_no_front_end_attaches_while_a_recording_begins(
    served: ringplane.Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests would pass a part of the layers on their way down, and others on their way up."""
    begun, go = threading.Event(), threading.Event()
    add_lowest = served.disk.add_lowest

    async def slowly(layer: Layer) -> None:
        begun.set()
        await aside(partial(go.wait, PATIENCE))
        await add_lowest(layer)

    monkeypatch.setattr(served.disk, "add_lowest", slowly)
    with ThreadPoolExecutor() as pool, socket.socket(socket.AF_UNIX) as front_end:
        beginning = pool.submit(served.start_recording, tmp_path / "disk.rec")
        assert begun.wait(PATIENCE)
        front_end.connect(str(tmp_path / "socket"))
        for _ in range(20):
            # A turn of the control thread.
            served.threads.call(lambda: asyncio.sleep(0)).result(PATIENCE)
        assert served.state == "listening"
        go.set()
        beginning.result(PATIENCE)
        assert eventually(lambda: served.state == "attached")


def test_what_cannot_be_done_with_a_recording(served: ringplane.Export, tmp_path: Path) -> None:
    with pytest.raises(OperationError, match="the disk is not recorded"):
        served.end_recording()
    with pytest.raises(OperationError, match="the disk is not recorded"):
        served.mark("text")
    (tmp_path / "old.rec").touch()
    with pytest.raises(OperationError, match="exists already"):
        served.start_recording(tmp_path / "old.rec")
    served.start_recording(tmp_path / "new.rec")
    with pytest.raises(OperationError, match=r"it is recorded already, to .*new\.rec; end that recording before"):
        served.start_recording(tmp_path / "other.rec")
    assert not (tmp_path / "other.rec").exists()
    with pytest.raises(OperationError, match="recorded"):
        served.resize(32 << 20)
    served.stop()
    assert open_recording(tmp_path / "new.rec").complete
