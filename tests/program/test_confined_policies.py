"""Policies that a confined process has not loaded before: the process beside it reads and compiles them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unit.api_client import Answer
from unit.policy_texts import own_policy
from unit.rig import eventually

from .served import DISK, SOON, ServedApi, needs_all

Serve = Callable[..., ServedApi]

API = ("--api-socket", "api.sock")
ALLOWED = (*API, "--allow-folder", ".")
FLUSH_FAILS = own_policy("my.found += 1\nreturn fail(EIO) if io.operation == FLUSH else PASS")
WRITE_FAILS = own_policy("my.found += 1\nreturn fail(EIO) if io.operation == WRITE else PASS", "return PASS", data=True)


# A busy machine compiles for longer than an answer may take; whoever asks again gets what was compiled.
NOT_YET = "loading a policy has not ended"


def ctl(served: ServedApi, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ringplane ctl policy` as a user runs it, in the folder of the process."""
    command = [sys.executable, "-m", "ringplane", "ctl", "--api-socket", "api.sock", "policy", *arguments]
    while True:
        done = subprocess.run(command, cwd=served.folder, capture_output=True, text=True, timeout=SOON, check=False)
        if NOT_YET not in done.stderr:
            return done


def ask(served: ServedApi, path: str, body: object) -> Answer:
    """POST this."""
    while True:
        answer = served.api.request("POST", path, body)
        if answer.status != 503 or NOT_YET not in answer.error["what"]:
            return answer


def add(served: ServedApi, policy: str, **keys: object) -> Answer:
    """Add a policy to the disk."""
    return ask(served, "/v1/disks/a/policies", {"policy": policy, **keys})


def mappings(served: ServedApi, name: str = "") -> list[str]:
    """The rights of each mapping of the process with this name."""
    lines = Path(f"/proc/{served.process.pid}/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if name in line]


@needs_all
@pytest.mark.parametrize("sandbox", [(), ("--sandbox",)], ids=["default", "required"])
def test_a_file_that_is_new_is_in_force(serve: Serve, tmp_path: Path, sandbox: tuple[str, ...]) -> None:
    """With a filter that ends the process at any call that is not allowed, so it does not map code itself."""
    served = serve(*DISK, *ALLOWED, *sandbox, strict=True)
    own = tmp_path / "own.py"
    own.write_text(FLUSH_FAILS)
    with served.attach() as driver:
        driver.flush()
        added = ctl(served, "add", "a", "own.py:own,number=7")
        assert (added.returncode, added.stderr) == (0, ""), added
        assert "number=7" in added.stdout
        with pytest.raises(OSError, match="flush"):
            driver.flush()
        # Another text at the same path, with a function for results, and data.
        own.write_text(WRITE_FAILS)
        replaced = ctl(served, "replace", "a", "own", "own.py:own")
        assert (replaced.returncode, replaced.stderr) == (0, ""), replaced
        driver.flush()
        with pytest.raises(OSError, match="writing"):
            driver.write(0, bytes(512))
        assert driver.read(0, 512) == bytes(512)
        policies = served.api.get("/v1/disks/a/policies")["policies"]
        assert policies[0]["counters"]["found"] == 4
        assert add(served, "error", parameters={"operation": "read"}).status == 201
        with pytest.raises(OSError, match="reading"):
            driver.read(0, 512)
    assert not [rights for rights in mappings(served) if "wx" in rights]
    assert mappings(served, "/memfd:ringplane-code") == ["r-xs"]
    assert "Traceback" not in served.end()


@needs_all
def test_a_guest_does_not_wait_while_a_policy_is_compiled(serve: Serve, tmp_path: Path) -> None:
    """The compiling process is stopped, so this takes as long as it takes."""
    served = serve(*DISK, *ALLOWED, strict=True)
    (tmp_path / "own.py").write_text(FLUSH_FAILS)
    compiling = compiling_process(served)
    os.kill(compiling, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool, served.attach() as driver:
            adding = pool.submit(ctl, served, "add", "a", "own.py")
            for _ in range(100):
                driver.flush()
                driver.write(0, bytes(512))
            assert not adding.done()
            os.kill(compiling, signal.SIGCONT)
            assert adding.result(SOON).returncode == 0
            with pytest.raises(OSError, match="flush"):
                driver.flush()
    finally:
        os.kill(compiling, signal.SIGCONT)
    served.end()


def compiling_process(served: ServedApi) -> int:
    """The ID of the process that compiles: the child of the one that opens files."""
    children = Path(f"/proc/{served.opener}/task/{served.opener}/children")
    assert eventually(lambda: children.read_text().strip())
    (child,) = map(int, children.read_text().split())
    return child


@needs_all
def test_what_cannot_be_loaded_is_one_line(serve: Serve, tmp_path: Path) -> None:
    """And then others can."""
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed, outside):
        folder.mkdir()
        (folder / "own.py").write_text(FLUSH_FAILS)
    (allowed / "link.py").symlink_to(outside / "own.py")
    (allowed / "wrong.py").write_text(own_policy("return io.ofset"))
    (allowed / "numba.py").write_text(own_policy("my.seen += int(io)\nreturn PASS"))
    (allowed / "large.py").write_text(FLUSH_FAILS + "#" * (1 << 18))
    (allowed / "bytes.py").write_bytes(b"\xff")
    (allowed / "memory.py").write_text(f"{FLUSH_FAILS}WORDS = 'a' * (1 << 40)\n")
    os.mkfifo(allowed / "fifo.py")
    served = serve(*DISK, *API, "--allow-folder", "allowed", strict=True)
    for name, status, words in (
        ("outside/own.py", 409, "it is not below a folder of --allow-folder"),
        ("allowed/../outside/own.py", 409, "it is not below a folder of --allow-folder"),
        ("allowed/link.py", 400, "link.py cannot be read: "),
        ("allowed/gone.py", 400, "gone.py cannot be read: No such file or directory"),
        ("allowed/fifo.py", 400, "fifo.py cannot be read: "),
        ("allowed/wrong.py", 400, "I/O has no field ofset (did you mean offset?)"),
        ("allowed/numba.py", 400, "numba.py:18: "),
        ("allowed/large.py", 400, "large.py is larger than 256 KiB"),
        ("allowed/bytes.py", 400, "bytes.py is not UTF-8"),
        ("allowed/memory.py", 400, "emory"),
        ("allowed/own.py:other", 400, "own.py has the policies own; name one: "),
    ):
        answer = add(served, f"{tmp_path}/{name}")
        assert (answer.status, answer.error["where"]) == (status, "policy"), (name, answer.data)
        assert words in answer.error["what"], answer.error
        assert "\n" not in answer.error["what"]
    answer = add(served, "eror")
    assert (answer.status, "no policy eror ships" in answer.error["what"]) == (400, True)
    assert add(served, f"{allowed}/own.py").status == 201
    with served.attach() as driver, pytest.raises(OSError, match="flush"):
        driver.flush()
    assert "Traceback" not in served.end()


@needs_all
def test_a_disk_is_added_with_a_policy_that_is_new(serve: Serve, tmp_path: Path) -> None:
    served = serve(*ALLOWED, strict=True)
    (tmp_path / "own.py").write_text(FLUSH_FAILS)
    body = {"image": str(tmp_path / "b.img"), "socket-path": str(tmp_path / "b.sock"), "create": "4M"}
    policies = [{"policy": f"{tmp_path}/own.py"}, {"policy": "error", "parameters": {"operation": "write"}}]
    answer = served.api.request("POST", "/v1/disks", body | {"policy": policies})
    # It is added in any case.
    assert answer.status in (201, 503), answer.data
    assert eventually(lambda: [each["name"] for each in served.api.get("/v1/disks")["disks"]] == ["b"])
    with served.attach("b.sock") as driver:
        for operation in (driver.flush, lambda: driver.write(0, bytes(512))):
            with pytest.raises(OSError, match=r"flush|writing"):
                operation()
    assert "Traceback" not in served.end()


@needs_all
def test_a_process_without_a_folder_says_what_to_do(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FLUSH_FAILS)
    served = serve(*DISK, *API, strict=True)
    for policy in ("error", f"{tmp_path}/own.py"):
        answer = add(served, policy)
        assert (answer.status, answer.error["where"]) == (409, "policy")
        assert "start it with --allow-folder FOLDER" in answer.error["what"]
        assert f"with {policy} for one of its disks" in answer.error["what"]
    served.end()


@needs_all
def test_the_end_of_the_process_that_compiles(serve: Serve, tmp_path: Path) -> None:
    """What is loaded stays in force, and one line says what to do."""
    (tmp_path / "own.py").write_text(FLUSH_FAILS)
    served = serve(*DISK, *ALLOWED, strict=True)
    assert add(served, f"{tmp_path}/own.py").status == 201
    os.kill(compiling_process(served), signal.SIGKILL)
    answer = add(served, "error")
    assert (answer.status, "restart ringplane" in answer.error["what"]) == (503, True)
    with served.attach() as driver, pytest.raises(OSError, match="flush"):
        driver.flush()
    served.end()


def test_without_a_sandbox_files_are_below_the_folders_too(serve: Serve, tmp_path: Path) -> None:
    """As images. Those of disks that are described may be anywhere."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    for path in (tmp_path / "own.py", allowed / "own.py", tmp_path / "described.py"):
        path.write_text(FLUSH_FAILS)
    served = serve(*DISK, *API, "--allow-folder", "allowed", "--no-sandbox", "--policy", "described.py,enabled=no")
    answer = add(served, f"{tmp_path}/own.py")
    assert (answer.status, "is not below a folder of --allow-folder" in answer.error["what"]) == (409, True)
    for name in ("allowed/own.py", "described.py:own"):
        assert add(served, f"{tmp_path}/{name}").status == 201
    served.end()
