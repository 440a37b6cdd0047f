"""What ends a start names what was being done, to what, and what to do about it."""

from __future__ import annotations

import errno
import os
import resource

import click
import pytest

from ringplane.cli.start_errors import start_errors
from ringplane.engines.common import EngineUnavailable
from ringplane.opener.opener import OpenerEnded
from ringplane.system.notes import NO_THREAD, doing, in_words


def message(error: BaseException, what: str = "") -> str:
    with pytest.raises(click.ClickException) as raised, start_errors(), doing(what):
        raise error
    return raised.value.message


def test_error_without_a_context() -> None:
    error = OSError(errno.EPERM, os.strerror(errno.EPERM))
    assert message(error, "confine the process") == "cannot confine the process: Operation not permitted"


def test_error_of_a_file() -> None:
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), "/some/where")
    assert message(error, "open it") == "cannot open it: /some/where: Permission denied"


def test_limits_of_process_and_machine() -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert f"this process may open only {limit} files; raise the limit" in message(OSError(errno.EMFILE, ""), "x")
    assert "fs.file-max" in message(OSError(errno.ENFILE, ""), "x")
    assert "not enough memory" in message(OSError(errno.ENOMEM, ""), "x")
    assert "not enough memory" in message(MemoryError())
    assert message(RuntimeError("can't start new thread")) == NO_THREAD


def test_errors_of_a_process_that_cannot_find_out_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox forbids getrlimit(2)."""

    def refuse(_: int) -> tuple[int, int]:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(resource, "getrlimit", refuse)
    assert in_words(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert in_words(OSError(errno.EMFILE, "")).startswith("this process may open no more files; raise the limit")


def test_the_process_that_opens_files_has_ended() -> None:
    assert message(OpenerEnded("it has ended; restart ringplane")) == "it has ended; restart ringplane"


def test_an_engine_has_its_own_advice() -> None:
    error = EngineUnavailable(
        "io_uring", "io_uring_setup(2)", OSError(errno.ENOMEM, ""), {errno.ENOMEM: "raise ulimit -l"}
    )
    assert message(error, "set it up") == (
        "cannot set it up: io_uring is unavailable (io_uring_setup(2): Cannot allocate memory): raise ulimit -l"
    )
