"""Units: functions that compiled code calls by address."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ringplane.compiler.jit import compiled
from ringplane.compiler.pipeline import compile_whole
from ringplane.compiler.units import call, unit
from ringplane.native.syscalls import read

EBADF = 9


@compiled
def twice(number):
    return 2 * number if number > 0 else number


@compiled
def twice_plus(number, more):
    return twice(number) + more


@unit
def combine(a, b, c):
    return twice_plus(a, b) - twice(c)


@unit
def nothing():
    return 7


@unit
def read_nothing(fd):
    return read(fd, 0, 0)


@compiled
def sum_up(address, count):
    total = 0
    for number in range(count):
        total += call(address, number, -number, number == 3)
    return total


@compiled
def call_plainly(address):
    return call(address)


@compiled
def call_with_one(address, argument):
    return call(address, argument)


def test_compiled_code_calls_a_unit_with_parts() -> None:
    expected = sum(2 * number - number - 2 * (number == 3) for number in range(10))
    assert sum_up(combine.address(), 10) == expected


def test_a_unit_without_arguments() -> None:
    assert call_plainly(nothing.address()) == 7


def test_a_system_call_in_a_unit_returns_its_error() -> None:
    assert call_with_one(read_nothing.address(), -1) == -EBADF


def test_a_unit_stays_at_its_address() -> None:
    assert combine.address() == combine.address() != nothing.address()


def test_python_calls_a_unit() -> None:
    assert combine(1, 1 << 40, -3) == 2 + (1 << 40) + 3


def test_a_unit_contains_its_code_once_and_needs_no_python() -> None:
    code = compile_whole(combine.__wrapped__).get_llvm_str()
    assert code.count("define ") == 1
    assert "Py" not in code


MODULE = """
import numba.core.event as event
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit

@compiled
def increment(number):
    return number + 1

@unit
def increment_twice(number):
    return increment(increment(number))

with event.install_recorder("numba:compile") as recorder:
    increment_twice.address()
print(len(recorder.buffer) // 2)
"""


def test_a_unit_is_loaded_from_the_cache(tmp_path: Path) -> None:
    (tmp_path / "made_up.py").write_text(MODULE)
    command = [sys.executable, "-c", "import made_up"]
    environment = {**os.environ, "RINGPLANE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def count_compiled() -> int:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert count_compiled() > 0
    assert count_compiled() == 0
