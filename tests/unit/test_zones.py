"""Zoned disks: valid and invalid requests compared with a model, and the state after exits, crashes and power cuts."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringplane
from ringplane.block import zonefile
from ringplane.block.image import ImageError
from ringplane.control.config import Config
from ringplane.control.listener import ListenError
from ringplane.control.rehearsal import find_problems
from ringplane.driver import Driver
from ringplane.driver.driver import FEATURES
from ringplane.driver.frontend import Refused
from ringplane.driver.virtqueue import peek, poke
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.options.zone_options import ZoneModel, parse_zones
from ringplane.system import procfs
from ringplane.vhost_user.messages import VHOST_F_LOG_ALL, ProtocolFeature
from ringplane.virtio import blk
from ringplane.virtio.blk_zones import DESCRIPTOR, REPORT

from .rig import (
    APPEND,
    CLOSE,
    FINISH,
    FLUSH,
    IN,
    IOERR,
    OK,
    OPEN,
    OUT,
    PATIENCE,
    REPORT_ZONES,
    RESET,
    RESET_ALL,
    UNSUPP,
    need_engine,
    pattern,
)
from .rig import ZONE_INVALID_CMD as INVALID_CMD

UNALIGNED_WP, OPEN_RESOURCE, ACTIVE_RESOURCE = 4, 5, 6
NOT_WP, EMPTY, IOPEN, EOPEN, CLOSED, FULL = 0, 1, 2, 3, 4, 14
CONV, SWR = 1, 2

MANAGEMENT = (OPEN, CLOSE, FINISH, RESET)

# In sectors: 16 zones of 256 KiB with a capacity of 192 KiB; the first two are conventional.
ZONE, CAPACITY, COUNT, CONVENTIONAL = 512, 384, 16, 2
MODEL = ZoneModel(ZONE * 512, CAPACITY * 512, CONVENTIONAL, max_open=3, max_active=5)
SIZE = COUNT * ZONE * 512
PAGE = 4096


@pytest.fixture(params=["aio", "io_uring", "memory"])
def engine(request: pytest.FixtureRequest) -> str:
    return need_engine(str(request.param))


@pytest.fixture
def folder(engine: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if engine == "memory" else "/var/tmp") as name:
        yield Path(name)


Serve = Callable[..., ringplane.Export]


@pytest.fixture
def serve(folder: Path, engine: str) -> Iterator[Serve]:
    """Serve the image `disk.img` of the folder, which the first call creates."""
    started: list[ringplane.Export] = []

    def start(**options: Any) -> ringplane.Export:
        image = folder / "disk.img"
        options = {"engine": engine, "zoned": MODEL, "num_queues": 2, "io_threads": 2} | options
        # A test with a model serves hundreds, each with 20 MB.
        started[:] = [export for export in started if not export.stopped]
        started.append(ringplane.serve(image, folder / "socket", create=SIZE, **options))
        return started[-1]

    yield start
    for export in started:
        export.stop()


class Disk:
    """A driver with support for zones; its methods return any status."""

    def __init__(self, export: ringplane.Export, **options: Any) -> None:
        assert export.socket_path is not None
        self.driver = Driver(export.socket_path, queues=2, memory_size=64 << 20, timeout=PATIENCE, **options)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.close()

    def do(self, kind: int, sector: int = 0, data: bytes = b"") -> int:
        return self.driver.request(kind, sector, data).status

    def write(self, sector: int, data: bytes) -> int:
        return self.do(OUT, sector, data)

    def read(self, sector: int, sectors: int) -> tuple[int, bytes]:
        answer = self.driver.request(IN, sector, read=512 * sectors)
        return answer.status, answer.data

    def append(self, zone: int, data: bytes) -> tuple[int, int]:
        """The status and, if it is OK, the sector of the data."""
        answer = self.driver.request(APPEND, zone * ZONE, data, read=8)
        assert answer.used == (9 if answer.status == OK else 0)
        return answer.status, struct.unpack("<Q", answer.data)[0] if answer.status == OK else -1

    def zones(self, first: int = 0, room: int = COUNT) -> list[tuple[int, int]]:
        """The state of each zone, and its write pointer in sectors from the zone's start."""
        answer = self.driver.request(REPORT_ZONES, first * ZONE, read=64 + 64 * room)
        (head,) = np.frombuffer(answer.data[:64], REPORT)
        found = np.frombuffer(answer.data[64:], DESCRIPTOR)[: head["nr_zones"]]
        assert answer.status == OK
        assert answer.used == 64 + 64 * len(found) + (len(found) == room)
        return [(int(zone["z_state"]), int(zone["z_wp"] - zone["z_start"])) for zone in found]

    def zone(self, number: int) -> tuple[int, int]:
        return self.zones(number, 1)[0]


@pytest.fixture
def disk(serve: Serve) -> Iterator[Disk]:
    with Disk(serve()) as disk:
        yield disk


def test_a_sync_of_the_control_plane_that_failed_is_not_forgotten(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data may be lost, although the next fdatasync(2) succeeds."""
    export = serve()
    with Disk(export) as disk, monkeypatch.context() as patch:
        assert disk.write(4 * ZONE, bytes(512)) == OK

        def fail(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            export.disk.sync()
        patch.undo()
        with pytest.raises(OSError, match="an earlier sync failed"):
            export.disk.sync()
        assert export.disk.flush_failed
        assert disk.do(FLUSH) == IOERR
        assert disk.read(4 * ZONE, 1) == (OK, bytes(512))


def test_the_configuration_space_of_a_zoned_disk(disk: Disk) -> None:
    config = disk.driver.config
    assert config["zone_sectors"] == ZONE
    assert (config["max_open_zones"], config["max_active_zones"]) == (3, 5)
    assert (config["max_append_sectors"], config["write_granularity"], config["model"]) == (CAPACITY, 512, 1)
    offered = disk.driver.front_end.get_features()
    assert offered & blk.VIRTIO_BLK_F_ZONED
    # These would bypass the write pointers of the zones.
    assert not offered & (blk.VIRTIO_BLK_F_DISCARD | blk.VIRTIO_BLK_F_WRITE_ZEROES | blk.VIRTIO_BLK_F_SECURE_ERASE)


def test_a_report(disk: Disk) -> None:
    answer = disk.driver.request(REPORT_ZONES, 0, read=64 + 64 * COUNT)
    found = np.frombuffer(answer.data[64:], DESCRIPTOR)
    assert answer.data[:64] == struct.pack("<Q", COUNT) + bytes(56)
    assert found["z_start"].tolist() == [number * ZONE for number in range(COUNT)]
    assert found["z_cap"].tolist() == [ZONE] * 2 + [CAPACITY] * 14
    assert found["z_type"].tolist() == [CONV] * 2 + [SWR] * 14
    assert found["z_state"].tolist() == [NOT_WP] * 2 + [EMPTY] * 14
    assert not found["reserved"].any()
    # From the zone of the sector on, as many as there is room for.
    assert len(disk.zones(first=10)) == 6
    assert len(disk.zones(room=3)) == 3
    answer = disk.driver.request(REPORT_ZONES, 5 * ZONE + 7, read=64 + 64 + 63)
    assert (answer.status, answer.used) == (OK, 128)
    assert np.frombuffer(answer.data[64:128], DESCRIPTOR)["z_start"][0] == 5 * ZONE
    assert disk.driver.request(REPORT_ZONES, 0, read=64).data[:8] == bytes(8)


@pytest.mark.parametrize(("sector", "room"), [(COUNT * ZONE, 128), (1 << 63, 128), (0, 63), (0, 0)])
def test_an_invalid_report(disk: Disk, sector: int, room: int) -> None:
    assert disk.driver.request(REPORT_ZONES, sector, read=room).status == IOERR


def test_conventional_zones_are_like_any_disk(disk: Disk) -> None:
    assert disk.write(700, pattern(4096)) == OK
    assert disk.write(100, pattern(512)) == OK
    assert disk.write(ZONE - 4, pattern(4096, 2)) == OK
    assert disk.read(ZONE - 4, 8) == (OK, pattern(4096, 2))
    for kind in MANAGEMENT:
        assert disk.do(kind, ZONE) == INVALID_CMD
    assert disk.append(1, bytes(512))[0] == INVALID_CMD


def test_writes_move_the_pointer(disk: Disk) -> None:
    start = 3 * ZONE
    assert disk.write(start, pattern(4096)) == OK
    assert disk.zone(3) == (IOPEN, 8)
    assert disk.write(start + 8, pattern(512, 1)) == OK
    assert disk.append(3, pattern(1024, 2)) == (OK, start + 9)
    assert disk.zone(3) == (IOPEN, 11)
    assert disk.read(start, 11) == (OK, pattern(4096) + pattern(512, 1) + pattern(1024, 2))
    assert disk.read(start + 11, 4) == (OK, bytes(2048))


@pytest.mark.parametrize(
    ("sector", "sectors", "status"),
    [
        (3 * ZONE + 1, 1, UNALIGNED_WP),
        (4 * ZONE - 1, 1, UNALIGNED_WP),
        (3 * ZONE, CAPACITY + 1, INVALID_CMD),
        (3 * ZONE, ZONE + 1, INVALID_CMD),
        (2 * ZONE - 1, 2, INVALID_CMD),
        (COUNT * ZONE - 1, 2, IOERR),
        (COUNT * ZONE, 1, IOERR),
        (1 << 62, 1, IOERR),
        ((1 << 64) - 1, 1, IOERR),
    ],
)
def test_a_rejected_write(disk: Disk, sector: int, sectors: int, status: int) -> None:
    before = disk.zones()
    assert disk.write(sector, bytes(512 * sectors)) == status
    assert disk.zones() == before


@pytest.mark.parametrize(
    ("sector", "size", "room", "status"),
    [
        (3 * ZONE + 1, 512, 8, INVALID_CMD),
        (3 * ZONE, 0, 8, INVALID_CMD),
        (3 * ZONE, (CAPACITY + 1) * 512, 8, INVALID_CMD),
        (3 * ZONE, 700, 8, UNALIGNED_WP),
        (3 * ZONE, 512, 7, IOERR),
        (COUNT * ZONE, 512, 8, IOERR),
        ((1 << 64) - ZONE, 512, 8, IOERR),
    ],
)
def test_a_rejected_append(disk: Disk, sector: int, size: int, room: int, status: int) -> None:
    before = disk.zones()
    assert disk.driver.request(APPEND, sector, bytes(size), read=room).status == status
    assert disk.zones() == before


def test_a_read_stays_in_its_zone(disk: Disk) -> None:
    assert disk.read(4 * ZONE - 1, 2)[0] == INVALID_CMD
    assert disk.read(2 * ZONE - 1, 2)[0] == INVALID_CMD
    assert disk.read(0, 2 * ZONE)[0] == OK
    assert disk.read(4 * ZONE, ZONE) == (OK, bytes(ZONE * 512))


def test_blocks_of_4096_bytes(serve: Serve) -> None:
    with Disk(serve(block_size=4096)) as disk:
        assert disk.driver.config["write_granularity"] == 4096
        assert disk.write(3 * ZONE, bytes(512)) == UNALIGNED_WP
        assert disk.write(0, bytes(512)) == IOERR
        assert disk.append(3, bytes(512))[0] == UNALIGNED_WP
        assert disk.append(3, bytes(4096)) == (OK, 3 * ZONE)


def test_states(disk: Disk) -> None:
    """Each transition of section 5.2.6."""
    start = 5 * ZONE

    def after(kind: int, data: bytes = b"") -> tuple[int, tuple[int, int]]:
        sector = start + (disk.zone(5)[1] if kind == OUT else 0)
        return disk.do(kind, sector, data), disk.zone(5)

    data = pattern(512)
    assert after(CLOSE) == (INVALID_CMD, (EMPTY, 0))
    assert after(RESET) == (OK, (EMPTY, 0))
    assert after(OPEN) == (OK, (EOPEN, 0))
    assert after(OPEN) == (OK, (EOPEN, 0))
    assert after(CLOSE) == (OK, (EMPTY, 0))
    assert after(OUT, data) == (OK, (IOPEN, 1))
    assert after(OPEN) == (OK, (EOPEN, 1))
    assert after(OUT, data) == (OK, (EOPEN, 2))
    assert after(CLOSE) == (OK, (CLOSED, 2))
    assert after(CLOSE) == (OK, (CLOSED, 2))
    assert after(OUT, data) == (OK, (IOPEN, 3))
    assert after(CLOSE) == (OK, (CLOSED, 3))
    assert after(OPEN) == (OK, (EOPEN, 3))
    assert after(RESET) == (OK, (EMPTY, 0))
    assert after(FINISH) == (OK, (FULL, ZONE))
    for kind in (OPEN, CLOSE):
        assert after(kind) == (INVALID_CMD, (FULL, ZONE))
    assert after(FINISH) == (OK, (FULL, ZONE))
    assert disk.write(start, data) == INVALID_CMD
    assert disk.append(5, data)[0] == INVALID_CMD
    assert after(RESET) == (OK, (EMPTY, 0))
    assert disk.write(start, bytes(CAPACITY * 512)) == OK
    assert disk.zone(5) == (FULL, ZONE)
    assert disk.do(RESET, start + 1) == INVALID_CMD
    assert after(RESET) == (OK, (EMPTY, 0))


def test_open_and_active_zones_are_limited(disk: Disk) -> None:
    """Implicitly opened zones are closed to make room, explicitly opened ones are not."""
    for zone in range(4, 9):
        assert disk.write(zone * ZONE, bytes(512)) == OK
    assert [state for state, _ in disk.zones()[4:9]] == [CLOSED, CLOSED, IOPEN, IOPEN, IOPEN]
    assert disk.write(9 * ZONE, bytes(512)) == ACTIVE_RESOURCE
    assert disk.append(9, bytes(512))[0] == ACTIVE_RESOURCE
    assert disk.do(OPEN, 9 * ZONE) == ACTIVE_RESOURCE
    for zone in (4, 5, 6):
        assert disk.do(OPEN, zone * ZONE) == OK
    assert [state for state, _ in disk.zones()[4:9]] == [EOPEN, EOPEN, EOPEN, CLOSED, CLOSED]
    assert disk.write(7 * ZONE + 1, bytes(512)) == OPEN_RESOURCE
    assert disk.do(OPEN, 7 * ZONE) == OPEN_RESOURCE
    assert disk.do(FINISH, 4 * ZONE) == OK
    assert disk.write(7 * ZONE + 1, bytes(512)) == OK
    assert disk.write(9 * ZONE, bytes(512)) == OPEN_RESOURCE or disk.zone(9)[0] == IOPEN
    assert disk.do(RESET_ALL) == OK
    assert disk.zones()[CONVENTIONAL:] == [(EMPTY, 0)] * 14


def begin_append(disk: Disk, zone: int, data: bytes) -> Callable[[], tuple[int, int]]:
    """Put an append into the ring without a kick. The returned function waits, and checks that only it was written."""
    memory = disk.driver.memory
    header, place, body = memory.allocate(16), memory.allocate(9), memory.allocate(len(data))
    poke(header, struct.pack("<IIQ", APPEND, 0, zone * ZONE))
    poke(place, b"\xee" * 9)
    poke(body, data)
    ticket = disk.driver.submit([(header, 16, False), (body, len(data), False), (place, 9, True)], kick=False)

    def finish() -> tuple[int, int]:
        assert disk.driver.wait(ticket) == 9
        assert peek(body, len(data)) == data
        sector, status = struct.unpack("<QB", peek(place, 9))
        return status, sector

    return finish


def test_appends_in_flight_at_once(disk: Disk) -> None:
    """Each gets its own position, which contains its data; adjacent ones must not be merged."""
    for turn in range(8):
        zone = 3 + turn
        blocks = [pattern(512 * (1 + number % 3), 100 * turn + number) for number in range(24)]
        waits = [begin_append(disk, zone, block) for block in blocks]
        disk.driver.queues[0].kick()
        places = [wait() for wait in waits]
        assert all(status == OK for status, _ in places)
        for block, (_, sector) in zip(blocks, places, strict=True):
            assert disk.read(sector, len(block) // 512) == (OK, block)
        ends = sorted((sector, sector + len(block) // 512) for block, (_, sector) in zip(blocks, places, strict=True))
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(ends))
        assert disk.do(FINISH, zone * ZONE) == OK


def test_reports_and_append_sectors_are_marked_in_the_dirty_log(disk: Disk) -> None:
    """What the device writes for them is not read from the image."""
    memory, front_end = disk.driver.memory, disk.driver.front_end
    fd = os.memfd_create("log")
    os.ftruncate(fd, memory.size // PAGE // 8)
    front_end.set_protocol_features(front_end.protocol_features | ProtocolFeature.LOG_SHMFD)
    front_end.set_log_base(memory.size // PAGE // 8, 0, fd)
    front_end.set_features(front_end.features | VHOST_F_LOG_ALL)
    head, data = memory.allocate(16), memory.allocate(512)
    for kind, size, readable in ((REPORT_ZONES, 2 * PAGE, []), (APPEND, 8, [(data, 512, False)])):
        poke(head, struct.pack("<IIQ", kind, 0, 3 * ZONE))
        # The last byte, the status, is in a page of its own.
        places = [memory.allocate(PAGE) for _ in range(2 + size // PAGE)]
        writable = [(place, min(size, PAGE), True) for place in places[:-1]]
        os.pwrite(fd, bytes(memory.size // PAGE // 8), 0)
        disk.driver.wait(disk.driver.submit([(head, 16, False), *readable, *writable, (places[-1], 1, True)]))
        bits = np.unpackbits(np.frombuffer(os.pread(fd, memory.size // PAGE // 8, 0), np.uint8), bitorder="little")
        assert peek(places[-1], 1) == b"\0"
        assert all(bits[memory.guest(place) // PAGE] for place in places)
    os.close(fd)


class Model:
    """A model of the zones according to section 5.2.6."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.state = [NOT_WP] * CONVENTIONAL + [EMPTY] * (COUNT - CONVENTIONAL)
        self.pointer = [0] * COUNT

    def write(self, zone: int, at: int, data: bytes) -> set[int]:
        """The possible statuses; the model assumes the reported one."""
        if self.state[zone] == FULL:
            return {INVALID_CMD}
        if at != self.pointer[zone]:
            return {UNALIGNED_WP}
        if at + len(data) // 512 > CAPACITY:
            return {INVALID_CMD}
        refused = self.open(zone, IOPEN)
        if refused:
            return {refused}
        start = (zone * ZONE + at) * 512
        self.content[start : start + len(data)] = data
        self.pointer[zone] += len(data) // 512
        if self.pointer[zone] == CAPACITY:
            self.state[zone] = FULL
        return {OK}

    def open(self, zone: int, wanted: int) -> int:
        """0, or an error status."""
        opened = [number for number in range(COUNT) if self.state[number] in (IOPEN, EOPEN)]
        active = [number for number in range(COUNT) if self.state[number] in (IOPEN, EOPEN, CLOSED)]
        if zone not in opened:
            if zone not in active and len(active) >= MODEL.max_active:
                return ACTIVE_RESOURCE
            if len(opened) >= MODEL.max_open and all(self.state[number] == EOPEN for number in opened):
                return OPEN_RESOURCE
        self.state[zone] = max(wanted, self.state[zone]) if zone in opened else wanted
        return 0

    def manage(self, kind: int, zone: int) -> int:
        state = self.state[zone]
        if kind == OPEN:
            return INVALID_CMD if state == FULL else self.open(zone, EOPEN)
        if kind == CLOSE:
            if state not in (IOPEN, EOPEN, CLOSED):
                return INVALID_CMD
            self.state[zone] = CLOSED if self.pointer[zone] else EMPTY
        elif kind == FINISH:
            self.state[zone], self.pointer[zone] = FULL, CAPACITY
        else:
            self.state[zone], self.pointer[zone] = EMPTY, 0
            self.content[zone * ZONE * 512 : (zone + 1) * ZONE * 512] = bytes(ZONE * 512)
        return OK

    def close_like(self, reported: list[tuple[int, int]]) -> None:
        """The device chooses which implicitly opened zones it closes to make room."""
        for zone, (state, _) in enumerate(reported):
            if (self.state[zone], state) == (IOPEN, CLOSED):
                self.state[zone] = CLOSED

    def zones(self) -> list[tuple[int, int]]:
        return [
            (state, ZONE if state == FULL else pointer) for state, pointer in zip(self.state, self.pointer, strict=True)
        ]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_any_requests_agree_with_the_model(serve: Serve, folder: Path, seed: int) -> None:
    for name in ("disk.img", "disk.img.zones"):
        (folder / name).unlink(missing_ok=True)
    draw, model = random.Random(seed), Model()
    with serve() as export, Disk(export) as disk:
        for _ in range(150):
            zone = draw.randrange(CONVENTIONAL, 10)
            kind = draw.choice([OUT, OUT, OUT, APPEND, APPEND, OPEN, CLOSE, FINISH, RESET, FLUSH])
            data = draw.randbytes(512 * draw.choice([1, 8, 100, CAPACITY // 2]))
            if kind == OUT:
                at = draw.choice([model.pointer[zone]] * 4 + [draw.randrange(CAPACITY - 200)])
                # Within the zone, regardless of its capacity.
                data = data[: (ZONE - at) * 512]
                if not data:
                    continue
                assert {disk.write(zone * ZONE + at, data)} == model.write(zone, at, data)
            elif kind == APPEND:
                at = model.pointer[zone]
                status, sector = disk.append(zone, data)
                assert {status} == model.write(zone, at, data)
                assert status != OK or sector == zone * ZONE + at
            elif kind == FLUSH:
                assert disk.do(FLUSH) == OK
            else:
                assert disk.do(kind, zone * ZONE) == model.manage(kind, zone)
            reported = disk.zones()
            model.close_like(reported)
            assert reported == model.zones()
        for zone in range(COUNT):
            assert disk.read(zone * ZONE, ZONE) == (OK, bytes(model.content[zone * ZONE * 512 :][: ZONE * 512]))
    # In the next process no zone is open, and everything else is unchanged.
    with serve() as export, Disk(export) as disk:
        model.state = [CLOSED if state in (IOPEN, EOPEN) else state for state in model.state]
        model.state = [
            EMPTY if state == CLOSED and not at else state for state, at in zip(model.state, model.pointer, strict=True)
        ]
        assert disk.zones() == model.zones()


def test_resets_free_space(disk: Disk, folder: Path) -> None:
    image = folder / "disk.img"
    for zone in range(3, 8):
        assert disk.write(zone * ZONE, pattern(CAPACITY * 512)) == OK
    used = image.stat().st_blocks
    assert used >= 5 * CAPACITY
    assert disk.do(RESET, 3 * ZONE) == OK
    assert image.stat().st_blocks <= used - CAPACITY
    assert disk.do(RESET_ALL) == OK
    assert image.stat().st_blocks == 0
    assert disk.read(3 * ZONE, ZONE) == (OK, bytes(ZONE * 512))


# Copies to a mapping are not subject to a file size limit.
@pytest.mark.parametrize("engine", ["aio", "io_uring"], indirect=True)
def test_a_failed_write_frees_its_place(serve: Serve) -> None:
    with Disk(serve()) as disk:
        assert disk.write(3 * ZONE, pattern(512)) == OK
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * ZONE * 512 + 4096, hard))
        try:
            statuses = [disk.write(5 * ZONE, pattern(512)), disk.append(6, pattern(512))[0]]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert statuses == [IOERR, IOERR]
        assert disk.zones()[5:7] == [(EMPTY, 0)] * 2
        assert disk.append(6, pattern(512)) == (OK, 6 * ZONE)


# The state after the process ends


def test_pointers_are_kept_across_a_restart(serve: Serve) -> None:
    export = serve()
    with Disk(export) as disk:
        assert disk.append(3, pattern(512)) == (OK, 3 * ZONE)
        assert disk.do(OPEN, 4 * ZONE) == OK
        assert disk.do(FINISH, 5 * ZONE) == OK
    export.stop()
    with Disk(serve()) as disk:
        assert disk.zones()[3:6] == [(CLOSED, 1), (EMPTY, 0), (FULL, ZONE)]
        assert disk.read(3 * ZONE, 2) == (OK, pattern(512) + bytes(512))


@pytest.mark.parametrize("new", [True, False])
def test_a_file_system_that_reports_no_holes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    """The whole file seems to be data, but a new file has none."""
    monkeypatch.setattr("ringplane.block.image.next_data", lambda fd, offset: offset)
    image = folder / "other.img"
    if not new:
        image.touch()
        os.truncate(image, 16 * MODEL.size)

    def serve_it() -> None:
        ringplane.serve(image, tmp_path / "other.sock", create=16 * MODEL.size, zoned=MODEL, num_queues=1).stop()

    if new:
        serve_it()
    else:
        with pytest.raises(ImageError, match="has data"):
            serve_it()


def crash(monkeypatch: pytest.MonkeyPatch, folder: Path, boot: bytes | None) -> None:
    """Make the files look like after a kill or, with another boot, after a power cut."""
    content = bytearray((folder / "disk.img.zones").read_bytes())
    header = np.frombuffer(content, zonefile.HEADER, 1)
    header[0]["in_use"] = 1
    (folder / "disk.img.zones").write_bytes(content)
    if boot is not None:
        monkeypatch.setattr(procfs, "boot_id", lambda: boot)


def pause(export: ringplane.Export, folder: Path) -> bytes:
    """The file of the pointers in its current state, before the exit of the process completes it."""
    return (folder / "disk.img.zones").read_bytes()


@pytest.mark.parametrize("boot", [None, b"another", pytest.param(b"", id="unknown, without /proc")])
def test_after_a_crash(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch, boot: bytes | None) -> None:
    """After a crash of the process completed writes are there; after one of the machine, those that a flush covers."""
    export = serve()
    with Disk(export) as disk:
        assert disk.write(3 * ZONE, pattern(4096)) == OK
        assert disk.write(4 * ZONE, pattern(4096)) == OK
        assert disk.do(FLUSH) == OK
        assert disk.write(3 * ZONE + 8, pattern(4096, 1)) == OK
        assert disk.do(RESET, 4 * ZONE) == OK
        assert disk.write(5 * ZONE, pattern(4096)) == OK
        at_crash = pause(export, folder)
    export.stop()
    (folder / "disk.img.zones").write_bytes(at_crash)
    crash(monkeypatch, folder, boot)
    with Disk(serve()) as disk:
        if boot is None:
            assert disk.zones()[3:6] == [(CLOSED, 16), (EMPTY, 0), (CLOSED, 8)]
        else:
            assert disk.zones()[3:6] == [(CLOSED, 8), (EMPTY, 0), (EMPTY, 0)]
        assert disk.read(3 * ZONE, 8) == (OK, pattern(4096))
        for zone, (_, pointer) in enumerate(disk.zones()[3:6], 3):
            # Data that no guarantee covers reads as never written.
            assert disk.read(zone * ZONE + pointer, ZONE - pointer) == (OK, bytes((ZONE - pointer) * 512))


def test_without_a_cache_completed_writes_are_stable(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = serve()
    with Disk(export, feature_bits=FEATURES & ~(blk.VIRTIO_BLK_F_FLUSH | blk.VIRTIO_BLK_F_CONFIG_WCE)) as disk:
        assert disk.write(3 * ZONE, pattern(4096)) == OK
        assert disk.append(3, pattern(512)) == (OK, 3 * ZONE + 8)
        at_crash = pause(export, folder)
    export.stop()
    (folder / "disk.img.zones").write_bytes(at_crash)
    crash(monkeypatch, folder, b"another")
    with Disk(serve()) as disk:
        assert disk.zone(3) == (CLOSED, 9)


def test_the_write_cache_is_switched_off(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = serve()
    with Disk(export) as disk:
        assert disk.write(3 * ZONE, pattern(4096)) == OK
        disk.driver.set_write_back(False)
        at_crash = pause(export, folder)
    export.stop()
    (folder / "disk.img.zones").write_bytes(at_crash)
    crash(monkeypatch, folder, b"another")
    with Disk(serve()) as disk:
        assert disk.zone(3) == (CLOSED, 8)


def test_a_process_that_is_killed(folder: Path) -> None:
    """With writes in flight: each completed one is there as a whole."""
    command = [sys.executable, "-m", "ringplane", "serve", "--blk-file", folder / "disk.img", "--create", str(SIZE)]
    command += ["--socket-path", folder / "socket", "--zoned", "256K", "--num-queues", "2"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "listening" not in process.stdout.readline():
        assert process.poll() is None
    driver = Driver(folder / "socket", queues=2, memory_size=64 << 20, timeout=PATIENCE)
    places = []
    for number in range(200):
        answer = driver.request(APPEND, (number % 8) * ZONE, pattern(4096, number), read=8)
        assert answer.status == OK
        places.append(struct.unpack("<Q", answer.data)[0])
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    driver.close()
    os.unlink(folder / "socket")
    with (
        ringplane.serve(folder / "disk.img", folder / "socket", zoned=ZoneModel(256 << 10, 256 << 10)) as export,
        Disk(export) as disk,
    ):
        assert [pointer for _, pointer in disk.zones()[:8]] == [200] * 8
        for number, sector in enumerate(places):
            assert disk.read(sector, 8) == (OK, pattern(4096, number))


# Errors


def test_a_driver_without_zoned_support(serve: Serve) -> None:
    with pytest.raises(Refused):
        Disk(serve(), feature_bits=FEATURES & ~blk.VIRTIO_BLK_F_ZONED)


@pytest.mark.parametrize("kind", [APPEND, REPORT_ZONES, *MANAGEMENT, RESET_ALL])
def test_a_disk_without_zones(serve: Serve, kind: int) -> None:
    with Disk(serve(zoned=None)) as disk:
        assert disk.driver.request(kind, 0, bytes(512) if kind == APPEND else b"", read=128).status == UNSUPP


def test_a_read_only_disk(serve: Serve) -> None:
    with pytest.raises(ImageError, match=r"disk\.img\.zones is missing, which a read-only zoned disk needs"):
        serve(read_only=True)
    export = serve()
    with Disk(export) as disk:
        assert disk.write(3 * ZONE, pattern(512)) == OK
    export.stop()
    with Disk(serve(read_only=True)) as disk:
        assert disk.zone(3) == (CLOSED, 1)
        assert disk.read(3 * ZONE, 1) == (OK, pattern(512))
        assert disk.write(3 * ZONE + 1, pattern(512)) == IOERR
        assert disk.append(3, pattern(512))[0] == IOERR
        for kind in (*MANAGEMENT, RESET_ALL):
            assert disk.do(kind, 3 * ZONE) == IOERR
        assert disk.do(FLUSH) == OK


def test_a_zoned_image_is_only_served_as_a_zoned_disk(serve: Serve, folder: Path) -> None:
    serve().stop()
    with pytest.raises(ImageError, match=r"is a zoned disk, because disk\.img\.zones exists; serve it with --zoned"):
        serve(zoned=None)
    with pytest.raises(ImageError, match="describes other zones: 16 of 262144 bytes"):
        serve(zoned=ZoneModel(ZONE * 512, ZONE * 512))
    damaged = bytearray((folder / "disk.img.zones").read_bytes())
    damaged[4096 + 8 * 5 : 4096 + 8 * 6] = struct.pack("<q", CAPACITY + 1)
    (folder / "disk.img.zones").write_bytes(damaged)
    with pytest.raises(ImageError, match="damaged: a write pointer is outside its zone"):
        serve()
    (folder / "disk.img.zones").write_bytes(b"x" * len(damaged))
    with pytest.raises(ImageError, match="not a zone file of ringplane"):
        serve()
    (folder / "disk.img.zones").write_bytes(damaged[:-1])
    with pytest.raises(ImageError, match="the size is not that of"):
        serve()


def test_an_image_with_data_does_not_become_a_zoned_disk(serve: Serve, folder: Path) -> None:
    image = folder / "disk.img"
    image.write_bytes(bytes(SIZE - 4096) + pattern(4096))
    with pytest.raises(ImageError, match=r"has data, but disk\.img\.zones .* is missing"):
        serve()
    assert not (folder / "disk.img.zones").exists()


@pytest.mark.parametrize("size", [0, PAGE, 3 * PAGE])
def test_a_file_whose_creation_was_interrupted_is_completed(
    serve: Serve, folder: Path, tmp_path: Path, size: int
) -> None:
    """Its header is written last."""
    image, zones = folder / "disk.img", folder / "disk.img.zones"
    zones.write_bytes(bytes(size))
    image.write_bytes(pattern(4096) + bytes(SIZE - 4096))
    with pytest.raises(ImageError, match="has data"):
        serve()
    image.unlink()
    image.touch()
    os.truncate(image, SIZE)
    config = DiskConfig(image, ("io0",), socket_path=tmp_path / "socket", create=SIZE, zoned=MODEL)
    assert find_problems(Config([config], [IoThread("io0")])) == []
    assert zones.read_bytes() == bytes(size)
    for written in range(2):
        export = serve()
        with Disk(export) as disk:
            assert disk.append(3, pattern(512)) == (OK, 3 * ZONE + written)
        export.stop()
    assert zones.stat().st_size <= zones.stat().st_blocks * 512


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (ZoneModel(1 << 20, 1 << 20, conventional=4), "with 4 zones at most 3 can be conventional, not 4"),
        (ZoneModel(64 << 20, 64 << 20), "add 62914560 bytes with: truncate -s"),
    ],
)
def test_zones_that_do_not_fit_leave_nothing_behind(
    serve: Serve, folder: Path, model: ZoneModel, sentence: str
) -> None:
    with pytest.raises(ImageError, match=sentence):
        serve(zoned=model)
    assert list(folder.iterdir()) == []


def test_an_invalid_socket_leaves_nothing_behind(folder: Path) -> None:
    with pytest.raises(ListenError):
        ringplane.serve(folder / "disk.img", folder / "none" / "socket", create=SIZE, zoned=MODEL)
    assert list(folder.iterdir()) == []


def test_another_size_is_rejected(serve: Serve, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    export = serve()
    with Disk(export) as disk:
        os.truncate(folder / "disk.img", 2 * SIZE)
        export.refresh_size()
        assert disk.zone(3) == (EMPTY, 0)
        export.drain()
        assert disk.driver.capacity == SIZE
    export.stop()
    assert "a zoned disk cannot get another size" in caplog.text


def test_option_values_are_parsed() -> None:
    assert parse_zones("64M") == ZoneModel(64 << 20, 64 << 20)
    text = "1G,capacity=768M, conventional=3,max-open=8,max-active=12"
    assert parse_zones(text) == ZoneModel(1 << 30, 768 << 20, 3, 8, 12)
    for wrong in ("48M", "32K", "64M,capacity=65M", "64M,capacity=1000", "64M,max-open=9,max-active=8", "64M,x=1"):
        with pytest.raises(ValueError, match=r"power of two|capacity|max-open|'x=1' is not one of"):
            parse_zones(wrong)
