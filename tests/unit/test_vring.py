"""One ring: what describes it, its start, its notifiers, and its reset."""

from __future__ import annotations

import copy
import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import ringplane
from ringplane.dataplane.ring_states import RingState
from ringplane.driver.frontend import Refused
from ringplane.vhost_user.messages import VHOST_USER_F_PROTOCOL_FEATURES, ProtocolError, Request
from ringplane.vhost_user.payloads import MemoryRegion, VringFd
from ringplane.virtio.blk import CONFIG, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH
from ringplane.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_RESET,
)
from ringplane.virtio.split import AVAIL_IDX

from .protocol_rig import (
    DRIVER_FEATURES,
    MEMORY_SIZE,
    QUEUES,
    RING_SIZE,
    Machine,
    Peer,
    break_ring,
    by_name,
    machine,
    negotiated,
    sector,
    select_readable,
    wait_until,
)
from .rig import NOTIFIERS, full_notifier

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.mark.parametrize("size", [0, 3, 100, 65535, 65536, (1 << 32) - 1])
def test_invalid_ring_size_is_refused(export: ringplane.Export, size: int) -> None:
    with negotiated(export) as peer:
        with pytest.raises(Refused):
            peer.set_vring_num(0, size)
        peer.set_vring_num(0, 128)


@pytest.mark.parametrize(("name", "wrong"), [("desc", 8), ("avail", 1), ("used", 2), ("desc", 1), ("used", 3)])
def test_misaligned_ring_address_is_refused(export: ringplane.Export, name: str, wrong: int) -> None:
    places = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000}
    with negotiated(export) as peer:
        with pytest.raises(Refused):
            peer.set_vring_addr(0, **(places | {name: places[name] + wrong}))
        peer.set_vring_addr(0, **places)


@pytest.mark.parametrize("index", [QUEUES, 255])
def test_queue_that_does_not_exist_is_refused(export: ringplane.Export, index: int) -> None:
    attempts: list[Callable[[Peer], object]] = [
        lambda peer: peer.set_vring_num(index, 128),
        lambda peer: peer.set_vring_addr(index, 0, 0, 0),
        lambda peer: peer.set_vring_base(index, 0),
        lambda peer: peer.set_vring_enable(index, True),
        lambda peer: peer.set_vring_kick(index, fd),
        lambda peer: peer.set_vring_call(index, fd),
        lambda peer: peer.set_vring_err(index, fd),
    ]
    fd = os.eventfd(0)
    with negotiated(export) as peer:
        for attempt in attempts:
            with pytest.raises(Refused):
                attempt(peer)
        with pytest.raises(ProtocolError, match="closed"):
            peer.get_vring_base(index)
    os.close(fd)


@pytest.mark.parametrize("name", ["desc", "avail", "used"])
@pytest.mark.parametrize("end", ["before the memory", "across its end"])
def test_ring_outside_the_memory_is_refused_and_can_be_corrected(export: ringplane.Export, name: str, end: str) -> None:
    with machine(export) as guest:
        ring = guest.ring
        edge = guest.memory.address + (0 if end == "before the memory" else MEMORY_SIZE)
        wrong = {"desc": ring.desc, "avail": ring.avail, "used": ring.used} | {name: edge - 16}
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.peer.set_vring_addr(0, **wrong)
        guest.peer.set_vring_kick(0, guest.vring.kick_fd)
        with pytest.raises(Refused):
            guest.peer.set_vring_enable(0, True)
        guest.peer.get_vring_base(0)
        guest.start()
        assert guest.read(5) == sector(5)


def test_ring_cannot_be_moved_or_resized_while_it_runs(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        ring = guest.ring
        with pytest.raises(Refused):
            guest.peer.set_vring_num(0, RING_SIZE * 2)
        with pytest.raises(Refused):
            guest.peer.set_vring_addr(0, ring.desc + 4096, ring.avail, ring.used)
        with pytest.raises(Refused):
            guest.peer.set_vring_base(0, 7)
        assert guest.read(5) == sector(5)


def test_polled_ring_is_refused(export: ringplane.Export) -> None:
    with machine(export) as guest, pytest.raises(Refused):
        guest.peer.set_vring_kick(0, None)


def test_kick_fd_that_cannot_be_watched_starts_no_ring(own_export: ringplane.Export) -> None:
    """epoll_ctl(2) rejects a regular file. The ring is then not served, whatever happens to the other rings."""
    with machine(own_export) as guest, open("/proc/self/exe", "rb") as file:
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.set_addresses()
        guest.peer.set_vring_enable(0, True)
        with pytest.raises(Refused):
            guest.peer.set_vring_kick(0, file.fileno())
        guest.offer_read(3)
        guest.ring.publish()
        with closing(Machine(guest.peer, index=1)) as other:
            guest.peer.add_mem_reg(
                MemoryRegion(1 << 40, MEMORY_SIZE, other.memory.address, 0),
                other.memory.fd,
            )
            other.start()
            time.sleep(0.05)
            assert guest.used_idx == 0


def test_kick_fd_that_blocks_does_not_stop_the_thread(own_export: ringplane.Export) -> None:
    """O_NONBLOCK belongs to the open file, so the front end can clear it: reading an empty eventfd would block."""
    kick = os.eventfd(0)
    with machine(own_export) as guest:
        guest.start()
        guest.peer.set_vring_kick(0, kick)
        os.set_blocking(kick, True)
        stop = threading.Thread(target=guest.peer.get_vring_base, args=[0])
        stop.start()
        stop.join(2)
        stuck = stop.is_alive()
        # Unblocks any reader.
        os.eventfd_write(kick, 1)
        stop.join()
    os.close(kick)
    assert not stuck


@pytest.mark.parametrize("kind", NOTIFIERS)
@pytest.mark.parametrize("end", ["stop", "replace", "leave", "process"])
def test_notifier_that_is_full_does_not_stop_the_thread(own_export: ringplane.Export, kind: str, end: str) -> None:
    """It blocks a thread that serves only this front end, but not when the thread is needed for something else.

    eventfd(2) has no RWF_NOWAIT for writes. For threads that serve several disks the kernel signals the eventfd, which
    never blocks (dataplane/signaller.py; hostile/test_notifiers.py); here that would cost 0.7 us per call.
    """
    with full_notifier(kind) as call:
        with machine(own_export) as guest:
            guest.start()
            guest.peer.set_vring_call(0, call)
            os.set_blocking(call, True)
            guest.read()
            if end == "stop":
                assert guest.peer.get_vring_base(0) == 1
            elif end == "replace":
                guest.peer.set_vring_call(0, guest.vring.call_fd)
                guest.read()
            elif end == "process":
                own_export.stop()
        if end == "leave":
            with machine(own_export) as other:
                other.start()
                other.read()


def test_broken_ring_stays_stopped_until_it_is_reset(own_export: ringplane.Export) -> None:
    with machine(own_export) as guest:
        guest.start()
        guest.read()
        break_ring(guest)
        own_export.drain()
        guest.peer.set_vring_enable(0, False)
        guest.peer.set_vring_enable(0, True)
        queue = own_export.disk.queues[0]
        assert queue.state is RingState.STOPPED_BROKEN
        guest.peer.get_vring_base(0)
        guest.place_ring()
        guest.start()
        assert queue.state is RingState.RUNNING
        guest.read()


def test_features_that_change_reach_a_running_ring(own_export: ringplane.Export) -> None:
    """After a driver gives up the flush feature, each of its writes is stable when it is completed."""
    with machine(own_export) as guest:
        guest.start()
        guest.read()
        queue = own_export.disk.queues[0]
        before = bool(queue.record["write_through"])
        offered = guest.peer.get_features()
        guest.peer.set_features(offered & ~VIRTIO_BLK_F_FLUSH)
        without = bool(queue.record["write_through"])
        guest.peer.set_features(offered & ~VIRTIO_F_EVENT_IDX)
        assert (before, without, bool(queue.record["write_through"])) == (before, True, False)
        assert queue.state is RingState.RUNNING


@pytest.mark.parametrize(
    "request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_VRING_KICK], ids=by_name
)
def test_unusable_fd_is_refused_and_closed(export: ringplane.Export, request_: Request, tmp_path: Path) -> None:
    """An O_PATH fd has no flags that can be set, so it cannot be made non-blocking."""
    fd = os.open(tmp_path, os.O_PATH)
    with machine(export) as guest:
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.set_addresses()
        guest.peer.set_vring_enable(0, True)
        for _ in range(3):
            with pytest.raises(Refused):
                guest.peer.send(request_, VringFd(0), [fd])
    os.close(fd)


# VIRTIO_F_RING_RESET, as front ends implement it


def test_one_ring_is_reset_while_the_other_runs(export: ringplane.Export) -> None:
    """It is stopped, moved, resized and started again; the other ring is not affected."""
    with machine(export) as guest:
        guest.peer.set_features(DRIVER_FEATURES | VIRTIO_F_RING_RESET | VHOST_USER_F_PROTOCOL_FEATURES)
        other = copy.copy(guest)
        del other.vring
        other.index = 1
        other.place_ring()
        other.start()
        guest.start()
        for size in (16, 128, 64):
            other.offer_read(7)
            guest.offer_read(8)
            guest.ring.publish()
            guest.vring.kick()
            guest.reap()
            assert guest.peer.get_vring_base(0) == 1
            other.ring.publish()
            other.vring.kick()
            other.reap()
            guest.place_ring(size)
            guest.start()
            assert other.read(9) == sector(9)
        other.vring.close()


# Notifiers


def test_call_fd_is_signalled_when_it_is_set(export: ringplane.Export) -> None:
    call = os.eventfd(0, os.EFD_NONBLOCK)
    with negotiated(export) as peer:
        for times in range(1, 4):
            peer.set_vring_call(1, call)
            assert os.eventfd_read(call) == 1, times
        peer.set_vring_call(1, None)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(call)
    os.close(call)


def test_only_the_last_call_fd_is_signalled(export: ringplane.Export) -> None:
    first, second = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    with machine(export) as guest:
        guest.start()
        for fd in (first, second):
            guest.peer.set_vring_call(0, fd)
            os.eventfd_read(fd)
        guest.read()
        wait_until(lambda: second in select_readable(second))
        assert not select_readable(first)
    os.close(first)
    os.close(second)


def test_full_call_pipe_blocks_nothing(export: ringplane.Export) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with machine(export) as guest:
        guest.start()
        guest.peer.set_vring_call(0, writing)
        for number in range(600):
            guest.read(number)
    os.close(reading)
    os.close(writing)


def test_broken_ring_signals_the_error_fd_and_works_again_after_a_restart(
    export: ringplane.Export, dropped: Callable[[], list[str]]
) -> None:
    with machine(export) as guest:
        guest.start()
        guest.ring.poke16(guest.ring.avail + AVAIL_IDX, RING_SIZE + 1)
        guest.vring.kick()
        wait_until(lambda: bool(select_readable(guest.vring.err_fd)))
        assert any("queue 0" in line for line in dropped())
        guest.peer.get_vring_base(0)
        os.eventfd_read(guest.vring.err_fd)
        guest.start()
        assert guest.read(2) == sector(2)


WRITEBACK: int = CONFIG.fields["writeback"][1]  # type: ignore[index]
WITH_WCE = DRIVER_FEATURES | VIRTIO_BLK_F_CONFIG_WCE | VHOST_USER_F_PROTOCOL_FEATURES


def stop_for_a_moment_by_drain(guest: Machine, export: ringplane.Export) -> None:
    export.drain()


def stop_for_a_moment_by_features(guest: Machine, export: ringplane.Export) -> None:
    guest.peer.set_features(WITH_WCE | VIRTIO_F_INDIRECT_DESC)


def stop_for_a_moment_by_config(guest: Machine, export: ringplane.Export) -> None:
    guest.peer.set_config(WRITEBACK, b"\0")


def disable_and_enable(guest: Machine, export: ringplane.Export) -> None:
    guest.peer.set_vring_enable(0, False)
    guest.peer.set_vring_enable(0, True)


@pytest.mark.parametrize(
    "stop", [stop_for_a_moment_by_drain, stop_for_a_moment_by_features, stop_for_a_moment_by_config, disable_and_enable]
)
def test_ring_that_is_stopped_without_its_memory_starts_when_that_is_added(
    own_export: ringplane.Export, stop: Callable[[Machine, ringplane.Export], None]
) -> None:
    queue = own_export.disk.queues[0]
    with machine(own_export) as guest:
        guest.peer.set_features(WITH_WCE)
        guest.start()
        guest.read()
        guest.peer.set_mem_table([], [])
        assert queue.state is RingState.SUSPENDED
        stop(guest, own_export)
        assert queue.state is RingState.STOPPED_SUSPENDED
        guest.peer.set_mem_table([], [])
        assert queue.state is RingState.STOPPED_SUSPENDED
        guest.share_memory()
        assert queue.state is RingState.RUNNING
        guest.read()


def test_ring_that_is_stopped_without_its_memory_starts_elsewhere(own_export: ringplane.Export) -> None:
    """Or is forgotten, and described again."""
    queue = own_export.disk.queues[0]
    with machine(own_export) as guest, closing(Machine(guest.peer)) as other:
        guest.start()
        guest.peer.set_mem_table([], [])
        own_export.drain()
        guest.peer.set_mem_table([other.memory.region()], [other.memory.fd])
        assert queue.state is RingState.STOPPED_SUSPENDED
        other.ring.reset(0)
        other.set_addresses()
        assert queue.state is RingState.RUNNING
        guest.peer.set_mem_table([], [])
        own_export.drain()
        assert guest.peer.get_vring_base(0) == 0
        assert queue.state is RingState.STOPPED
