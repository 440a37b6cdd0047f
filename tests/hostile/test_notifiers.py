"""Notifiers that block their writer: O_NONBLOCK belongs to the open file, so the front end can clear it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES, Refused
from ringplane.vhost_user.messages import ProtocolFeature, Request
from ringplane.vhost_user.payloads import VringState
from unit.rig import IN, NOTIFIERS, eventually, fill, full_notifier, take_events
from unit.waiting import repeating

from .attacker import Attacker, RemoteLine
from .conftest import DISK, Target, sector, serving

IN_BAND = ProtocolFeature.BACKEND_REQ | ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.RESET_DEVICE


def blocking(fd: int) -> contextlib.AbstractContextManager[None]:
    """Keep clearing O_NONBLOCK."""
    return repeating(lambda: os.set_blocking(fd, True))


def assert_others_are_served(
    target: Target, attacker: Attacker, line: RemoteLine, kick: Callable[[], object] | None = None
) -> None:
    """Check a neighbour on the same I/O thread, the control plane, and the front end's own requests."""
    request = line.put(IN, 3, room=512)
    line.ring.publish()
    (kick or line.kick)()
    assert eventually(lambda: attacker.guest.read(request.writable[0].offset, 512) == sector(3))
    data = os.urandom(4096)
    target.victim.neighbour.write(0, data)
    assert target.victim.neighbour.read(0, 4096) == data
    with contextlib.closing(target.attacker("read-only")) as other:
        other.check_honest_ring(DISK)
    attacker.check_honest_ring(DISK)


@pytest.mark.parametrize("kind", NOTIFIERS)
def test_a_call_fd_that_is_full_and_blocks(target: Target, ring_class: Any, kind: str) -> None:
    attacker = target.attacker(ring_class=ring_class)
    line = attacker.lines[0]
    with full_notifier(kind) as call:
        with blocking(call):
            # SET_VRING_CALL signals it, too.
            attacker.front_end.set_vring_call(0, call)
            assert_others_are_served(target, attacker, line)
        attacker.front_end.set_vring_call(0, line.call_fd)
    line.reset()


def test_an_error_fd_that_is_full_and_blocks(target: Target, ring_class: Any) -> None:
    attacker = target.attacker(ring_class=ring_class)
    line = attacker.lines[0]
    fill(line.err_fd)
    with blocking(line.err_fd):
        line.ring.put_bad_head()
        line.kick()
        assert eventually(lambda: "ring broken by the driver" in target.logged())
        attacker.check_honest_ring(DISK)
        line.stop()
        take_events(line.err_fd)
        attacker.new_ring(line)
        assert_others_are_served(target, attacker, line)


@pytest.mark.parametrize("kind", [Request.SET_VRING_CALL, Request.SET_VRING_ERR], ids=lambda each: each.name)
def test_notifiers_that_are_not_eventfds(target: Target, kind: Request) -> None:
    """For example, a file could be on a file system that hangs."""
    attacker = target.attacker()
    with pytest.raises(Refused):
        attacker.front_end._set_vring_fd(kind, 0, attacker.guest.fd)
    assert "the fd is not an eventfd" in target.logged()
    attacker.check_honest_ring(DISK)


def test_a_channel_that_is_full_and_blocks(target: Target) -> None:
    """In-band calls are messages on a socket that the front end has sent; it holds the other end as well."""
    attacker = target.attacker(protocol_features=WANTED_PROTOCOL_FEATURES | IN_BAND)
    line, front_end = attacker.lines[0], attacker.front_end
    ours, theirs = socket.socketpair()
    with ours, theirs, blocking(theirs.fileno()):
        front_end.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(4096), socket.MSG_DONTWAIT)
        # This forgets the call fd.
        front_end.send(Request.RESET_DEVICE)
        attacker.lines[1].resume()
        layout = line.ring.layout()
        front_end.set_vring_num(0, layout.size)
        front_end.set_vring_base(0, layout.base)
        front_end.set_vring_addr(0, layout.desc, layout.avail, layout.used)
        front_end.set_vring_enable(0, True)
        assert_others_are_served(target, attacker, line, lambda: front_end.send(Request.VRING_KICK, VringState(0, 0)))


@pytest.mark.parametrize("kind", NOTIFIERS)
def test_a_thread_of_one_disk_is_blocked_only_until_it_is_needed(tmp_path: Path, kind: str) -> None:
    """The next front end is served and SIGTERM ends the process, although nobody reads the notifier."""
    (tmp_path / "disks.toml").write_text('[[disk]]\nimage = "a.img"\nsocket-path = "a.sock"\nnum-queues = 2\n')
    (tmp_path / "a.img").write_bytes(DISK)
    with full_notifier(kind) as call, serving(tmp_path):
        for _ in range(2):
            with contextlib.closing(Attacker(tmp_path / "a.sock")) as attacker:
                attacker.front_end.set_vring_call(0, call)
                os.set_blocking(call, True)
                place = attacker.lines[0].put(IN, 3, room=512).writable[0].offset
                attacker.lines[0].kick()
                assert eventually(lambda here=attacker.guest, place=place: here.read(place, 512) == sector(3))
