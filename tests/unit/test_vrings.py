"""All rings of a front end are stopped and restarted."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ringplane
from ringplane.block.stack import Stack
from ringplane.dataplane.ring_states import RingState
from ringplane.driver.frontend import Refused
from ringplane.driver.virtqueue import peek
from ringplane.vhost_user.messages import VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, Request
from ringplane.vhost_user.payloads import MemoryRegion
from ringplane.virtio.blk import VIRTIO_BLK_S_OK

from .protocol_rig import (
    DRIVER_FEATURES,
    MEMORY_SIZE,
    QUEUES,
    RING_SIZE,
    SECTOR,
    Machine,
    Peer,
    by_name,
    machine,
    negotiated,
    open_fds,
    sector,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def stop_with_get_vring_base(guest: Machine) -> int:
    return guest.peer.get_vring_base(0)


def stop_with_enable(guest: Machine) -> int:
    guest.peer.set_vring_enable(0, False)
    return guest.used_idx


@pytest.mark.parametrize("stop", [stop_with_get_vring_base, stop_with_enable])
def test_stop_waits_for_every_request_in_flight(export: ringplane.Export, stop: Callable[[Machine], int]) -> None:
    """The base is where fetching stopped: all requests before it have a used entry, all later ones have none."""
    fetched_in_all = 0
    for _ in range(5):
        with machine(export) as guest:
            guest.start()
            places = [guest.offer_read(number, 256 * 1024) for number in range(16)]
            guest.ring.publish()
            guest.vring.kick()
            wait_until(lambda: export.in_flight > 0 or guest.used_idx > 0)
            base = stop(guest)
            assert guest.used_idx == base
            assert [peek(status, 1)[0] for _, status in places] == [VIRTIO_BLK_S_OK] * base + [0xFF] * (16 - base)
            fetched_in_all += base
        wait_until(lambda: export.state == "listening")
    assert fetched_in_all > 0


def test_stop_under_load_loses_no_request(export: ringplane.Export) -> None:
    with machine(export) as guest:
        base = 0
        for number in range(20):
            guest.ring.reset(base)
            guest.peer.start_vring(guest.vring, base)
            for _ in range(8):
                guest.offer_read(number, 65536)
            guest.ring.publish()
            guest.vring.kick()
            stopped = guest.peer.get_vring_base(0)
            assert guest.used_idx == stopped
            assert 0 <= (stopped - base) & 0xFFFF <= 8
            guest.memory.forget()
            guest.place_ring()
            base = stopped


def test_restart_from_the_base_serves_the_remaining_requests(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        guest.read(1)
        guest.peer.set_vring_enable(0, False)
        base = guest.peer.get_vring_base(0)
        data, _ = guest.offer_read(7)
        guest.ring.publish()
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.peer.set_vring_base(0, base)
        guest.set_addresses()
        guest.peer.set_vring_kick(0, guest.vring.kick_fd)
        guest.peer.set_vring_enable(0, True)
        guest.reap()
        assert peek(data, SECTOR) == sector(7)
        assert guest.peer.get_vring_base(0) == base + 1


def test_ring_that_never_ran_has_the_base_that_was_set(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        peer.set_vring_base(1, 1234)
        assert peer.get_vring_base(1) == 1234


@pytest.mark.parametrize("request_", [Request.RESET_DEVICE, Request.RESET_OWNER], ids=by_name)
def test_reset_stops_the_rings_and_leaves_the_memory(export: ringplane.Export, request_: Request) -> None:
    with machine(export) as guest:
        guest.start()
        for number in range(3):
            guest.read(number)
        guest.peer.send(request_)
        guest.offer_read(1)
        guest.ring.publish()
        guest.vring.kick()
        time.sleep(0.05)
        assert guest.used_idx == 3
        guest.peer.get_vring_base(0)
        guest.start()
        assert guest.read(6) == sector(6)


@contextlib.contextmanager
def two_rings(export: ringplane.Export) -> Iterator[tuple[Machine, Machine]]:
    with machine(export) as first, contextlib.closing(Machine(first.peer, index=1, size=8)) as second:
        memory = second.memory
        first.peer.add_mem_reg(MemoryRegion(MEMORY_SIZE, MEMORY_SIZE, memory.address, 0), memory.fd)
        second.ring.state["memory"] -= MEMORY_SIZE
        first.start()
        second.start()
        assert (first.read(3), second.read(4)) == (sector(3), sector(4))
        yield first, second


def set_other_features(peer: Peer) -> None:
    peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES | DRIVER_FEATURES | VHOST_F_LOG_ALL)


def set_log(peer: Peer) -> None:
    with open(os.memfd_create("log"), "r+b") as file:
        file.truncate(4096)
        peer.set_log_base(4096, 0, file.fileno())


@pytest.mark.parametrize("cause", ["no room in the in-flight area", "the engine"])
@pytest.mark.parametrize("change", [set_other_features, set_log])
def test_a_ring_that_cannot_start_again_stops_no_other_ring(
    own_export: ringplane.Export, monkeypatch: pytest.MonkeyPatch, cause: str, change: Callable[[Peer], None]
) -> None:
    with two_rings(own_export) as (first, second):
        if change is set_log:
            set_other_features(first.peer)
        if cause == "the engine":
            fail_once(monkeypatch, own_export.disk.queues[0].stack)
        else:
            # For the smaller one of the two rings.
            described, fd = first.peer.get_inflight_fd(QUEUES, 8)
            first.peer.set_inflight_fd(described, fd)
            os.close(fd)
        with pytest.raises(Refused):
            change(first.peer)
        served, failed = own_export.disk.queues[1], own_export.disk.queues[0]
        assert failed.state is RingState.STOPPED
        assert served.layout is not None
        assert served.layout.features & VHOST_F_LOG_ALL
        assert (served.layout.log is None) == (change is set_other_features)
        assert second.read(5) == sector(5)


def fail_once(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    """The stack, which the two queues share, cannot be attached for the first one."""
    attach, failing = stack.attach, [True]

    def attach_later(engine: Any) -> None:
        if failing:
            failing.clear()
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        attach(engine)

    monkeypatch.setattr(stack, "attach", attach_later)


@pytest.mark.parametrize("order", ["the log", "the features", "the memory"])
def test_a_dirty_log_that_is_too_small_is_logged(
    export: ringplane.Export, dropped: Callable[[], list[str]], order: str
) -> None:
    """Whichever message is the last one; a log with a bit for each page is not."""
    memory_needs = MEMORY_SIZE // 4096 // 8
    with machine(export) as guest, open(os.memfd_create("log"), "r+b") as log:
        log.truncate(4096)
        guest.peer.set_log_base(memory_needs, 0, log.fileno())
        set_other_features(guest.peer)
        guest.share_memory()
        assert dropped() == []
        if order == "the features":
            guest.peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES | DRIVER_FEATURES)
        if order == "the memory":
            guest.peer.add_mem_reg(MemoryRegion(MEMORY_SIZE, 4096, guest.memory.address, 0), guest.memory.fd)
            memory_needs += 1
        else:
            guest.peer.set_log_base(memory_needs - 1, 0, log.fileno())
        if order == "the features":
            assert dropped() == []
            set_other_features(guest.peer)
        (line,) = dropped()
    smaller = (
        f"the dirty log of {memory_needs - 1} bytes is smaller than the {memory_needs} bytes that the shared memory"
    )
    assert smaller in line


def test_reset_device_forgets_the_rings(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        guest.read()
        fds = len(open_fds())
        guest.peer.send(Request.RESET_DEVICE)
        # The back end's copies of the kick, call and error fds.
        assert len(open_fds()) == fds - 3
        assert guest.peer.get_vring_base(0) == 0
