"""docs/hostile-drivers.md names for each class of attacks all tests that cover it, and no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "hostile-drivers.md"

Rows = dict[str, set[str]]


def marked() -> Rows:
    """For each class: `file: test` of all tests that are marked with it."""
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
    """The same, according to the table."""
    rows: Rows = {}
    for line in PAGE.read_text().split("tests in tests/hostile |\n|---|---|---|---|\n")[1].splitlines():
        name, _, _, tests = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = set()
        for file, names in re.findall(r"(test_\w+\.py): ((?:`\w+`(?:, )?)+)", tests):
            rows[name] |= {f"{file}: {test}" for test in re.findall(r"`(\w+)`", names)}
    return rows


def test_the_table_names_exactly_the_marked_tests() -> None:
    assert documented() == marked()


def test_every_class_has_a_test() -> None:
    assert len(documented()) > 20
    assert all(documented().values())
