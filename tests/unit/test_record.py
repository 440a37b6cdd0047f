"""The layer `record`: all that changes the disk is recorded, in the order in which it ended, and nothing is lost."""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.layers.record import RecordLayer, RecordPart
from ringplane.block.layers.recording_file import RecordingFile
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


@settings(max_examples=20)
@given(kinds=st.lists(st.sampled_from([IN, OUT, OUT, FLUSH]), min_size=1, max_size=60), threads=st.integers(1, 2))
def test_any_mixture_of_several_threads(make_rig: RigFactory, tmp_path: Path, kinds: list[int], threads: int) -> None:
    """What was recorded makes the same disk of the previous one, and says what covers what."""
    path = tmp_path / "mixture.rec"
    path.unlink(missing_ok=True)
    recorder = Recorder(path)
    rig = make_rig(workers=threads)
    lines = [rig.line(number, [recorder.part()]).start() for number in range(threads)]
    recorder.start()
    for place, kind in enumerate(kinds):
        data = pattern(1024, place) if kind == OUT else b""
        lines[place % threads].put(kind, 2 * place, data, 1024 if kind == IN else 0)
        lines[place % threads].kick()
    for line in lines:
        line.wait()
        line.stop()
    recording = recorder.end()
    assert played(recording) == rig.content()
    assert len(recording) == sum(kind != IN for kind in kinds)
    assert recording.complete


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


class SlowFile:
    """A pipe in place of the file of a recording: its storage hangs until `read_all` is called."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._start = recorder.path.read_bytes()
        self._take, self._give = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(self._give, fcntl.F_SETPIPE_SZ, 4096)
        recorder.file._record["fd"] = self._give
        self._taken: list[bytes] = []
        self._reading = threading.Thread(target=self._read)

    def _read(self) -> None:
        while piece := os.read(self._take, 1 << 16):
            self._taken.append(piece)

    @property
    def waiting(self) -> int:
        """Bytes that are not in the pipe yet."""
        return int(self._recorder.file._record["head"] - self._recorder.file._record["tail"])

    def read_all(self) -> None:
        self._reading.start()

    def end(self) -> Recording:
        """When no I/O is in progress."""
        self._recorder.end()
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
    file = SlowFile(recorder)
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
    file, part = SlowFile(recorder), recorder.part()
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
        run_load(driver, Load(depth=16, seconds=0.3, read_percent=30, verify=True))
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
            loading = pool.submit(run_load, driver, Load(depth=8, queues=2, read_percent=30, seconds=0.5, seed=number))
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
    recording = served.operations.recording
    assert recording is not None
    recording.file.failed = "No space left on device"
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
        result = run_load(driver, Load(depth=8, queues=2, read_percent=50, seconds=1, verify=True))
        ended.set()
        count = beginning.result()
    assert result.errors == 0
    assert all(open_recording(tmp_path / f"{number}.rec").complete for number in range(count))


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
