"""Counting what processes compile: a file with the name of each function that Numba begins to compile."""

from __future__ import annotations

from pathlib import Path

# Python imports a module of this name when it starts.
SITE = """
import os
from numba.core.bytecode import FunctionIdentity
begin = FunctionIdentity.from_function.__func__
def noted(cls, function):
    with open(os.environ["RINGPLANE_TEST_COMPILED"], "a") as file:
        file.write(f"{function.__module__}.{function.__qualname__}\\n")
    return begin(cls, function)
FunctionIdentity.from_function = classmethod(noted)
"""


def counting(folder: Path, seen_as: Path | None = None) -> dict[str, str]:
    """Variables for the environment of processes that are counted; they see `folder` as `seen_as`."""
    (folder / "sitecustomize.py").write_text(SITE)
    seen_as = seen_as or folder
    return {
        "PYTHONPATH": str(seen_as),
        "RINGPLANE_TEST_COMPILED": str(seen_as / "compiled"),
        "PYTHONDONTWRITEBYTECODE": "1",
        # As `serve` does before NumPy is imported.
        "OPENBLAS_NUM_THREADS": "1",
    }


def compiled(folder: Path) -> list[str]:
    """The functions that have been compiled until now."""
    path = folder / "compiled"
    return path.read_text().splitlines() if path.exists() else []
