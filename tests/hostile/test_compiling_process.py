"""The process that compiles policies, asked by one that a guest controls, and for files whose authors mean harm."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from program.served import needs_all
from ringplane.opener import compiling_process, remote_opener
from ringplane.opener.compile_requests import MADE, REFUSED, REQUEST, SHIPPED, TOO_LONG, UNCHANGED, Request
from ringplane.opener.open_requests import CREATE, OPEN, READ_ONLY, parsed
from ringplane.opener.open_requests import Request as OpenRequest
from ringplane.opener.opener import OpenerEnded
from ringplane.opener.remote_compiler import RemoteCompiler
from ringplane.opener.remote_opener import RemoteOpener
from ringplane.policies.usable import DIGEST_SIZE
from ringplane.system.digests import blake2b
from unit.policy_texts import own_policy
from unit.rig import eventually

pytestmark = needs_all

NOTHING = bytes(DIGEST_SIZE)
GOOD = own_policy("return PASS")


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple[RemoteOpener, RemoteCompiler]]:
    with contextlib.closing(RemoteOpener([folder], compiling=True)) as opener:
        opener.wait_until_ready()
        assert opener.compiler is not None
        yield opener, opener.compiler


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[RemoteCompiler]:
    (tmp_path / "good.py").write_text(GOOD)
    with started(tmp_path) as (_, compiler):
        yield compiler


def still_compiles(compiler: RemoteCompiler) -> bool:
    return compiler.ask(0, b"good.py", "own", NOTHING).status == MADE


@pytest.mark.parametrize("expression", ["3 ** (1 << 34)", "sum(range(1 << 60))"])
def test_endless_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    """In one instruction of the interpreter, and in many. The limit is lower than usual."""
    limit = (
        "import ringplane.opener.compiling_process as each; each.CPU_TIME = 8; from ringplane.opener.opening_process"
    )
    monkeypatch.setattr(
        remote_opener, "CODE", remote_opener.CODE.replace("from ringplane.opener.opening_process", limit, 1)
    )
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(f"{GOOD}LARGE = {expression}\n")
    with started(tmp_path) as (_, compiler):
        answer = compiler.ask(0, b"bad.py", "", NOTHING)
        assert (answer.status, answer.size) == (TOO_LONG, 0), answer
        assert still_compiles(compiler)


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        (f"{GOOD}LARGE = 'a' * (1 << 50)\n", REFUSED, "emory"),
        (f"{GOOD}LARGE = tuple(range(1 << 40))\n", REFUSED, "emory"),
        ("(" * 5000, REFUSED, ""),
        ("\0", REFUSED, ""),
        (f"{GOOD}import os\n", REFUSED, "a policy cannot import os"),
        ("from ringplane.policies import *\n", REFUSED, "import * is not possible"),
    ],
)
def test_harm(tmp_path: Path, compiler: RemoteCompiler, text: str, status: int, words: str) -> None:
    """One answer for each within the limits, and the process survives."""
    (tmp_path / "bad.py").write_text(text)
    answer = compiler.ask(0, b"bad.py", "", NOTHING)
    assert (answer.status, answer.size) == (status, 0), answer
    assert words in answer.text
    assert still_compiles(compiler)


def test_a_text_that_is_known_is_not_compiled_again(compiler: RemoteCompiler) -> None:
    digest = blake2b(GOOD.encode(), digest_size=DIGEST_SIZE).digest()
    assert compiler.ask(0, b"good.py", "own", digest).status == UNCHANGED


def test_code_is_never_placed_where_other_code_is(compiler: RemoteCompiler) -> None:
    first, second = (compiler.ask(0, b"good.py", "own", NOTHING) for _ in range(2))
    assert first.address + first.size <= second.address


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        b"x" * 5000,
        REQUEST.pack(1, 0, NOTHING),
        Request(1, b"good.py", b"own", NOTHING).packed(1),
        Request(0, b"../good.py", b"own", NOTHING).packed(1),
        Request(0, b"/etc/good.py", b"own", NOTHING).packed(1),
        Request(0, b"good", b"own", NOTHING).packed(1),
        Request(SHIPPED, b"good.py", b"own", NOTHING).packed(1),
        Request(SHIPPED, b"", b"", NOTHING).packed(1),
        Request(0, b"good.py", b"\xff", NOTHING).packed(1),
        Request(0, b"good.py", b"a\0b", NOTHING).packed(1),
    ],
)
def test_a_message_that_our_end_never_sends_ends_it(compiler: RemoteCompiler, message: bytes) -> None:
    compiler._sock.send(message)
    assert compiler._sock.recv(100) == b""
    with pytest.raises(OpenerEnded, match="the process that compiles policies has ended"):
        compiler.ask(0, b"good.py", "own", NOTHING)


@pytest.mark.parametrize(("kind", "how"), [(OPEN, 0), (CREATE, 0)])
def test_files_of_policies_are_not_written_through_the_process_that_opens_files(
    tmp_path: Path, kind: int, how: int
) -> None:
    """Otherwise a guest that controls ringplane would have compiled what it likes."""
    size = 1 << 20 if kind == CREATE else 0
    with pytest.raises(ValueError, match="not a request"):
        parsed(OpenRequest(kind, 0, b"own.py", how=how, size=size).packed(1), 1)
    parsed(OpenRequest(OPEN, 0, b"own.py", how=READ_ONLY).packed(1), 1)
    with started(tmp_path) as (opener, _):
        (tmp_path / "own.py").write_text(GOOD)
        for attempt in (
            partial(opener.create, tmp_path / "new.py", 1 << 20),
            partial(opener.open, tmp_path / "own.py", read_only=False, direct=False),
        ):
            with pytest.raises(PermissionError, match=r"a name that ends with \.py is for policies"):
                attempt()
        os.close(opener.open(tmp_path / "own.py", read_only=True, direct=False))


def test_it_ends_with_the_process_that_opens_files(tmp_path: Path) -> None:
    with started(tmp_path) as (opener, compiler):
        assert not has_ended(compiler)
        os.kill(opener.pid, signal.SIGKILL)
        assert eventually(lambda: has_ended(compiler))


def has_ended(compiler: RemoteCompiler) -> bool:
    try:
        compiler.ask(0, b"gone.py", "own", NOTHING)
    except OpenerEnded as error:
        return "restart ringplane" in str(error)
    return False


def test_what_it_can_still_do(tmp_path: Path) -> None:
    """It has no capabilities and a filter, and so has a child of it."""
    with started(tmp_path) as (opener, compiler):
        (tmp_path / "own.py").write_text(GOOD)
        children = Path(f"/proc/{opener.pid}/task/{opener.pid}/children")
        (child,) = map(int, children.read_text().split())
        assert compiler.ask(0, b"own.py", "own", NOTHING).status == MADE
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
        assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0)
    assert compiling_process.CPU_TIME < compiling_process.TIME
