"""Compiling the data plane ahead, in a child process: the compiler's memory (some 90 MB) goes away with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from ringplane.dataplane.worker import Worker
from ringplane.native.jit import cache_directory, forget_old_versions, is_cached
from ringplane.native.libc import drop_code

log = logging.getLogger(__name__)


def warm_up() -> None:
    """Fill the cache if it is empty. Where no child can be started, the first worker compiles for itself."""
    if is_cached():
        return
    log.info("compiling the data plane; only the first start after an installation does this ...")
    environment = {**os.environ, "RINGPLANE_CACHE_DIR": str(cache_directory().parent)}
    command = [sys.executable, "-m", "ringplane.dataplane.warm"]
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        log.warning("cannot compile in a process of its own: %s", error)
        return
    if done.returncode != 0:
        log.warning("compiling failed: %s", done.stderr.decode(errors="replace").strip().rpartition("\n")[2])


def release_compiler() -> None:
    """Give back the memory of LLVM's code, which only loads what is compiled: a third of what a small process has."""
    drop_code("libllvmlite.so")


def load() -> None:
    """Compile or load all that a worker needs, by running one."""
    worker = Worker("warm-up", slots=1)
    worker.start()
    worker.call(lambda: None).result()
    worker.stop()
    forget_old_versions()


if __name__ == "__main__":
    load()
