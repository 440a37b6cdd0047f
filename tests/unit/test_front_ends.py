"""A second front end of a disk: the log says that it waits and for which process; it is served next."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringplane
from ringplane.driver.frontend import FrontEnd
from ringplane.vhost_user import peers
from ringplane.vhost_user.messages import ProtocolError

from .protocol_rig import take_over
from .rig import PATIENCE, eventually

ME = f"process {os.getpid()}, python"
WAITS = "image: a second front end ("
GONE = "image: the second front end ("


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def export(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ringplane.Export]:
    monkeypatch.setattr("ringplane.control.front_ends.WAITING_PATIENCE", 0)
    with ringplane.serve(image, tmp_path / "socket", num_queues=1, upgradable=True) as export:
        yield export


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "ringplane"):
        yield caplog


def connect(export: ringplane.Export) -> contextlib.closing[FrontEnd]:
    assert export.socket_path is not None
    return contextlib.closing(FrontEnd(export.socket_path, PATIENCE))


def served(front_end: FrontEnd) -> FrontEnd:
    assert front_end.get_features()
    return front_end


def comes(log: pytest.LogCaptureFixture, text: str, count: int = 1) -> bool:
    return eventually(lambda: log.text.count(text) == count)


def test_the_log_names_both_front_ends(export: ringplane.Export, log: pytest.LogCaptureFixture) -> None:
    with connect(export) as first:
        served(first)
        with connect(export):
            assert comes(log, WAITS)
            line = next(record.getMessage() for record in log.records if WAITS in record.getMessage())
            assert line.startswith(f"{WAITS}{ME}")
            assert f") waits until the first one ({ME}" in line
            assert line.endswith(") detaches; SIGUSR1 detaches the first one")
        assert comes(log, GONE)
        served(first)


def test_the_second_front_end_is_served_next(export: ringplane.Export, log: pytest.LogCaptureFixture) -> None:
    """The messages that it has sent meanwhile are answered, and more front ends may wait."""
    with connect(export) as first, connect(export) as second, connect(export) as third:
        served(first)
        assert comes(log, WAITS)
        first.close()
        served(second)
        assert comes(log, WAITS, 2)
        second.close()
        served(third)
    assert eventually(lambda: export.state == "listening")
    assert log.text.count("image: front end attached (") == 3


def test_front_ends_that_give_up_are_replaced(export: ringplane.Export, log: pytest.LogCaptureFixture) -> None:
    with connect(export) as first:
        served(first)
        for number in range(1, 4):
            with connect(export) as impatient:
                impatient.sock.sendall(b"half a message"[:11])
                assert comes(log, WAITS, number)
            assert comes(log, GONE, number)
        with connect(export) as second:
            assert comes(log, WAITS, 4)
            first.close()
            served(second)


def test_the_first_front_end_is_detached_on_request(export: ringplane.Export, log: pytest.LogCaptureFixture) -> None:
    """This happens only if another one waits."""
    export.make_way()
    with connect(export) as first:
        served(first)
        export.make_way()
        assert comes(log, "stays attached: no other one waits")
        served(first)
        with connect(export) as second:
            assert comes(log, WAITS)
            export.make_way()
            served(second)
            assert comes(log, "is detached on request, because another one waits")
            with pytest.raises((ProtocolError, OSError)):
                served(first)


def test_a_waiting_front_end_is_handed_over(
    export: ringplane.Export, image: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """It continues to wait in the next process, and so does the next one in the socket's queue."""
    with contextlib.ExitStack() as undo, connect(export) as first, connect(export) as second, connect(export) as third:

        def serve(**options: object) -> ringplane.Export:
            following = ringplane.serve(image, tmp_path / "socket", num_queues=1, upgradable=True, **options)  # type: ignore[arg-type]
            undo.callback(following.stop)
            return following

        served(first)
        assert comes(log, WAITS)
        following = take_over(serve, export)
        assert comes(log, WAITS, 2)
        served(first)
        first.close()
        served(second)
        second.close()
        served(third)
        third.close()
        assert eventually(lambda: following.state == "listening")


def test_a_reconnection_is_not_logged_as_waiting(
    export: ringplane.Export, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringplane.control.front_ends.WAITING_PATIENCE", PATIENCE)
    with contextlib.ExitStack() as undo:
        before = served(undo.enter_context(connect(export)))
        for _ in range(20):
            again = undo.enter_context(connect(export))
            before.close()
            before = served(again)
            # A probe whether a process listens.
            connect(export).__enter__().close()
    assert WAITS not in log.text


def test_a_waiting_front_end_is_dropped_with_its_disk(export: ringplane.Export, log: pytest.LogCaptureFixture) -> None:
    with connect(export) as first, connect(export) as second:
        served(first)
        assert comes(log, WAITS)
        export.stop()
        assert second.sock.recv(1) == b""


def test_the_peer_of_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peers.credentials(ours) == (os.getpid(), os.geteuid())
        assert peers.describe(ours).startswith(ME)


def test_a_process_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example in the sandbox."""

    def refuse(path: str) -> str:
        raise PermissionError

    monkeypatch.setattr(os, "readlink", refuse)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peers.describe(ours) == f"process {os.getpid()}"
        monkeypatch.setattr(peers, "credentials", lambda _: (0, 65534))
        assert peers.describe(ours) == "a process of another PID namespace"
