"""Two source trees side by side: how their processes start, and a table for the terminal that is also Markdown."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

THIS = Path(__file__).resolve().parent.parent
# The line that ringplane prints for each disk when it is ready.
READY = "listening on"


@contextlib.contextmanager
def serving(
    tree: Path, options: Sequence[str], disks: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """The process ID of `ringplane serve` from the sources of a tree; it listens for all its disks."""
    command = [sys.executable, "-m", "ringplane", "serve", *options, "--log-level", "warning"]
    path = os.pathsep.join([str(tree / "src"), *(environment or {}).get("PYTHONPATH", "").split()])
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {}), "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C must end only this program, which stops its processes
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while disks:
            line = process.stdout.readline()
            if not line:
                sys.exit(f"{tree}: ringplane ended with status {process.wait()}")
            disks -= READY in line
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def commit(tree: Path) -> str:
    """The commit of a tree; with "-dirty" if files differ from it."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned Markdown; the first column holds names, the others figures."""
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in (heading, rule, *lines)
    )
