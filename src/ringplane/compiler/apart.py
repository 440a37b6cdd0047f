"""Compiling in a child process: its end frees the compiler's memory (some 90 MB), and a signal can end it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ringplane.compiler.bad_code import BadCode
from ringplane.compiler.cache import is_cached, place, use_only
from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.key import NATIVE, variables
from ringplane.compiler.side_by_side import BAD_CODE, Job, work_off
from ringplane.system.libc import end_with_parent
from ringplane.system.signals import NONE, Signals, held_back

# Precedes the arguments.
GO = "compile"

log = logging.getLogger(__name__)


# The processes that `ahead` has started for a module, a folder and a CPU, and that nobody has used yet.
_waiting: dict[tuple[str, Path, str], subprocess.Popen[bytes]] = {}


@contextlib.contextmanager
def ahead(module: str) -> Iterator[None]:
    """If the module has to be compiled, start its process now: it imports the compiler while this process continues.

    `compile_apart` uses it; at the end it is ended if that has not happened.
    """
    folder = None if INTERPRETED else place().folder
    key = (module, folder, NATIVE) if folder and not is_cached(module) else None
    if key:
        with contextlib.suppress(OSError):
            _waiting[key] = _start(*key)
    try:
        yield
    finally:
        if key and (child := _waiting.pop(key, None)):
            _end(child)


def compile_apart(
    module: str,
    signals: Signals = NONE,
    arguments: Sequence[str] = (),
    folder: Path | None = None,
    cpu: str = NATIVE,
) -> None:
    """Run the module with these arguments; it fills the folder, or the cache.

    Without a cache or a child process, this process compiles when needed.

    Raises BadCode if the code has mistakes, which this process would find again. Raises Interrupted; the child process
    has ended then.
    """
    folder = folder or place().folder
    if folder is None:
        return
    key = module, folder, cpu
    try:
        child = _waiting.pop(key, None) or _start(*key)
    except OSError as error:
        log.warning("cannot start a process that compiles: %s; compiling in this process", error)
        return
    said = _result(child, arguments, signals).decode(errors="replace").strip()
    if child.returncode == BAD_CODE:
        raise BadCode(said)
    if child.returncode != 0:
        log.warning("compiling failed: %s", said.rpartition("\n")[2])


def _start(module: str, folder: Path, cpu: str) -> subprocess.Popen[bytes]:
    """Start the process; it waits for its arguments. Raises OSError."""
    command = [sys.executable, "-m", module, str(folder)]
    # In its own process group, so that Ctrl-C signals only this process.
    with held_back():
        return subprocess.Popen(
            command,
            env={**os.environ, **variables(cpu)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    # Then closes the pipes and waits.
    with child:
        os.killpg(child.pid, signal.SIGKILL)


def _result(child: subprocess.Popen[bytes], arguments: Sequence[str], signals: Signals) -> bytes:
    """Give the child process its arguments and wait for its end; returns its output."""
    assert child.stdin is not None
    assert child.stdout is not None
    said = b""
    try:
        # A process that has failed early does not read them.
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write("".join(f"{each}\n" for each in (GO, *arguments)).encode())
        with child.stdout:
            fd = child.stdout.fileno()
            while signals.wait(fd) and (part := os.read(fd, 65536)):
                said += part
            child.wait()
    except BaseException:
        _end(child)
        raise
    return said


def run_child(jobs_of: Callable[[list[str]], Sequence[Job]], finish: Callable[[], None]) -> None:
    """The main function of such a module, which has the folder as its argument.

    It does the jobs of the arguments from standard input, then `finish`.
    """
    end_with_parent()
    # Compiling leaves hardly any cyclic garbage. Collecting it takes 0.3 s of 6, and the process ends soon.
    gc.disable()
    use_only(Path(sys.argv[1]))
    try:
        # Imported here, because only this process needs them: they take 25 MB.
        from ringplane.compiler.checker import check_package
        from ringplane.compiler.pipeline import load_definitions

        # Each process that compiles needs them.
        load_definitions()
        go, *arguments = sys.stdin.read().splitlines() or [""]
        if go == GO:
            work_off(check_package, jobs_of(arguments))
            finish()
    except BadCode as error:
        print(error, flush=True)
        sys.exit(BAD_CODE)
