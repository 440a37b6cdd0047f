"""The interpreted mode: it serves a disk, a debugger stops in it, and structs behave as in compiled code."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ringplane.compiler import interpreted
from ringplane.compiler.jit import compiled
from ringplane.compiler.sources import PACKAGE
from ringplane.driver import Driver
from ringplane.native.access import view

PATIENCE = 60.0
SIZE = 4 << 20


@contextlib.contextmanager
def serving(folder: Path, *options: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that serves a new disk, interpreted, at folder/socket. At the end it is stopped."""
    environment = {**os.environ, "RINGPLANE_INTERPRET": "1", "RINGPLANE_CACHE_DIR": str(folder / "cache"), **variables}
    command = [sys.executable, "-m", "ringplane", "serve", "--blk-file", "image", "--create", str(SIZE), *options]
    with subprocess.Popen(
        [*command, "--socket-path", "socket", "--num-queues", "1"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("listening"):
                assert process.poll() is None
            yield process
        finally:
            process.terminate()


@pytest.mark.parametrize("options", [["--engine", "io_uring"], ["--engine", "aio"], ["--zoned", "1M"]], ids=" ".join)
def test_a_disk(tmp_path: Path, options: list[str]) -> None:
    with serving(tmp_path, *options) as process:
        with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
            data = os.urandom(64 << 10)
            driver.write(0, data)
            driver.flush()
            assert driver.read(0, len(data)) == data
            if "--zoned" not in options:
                driver.discard(1 << 20, 1 << 20)
                driver.write_zeroes(4096, 8192)
                data = data[:4096] + bytes(8192) + data[12288:]
            assert driver.read(0, len(data)) == data
        process.terminate()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    assert (tmp_path / "image").read_bytes()[: len(data)] == data
    # Nothing was compiled but intrinsics, and nothing was left for a start that is not interpreted.
    assert not (tmp_path / "cache").exists()


def test_a_debugger_stops_in_the_data_plane(tmp_path: Path) -> None:
    package = tmp_path / "source" / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = next(path for path in sorted(package.rglob("*.py")) if "\ndef execute(" in path.read_text())
    lines = path.read_text().splitlines()
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    line = next(node for node in functions if node.name == "execute").body[1].lineno
    lines.insert(line - 1, "    breakpoint()")
    path.write_text("\n".join(lines) + "\n")
    with serving(tmp_path, PYTHONPATH=str(package.parent)) as process:
        assert process.stdin is not None
        process.stdin.write("p queue.size + 1000000\np request\ncontinue\n")
        process.stdin.flush()
        with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
            assert driver.read(0, 512) == bytes(512)
        process.terminate()
        said, _ = process.communicate(timeout=PATIENCE)
    assert f"{path}({line + 1})execute()" in said
    assert "(Pdb) 1000256\n" in said
    assert "slot=" in said


# Structs

TYPES = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8")
LAYOUT = np.dtype([(f"field{number}", kind) for number, kind in enumerate(TYPES)] + [("cells", "<i8", (3,))])
EDGES = (7, 8, 15, 16, 31, 32, 62)
VALUES = (0, -1, -129, -(1 << 63), (1 << 63) - 1, *(1 << bit for bit in EDGES), *((1 << bit) - 1 for bit in EDGES))


def put_all(address, value):
    """Store the value in all fields; returns the sum of what is read back."""
    struct = view(address, LAYOUT)
    struct.field0 = value
    struct.field1 = value
    struct.field2 = value
    struct.field3 = value
    struct.field4 = value
    struct.field5 = value
    struct.field6 = value
    struct.cells[1] = value
    narrow = struct.field0 + 3 * struct.field1 + 5 * struct.field2 + 7 * struct.field3
    return narrow + 11 * struct.field4 + 13 * struct.field5 + (struct.field6 ^ struct.cells[1]) + struct.cells[2]


def address(array: npt.NDArray[np.void]) -> int:
    return int(array.ctypes.data)


@pytest.mark.parametrize("value", VALUES)
def test_fields_behave_as_in_compiled_code(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    compiled_array, interpreted_array = np.zeros(1, LAYOUT), np.zeros(1, LAYOUT)
    expected = compiled(put_all)(address(compiled_array), value)
    monkeypatch.setitem(globals(), "view", interpreted.view)
    assert put_all(address(interpreted_array), value) == expected
    assert interpreted_array == compiled_array


def test_a_struct() -> None:
    array = np.zeros(1, LAYOUT)
    struct = interpreted.view(address(array), LAYOUT)
    assert interpreted.address_of(struct) == address(array)
    array["field4"] = 0xFFFF_FFFF
    assert "field3=0, field4=4294967295" in repr(struct)
    with pytest.raises(AttributeError):
        struct.field99 = 1  # type: ignore[attr-defined]


def test_units_and_c_functions_are_called_by_address() -> None:
    def double(number: int) -> int:
        return 2 * number

    def add(a: int, b: int) -> int:
        return a + b

    places = [interpreted.address_of_unit(each) for each in (double, add, double)]
    assert places[0] == places[2] != places[1]
    assert 0 not in places
    assert interpreted.call(places[0], 21) == 42
    assert interpreted.call(places[1], 40, 2) == 42
    labs = ctypes.cast(ctypes.CDLL(None).labs, ctypes.c_void_p).value
    assert labs
    assert interpreted.call(labs, -42) == 42
