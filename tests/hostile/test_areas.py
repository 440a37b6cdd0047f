"""Memory that a front end keeps for the back end, in-flight areas and dirty logs, with wrong sizes and contents."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from typing import Any

import pytest

from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES, Refused
from ringplane.inflight.tracking import region_bytes
from ringplane.vhost_user.messages import VHOST_F_LOG_ALL, ProtocolError, ProtocolFeature
from ringplane.vhost_user.payloads import Inflight
from unit.packed_ring import NEW_RING, PackedRing
from unit.rig import IN, NO_ANSWER, OK, OUT, ZONE_INVALID_CMD, Answer, Pending, eventually, has_event, take_events

from .attacker import Attacker, RemoteLine
from .conftest import CAPACITY, DISK, Target, Victim, running, sector, serving
from .fuzz import ZONED

AREAS = WANTED_PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.LOG_SHMFD

LARGE = (1 << 31, 1 << 32, 1 << 55, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
# The offset of used_idx in the region of a split ring.
USED_INDEX = 14

# The size of the files that are mapped.
FILE = 1 << 16


@contextlib.contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("area", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def is_served(attacker: Attacker) -> None:
    assert attacker.lines[0].do(IN, 5, room=512) == Answer(OK, 513, sector(5))
    attacker.guest.free = 1 << 16


# One of mmap_size, mmap_offset, num_queues and queue_size is wrong, the others are valid.
GOOD = (2 * region_bytes(16, packed=True), 0, 2, 16)
AREA_FAULTS = {
    "mmap_size": [(value, *GOOD[1:]) for value in (0, FILE + 1, *LARGE)],
    "mmap_offset": [(GOOD[0], value, *GOOD[2:]) for value in (FILE, FILE - GOOD[0] + 1, *LARGE)],
    "both": [(1 << 63, 1 << 63, 2, 16), ((1 << 64) - 4096, 4096, 2, 16), (FILE, FILE, 2, 16)],
    "num_queues": [(*GOOD[:2], 0, 16)],
    "queue_size": [(*GOOD[:3], value) for value in (0, 32769, 65535)],
}

# These areas are valid, but not for a ring of 16 descriptors; the last one is not aligned.
TOO_SMALL = [
    (1, 0, 2, 16),
    (64, 0, 1, 16),
    (region_bytes(16, packed=False) - 64, 0, 1, 16),
    (GOOD[0], 0, 65535, 16),
    (GOOD[0], 4, 2, 16),
]


@pytest.mark.row("in-flight region sizes not checked against the mapping")
@pytest.mark.parametrize("fault", AREA_FAULTS)
def test_inflight_areas_with_invalid_sizes(target: Target, ring_class: Any, fault: str) -> None:
    attacker = target.attacker(ring_class=ring_class, protocol_features=AREAS)
    with memfd(FILE) as fd:
        for described in AREA_FAULTS[fault]:
            with pytest.raises(Refused):
                attacker.front_end.set_inflight_fd(Inflight(*described), fd)
            assert "SET_INFLIGHT_FD" in target.logged().splitlines()[-1]
            is_served(attacker)
        assert os.pread(fd, FILE, 0) == bytes(FILE)


@pytest.mark.row("in-flight region sizes not checked against the mapping")
def test_inflight_areas_too_small_for_a_ring(target: Target, ring_class: Any) -> None:
    """The ring does not start with such an area but does with a valid one; nothing behind the area's end is touched."""
    attacker = target.attacker(ring_class=ring_class, protocol_features=AREAS)
    line, front_end = attacker.lines[0], attacker.front_end
    for described in TOO_SMALL:
        with memfd(FILE) as fd:
            os.pwrite(fd, b"\xa5" * FILE, 0)
            front_end.set_inflight_fd(Inflight(*described), fd)
            line.stop()
            with pytest.raises(Refused):
                attacker.new_ring(line)
            assert "in-flight" in target.logged().splitlines()[-1]
            attacker.check_honest_ring(DISK)
            # When a ring is stopped, the version in its area is cleared.
            assert os.pread(fd, FILE, 0).count(b"\xa5") >= FILE - 2
        with memfd(FILE) as fd:
            front_end.set_inflight_fd(Inflight(*GOOD), fd)
            line.reset()
            is_served(attacker)
            assert os.pread(fd, FILE, 0)[GOOD[0] :] == bytes(FILE - GOOD[0])


@pytest.mark.row("in-flight region sizes not checked against the mapping")
def test_files_that_cannot_be_mapped(target: Target) -> None:
    attacker = target.attacker(protocol_features=AREAS)
    reading, writing = os.pipe()
    folder = os.open("/", os.O_RDONLY)
    readonly = os.open("/proc/self/exe", os.O_RDONLY)
    eventfd = os.eventfd(0)
    try:
        for fd in (reading, folder, readonly, eventfd):
            with pytest.raises(Refused):
                attacker.front_end.set_inflight_fd(Inflight(*GOOD), fd)
            with pytest.raises(Refused):
                attacker.front_end.set_log_base(4096, 0, fd)
            is_served(attacker)
    finally:
        for fd in (reading, writing, folder, readonly, eventfd):
            os.close(fd)


@pytest.mark.row("in-flight region sizes not checked against the mapping")
def test_get_inflight_fd_of_extreme_sizes(target: Target) -> None:
    """The largest sizes are served; sizes without any queue or ring, and larger ones, are not."""
    attacker = target.attacker(protocol_features=AREAS)
    for queues, size in [(0, 16), (2, 0), (2, 32769), (65535, 65535)]:
        with pytest.raises(ProtocolError):
            attacker.front_end.get_inflight_fd(queues, size)
        assert "in-flight area" in target.logged().splitlines()[-1]
        is_served(attacker)
    for queues, size in [(2, 16), (65535, 32768)]:
        described, fd = attacker.front_end.get_inflight_fd(queues, size)
        attacker.front_end.set_inflight_fd(described, fd)
        os.close(fd)
        attacker.lines[0].reset()
        is_served(attacker)


@pytest.mark.row("dirty log: offset + size overflows")
def test_logs_with_invalid_sizes(target: Target, ring_class: Any) -> None:
    attacker = target.attacker(ring_class=ring_class, protocol_features=AREAS)
    sums = (
        [(value, (1 << 64) - value) for value in LARGE]
        + [(value, 4096) for value in LARGE]
        + [(4096, value) for value in LARGE]
    )
    with memfd(FILE) as fd:
        for size, offset in [(0, 0), (0, 4096), (FILE + 1, 0), (FILE, 1), (1, FILE), (4096, FILE - 4095), *sums]:
            with pytest.raises(Refused):
                attacker.front_end.set_log_base(size, offset, fd)
            assert "SET_LOG_BASE" in target.logged().splitlines()[-1]
            is_served(attacker)
        attacker.front_end.set_features(attacker.front_end.features | VHOST_F_LOG_ALL)
        is_served(attacker)
        assert os.pread(fd, FILE, 0) == bytes(FILE)


@pytest.mark.row("dirty log: offset + size overflows")
@pytest.mark.parametrize(("size", "offset"), [(1, 4095), (8, 12), (4096, 4096)])
def test_a_log_shorter_than_the_memory(target: Target, ring_class: Any, size: int, offset: int) -> None:
    """Guest addresses begin at 4 GiB: their bits are far behind the log's end, and nothing is marked."""
    attacker = target.attacker(ring_class=ring_class, protocol_features=AREAS)
    front_end = attacker.front_end
    with memfd(FILE) as fd:
        front_end.set_log_base(size, offset, fd)
        front_end.set_features(front_end.features | VHOST_F_LOG_ALL)
        layout = attacker.lines[0].ring.layout()
        for log in (0, 1 << 63, (1 << 64) - 1):
            front_end.set_vring_addr(0, layout.desc, layout.avail, layout.used, flags=1, log=log)
            is_served(attacker)
        assert os.pread(fd, FILE, 0) == bytes(FILE)


# In-flight areas as a restarted back end finds them.


@pytest.mark.row("in-flight region sizes not checked against the mapping")
def test_inflight_areas_with_invalid_contents(target: Target, ring_class: Any) -> None:
    """Version and size are right, the rest is random or says that everything is in flight.

    The area is used, refused, or breaks the ring.
    """
    attacker = target.attacker(ring_class=ring_class, protocol_features=AREAS, sizes=(16, 16))
    line, randomness, served = attacker.lines[0], random.Random(1), 0
    target.allowed = [(0, len(DISK) - 512)]
    for number in range(60):
        with memfd(FILE) as fd:
            content = bytearray(randomness.randbytes(GOOD[0]) if number else b"\1" * GOOD[0])
            if number % 3 == 0:
                # At least the indices are in range.
                content[16:] = bytes(byte & 1 for byte in content[16:])
            content[8:12] = struct.pack("<HH", 1, 16)
            os.pwrite(fd, content, 0)
            attacker.front_end.set_inflight_fd(Inflight(GOOD[0], 0, 1, 16), fd)
            line.stop()
            with suppress(Refused):
                attacker.new_ring(line)
                line.kick()
                attacker.check_honest_ring(DISK)
                served += 1
            assert os.pread(fd, FILE, 0)[GOOD[0] :] == bytes(FILE - GOOD[0])
            with memfd(FILE) as good:
                attacker.front_end.set_inflight_fd(Inflight(*GOOD), good)
                line.reset()
                is_served(attacker)
    assert served


@pytest.mark.row("requests lost when the process is killed before the first completion")
def test_killed_before_the_first_completion(engine: str, ring_class: Any) -> None:
    """Nothing was ever used on this ring; the next process completes the requests in flight in their order."""
    with running(engine) as victim:
        victim.image.write_bytes(DISK)
        complete_after_a_kill(victim, ring_class, lambda: serving(victim.folder))


def complete_after_a_kill(
    victim: Victim, ring_class: Any, next_process: Callable[[], AbstractContextManager[object]]
) -> None:
    """Kill a process with requests in flight: the next one completes them in their order."""
    attacker = Attacker(victim.socket, ring_class=ring_class, in_order=True, protocol_features=AREAS)
    with closing(attacker):
        line, front_end = attacker.lines[0], attacker.front_end
        described, fd = front_end.get_inflight_fd(2, 16)
        front_end.set_inflight_fd(described, fd)
        line.reset()
        requests = stopped_in_flight(victim, line, lambda: in_flight(fd, ring_class))
        victim.process.kill()
        victim.process.wait()
        assert in_flight(fd, ring_class) == len(requests)
        assert used_index(fd, ring_class) == 0
        assert not list(line.ring.take_used())
        front_end.close()
        with next_process():
            attacker.connect()
            attacker.front_end.set_inflight_fd(described, fd)
            attacker.lines[1].start(ring_class=ring_class, size=16, **attacker.negotiated)
            line.resume(base=NEW_RING if ring_class is PackedRing else 0)
            assert line.wait() == requests
            assert line.answer(requests[0]) == Answer(OK, 1, b"")
            for number, request in enumerate(requests[1:]):
                assert line.answer(request) == Answer(OK, 513, sector(number))
            attacker.check_honest_ring(DISK)
            assert in_flight(fd, ring_class) == 0
            attacker.front_end.close()
        os.close(fd)


@pytest.mark.parametrize("count", [2, 4], ids=["open", "full"])
def test_zone_writes_that_were_done_but_not_completed(engine: str, count: int) -> None:
    """The write pointer already covers them, and one more that was not done, although later ones were."""
    sectors = CAPACITY // 4
    data = [random.Random(number).randbytes(512 * sectors) for number in range(4)]
    with running(engine) as victim:
        attacker = Attacker(victim.folder / "zoned.sock", protocol_features=AREAS)
        with closing(attacker):
            line, front_end = attacker.lines[0], attacker.front_end
            described, fd = front_end.get_inflight_fd(2, 16)
            front_end.set_inflight_fd(described, fd)
            line.reset()
            requests = [line.put(OUT, ZONED.first + number * sectors, data[number]) for number in range(count)]
            line.kick()
            assert len(line.wait()) == count
            victim.process.kill()
            victim.process.wait()
            front_end.close()
            forget_answers(line, requests, fd)
            with (victim.folder / "zoned.img").open("r+b") as file:
                file.seek(ZONED.first * 512)
                file.write(bytes(512 * sectors))
            with serving(victim.folder):
                attacker.connect()
                attacker.front_end.set_inflight_fd(described, fd)
                line.resume(base=0)
                assert len(line.wait()) == count
                assert [line.answer(request) for request in requests] == [Answer(OK, 1, b"")] * count
                read = line.do(IN, ZONED.first, room=512 * sectors * count)
                assert read.data == b"".join(data[:count])
                more = line.do(OUT, ZONED.first + count * sectors, data[0])
                # Nothing can be written behind a zone's capacity: the zone was full.
                assert more.status == (OK if count < 4 else ZONE_INVALID_CMD)
                attacker.front_end.close()
            os.close(fd)


def forget_answers(line: RemoteLine, requests: list[Pending], fd: int) -> None:
    """Make a split ring and its area look as if the process had died just before it returned the first request."""
    ring = line.ring
    ring.used_idx = 0
    ring.guest.write(ring.used + 2, bytes(2))
    os.pwrite(fd, bytes(2), USED_INDEX)
    for number, request in enumerate(requests):
        request.used_length = None
        ring.pending[request.head] = request
        line.rig.guest.write(request.writable[-1].offset, bytes([NO_ANSWER]))
        # inflight, 5 bytes of padding, next, counter (the order of fetching)
        os.pwrite(fd, struct.pack("<B7xQ", 1, number), 16 + 16 * request.head)
    ring._free = [free for free in ring._free if all(free not in request.descriptors for request in requests)]


def stopped_in_flight(victim: Victim, line: RemoteLine, count: Callable[[], int]) -> list[Pending]:
    """Requests behind a slow one. The process has fetched all of them, completed none, and is stopped (SIGSTOP)."""
    guest = line.rig.guest
    start = guest.free
    # It is stopped at a random moment; several out of ten are right.
    for _ in range(500):
        requests = [
            Target(victim, 0).put_slow(line),
            *(line.put(IN, number, room=512, direct=0) for number in range(9)),
        ]
        line.kick()
        assert eventually(lambda requests=requests: count() == len(requests) or has_event(line.call_fd))
        victim.process.send_signal(signal.SIGSTOP)
        os.waitpid(victim.process.pid, os.WUNTRACED)
        if count() == len(requests) and not has_event(line.call_fd):
            return requests
        victim.process.send_signal(signal.SIGCONT)
        line.wait()
        # So many attempts would need more memory than there is, if each had its own.
        guest.free = start
        line.reset()
        take_events(line.call_fd)
    pytest.fail("the slow request was too quick")


def in_flight(fd: int, ring_class: Any) -> int:
    """How many chains are marked as in flight in the first ring's region, which has 16 descriptors."""
    start, step = (32, 32) if ring_class is PackedRing else (16, 16)
    return sum(os.pread(fd, start + 16 * step, 0)[start::step])


def used_index(fd: int, ring_class: Any) -> int:
    """`used_idx` of that region; for a packed ring together with `old_used_idx`."""
    return int.from_bytes(os.pread(fd, 4, 16) if ring_class is PackedRing else os.pread(fd, 2, USED_INDEX), "little")
