"""Compiling in a child process: its end frees the compiler's memory (some 90 MB), and a signal can end it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ringplane.compiler.bad_code import BadCode
from ringplane.compiler.cache import place, use_only
from ringplane.compiler.key import NATIVE, variables
from ringplane.compiler.side_by_side import BAD_CODE
from ringplane.system.libc import end_with_parent
from ringplane.system.signals import NONE, Signals, held_back

log = logging.getLogger(__name__)


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
    environment = {**os.environ, **variables(cpu)}
    command = [sys.executable, "-m", module, str(folder), *arguments]
    try:
        # In its own process group, so that Ctrl-C signals only this process.
        with held_back():
            child = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
            )
    except OSError as error:
        log.warning("cannot start a process that compiles: %s; compiling in this process", error)
        return
    said = _result(child, signals).decode(errors="replace").strip()
    if child.returncode == BAD_CODE:
        raise BadCode(said)
    if child.returncode != 0:
        log.warning("compiling failed: %s", said.rpartition("\n")[2])


def _result(child: subprocess.Popen[bytes], signals: Signals) -> bytes:
    """Wait for the child process; returns its output."""
    assert child.stdout is not None
    said = b""
    try:
        with child.stdout:
            fd = child.stdout.fileno()
            while signals.wait(fd) and (part := os.read(fd, 65536)):
                said += part
            child.wait()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    return said


def run_child(load: Callable[[], None]) -> None:
    """The main function of such a module, which has the folder as its argument."""
    end_with_parent()
    # Compiling leaves hardly any cyclic garbage. Collecting it takes 0.3 s of 6, and the process ends soon.
    gc.disable()
    use_only(Path(sys.argv[1]))
    # Imported here, because only this process needs it: it takes 25 MB.
    from ringplane.compiler.checker import check_package

    try:
        check_package()
        load()
    except BadCode as error:
        print(error, flush=True)
        sys.exit(BAD_CODE)
