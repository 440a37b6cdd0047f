"""The file of a listening socket: who can connect to it, and when."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.control.listener import Listener, ListenError

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that all users can write to."""
    with tempfile.TemporaryDirectory(prefix="ringplane-") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def group_of_others() -> int:
    """A group that this process may give files to; for root not its own group."""
    return 12345 if os.geteuid() == 0 else os.getgid()


@pytest.mark.parametrize(
    ("mode", "group", "found"), [(0o606, False, 0o606), (0o777, True, 0o777), (0o600, True, 0o600), (None, True, 0o660)]
)
def test_mode_and_group(path: Path, mode: int | None, group: bool, found: int) -> None:
    number = group_of_others() if group else None
    listener = Listener.at(path, mode, number)
    assert path.stat().st_mode & 0o777 == found
    assert path.stat().st_gid == (os.getgid() if number is None else number)
    listener.close()
    assert not path.exists()


def test_nobody_connects_before_mode_and_group_are_set(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def connect_too_early(*_: object, **__: object) -> None:
        with socket.socket(socket.AF_UNIX) as early, pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            early.connect(str(path))
        tried.append(True)

    monkeypatch.setattr(os, "chown", connect_too_early)
    monkeypatch.setattr(os, "chmod", connect_too_early)
    listener = Listener.at(path, 0o666, group_of_others())
    assert tried == [True, True]
    with socket.socket(socket.AF_UNIX) as later:
        later.connect(str(path))
    listener.close()


def test_group_of_which_one_is_not_a_member(everybodys: Path) -> None:
    message = refusal_for_nobody(everybodys / "socket", 0)
    assert message == (
        f"{everybodys / 'socket'}: its group cannot be root: this user is not a member; "
        "join with: usermod -aG root USER, then log in again"
    )
    assert list(everybodys.iterdir()) == []


def refusal_for_nobody(path: Path, group: int) -> str:
    """The error message for a process without any rights."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            Listener.at(path, group=group)
        except ListenError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, encoding="utf-8") as text:
        return text.read()
