"""`systemctl reload` of the unit: a successor is started in the background, and the manager notified of it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.driver import Driver

from .served import SOON, needs_all, refused
from .test_handover import Load, attach
from .test_systemd import settings

CREDENTIALS = struct.Struct("3i")


class Manager:
    """What systemd does for a service with Type=notify and NotifyAccess=exec."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(str(folder / "notify"))
        self._sock.settimeout(SOON)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "NOTIFY_SOCKET": str(self._folder / "notify")}
        command = [sys.executable, "-m", "ringplane", "serve", *arguments]
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)

    def next(self) -> tuple[int, str]:
        """The next message, and the process that has sent it."""
        text, ancillary, _, _ = self._sock.recvmsg(100, socket.CMSG_SPACE(CREDENTIALS.size))
        return CREDENTIALS.unpack(ancillary[0][2])[0], text.decode()

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as manager:
        yield manager


def arguments(word: str, folder: Path) -> list[str]:
    """Those of the unit, for `serve`."""
    (command,) = [line for line in settings(word) if " serve " in line]
    return command.replace("/etc/ringplane/%i.toml", str(folder / "disks.toml")).split()[2:]


def end(pid: int) -> None:
    """Stop a process that is not our child."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        assert select.select([fd], [], [], SOON)[0]
        os.close(fd)


@needs_all
def test_reloads_under_load(manager: Manager, tmp_path: Path) -> None:
    """With the commands of the unit: the new main process is known before the old one ends, and can be reloaded too."""
    (tmp_path / "disks.toml").write_text('[[disk]]\nimage = "a.img"\ncreate = "16M"\nsocket-path = "a.sock"\n')
    first = manager.start(*arguments("ExecStart", tmp_path))
    main = first.pid
    try:
        assert manager.next() == (main, "READY=1")
        load = Load(tmp_path / "a.sock")
        load.start()
        try:
            for _ in range(3):
                load.do_some()
                reload = manager.start(*arguments("ExecReload", tmp_path))
                sender, text = manager.next()
                assert (sender, text.partition("=")[0]) == (main, "MAINPID")
                main = int(text.partition("=")[2])
                assert manager.next() == (main, "READY=1")
                assert reload.wait(SOON) == 0, manager.log()
                assert main not in (first.pid, reload.pid)
            load.do_some()
        finally:
            load.stopping = True
            load.join()
            load.disk.close()
        assert load.error is None
        assert first.wait(SOON) == 0
    finally:
        end(main)
        first.kill()
        first.wait()
    assert "WARNING" not in manager.log()
    assert not (tmp_path / "a.sock").exists()


@needs_all
def test_a_reload_that_fails(manager: Manager, tmp_path: Path) -> None:
    """Its status says so, and the running process continues; it stays the main process."""
    config = tmp_path / "disks.toml"
    text = '[[disk]]\nimage = "a.img"\ncreate = "16M"\nsocket-path = "a.sock"\n'
    config.write_text(text)
    first = manager.start(*arguments("ExecStart", tmp_path))
    try:
        assert manager.next() == (first.pid, "READY=1")
        for wrong, words in (
            (text + "num-queues = 3\n", "num-queues is 64 in the running process and 3 here"),
            (text + "color = 1\n", 'unknown key "color"'),
        ):
            config.write_text(wrong)
            assert manager.start(*arguments("ExecReload", tmp_path)).wait(SOON) == 1
            assert words in manager.log()
            with attach(tmp_path / "a.sock") as disk:
                disk.read(0, 512)
        first.send_signal(signal.SIGTERM)
        assert first.wait(SOON) == 0
    finally:
        first.kill()
        first.wait()


@needs_all
def test_a_manager_that_does_not_read(manager: Manager, tmp_path: Path) -> None:
    """Its socket is full: guests do not wait for it."""
    (tmp_path / "disks.toml").write_text('[[disk]]\nimage = "a.img"\ncreate = "16M"\nsocket-path = "a.sock"\n')
    first = manager.start(*arguments("ExecStart", tmp_path))
    main = 0
    try:
        assert manager.next() == (first.pid, "READY=1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(BlockingIOError):
            sock.setblocking(False)
            sock.connect(str(tmp_path / "notify"))
            while True:
                sock.send(b"STATUS=full")
        with Driver(tmp_path / "a.sock", timeout=SOON, memory_size=16 << 20) as driver:
            reload = manager.start(*arguments("ExecReload", tmp_path))
            assert first.wait(SOON) == 0
            driver.read(0, 512)
            assert reload.wait(SOON) == 0
            found = re.search(r"process (\d+) takes over all disks", manager.log())
            assert found
            main = int(found[1])
    finally:
        if main:
            end(main)
        first.kill()
        first.wait()


def test_the_background_is_for_upgrades(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    words = refused("--blk-file", image, "--socket-path", tmp_path / "socket", "--detach")
    assert "--detach is for --upgrade" in words
