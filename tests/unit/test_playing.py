"""Recordings that are played on an image or on a back end."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from errno import EIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringplane
from ringplane.block.image import ImageError
from ringplane.driver import Driver
from ringplane.driver.play_targets import ImageTarget, SocketTarget, Target
from ringplane.driver.playing import Player
from ringplane.recordings.entries import (
    CHANGES,
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    SECURE_ERASE,
    UNFINISHED,
    UNMAP,
    WRITE,
    ZERO,
    Entry,
    Header,
)
from ringplane.recordings.reader import Recording

from .recording_makers import recording_of
from .rig import loop_device, pattern

SIZE = 4 << 20
MS = 1_000_000


def recorded(*entries: dict[str, Any]) -> Recording:
    return recording_of(Header(SIZE), *entries)


MakeTarget = Callable[[], Target]


@pytest.fixture(params=["image", "socket"])
def make_target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeTarget]:
    """The same disk each time, whose content is a pattern."""
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(SIZE))
    with ExitStack() as opened:
        if request.param == "image":
            target: Target = opened.enter_context(closing(ImageTarget(path)))
        else:
            opened.enter_context(ringplane.serve(path, tmp_path / "socket"))
            target = SocketTarget(opened.enter_context(Driver(tmp_path / "socket")))
        yield lambda: target


def test_each_kind(make_target: MakeTarget) -> None:
    target = make_target()
    large = pattern(600 << 10, 1)
    recording = recorded(
        {"kind": WRITE, "data": large, "offset": 512},
        {"kind": WRITE, "data": pattern(512, 2), "offset": 1024, "flags": FUA},
        {"kind": MARK, "data": b"here"},
        {"kind": FLUSH},
        {"kind": ZERO, "offset": 1 << 20, "length": 8192},
        {"kind": ZERO, "offset": 2 << 20, "length": 1 << 20, "flags": UNMAP},
        {"kind": SECURE_ERASE, "offset": 3 << 20, "length": 4096},
        {"kind": DISCARD, "offset": (3 << 20) + 4096, "length": 4096},
        {"kind": WRITE, "data": pattern(512, 3), "offset": 0, "result": -EIO},
        {"kind": WRITE, "data": pattern(512, 4), "offset": 0, "flags": UNFINISHED},
    )
    player = Player(recording, target)
    played = player.play(timed=False)
    assert (played.requests, played.left_out, played.unsupported) == (7, 2, 0)
    assert list(player.differences()) == []
    assert target.read(0, 512) == pattern(SIZE)[:512]
    assert target.read(512, 512) == large[:512]
    assert target.read(1024, 512) == pattern(512, 2)
    assert target.read(1536, 64 << 10) == large[1024:][: 64 << 10]
    for offset, length in ((1 << 20, 8192), (2 << 20, 1 << 20), (3 << 20, 4096)):
        assert target.read(offset, length) == bytes(length)


def test_an_image_in_use_is_not_overwritten(tmp_path: Path) -> None:
    """Neither by us, nor, while we play, by others."""
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(SIZE))
    with ringplane.serve(path, tmp_path / "socket"), pytest.raises(OSError, match="another program uses it"):
        ImageTarget(path)
    with closing(ImageTarget(path)), pytest.raises(ImageError):
        ringplane.serve(path, tmp_path / "socket").__enter__()


def test_a_device_in_use_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    with loop_device(path) as device:
        with os.fdopen(os.open(device, os.O_RDWR | os.O_EXCL)), pytest.raises(OSError, match="another program uses it"):
            ImageTarget(device)
        with closing(ImageTarget(device)) as target:
            assert target.size == SIZE


def test_differences_are_found(make_target: MakeTarget) -> None:
    """What another one changes after the recording was played."""
    target = make_target()
    player = Player(
        recorded(
            {"kind": WRITE, "data": pattern(8192, 1), "offset": 8192},
            {"kind": ZERO, "offset": 65536, "length": 4096},
            {"kind": DISCARD, "offset": 1 << 20, "length": 4096},
        ),
        target,
    )
    player.play(timed=False)
    Player(
        recorded(*({"kind": WRITE, "data": b"!" * 512, "offset": place} for place in (12288, 65536, 1 << 20, 0))),
        target,
    ).play(timed=False)
    assert list(player.differences()) == [(12288, 512), (65536, 512)]


class FakeDisk:
    """A large disk of zeros, which remembers what was read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads: list[tuple[int, int]] = []

    def begin(self, entry: Entry) -> Callable[[], None]:
        return lambda: None

    def sync(self) -> None:
        pass

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return bytes(length)


def test_a_disk_that_was_discarded_as_a_whole_is_verified() -> None:
    """As mkfs does it. Only what was written is read, in large pieces, and memory is needed for that only."""
    disk = FakeDisk(1 << 30)
    writes = [{"kind": WRITE, "data": bytes(4096), "offset": 4096 * place} for place in range(1000)]
    recording = recording_of(
        Header(disk.size),
        {"kind": DISCARD, "length": disk.size},
        *writes,
        {"kind": ZERO, "offset": 512 << 20, "length": 8 << 20},
        {"kind": DISCARD, "offset": 516 << 20, "length": 508 << 20},
    )
    tracemalloc.start()
    try:
        assert list(Player(recording, disk).differences()) == []
        # A dictionary of the blocks would have 50 MiB.
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert sum(length for _, length in disk.reads) == 4096 * 1000 + (4 << 20)
    assert len(disk.reads) == 4 + 4


def test_all_kinds_are_in_flight_together_on_a_back_end(tmp_path: Path) -> None:
    """None is waited for when it begins: the disk is paused."""
    large = pattern(600 << 10, 1)
    recording = recorded(
        {"kind": WRITE, "data": large, "offset": 0, "began": 0},
        {"kind": WRITE, "data": pattern(512, 2), "offset": 1 << 20, "flags": FUA, "began": 0},
        {"kind": ZERO, "offset": 2 << 20, "length": 8192, "began": 0},
        {"kind": DISCARD, "offset": 3 << 20, "length": 4096, "began": 0},
        {"kind": FLUSH, "began": 0},
    )
    with (
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", create=SIZE) as export,
        Driver(tmp_path / "socket") as driver,
    ):
        target = SocketTarget(driver)
        export.pause()
        ends = [target.begin(entry) for entry in recording]
        assert target.size == SIZE
        export.resume()
        for end in ends:
            end()
        assert driver.read(0, len(large)) == large
        assert driver.read(1 << 20, 512) == pattern(512, 2)
        # The flush, and that of the write with FUA.
        assert (export.counters["flush"].requests, export.counters["discard"].requests) == (2, 1)


def test_a_back_end_that_accepts_only_small_ranges(tmp_path: Path) -> None:
    """There are more requests for one entry than the ring has room for."""
    recording = recorded({"kind": ZERO, "length": SIZE}, {"kind": DISCARD, "offset": 8192, "length": SIZE - 8192})
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(SIZE))
    with ringplane.serve(path, tmp_path / "socket") as export, Driver(tmp_path / "socket") as driver:
        driver.config = driver.config.copy()
        driver.config["max_write_zeroes_sectors"] = driver.config["max_discard_sectors"] = 8
        player = Player(recording, SocketTarget(driver))
        assert player.play(timed=False).requests == 2
        assert list(player.differences()) == []
        assert export.counters["write_zeroes"].requests == SIZE // 4096
        assert export.counters["discard"].requests == SIZE // 4096 - 2


def test_zeros_are_written_where_a_back_end_has_no_request_for_them(tmp_path: Path) -> None:
    recording = recorded(
        {"kind": ZERO, "length": 1 << 20},
        {"kind": SECURE_ERASE, "offset": 1 << 20, "length": 4096},
        {"kind": DISCARD, "offset": 2 << 20, "length": 4096},
    )
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(SIZE))
    options: Any = {"features": {"write-zeroes": False, "discard": False}}
    with ringplane.serve(path, tmp_path / "socket", **options), Driver(tmp_path / "socket") as driver:
        player = Player(recording, SocketTarget(driver))
        played = player.play(timed=False)
        assert (played.requests, played.unsupported) == (2, 1)
        assert list(player.differences()) == []


def test_what_is_not_whole_blocks_is_not_played_on_a_back_end(tmp_path: Path) -> None:
    recording = recorded({"kind": WRITE, "data": b"odd"})
    with (
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", create=SIZE),
        Driver(tmp_path / "socket") as driver,
        pytest.raises(ValueError, match="3 bytes at 0 are not whole blocks"),
    ):
        Player(recording, SocketTarget(driver)).play(timed=False)


def test_zeros_become_holes_of_an_image(tmp_path: Path) -> None:
    """If the guest allowed it."""
    path = tmp_path / "disk.img"
    for flags, fewer in ((UNMAP, True), (0, False)):
        path.write_bytes(pattern(SIZE))
        before = path.stat().st_blocks
        with closing(ImageTarget(path)) as target:
            Player(recorded({"kind": ZERO, "length": SIZE, "flags": flags}), target).play(timed=False)
        assert path.read_bytes() == bytes(SIZE)
        assert (path.stat().st_blocks < before // 2) == fewer


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Changes of which several can be in flight, also of the same places."""
    entries = []
    for index in range(draw(st.integers(1, 25))):
        kind = draw(st.sampled_from([WRITE, WRITE, WRITE, ZERO, DISCARD, FLUSH]))
        entry: dict[str, Any] = {"kind": kind, "began": draw(st.integers(max(0, index - 5), index))}
        if kind != FLUSH:
            entry |= {"offset": 512 * draw(st.integers(0, 12)), "length": 512 * draw(st.integers(1, 4))}
        if kind == WRITE:
            entry["data"] = pattern(entry["length"], index)
        entries.append(entry)
    return entries


class SlowDisk:
    """A disk in memory, on which requests end when somebody waits for them, and that watches what overlaps."""

    def __init__(self) -> None:
        self.size = SIZE
        self.content = bytearray(SIZE)
        self.in_flight: dict[int, Entry] = {}
        self.ended: list[int] = []
        # Whether all that has ended is stable.
        self.stable = False

    def begin(self, entry: Entry) -> Callable[[], None]:
        for other in self.in_flight.values():
            assert other.index >= entry.began, "it began before what had ended"
            apart = entry.offset >= other.offset + other.length or other.offset >= entry.offset + entry.length
            assert apart or FLUSH in (entry.kind, other.kind), "what overlaps is in flight together"
        self.in_flight[entry.index] = entry
        self.stable = False

        def end() -> None:
            del self.in_flight[entry.index]
            if entry.kind in CHANGES:
                data = entry.data if entry.kind == WRITE else bytes(entry.length)
                self.content[entry.offset : entry.offset + entry.length] = data

        return end

    def sync(self) -> None:
        assert self.in_flight == {}
        self.stable = True

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])


@given(histories())
def test_what_was_in_flight_together_is_so_again(entries: list[dict[str, Any]]) -> None:
    disk = SlowDisk()
    player = Player(recorded(*entries), disk)
    assert player.play(timed=False).requests == len(entries)
    assert disk.in_flight == {}
    assert disk.stable
    assert list(player.differences()) == []


@settings(max_examples=10)
@given(entries=histories())
def test_any_history(make_target: MakeTarget, entries: list[dict[str, Any]]) -> None:
    player = Player(recorded(*entries), make_target())
    player.play(timed=False)
    assert list(player.differences()) == []


def test_at_the_recorded_times(make_target: MakeTarget) -> None:
    """None begins too early. How late one can be depends on the machine, and is not added to the next one."""
    times = [0, 20, 20, 50, 90]
    began: list[int] = []
    target = make_target()

    class Watched:
        size = SIZE

        def begin(self, entry: Entry) -> Callable[[], None]:
            began.append(time.monotonic_ns())
            return target.begin(entry)

        def sync(self) -> None:
            target.sync()

        def read(self, offset: int, length: int) -> bytes:
            return target.read(offset, length)

    entries = [
        {"kind": WRITE, "data": bytes(512), "begin_ns": 7 + each * MS, "end_ns": 7 + each * MS} for each in times
    ]
    start = time.monotonic_ns()
    played = Player(recorded(*entries), Watched()).play(timed=True)
    assert all(at - start >= each * MS for at, each in zip(began, times, strict=True))
    assert played.recorded_seconds == 0.09
    assert played.seconds >= 0.09
