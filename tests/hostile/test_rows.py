"""Each class of ../shared/hostile.md has tests here, and docs/security.md names them all and no others."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIST = ROOT.parent / "shared" / "hostile.md"

Rows = dict[str, set[str]]


def marked() -> Rows:
    """By class: `file: test`, of all tests with the mark."""
    rows: Rows = {}
    for path in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.row":
                    (argument,) = mark.args
                    name = argument.value if isinstance(argument, ast.Constant) else constants[ast.unparse(argument)]
                    rows.setdefault(str(name), set()).add(f"{path.name}: {function.name}")
    return rows


def documented() -> Rows:
    """The same, as docs/security.md has it."""
    table = (ROOT / "docs" / "security.md").read_text().split("| class | tests in tests/hostile |\n|---|---|\n")[1]
    rows: Rows = {}
    for line in table.split("\n\n")[0].splitlines():
        name, tests = re.fullmatch(r"\| (.*) \| (.*) \|", line).groups()  # type: ignore[union-attr]
        rows[name] = set()
        for file, names in re.findall(r"(test_\w+\.py): ((?:`\w+`(?:, )?)+)", tests):
            rows[name] |= {f"{file}: {test}" for test in re.findall(r"`(\w+)`", names)}
    return rows


def test_the_page_names_the_tests_that_there_are() -> None:
    assert documented() == marked()


def test_every_class_has_a_test() -> None:
    if os.environ.get("CI") != "true" and not LIST.exists():
        pytest.skip(f"there is no {LIST} to compare with")
    classes = re.findall(r"^\| ([^|]*?) \|", LIST.read_text(), re.MULTILINE)[1:]
    assert len(classes) > 20
    assert set(classes) == set(marked())
