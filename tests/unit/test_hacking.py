"""docs/hacking.md: its code is right for the checker, and the names that it gives are where it says."""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.compiler.checker import check

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "ringplane"
PAGE = (REPOSITORY / "docs" / "hacking.md").read_text()
TEXT = " ".join(PAGE.split())
# Code that compiled functions can be written in; the rest is Python of the control plane, or commands.
UNITS = [
    textwrap.dedent(block)
    for block in re.findall(r"(?:^(?:    .*)?\n)+", PAGE, re.MULTILINE)
    if block.lstrip().startswith("@unit")
]
# What the text calls its own.
OWN = {"DELAY": 'struct("read", "write", "flush")'}


def defined(path: Path) -> Iterator[str]:
    """The names that a module gives to others."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        for target in (*getattr(node, "targets", ()), *([node.target] if isinstance(node, ast.AnnAssign) else ())):
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def home_of(name: str) -> str | None:
    """The module from which ringplane's own modules import a name."""
    trees = (ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py"))
    found = Counter(
        node.module
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names}
    )
    return found.most_common(1)[0][0] if found else None


def whole(block: str) -> str:
    """The block as a module: with imports of what it uses, and an end where it has none."""
    tree = ast.parse(block)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    local = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    local |= {argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args}
    imports = [f"from {home_of(name)} import {name}" for name in sorted(used - local - set(OWN))]
    own = [f"{name} = {value}" for name, value in OWN.items() if name in used]
    if own:
        imports.append("from ringplane.native.structs import struct")
    lines = [line for line in block.splitlines() if line.strip() != "..."]
    end = [] if "    return " in block else ["    return 0"]
    return "\n".join([*imports, *own, *lines, *end, ""])


@pytest.mark.parametrize("block", UNITS, ids=lambda block: block.split("(")[0].split()[-1])
def test_units_have_no_mistakes(block: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(whole(block))
    assert check([path]) == []


def test_units_are_found() -> None:
    assert len(UNITS) == 4


def places(text: str) -> list[tuple[str, str]]:
    """Names and files, except those of a whole file: "`store64` (`native/access.py`)", "`put` of `block/io.py`"."""
    found = re.findall(r"((?:`\w+`(?:, | and )?)+) (?:of |\()`(?!src/)([\w/]+\.py)`", text)
    each = ((name, file) for names, file in found for name in re.findall(r"\w+", names.replace(" and ", " ")))
    return [(name, file) for name, file in each if name != Path(file).stem]


@pytest.mark.parametrize(("name", "file"), places(TEXT))
def test_names_are_where_it_says(name: str, file: str) -> None:
    assert any(name in set(defined(path)) for path in PACKAGE.rglob(Path(file).name) if str(path).endswith(f"/{file}"))


def test_names_are_found() -> None:
    assert {("put", "block/io.py"), ("store64", "native/access.py"), ("reply", "requests.py")} <= set(places(TEXT))
