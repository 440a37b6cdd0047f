"""Requests that cannot be done: an error in the status byte, the right length in used.len, no other effect."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringplane.dataplane import ring_rules
from ringplane.dataplane.state import MAX_IOVECS, MAX_RANGES
from ringplane.driver import Driver
from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES, FrontEnd, Refused
from ringplane.vhost_user.messages import ProtocolError, ProtocolFeature
from ringplane.virtio import blk
from unit.rig import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    NO_ANSWER,
    OK,
    OUT,
    PATIENCE,
    SCSI_CMD,
    SECURE_ERASE,
    UNSUPP,
    WRITE_ZEROES,
    Answer,
)

from .attacker import BLOCK_FEATURES, RemoteLine
from .conftest import DISK, EVERY_ENGINE, FOLDERS, SIZE, Target, sector, serving, worker_engine

pytestmark = EVERY_ENGINE

CAPACITY = SIZE // 512
LIFETIME, ZONE_APPEND, ZONE_REPORT = 10, 15, 16
RANGES = blk.VIRTIO_BLK_F_DISCARD | blk.VIRTIO_BLK_F_WRITE_ZEROES | blk.VIRTIO_BLK_F_SECURE_ERASE


def segment(first: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", first & (1 << 64) - 1, count, flags)


def nothing(size: int) -> bytes:
    return bytes([NO_ANSWER]) * size


# Type, sector, data, room for the answer; status, used.len, and how much of the room is written.
LENGTHS = {
    "read": ((IN, 3, b"", 4096), OK, 4097, 4096),
    "read-nothing": ((IN, 3, b"", 0), OK, 1, 0),
    "read-beyond": ((IN, CAPACITY - 1, b"", 1024), IOERR, 0, 0),
    "read-half-a-sector": ((IN, 3, b"", 700), IOERR, 0, 0),
    "write": ((OUT, 3, bytes(4096), 0), OK, 1, 0),
    "write-with-room": ((OUT, 3, bytes(512), 64), OK, 0, 0),
    "write-beyond": ((OUT, CAPACITY, bytes(512), 0), IOERR, 1, 0),
    "flush": ((FLUSH, 0, b"", 0), OK, 1, 0),
    "flush-with-room": ((FLUSH, 0, b"", 64), OK, 0, 0),
    "id": ((GET_ID, 0, b"", 20), OK, 21, 20),
    "id-short": ((GET_ID, 0, b"", 5), OK, 6, 5),
    "id-long": ((GET_ID, 0, b"", 64), OK, 20, 20),
    "id-nowhere": ((GET_ID, 0, b"", 0), OK, 1, 0),
    "unknown": ((99, 0, b"", 0), UNSUPP, 1, 0),
    "unknown-with-room": ((99, 0, b"", 64), UNSUPP, 0, 0),
    "unknown-with-data": ((0x7FFF_FFFF, 0, bytes(512), 64), UNSUPP, 0, 0),
    "scsi": ((SCSI_CMD, 0, bytes(64), 512), UNSUPP, 0, 0),
    "discard": ((DISCARD, 0, segment(8, 8), 0), OK, 1, 0),
    "discard-with-room": ((DISCARD, 0, segment(8, 8), 64), OK, 0, 0),
    "zeroes": ((WRITE_ZEROES, 0, segment(8, 8), 0), OK, 1, 0),
    "zeroes-beyond": ((WRITE_ZEROES, 0, segment(CAPACITY, 8), 16), IOERR, 0, 0),
    "zeroes-flags": ((WRITE_ZEROES, 0, segment(8, 8, 2), 16), UNSUPP, 0, 0),
    "half-a-segment": ((DISCARD, 0, bytes(24), 16), IOERR, 0, 0),
    "too-many-segments": ((DISCARD, 0, segment(8, 8) * (MAX_RANGES + 1), 16), UNSUPP, 0, 0),
    "append": ((ZONE_APPEND, 0, bytes(512), 8), UNSUPP, 0, 0),
}


@pytest.mark.row("used.len larger than the number of bytes written")
@pytest.mark.parametrize("direct", [None, 0], ids=["direct", "indirect"])
def test_the_used_length_on_every_path(target: Target, ring_class: Any, direct: int | None) -> None:
    """Bytes that were not written are unchanged and not counted; the status counts if all before it was written."""
    line = target.attacker(ring_class=ring_class).lines[0]
    target.allowed = [(3 * 512, 16 * 512)]
    for name, (request, status, used, written) in LENGTHS.items():
        room = request[3]
        answer = line.do(*request, direct=direct)
        assert (answer.status, answer.used_length) == (status, used), name
        assert answer.data[written:] == nothing(room - written), name
        assert NO_ANSWER not in answer.data[:written] or request[0] == IN, name


@pytest.mark.row("used.len larger than the number of bytes written")
def test_the_used_length_of_a_short_read(target: Target, ring_class: Any) -> None:
    """The image is truncated while it is served: only the bytes before its new end are counted."""
    line = target.attacker(ring_class=ring_class).lines[0]
    image = target.victim.image
    os.truncate(image, SIZE - 4096)
    try:
        answer = line.do(IN, CAPACITY - 16, room=8192)
    finally:
        os.truncate(image, SIZE)
        with image.open("r+b") as file:
            file.seek(SIZE - 4096)
            file.write(DISK[SIZE - 4096 :])
    assert answer.status == IOERR
    assert answer.used_length in (0, 4096)
    assert answer.data[: answer.used_length] == DISK[SIZE - 8192 :][: answer.used_length]
    assert answer.data[4096:] == nothing(4096)


def assert_refused(line: RemoteLine, kind: int, first: int, data: bytes = b"", room: int = 0) -> None:
    """Check for an I/O error that leaves the room for the answer untouched."""
    for direct in (None, 0):
        answer = line.do(kind, first, data, room, direct=direct)
        assert answer == Answer(IOERR, 0 if room else 1, nothing(room)), (kind, first)


@pytest.mark.row("sector * 512 wraps")
def test_sectors_beyond_the_disk(target: Target, ring_class: Any) -> None:
    """2^55 * 512 is 2^64, which would be sector 0 after an overflow."""
    line = target.attacker(ring_class=ring_class).lines[0]
    for first in (
        1 << 55,
        (1 << 55) + 3,
        1 << 54,
        1 << 56,
        1 << 63,
        (1 << 63) + 3,
        (1 << 64) - 1,
        (1 << 64) - 8,
        CAPACITY,
    ):
        assert_refused(line, IN, first, room=4096)
        assert_refused(line, OUT, first, bytes(4096))
        for kind in (DISCARD, WRITE_ZEROES):
            assert_refused(line, kind, 0, segment(first, 8))
            # All segments are checked before the first is acted on.
            assert_refused(line, kind, 0, segment(8, 8) + segment(first, 8))
            # Empty, but beyond the end all the same.
            assert_refused(line, kind, 0, segment(max(first, CAPACITY + 1), 0))
    for first, count in [(CAPACITY - 1, 2), (CAPACITY - 7, 8)]:
        assert_refused(line, IN, first, room=512 * count)
        assert_refused(line, OUT, first, bytes(512 * count))
        assert_refused(line, DISCARD, 0, segment(first, count))
    assert line.do(IN, CAPACITY - 1, room=512).data == DISK[-512:]


@pytest.mark.row("num_sectors * 512 overflows 32 bits in discard and write zeroes")
def test_segment_lengths_that_wrap(target: Target, ring_class: Any) -> None:
    """2^23 sectors are 2^32 bytes, which is 0 in 32 bits; also lengths whose sum with the sector wraps."""
    line = target.attacker(ring_class=ring_class).lines[0]
    for count in (1 << 23, (1 << 23) + 8, 1 << 24, 1 << 31, (1 << 32) - 8, (1 << 32) - 1, CAPACITY + 1):
        for kind in (DISCARD, WRITE_ZEROES):
            for first in (0, 8, (1 << 64) - count, (1 << 63) - count, (1 << 55) - count):
                assert_refused(line, kind, 0, segment(first, count))
            assert_refused(line, kind, 0, segment(8, 8) + segment(0, count))


@pytest.mark.row("write to a read-only disk without VIRTIO_BLK_F_RO acknowledged")
@pytest.mark.parametrize("features", [0, BLOCK_FEATURES & ~blk.VIRTIO_BLK_F_RO, BLOCK_FEATURES])
def test_writes_to_a_read_only_disk(target: Target, ring_class: Any, features: int) -> None:
    attacker = target.attacker("read-only", ring_class=ring_class, features=features)
    line = attacker.lines[0]
    assert attacker.front_end.get_features() & blk.VIRTIO_BLK_F_RO
    for direct in (None, 0):
        assert line.do(OUT, 3, bytes(512), direct=direct) == Answer(IOERR, 1, b"")
        assert line.do(OUT, 3, bytes(4096), readable=[8, 8, 4096], direct=direct) == Answer(IOERR, 1, b"")
        for kind in (DISCARD, WRITE_ZEROES, SECURE_ERASE, ZONE_APPEND):
            assert line.do(kind, 0, segment(8, 8), direct=direct).status in (IOERR, UNSUPP)
        assert line.do(FLUSH, direct=direct).status == OK
        assert line.do(IN, 3, room=512, direct=direct) == Answer(OK, 513, sector(3))


@pytest.mark.row("use of a feature that was offered but not negotiated")
def test_requests_of_features_that_were_not_negotiated(target: Target, ring_class: Any) -> None:
    """The features are offered: after negotiating them, the same requests succeed."""
    attacker = target.attacker(ring_class=ring_class, features=BLOCK_FEATURES & ~RANGES)
    line = attacker.lines[0]
    assert attacker.front_end.get_features() & RANGES == RANGES & ~blk.VIRTIO_BLK_F_SECURE_ERASE
    for kind in (DISCARD, WRITE_ZEROES, SECURE_ERASE):
        assert line.do(kind, 0, segment(8, 8)) == Answer(UNSUPP, 1, b"")
        assert line.do(kind, 0, segment(8, 8), room=8) == Answer(UNSUPP, 0, nothing(8))
    for kind in (LIFETIME, ZONE_APPEND, *range(ZONE_REPORT, 26)):
        assert line.do(kind, 0, bytes(512), room=512) == Answer(UNSUPP, 0, nothing(512))
    assert line.do(IN, 8, room=4096).data == sector(8, 8)
    attacker.close()
    line = target.attacker(ring_class=ring_class).lines[0]
    target.allowed = [(8 * 512, 16 * 512)]
    assert line.do(WRITE_ZEROES, 0, segment(8, 8)) == Answer(OK, 1, b"")
    assert line.do(DISCARD, 0, segment(8, 8)) == Answer(OK, 1, b"")


@pytest.mark.row("use of a feature that was offered but not negotiated")
def test_messages_of_features_that_were_not_negotiated(target: Target) -> None:
    """The message is refused where the protocol has a reply for that; otherwise the connection ends."""
    attacker = target.attacker(protocol_features=WANTED_PROTOCOL_FEATURES & ~ProtocolFeature.MQ)
    front_end = attacker.front_end
    offered = front_end.get_features()
    with pytest.raises(Refused):
        front_end.set_features(offered | 1 << 63)
    with pytest.raises(Refused):
        front_end.set_protocol_features(ProtocolFeature(1 << 62))
    for tell in (lambda: front_end.set_status(0), lambda: front_end.set_config(0, b"\0")):
        with pytest.raises(Refused):
            tell()
    assert "the protocol feature STATUS was not negotiated" in target.logged()
    attacker.check_honest_ring(DISK)
    front_end.protocol_features |= ProtocolFeature.MQ
    with pytest.raises(ProtocolError):
        front_end.get_queue_num()
    assert (
        "front end dropped: GET_QUEUE_NUM: sent although the protocol feature MQ was not negotiated" in target.logged()
    )


@pytest.mark.row("more segments than seg_max")
@pytest.mark.parametrize("direct", [None, 0], ids=["direct", "indirect"])
def test_more_segments_than_seg_max(target: Target, ring_class: Any, direct: int | None) -> None:
    """They are served up to the limit for a chain (Windows sends 129 and 515); a longer chain breaks the ring."""
    attacker = target.attacker(ring_class=ring_class, sizes=(2048, 16), guest_size=4 << 20)
    line = attacker.lines[0]
    target.allowed = [(0, 2048 * 512)]
    seg_max = np.frombuffer(attacker.front_end.get_config(0, blk.CONFIG.itemsize), blk.CONFIG)[0]["seg_max"]
    for count in (int(seg_max), 129, 515, MAX_IOVECS - 2):
        assert count >= seg_max
        data = os.urandom(512 * count)
        assert line.do(OUT, 8, data, readable=[16, *[512] * count], direct=direct) == Answer(OK, 1, b"")
        answer = line.do(IN, 8, room=len(data), writable=[*[512] * count, 1], direct=direct)
        assert answer == Answer(OK, len(data) + 1, data)
        attacker.guest.free = 1 << 17
    line.put(IN, 8, room=512 * MAX_IOVECS, writable=[*[512] * MAX_IOVECS, 1], direct=direct)
    target.assert_breaks(line, ring_rules.TOO_MANY_SEGMENTS)


# Each of these tests has its own process.

MAGICS = {
    # Version 2, a backing file name of 16 bytes at 0x80.
    "qcow2": b"QFI\xfb" + struct.pack(">IQIIQ", 2, 0x80, 16, 16, 1 << 30),
    "vmdk": b"KDMV\1\0\0\0",
    "vhdx": b"vhdxfile",
    "vpc": b"conectix",
    "luks": b"LUKS\xba\xbe\0\1",
    "qed": b"QED\0",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
}


@pytest.fixture
def folder(engine: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FOLDERS[engine]) as name:
        folder = Path(name)
        (folder / "disks.toml").write_text(f'[[io-thread]]\nengine = "{worker_engine(engine)}"\n')
        yield folder


def describe(folder: Path, name: str, image: Path, more: str = "") -> None:
    """Add a disk to the configuration file."""
    with (folder / "disks.toml").open("a") as file:
        file.write(f'[[disk]]\nimage = "{image}"\nsocket-path = "{name}.sock"\nnum-queues = 1\n{more}\n')


@pytest.mark.row("raw image probed as another format")
def test_image_formats_are_never_probed(folder: Path) -> None:
    """An image that begins like another format is served as raw, also if its guest wrote that before a restart."""
    secret = os.urandom(1024)
    (folder / "secret").write_bytes(secret)
    content = {}
    for name, magic in MAGICS.items():
        content[name] = magic.ljust(512, b"\0") + os.urandom(SIZE // 8 - 512)
        (folder / f"{name}.img").write_bytes(content[name])
    (folder / "raw.img").write_bytes(bytes(SIZE // 8))
    for name in ("raw", *MAGICS):
        describe(folder, name, folder / f"{name}.img")
    with serving(folder):
        for name in MAGICS:
            with Driver(folder / f"{name}.sock", memory_size=16 << 20, timeout=PATIENCE) as driver:
                assert driver.capacity == SIZE // 8
                assert driver.read(0, SIZE // 8) == content[name]
        with Driver(folder / "raw.sock", memory_size=16 << 20, timeout=PATIENCE) as driver:
            content["raw"] = MAGICS["qcow2"].ljust(0x80, b"\0") + str(folder / "secret").encode().ljust(
                SIZE // 8 - 0x80
            )
            driver.write(0, content["raw"])
            driver.flush()
    with serving(folder), Driver(folder / "raw.sock", memory_size=16 << 20, timeout=PATIENCE) as driver:
        assert driver.capacity == SIZE // 8
        assert driver.read(0, SIZE // 8) == content["raw"]
        assert secret not in driver.read(0, SIZE // 8)


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """A loop device for the file, or the file itself where loop devices are unavailable (no root, a container)."""
    made = subprocess.run(["losetup", "--find", "--show", str(path)], capture_output=True, text=True)
    yield Path(made.stdout.strip()) if made.returncode == 0 else path
    if made.returncode == 0:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


# Flags, and fields where zero means unknown or unlimited.
MAY_BE_ZERO = {"alignment_offset", "opt_io_size", "physical_block_exp", "write_zeroes_may_unmap", "writeback"}
MAY_BE_ZERO |= {"max_open_zones", "max_active_zones"}


@pytest.mark.row("feature offered with a limit of zero")
def test_offered_features_have_limits(folder: Path) -> None:
    """Files of several sizes, blocks of 4096 bytes, read-only and zoned disks, a block device if one is available."""
    disks = {
        "file": (SIZE, ""),
        "sector": (512, ""),
        "odd": (7 * 512, ""),
        "blocks": (SIZE, "block-size = 4096"),
        "readonly": (SIZE, "read-only = true"),
    }
    for name, (size, more) in disks.items():
        (folder / f"{name}.img").write_bytes(bytes(size))
        describe(folder, name, folder / f"{name}.img", more)
    describe(folder, "zoned", folder / "zoned.img", 'create = "8M"\nzoned = "1M"')
    (folder / "device.img").write_bytes(bytes(SIZE))
    with loop_device(folder / "device.img") as device:
        describe(folder, "device", device)
        with serving(folder):
            for name in (*disks, "zoned", "device"):
                front_end = FrontEnd(folder / f"{name}.sock", PATIENCE)
                with contextlib.closing(front_end):
                    offered = front_end.negotiate((1 << 64) - 1)
                    config = np.frombuffer(front_end.get_config(0, blk.CONFIG.itemsize), blk.CONFIG)[0]
                    assert config["capacity"] > 0
                    assert config["num_queues"] == 1
                    for bit, fields in blk.CONFIG_FIELDS.items():
                        for field in set(fields) - MAY_BE_ZERO if offered & bit else ():
                            assert config[field] > 0, (name, field)
                    assert config["seg_max"] < 0xFFFF_FFFF
                    if offered & blk.VIRTIO_BLK_F_DISCARD:
                        assert config["max_discard_sectors"] >= config["discard_sector_alignment"]
