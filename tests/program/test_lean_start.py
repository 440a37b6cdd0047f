"""What a start imports: a disk takes no memory for what it does not use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .served import DISK, SOON

# Writes the names of all modules of the process at its end, into a file that it opens before it is confined.
SERVE = """
import atexit, json, sys
file = open("modules", "w")
atexit.register(lambda: (json.dump(sorted(sys.modules), file), file.flush()))
from ringplane.__main__ import main
"""

# Each is needed by a disk, or by an option, that has something to do with it, or by a compiler.
UNUSED = [
    "numba",
    "llvmlite.ir",
    "ssl",
    "hashlib",
    "difflib",
    "concurrent.futures.thread",
    "uvicorn",
    "starlette",
    "msgspec",
    "prometheus_client",
    "rich",
    "ringplane.api",
    "ringplane.client",
    "ringplane.driver",
    "ringplane.bench",
    "ringplane.compiler.pipeline",
    "ringplane.compiler.emitter",
    "ringplane.block.sources.nbd",
    "ringplane.block.sources.rbd",
    "ringplane.options.nbd_uri",
    "ringplane.options.rbd_address",
    "ringplane.limits.limiter",
    "ringplane.opener.remote_opener",
    "ringplane.control.config",
    "ringplane.control.trace_recording",
    "ringplane.control.restoring",
    "ringplane.control.state_file",
    "ringplane.control.keeping",
    "ringplane.control.taking_over",
]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Of a process that has served one disk on a file."""
    folder = tmp_path_factory.mktemp("lean")
    command = [sys.executable, "-c", SERVE, "serve", *DISK]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("listening on") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(SOON) == 0
    return set(json.loads(Path(folder, "modules").read_text()))


@pytest.mark.parametrize("name", UNUSED)
def test_a_disk_on_a_file_does_not_import(modules: set[str], name: str) -> None:
    assert name not in modules
    assert not [each for each in modules if each.startswith(f"{name}.")]


def test_what_is_left_out_is_imported_when_it_is_used() -> None:
    """A process that compiles itself, because there is no cache, gets all of llvmlite."""
    code = (
        "from ringplane.cli.lean_imports import import_asyncio, import_llvm; import_asyncio(); import_llvm()\n"
        "import numba, ssl; from llvmlite import ir\n"
        "assert ir.IntType(64).width == 64 and ssl.SSLContext\n"
        "assert numba.njit(lambda number: number + 1)(1) == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SOON)
