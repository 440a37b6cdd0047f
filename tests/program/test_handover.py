"""A planned restart: front ends notice nothing, and a restart that fails changes nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.control import handing_over, handover
from ringplane.control.export import Export
from ringplane.control.handover import Channel, HandoverError, socket_beside
from ringplane.control.operations import Operations
from ringplane.dataplane.ring_states import RingState
from ringplane.driver import Driver
from ringplane.driver.driver import FEATURES
from ringplane.driver.virtqueue import poke
from ringplane.options.zone_options import ZoneModel
from ringplane.session.negotiation import Negotiation
from ringplane.session.refusal import Refused
from ringplane.system.aside import NoThread, aside
from ringplane.system.fd import Fd
from ringplane.vhost_user.messages import HEADER, BackendRequest, ProtocolError, Request
from ringplane.vhost_user.payloads import VringState
from ringplane.virtio.blk_zones import VIRTIO_BLK_T_ZONE_APPEND, VIRTIO_BLK_T_ZONE_OPEN, VIRTIO_BLK_T_ZONE_REPORT
from ringplane.virtio.split import AVAIL_IDX
from unit.protocol_rig import (
    CONTENT,
    QUEUES,
    Machine,
    front_end,
    machine,
    negotiated,
    open_fds,
    sector,
    shared_mappings,
    take_over,
)
from unit.rig import OK, PATIENCE, eventually, need_engine, pattern
from unit.test_inband import FrontEnd as InbandFrontEnd

from .test_serve import Served, attach

SIZE = 16 << 20
BLOCK = 4096

Serve = Callable[..., ringplane.Export]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the socket."""
    return tmp_path / "socket"


@pytest.fixture
def serve(image: Path, path: Path) -> Iterator[Serve]:
    """Both sides in this process, where a test can inspect them: `serve()` starts, `serve(upgrade=True)` takes over."""
    with contextlib.ExitStack() as undo:

        def start(**options: Any) -> ringplane.Export:
            given: dict[str, Any] = {"num_queues": QUEUES, "upgradable": True} | options
            export = ringplane.serve(image, path, **given)
            undo.callback(export.stop)
            return export

        yield start


# Processes.


@pytest.fixture
def processes() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*arguments: object, **options: Any) -> Served:
        started.append(Served([str(each) for each in arguments], **options))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()
        assert served.process.stdout
        served.process.stdout.close()
        served.errors.close()


def ended(served: Served) -> None:
    """Check that the process has handed over: it ended with status 0 and without warnings."""
    status, _, errors = served.finish()
    assert status == 0, errors
    assert "WARNING" not in errors


class Load(threading.Thread):
    """Writes, reads back and compares repeatedly until it is stopped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.disk = attach(path)
        self.blocks = 0
        self.stopping = False
        self.error: BaseException | None = None

    def run(self) -> None:
        chance = random.Random(1)
        written: dict[int, bytes] = {}
        try:
            while not self.stopping:
                offset = chance.randrange(SIZE // BLOCK) * BLOCK
                if offset in written:
                    assert self.disk.read(offset, BLOCK) == written[offset], offset
                written[offset] = chance.randbytes(BLOCK)
                self.disk.write(offset, written[offset])
                self.blocks += 1
            for offset, data in written.items():
                assert self.disk.read(offset, BLOCK) == data, offset
        except BaseException as error:
            self.error = error

    def do_some(self) -> None:
        before = self.blocks
        assert eventually(lambda: self.blocks > before + 20 or self.error is not None)
        if self.error:
            raise self.error


@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_repeated_takeovers_under_load(processes: Callable[..., Served], image: Path, path: Path, engine: str) -> None:
    need_engine(engine)
    options = ("--image", image, "--socket-path", path, "--engine", engine, "--num-queues", 2)
    running = processes(*options)
    assert eventually(socket_beside(path).is_socket)
    load = Load(path)
    load.start()
    for _ in range(5):
        load.do_some()
        following = processes(*options, "--upgrade", "--io-threads", 2)
        ended(running)
        running = following
    load.do_some()
    load.stopping = True
    load.join()
    assert load.error is None
    load.disk.close()
    with attach(path) as another:
        another.read(0, BLOCK)
    status, _, errors = running.end()
    assert status == 0
    assert "resumed a front end of the previous process" in errors
    assert "WARNING" not in errors
    assert not path.exists()
    assert not socket_beside(path).exists()


def test_all_disks_of_a_file_are_taken_over(processes: Callable[..., Served], tmp_path: Path) -> None:
    """In any order of the new file."""
    tables = [
        f'[[disk]]\nimage = "{name}"\nsocket-path = "{name}.sock"\ncreate = "1M"\nnum-queues = 1\n' for name in "abc"
    ]
    before, after = tmp_path / "before.toml", tmp_path / "after.toml"
    before.write_text("".join(tables))
    after.write_text("".join(reversed(tables)))
    running = processes("--config", before)
    assert eventually(socket_beside(tmp_path / "a.sock").is_socket)
    disks = [attach(tmp_path / f"{name}.sock") for name in "ab"]
    for number, disk in enumerate(disks):
        disk.write(0, pattern(512, number))
    following = processes("--config", after, "--upgrade")
    ended(running)
    for number, disk in enumerate(disks):
        assert disk.read(0, 512) == pattern(512, number)
        disk.close()
    attach(tmp_path / "c.sock").close()
    assert following.end()[0] == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "after.toml", "b", "before.toml", "c"]


def refused(*arguments: object) -> str:
    """The one-line error of a process that cannot take over."""
    command = [sys.executable, "-m", "ringplane", "serve", *map(str, arguments), "--upgrade"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert done.returncode != 0
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_the_running_process_continues_if_a_takeover_is_rejected(
    processes: Callable[..., Served], image: Path, path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    running = processes("--image", image, "--socket-path", path, "--num-queues", 2)
    assert eventually(socket_beside(path).is_socket)
    with attach(path) as disk:
        for options, words in (
            (
                ("--image", image, "--socket-path", path, "--num-queues", 1),
                "num-queues is 2 in the running process and 1 here",
            ),
            (
                ("--image", image, "--socket-path", path, "--read-only"),
                "read-only is False in the running process and True here",
            ),
            (
                ("--image", image, "--socket-path", path, "--num-queues", 2, "--physical-block-size", "16K"),
                "physical-block-size is None in the running process and 16384 here",
            ),
            (
                ("--image", other, "--socket-path", path, "--num-queues", 2),
                "is not the image that the running process serves",
            ),
            (("--image", image, "--socket-path", f"{path}2"), "no running ringplane serves there"),
            (("--image", image, "--fd", 0), "--upgrade needs --socket-path"),
        ):
            assert words in refused(*options)
            assert disk.read(512, 512) == sector(1)
    assert running.process.poll() is None
    assert running.end()[0] == 0


# The state of a front end.


def test_a_partly_received_message_is_handed_over(serve: Serve) -> None:
    running = serve()
    with negotiated(running) as peer:
        asked = HEADER.pack(Request.GET_QUEUE_NUM, 1, 0)
        peer.sock.send(asked[:7])
        running = take_over(serve, running)
        peer.sock.send(asked[7:])
        assert peer.sock.recv(100) == HEADER.pack(Request.GET_QUEUE_NUM, 5, 8) + struct.pack("<Q", QUEUES)
        # And one of which the header has come, with an fd.
        asked = HEADER.pack(Request.SET_VRING_ERR, 9, 8) + struct.pack("<Q", 0)
        fd = os.eventfd(0)
        socket.send_fds(peer.sock, [asked[:15]], [fd])
        os.close(fd)
        running = take_over(serve, running)
        peer.sock.send(asked[15:])
        assert peer.sock.recv(100) == HEADER.pack(Request.SET_VRING_ERR, 5, 8) + bytes(8)


def test_front_ends_that_wait_are_accepted(serve: Serve) -> None:
    running = serve()
    with front_end(running) as first, front_end(running) as second:
        first.get_features()
        running = take_over(serve, running)
        first.get_features()
        first.close()
        second.get_features()


def test_takeover_without_a_front_end(serve: Serve) -> None:
    running = serve()
    running = take_over(serve, running)
    with machine(running) as guest:
        guest.start()
        assert guest.read(3) == sector(3)


def test_another_format_is_logged_once(serve: Serve, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    with image.open("r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    running = serve(physical_block_size=16384)
    take_over(serve, running, physical_block_size=16384)
    assert len([record for record in caplog.records if "looks like a qcow2 image" in record.getMessage()]) == 1


def test_the_state_of_a_front_end_is_handed_over(serve: Serve) -> None:
    """Memory, rings, in-flight area, dirty log and status, through two restarts."""
    running = serve()
    with machine(running) as guest:
        described, fd = guest.peer.get_inflight_fd(QUEUES, guest.ring.size)
        guest.peer.set_inflight_fd(described, fd)
        guest.peer.set_log_base(4096, 0, fd)
        os.close(fd)
        guest.peer.set_status(15)
        guest.start()
        assert guest.read(7) == sector(7)
        for number in (8, 9):
            running = take_over(serve, running)
            assert guest.read(number) == sector(number)
            assert guest.peer.get_status() == 15
        assert running.state == "attached"


def test_a_ring_starts_later(serve: Serve) -> None:
    running = serve()
    with machine(running) as guest:
        guest.ring.reset(0)
        guest.peer.set_vring_num(0, guest.ring.size)
        running = take_over(serve, running)
        guest.start()
        assert guest.read(7) == sector(7)


def test_a_ring_without_memory_is_handed_over_when_it_is_stopped(serve: Serve) -> None:
    running = serve()
    with machine(running) as guest:
        guest.start()
        assert serves_on(guest, 1)
        guest.peer.set_mem_table([], [])
        with pytest.raises(HandoverError, match="has removed the memory of a ring"):
            take_over(serve, running)
        base = guest.peer.get_vring_base(0)
        guest.share_memory()
        running = take_over(serve, running)
        guest.start(base)
        assert running.disk.queues[0].state is RingState.RUNNING


@pytest.mark.parametrize("kind", [Refused, ProtocolError])
def test_a_front_end_that_does_not_fit(serve: Serve, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    """Another release may offer less, or resume differently."""

    def refuse(*_: object) -> None:
        raise kind("its driver uses what is not offered here")

    running = serve()
    with machine(running) as guest:
        guest.start()
        with monkeypatch.context() as other:
            other.setattr(Negotiation, "resume", refuse)
            with pytest.raises(HandoverError, match="its driver uses what is not offered"):
                serve(upgrade=True)
        assert guest.read(7) == sector(7)
        assert not running.stopped


def test_a_broken_ring_stays_broken(serve: Serve) -> None:
    running = serve()
    with machine(running) as guest:
        guest.start()
        poke(guest.ring.avail + AVAIL_IDX, struct.pack("<H", 1000))
        guest.vring.kick()
        assert eventually(lambda: running.disk.queues[0].state is RingState.BROKEN)
        running = take_over(serve, running)
        assert running.disk.queues[0].state is RingState.STOPPED_BROKEN


def test_write_through_is_kept(serve: Serve, path: Path) -> None:
    running = serve()
    with Driver(path, feature_bits=FEATURES, memory_size=1 << 24) as disk:
        disk.set_write_back(False)
        running = take_over(serve, running)
        # The ring resumes when the new process's control thread has started it.
        disk.read(0, 512)
        assert running.disk.queues[0].layout is not None
        assert running.disk.queues[0].layout.write_through
        disk.read_config()
        assert not disk.config["writeback"]


def test_a_failed_flush_is_not_forgotten(serve: Serve) -> None:
    running = serve()
    running.disk.set_flush_failed()
    running = take_over(serve, running)
    assert running.disk.flush_failed


def test_in_band_notifications(serve: Serve) -> None:
    switches = {"inband-notifications": True}
    running = serve(features=switches)
    with InbandFrontEnd(running) as guest:
        guest.place()
        for number in range(4):
            guest.read_by_messages(number)
            running = take_over(serve, running, features=switches)


def test_takeover_waits_for_the_reply_to_an_in_band_call(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringplane.session.session.FREEZE_PATIENCE", 0.2)
    switches = {"inband-notifications": True}
    running = serve(features=switches)
    with InbandFrontEnd(running) as guest:
        guest.place()
        guest.offer_read(1)
        guest.ring.publish()
        guest.kick()
        guest.reap()
        with pytest.raises(HandoverError, match="does not read the back-end channel"):
            serve(upgrade=True, features=switches)
        assert guest.hear() == (BackendRequest.VRING_CALL, VringState(0, 0))
        guest.read_by_messages(2)


ZONE = 256 << 10
MODEL = ZoneModel(ZONE, ZONE, 2, max_open=3, max_active=5)


def test_the_state_of_zones_is_handed_over(tmp_path: Path) -> None:
    """The write pointers, and which zones are open, which only the process knows."""
    image, path = tmp_path / "zoned", tmp_path / "socket"
    with (
        ringplane.serve(image, path, create=16 * ZONE, zoned=MODEL, upgradable=True) as running,
        Driver(path, feature_bits=FEATURES, memory_size=1 << 24) as disk,
    ):

        def report() -> bytes:
            return disk.request(VIRTIO_BLK_T_ZONE_REPORT, 0, read=64 + 16 * 64).data

        def append(number: int) -> int:
            sector = 6 * ZONE // 512
            answer = disk.request(VIRTIO_BLK_T_ZONE_APPEND, sector, pattern(512, number), read=8)
            assert answer.status == OK
            return int.from_bytes(answer.data, "little") - sector

        disk.request(VIRTIO_BLK_T_ZONE_OPEN, 5 * ZONE // 512)
        assert [append(number) for number in range(3)] == [0, 1, 2]
        before = report()
        with ringplane.serve(image, path, zoned=MODEL, upgradable=True, upgrade=True):
            assert running.wait(PATIENCE)
            assert report() == before
            assert disk.read(6 * ZONE, 1536) == b"".join(pattern(512, number) for number in range(3))
            assert append(3) == 3
    # After an orderly stop no data is lost, and none has appeared.
    with ringplane.serve(image, path, zoned=MODEL) as again, Driver(path, memory_size=1 << 24) as disk:
        assert again.disk.layers
        assert disk.read(6 * ZONE, 512) == pattern(512, 0)


# Failures.


def serves_on(guest: Machine, number: int) -> bool:
    return guest.read(number) == sector(number)


def connect(path: Path) -> Channel:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(socket_beside(path)))
    return Channel(sock)


@pytest.mark.parametrize("stage", range(5))
def test_a_successor_that_ends_changes_nothing(
    serve: Serve, path: Path, stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Before its first message, before the offer, before it is ready, while the state is sent, and after that."""
    running = serve()
    with machine(running) as guest:
        guest.start()
        assert serves_on(guest, 1)
        # Files of earlier tests that wait for a garbage collection: a mapping of Python's has a descriptor of its own.
        gc.collect()
        fds, mappings = open_fds(), shared_mappings()
        with connect(path) as channel:
            if stage > 0:
                channel.send({"hello": handover.VERSION})
            if stage > 1:
                channel.receive("disks", PATIENCE)
            if stage > 2:
                channel.send({"ready": True})
            if stage > 3:
                state = channel.receive("disks", PATIENCE)
                assert state["disks"][0]["front_end"]["vrings"][0]["size"] == guest.ring.size
        assert eventually(lambda: "could not take over" in caplog.text)
        assert serves_on(guest, 2)
        assert eventually(lambda: open_fds().keys() == fds.keys())
        assert shared_mappings() == mappings
        # And another one may take over.
        take_over(serve, running)
        assert serves_on(guest, 3)


def test_threads_that_cannot_be_started(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the running process it is, one process serves, and the other one has an answer."""
    running = serve()
    with machine(running) as guest:
        guest.start()
        for allowed in range(4):
            monkeypatch.setattr(handing_over, "aside", allowing(allowed))
            with pytest.raises(HandoverError, match="no thread can be started"):
                serve(upgrade=True)
            assert serves_on(guest, allowed)
        monkeypatch.setattr(handing_over, "aside", allowing(4))
        take_over(serve, running)
        assert serves_on(guest, 20)


def allowing(calls: int) -> Callable[..., Any]:
    """What `aside` is when no more threads can be started than these."""
    left = iter(range(calls))

    async def few(function: Callable[[], Any]) -> Any:
        if next(left, None) is None:
            raise NoThread
        return await aside(function)

    return few


def test_without_fds_a_successor_waits(serve: Serve, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    running = serve()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as sock:
        free = os.dup(sock.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            sock.connect(str(socket_beside(path)))
            assert eventually(lambda: "cannot accept a process that takes over" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        sock.settimeout(PATIENCE)
        sock.sendall(handover.PREFIX.pack(2, 0) + b"{}")
        assert sock.recv(1)
    assert eventually(lambda: "could not take over" in caplog.text)
    take_over(serve, running)


def test_one_process_takes_over_at_a_time(serve: Serve, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    running = serve()
    with connect(path) as channel:
        channel.send({"hello": handover.VERSION})
        channel.receive("disks", PATIENCE)
        with pytest.raises(HandoverError, match=f"process {os.getpid()} is taking over; try again when it has ended"):
            serve(upgrade=True)
    assert eventually(lambda: "could not take over" in caplog.text)
    take_over(serve, running)


def test_an_internal_error_ends_one_takeover(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    running = serve()
    with monkeypatch.context() as patch:
        patch.setattr(handing_over, "_state_of_all", fail)
        with pytest.raises(HandoverError, match="an internal error, which its log shows"):
            serve(upgrade=True)
    assert eventually(lambda: "please report it" in caplog.text)
    take_over(serve, running)


def test_a_successor_that_hangs_times_out(serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    with machine(running) as guest, connect(path) as channel:
        guest.start()
        channel.send({"hello": handover.VERSION})
        channel.receive("disks", PATIENCE)
        # Not before: the hello has as much time.
        monkeypatch.setattr(handing_over, "TAKING_PATIENCE", 0.2)
        channel.send({"ready": True})
        channel.receive("disks", PATIENCE)
        with pytest.raises(HandoverError, match="does not answer"):
            channel.receive("disks", PATIENCE)
        assert serves_on(guest, 1)


def test_slow_requests_end_the_takeover(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing_over, "DRAIN_PATIENCE", 0)
    running = serve()
    with machine(running) as guest:
        guest.start()
        with pytest.raises(HandoverError, match="requests in flight took longer than"):
            serve(upgrade=True)
        assert serves_on(guest, 1)


def test_a_flush_of_the_control_plane_ends_first(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process could read the reply to it. If it takes too long, none takes over."""
    running, begun, go, ended = serve(), threading.Event(), threading.Event(), threading.Event()
    really_sync, really_freeze = running.disk.sync, Export.freeze

    def sync() -> None:
        begun.set()
        assert go.wait(PATIENCE)
        really_sync()
        ended.set()

    async def freeze(export: Export, patience: float) -> None:
        assert ended.is_set()
        await really_freeze(export, patience)

    monkeypatch.setattr(running.disk, "sync", sync)
    monkeypatch.setattr(Export, "freeze", freeze)
    with machine(running) as guest, ThreadPoolExecutor(1) as pool:
        guest.start()
        flushing = pool.submit(running.flush)
        assert begun.wait(PATIENCE)
        with monkeypatch.context() as patch:
            patch.setattr(handing_over, "DRAIN_PATIENCE", 0.05)
            with pytest.raises(HandoverError, match=r"flush has not ended after 0\.05 seconds; try again when it has"):
                serve(upgrade=True)
        assert serves_on(guest, 1)
        monkeypatch.setattr(handing_over, "DRAIN_PATIENCE", PATIENCE)
        monkeypatch.setattr(Operations, "hold", after(go.set, Operations.hold))
        take_over(serve, running)
        flushing.result(PATIENCE)
        assert serves_on(guest, 2)


def after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the first one, then the other."""

    def both(*arguments: Any) -> Any:
        first()
        return then(*arguments)

    return both


def test_a_predecessor_that_dies_after_the_handover(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed before it reads the last message: no other process serves, so the new one does."""
    receive = Channel.receive

    def reset(channel: Channel, what: str, patience: float) -> dict[str, Any]:
        if what == "yours":
            raise ConnectionResetError
        return receive(channel, what, patience)

    running = serve()
    with machine(running) as guest:
        guest.start()
        monkeypatch.setattr(Channel, "receive", reset)
        take_over(serve, running)
        assert serves_on(guest, 1)


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"hello": 1}',
        b'{"hello": {"fd": 3}}',
        b'{"hello": {"hex": "xy"}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_invalid_messages_are_rejected(serve: Serve, path: Path, text: bytes) -> None:
    running = serve()
    with machine(running) as guest:
        guest.start()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(socket_beside(path)))
            sock.send(handover.PREFIX.pack(len(text), 0) + text)
            with sock.makefile("rb") as stream:
                assert b"refused" in stream.read()
        assert serves_on(guest, 1)


def test_a_stop_during_a_takeover(serve: Serve, path: Path) -> None:
    running = serve()
    with connect(path) as channel:
        channel.send({"hello": handover.VERSION})
        channel.receive("disks", PATIENCE)
        running.stop()
        with pytest.raises((EOFError, OSError, HandoverError)):
            channel.receive("disks", PATIENCE)
    assert not socket_beside(path).exists()


def test_a_socket_path_without_room_for_the_suffix(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ("s" * (104 - len(str(tmp_path))))
    with ringplane.serve(image, path, num_queues=QUEUES, upgradable=True) as running, machine(running) as guest:
        guest.start()
        assert serves_on(guest, 1)
    assert "no other process will be able to take over" in caplog.text


def test_channel_carries_fds_and_bytes() -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours) as one, Channel(theirs) as other:
        fds = [os.eventfd(number) for number in range(500)]
        sending = threading.Thread(
            target=lambda: one.send({"fds": [Fd(fd) for fd in fds], "bytes": b"\0\xff", "big": "x" * (1 << 20)})
        )
        sending.start()
        got = other.receive("fds", PATIENCE)
        sending.join()
        assert [os.eventfd_read(fd.number) for fd in got["fds"][1:]] == list(range(1, 500))
        assert got["bytes"] == b"\0\xff"
        assert len(got["big"]) == 1 << 20
        for fd in fds:
            os.close(fd)


def test_only_the_same_user_may_take_over(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve()
    assert socket_beside(path).stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(Channel, "peer", (1, 12345))
    with connect(path) as channel, pytest.raises(HandoverError, match="user 12345 may not"):
        channel.receive("disks", PATIENCE)
    assert "user 12345 may not take over" in caplog.text
