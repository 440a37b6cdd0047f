"""What only Numba finds in compiled code: one line with the place and the innermost message, and nothing is left."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringplane.compiler.bad_code import BadCode, in_one_line
from ringplane.compiler.checker import check
from ringplane.compiler.jit import load
from ringplane.compiler.sources import PACKAGE
from ringplane.compiler.units import known

# A variable that is a tuple or a number: the checker does not follow that.
MISTAKE = "pair = (1, 2) if {name} else 0"
MODULE = f"""\
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
@compiled
def inner(number):
    {MISTAKE.format(name="number")}
    return number
@compiled
def outer(number):
    return inner(number)
@unit
def by_address(number):
    return inner(number)
"""
SAID = r"Cannot unify .*Tuple.* and .*int.* for .*"


def imported(path: Path) -> Any:
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("bad_code_example", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    others = set(known)
    spec.loader.exec_module(module)
    # Whatever compiles all units in this process must not find the wrong one.
    for name in known.keys() - others:
        del known[name]
    return module


def test_a_mistake_behind_other_functions(tmp_path: Path) -> None:
    module = imported(tmp_path / "example.py")
    assert check([tmp_path]) == []
    place = re.escape(f"{tmp_path}/example.py:5: ")
    with pytest.raises(BadCode, match=f"^{place}{SAID}$"):
        load(module.outer)
    with pytest.raises(BadCode, match=f"^{place}{SAID}$"):
        module.by_address.address()


def test_a_message_without_a_place() -> None:
    assert in_one_line("Something\n  is wrong\n") == "Something is wrong"


def plant(package: Path, mistake: str) -> tuple[Path, int]:
    """Plant the mistake into the code of the helper threads, a small part; returns where it is."""
    path = next(path for path in sorted(package.rglob("*.py")) if "\ndef run_helper(" in path.read_text())
    text = path.read_text()
    functions = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    helper = next(node for node in functions if node.name == "run_helper")
    line = helper.body[1].lineno
    lines = text.splitlines()
    lines.insert(line - 1, "    " + mistake.format(name=helper.args.args[0].arg))
    path.write_text("\n".join(lines) + "\n")
    return path, line


@pytest.mark.parametrize(
    ("mistake", "said"), [(MISTAKE, SAID), ("pair = nothing_of_this_name", "unknown name nothing_of_this_name")]
)
def test_serve_ends_with_one_line(tmp_path: Path, mistake: str, said: str) -> None:
    """Whether the compiler finds the mistake or, before that, the checker."""
    package = tmp_path / "source" / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path, line = plant(package, mistake)
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "RINGPLANE_CACHE_DIR": str(tmp_path / "cache"),
        "TMPDIR": str(home),
    }
    command = [sys.executable, "-m", "ringplane", "serve", "--blk-file", "image", "--create", "1M"]
    command += ["--socket-path", "socket", "--log-level", "warning"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"Error: {re.escape(str(path))}:{line}: {said}\n", done.stderr)
    assert list(home.iterdir()) == []


def test_a_start_with_a_filled_cache_checks_nothing() -> None:
    program = (
        "import sys; from ringplane.dataplane.compile_data_plane import warm_up; warm_up(); print(sys.modules.keys())"
    )
    # The first one may have to compile.
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ringplane.dataplane.compile_data_plane" in done.stdout
    assert "ringplane.compiler.checker" not in done.stdout
