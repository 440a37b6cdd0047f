"""Names of hosts, which another process looks up, and servers that are not found."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

from ringplane.cli.serve import places_of
from ringplane.opener import host_names
from ringplane.opener.host_names import CODE, Host, look_up
from ringplane.options.api_options import ApiOptions
from ringplane.options.image_address import parse_server
from ringplane.system.signals import NONE, Interrupted, Signals

from .waiting import PATIENCE

# In the process: a name that hangs, and one that is not known.
SPECIAL = """
import socket, threading
really = socket.getaddrinfo
def getaddrinfo(name, *arguments, **more):
    if name == "hangs":
        threading.Event().wait()
    if name == "unknown":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return really(name, *arguments, **more)
socket.getaddrinfo = getaddrinfo
"""

LOCAL: Host = ("localhost", 10809)


class Impatient(Signals):
    """The time is over after so many answers."""

    def __init__(self, answers: int) -> None:
        self._left = answers

    def wait(self, fd: int, timeout: float | None = None) -> bool:
        self._left -= 1
        return self._left >= 0 and super().wait(fd, PATIENCE)


def expected(host: Host) -> list[object]:
    return [(family, address) for family, _, _, _, address in socket.getaddrinfo(*host, type=socket.SOCK_STREAM)]


@pytest.fixture(autouse=True)
def special(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_names, "CODE", SPECIAL + CODE)
    monkeypatch.setattr(host_names, "PATIENCE", PATIENCE)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes."""
    made, really_start = [], host_names._started

    def start(names: Iterable[Host]) -> subprocess.Popen[bytes]:
        made.append(really_start(names))
        return made[-1]

    monkeypatch.setattr(host_names, "_started", start)
    return made


def test_names(started: list[subprocess.Popen[bytes]]) -> None:
    """One process for all of them."""
    found = look_up([LOCAL, ("localhost", 1), ("unknown", 1)])
    assert [found[LOCAL], found["localhost", 1]] == [expected(LOCAL), expected(("localhost", 1))]
    unknown = found["unknown", 1]
    assert isinstance(unknown, OSError)
    assert (unknown.errno, unknown.strerror) == (socket.EAI_NONAME, "Name or service not known")
    assert len(started) == 1


def test_what_needs_no_process(started: list[subprocess.Popen[bytes]]) -> None:
    hosts = [("127.0.0.1", 80), ("::1", 81)]
    assert look_up(hosts) == {host: expected(host) for host in hosts}
    assert look_up([]) == {}
    impossible = look_up([("a" * 64, 1)])["a" * 64, 1]
    assert isinstance(impossible, OSError)
    assert impossible.errno == errno.EINVAL
    assert not started


def test_a_name_server_that_does_not_answer_holds_up_no_other_name(started: list[subprocess.Popen[bytes]]) -> None:
    hanging = ("hangs", 1)
    found = look_up([hanging, LOCAL], Impatient(1))
    assert found[LOCAL] == expected(LOCAL)
    assert isinstance(found[hanging], TimeoutError)
    assert started[0].returncode is not None


def test_the_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_names, "PATIENCE", 0.1)
    assert "no name server has answered within 0.1 s" in str(look_up([("hangs", 1)])["hangs", 1])


def test_it_can_be_interrupted(started: list[subprocess.Popen[bytes]]) -> None:
    class Once(Signals):
        def wait(self, fd: int, timeout: float | None = None) -> bool:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        look_up([("hangs", 1)], Once())
    assert started[0].returncode is not None


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(host_names, "_started", start)
    assert "Resource temporarily unavailable" in str(look_up([LOCAL])[LOCAL])


def test_a_server_that_is_not_found_stops_no_other_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    addresses = ("nbd://hangs", "nbd://127.0.0.1:1", "nbd+unix:///?socket=/run/nbd", "rbd::id=vms")
    hanging, local, unix, cluster = servers = tuple(map(parse_server, addresses))
    monkeypatch.setattr(host_names, "PATIENCE", 0.1)
    places = places_of(ApiOptions(Path("api"), allow_folders=(Path("/"),), allow_servers=servers), NONE)
    assert places == {
        hanging.server: (),
        local.server: [(socket.AF_INET, ("127.0.0.1", 1))],
        unix.server: [(socket.AF_UNIX, "/run/nbd")],
        cluster.server: (),
    }
    assert caplog.messages == [
        "nbd://hangs/: cannot be found: no name server has answered within 0.1 s; to add disks there, restart "
        "ringplane when it can be found"
    ]
