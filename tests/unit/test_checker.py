"""Mistakes in compiled code: exactly the lines with one are reported, in examples and in copies of the real sources."""

from __future__ import annotations

import ast
import bisect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringplane.compiler.checker import check
from ringplane.compiler.sources import PACKAGE

REPOSITORY = Path(__file__).parents[2]

# What the examples begin with.
HEAD = """\
import numpy as np
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call, unit
from ringplane.native.access import address_of, copy, fence, load64, store64, view
from ringplane.virtio import split
APART = "apart"
POINT = np.dtype([("x", "<i8"), ("y", "<i8"), ("small", "u1"), ("raw", "<u8"), ("cells", "<i8", (4,)), (APART, "<i8")])
PAIR = np.dtype([("first", "<i8"), ("point", "<i8")])
LIMIT, HALF, NAMES, HUGE, TABLE = 7, 0.5, ["a"], 1 << 63, np.zeros(3)
def plain(a):
    return a
@unit
def apart(address):
    return view(address, POINT).x
@compiled
def shift(point, by):
    point.x += by
@compiled
def length(point):
    return point.x + point.y
@compiled
def both(point):
    return point.x, point.y
"""

# Each one is the body of a compiled function `example(point, number)`. The line with the mistake ends with `#!` and a
# part of what is reported; without such a line nothing is reported.
EXAMPLES = """
number = lenght(point) #!unknown name lenght (did you mean length?)
---
number = LIMTI #!unknown name LIMTI (did you mean LIMIT?)
---
return numbr #!unknown name numbr (did you mean number?)
---
return split.availabel(point) #!split has no availabel (did you mean available?)
---
return point.z #!POINT has no field z
---
point.smal = 1 #!POINT has no field smal (did you mean small?)
---
point.smal += 1 #!POINT has no field smal (did you mean small?)
---
point.z, number = 1, 2 #!POINT has no field z
---
return view(view(number, PAIR).point, POINT).first #!POINT has no field first
---
return length(view(number, PAIR)) #!length() needs a POINT as `point`, but gets a PAIR
---
return length(number) #!length() needs a POINT as `point`, but gets a number
---
return number.x #!`number` is a number, not a struct, so it has no field x
---
return unknown.x #!unknown name unknown
---
shift(point) #!shift() takes 2 arguments, but gets 1
---
shift(point, 1, 2) #!shift() takes 2 arguments, but gets 3
---
shift(point, by=1) #!shift() gets by= by name
---
store64(number) #!store64() takes 2 arguments, but gets 1
---
return load64(point) #!`point` is a POINT, not a number (address_of() gives its address)
---
return view(number) #!view() takes 2 arguments, but gets 1
---
return view(number, LIMIT).x #!`LIMIT` is not the layout of a struct
---
return view(point, POINT).x #!`point` is a POINT, not a number
---
return address_of(number) #!`number` is a number, not a struct
---
return min(number) #!min() takes 2 or more arguments, but gets 1
---
moved = shift(point, 1) #!`shift(point, 1)` returns nothing, but its value is used
return moved
---
return load64(fence()) #!`fence()` returns nothing, but its value is used
---
if number:
    return #!example() returns here without a value, but returns one in line
return 1
---
if number: #!example() ends after this without a value, but returns one in line
    return 1
---
while number:
    number -= 1
    if number == 3:
        return number
shift(point, 1) #!example() ends after this without a value, but returns one in line
---
if number:
    found = 1
return found #!found is not assigned on every path that leads here
---
for index in range(number):
    found = index
return found #!found is not assigned on every path that leads here
---
total += number #!total is used before it is assigned
---
while number > 0:
    total += number #!total is used before it is assigned
    total = 0
    number -= 1
---
a, b, c = both(point) #!a tuple of 2 is assigned to 3 variables
---
a, b = length(point) #!`length(point)` is a number, not a tuple
---
return both(point) + 1 #!`both(point)` is a tuple of 2, not a number
---
return point + 1 #!`point` is a POINT, not a number
---
if point: #!`point` is a POINT, not a number
    return 1
return 0
---
number == 3 #!`number == 3` has no effect
---
return apart(number) #!apart() is a unit: store its address(), and call that with call()
---
return call(number, 1, 2, 3) + call(number)
---
return call(point.apart, number)
---
return call(point.apart, number, 2) #!the unit apart takes 1 argument, but gets 2
---
return call() #!call() takes 1 or more arguments, but gets 0
---
return call(number, point) #!`point` is a POINT, not a number
---
print(number) #!print() is not possible in compiled code
---
return str(number) #!str() is not possible in compiled code
---
text = "text" #!'text' is a string, which compiled code cannot use
---
text = f"{number}" #!an f-string is not possible in compiled code
---
numbers = [number] #!a list is not possible in compiled code
---
numbers = {1: number} #!a dict is not possible in compiled code
---
numbers = {number} #!a set is not possible in compiled code
---
return sum(each for each in range(3)) #!sum() is not possible in compiled code
---
numbers = [each for each in range(3)] #!a list comprehension is not possible in compiled code
---
work = lambda: 1 #!a lambda is not possible in compiled code
---
try: #!try is not possible in compiled code
    number = 1
except ValueError:
    number = 2
---
with number: #!with is not possible in compiled code
    number = 1
---
raise ValueError #!raise is not possible in compiled code
---
assert number #!assert is not possible in compiled code
---
global LIMIT #!global is not possible in compiled code
LIMIT = 3
---
yield number #!yield is not possible in compiled code
---
import os #!import is not possible in compiled code
---
for each in point.cells: #!a `for` is only possible with range(), not with `point.cells`
    number += 1
---
return NAMES #!NAMES is of type list, which compiled code cannot use
---
return HUGE #!HUGE does not fit into an int64
---
return 0x8000_0000_0000_0000 #!9223372036854775808 does not fit into an int64
---
return TABLE[0] #!TABLE is an array, which would be copied into the code; pass its address
---
return POINT #!POINT is the layout of a struct
---
return plain(number) #!plain() is not compiled (@compiled is missing)
---
return plain + 1 #!plain is a function or class, not a number
---
return number / 2 #!/ gives a float; use //
---
point.x = HALF * number #!a float is stored in `point.x`, which is an integer; convert it with int()
---
return number & HALF #!`HALF` is a float; an integer is needed
---
return load64(HALF) #!`HALF` is a float; load64() needs an integer
---
return point.raw #!POINT.raw is unsigned, so an expression with an int64 becomes a float; use <i8
---
return number is None #!`number is None`: numbers are compared with ==
---
return number in (1, 2) #!`number in (1, 2)`: numbers are compared with ==
---
return number[0] #!`number` is a number, not an array
---
return point.cells + 1 #!`point.cells` is an array, not a number
---
return number.bit_length() #!`number.bit_length` is not a function that compiled code can call
---
point.x = int(HALF * length(point))
number = (point.cells[number] << 3) + split.INDEX_MASK + address_of(point)
while True:
    found, other = both(point)
    if found:
        break
    shift(point, other)
    continue
return -1 if not found and number < LIMIT else max(found, abs(other), 3)
"""


def parts() -> list[str]:
    return [part.strip("\n") for part in EXAMPLES.split("---\n")]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, str]]:
    """For each example what is reported, by the line in it. All are in one file."""
    text, starts = HEAD, []
    for number, body in enumerate(parts()):
        text += f"@compiled\ndef call_{number}(address):\n    example_{number}(view(address, POINT), load64(address))\n"
        text += f"@compiled\ndef example_{number}(point, number):\n"
        starts.append(text.count("\n"))
        text += "".join(f"    {line}\n" for line in body.splitlines())
    path = tmp_path_factory.mktemp("examples") / "examples.py"
    path.write_text(text)
    found: list[dict[int, str]] = [{} for _ in starts]
    for mistake in check([path]):
        assert mistake.path == path
        example = bisect.bisect_left(starts, mistake.line) - 1
        found[example][mistake.line - starts[example]] = mistake.text.replace(f"example_{example}", "example")
    return found


@pytest.mark.parametrize("number", range(len(parts())), ids=[re.sub(r"\W+", "-", each)[:60] for each in parts()])
def test_an_example(reported: list[dict[int, str]], number: int) -> None:
    lines = enumerate(parts()[number].splitlines(), 1)
    expected = {place: line.partition("#!")[2] for place, line in lines if "#!" in line}
    found = reported[number]
    assert set(found) == set(expected), found
    assert all(expected[place] in text for place, text in found.items()), found


def test_no_mistake_in_our_code() -> None:
    assert check([PACKAGE, REPOSITORY / "tests"]) == []


def test_a_unit_returns_a_number_and_gets_numbers(tmp_path: Path) -> None:
    (tmp_path / "units.py").write_text(
        f"{HEAD}@unit\ndef silent(address):\n    store64(address, 1)\n@unit\ndef wrong(point):\n    return point.x\n"
    )
    line = HEAD.count("\n")
    assert [(mistake.line, mistake.text) for mistake in check([tmp_path])] == [
        (line + 3, "silent() is a unit, so it must return a number"),
        (line + 6, "`point` is a number, not a struct, so it has no field x"),
    ]


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(HEAD)
    (tmp_path / "bad.py").write_text(HEAD.replace("point.x + point.y", "point.x + point.why"))
    (tmp_path / "broken.py").write_text("import ringplane.compiler.jit\ndef (")
    command = [sys.executable, "-m", "ringplane.compiler.checker"]
    done = subprocess.run([*command, "good.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run([*command, "."], cwd=tmp_path, capture_output=True, text=True)
    line = 1 + HEAD[: HEAD.index("point.x + point.y")].count("\n")
    assert done.stdout == f"bad.py:{line}: no struct has a field why\nbroken.py:2: invalid syntax\n"
    assert (done.returncode, done.stderr) == (1, "")
    done = subprocess.run([*command, "none.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "Error: none.py: No such file or directory\n")


def test_an_installed_package_is_checked_without_those_beside_it(tmp_path: Path) -> None:
    """In site-packages, Numba's modules lie beside ours, and define their names in ways that are not followed."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "numba").mkdir()
    for name in ("__init__.py", "extending.py"):
        (tmp_path / "numba" / name).write_text("from numba.core import *\n")
    assert check([tmp_path / PACKAGE.name]) == []


# The same in a copy of the real sources, where one place in a few of each kind is changed.


@dataclass(frozen=True)
class Change:
    """In this line, the characters from `start` to `end` become `text`."""

    line: int
    start: int
    end: int
    text: str


def span(node: ast.expr, text: str) -> Change:
    assert node.end_col_offset is not None
    return Change(node.lineno, node.col_offset, node.end_col_offset, text)


def misspell_field(node: ast.AST) -> Change | None:
    """`queue.size` becomes `queue.size_`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id.islower():
        return span(node, f"{ast.unparse(node)}_")
    return None


def misspell_name(node: ast.AST) -> Change | None:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return span(node, f"{node.id}_")
    return None


def drop_argument(node: ast.AST) -> Change | None:
    """The last one, of a function that is not one of Python's."""
    if not isinstance(node, ast.Call) or len(node.args) < 2 or ast.unparse(node.func) in ("range", "max"):
        return None
    if ast.unparse(node.func) == "call" and (
        isinstance(node.args[0], ast.Name) or "event" in ast.unparse(node.args[0])
    ):
        # Nothing says which unit that is, and no layer or source of ours has an event.
        return None
    last, previous = node.args[-1], node.args[-2]
    if last.end_lineno != previous.lineno:
        return None
    assert previous.end_col_offset
    assert last.end_col_offset
    return Change(last.lineno, previous.end_col_offset, last.end_col_offset, "")


def swap_structs(node: ast.AST) -> Change | None:
    """Of two structs, each is passed as the other."""
    if isinstance(node, ast.Call) and re.match(r"\w+\((worker|channel|queue), (queue|request|io)\b", ast.unparse(node)):
        second = ast.unparse(node.args[1])
        swapped = f"{second}, {ast.unparse(node.args[0])}"
        return Change(node.lineno, node.args[0].col_offset, node.args[1].end_col_offset or 0, swapped)
    return None


def allocate(node: ast.AST) -> Change | None:
    """A number becomes a list of it."""
    return span(node, f"[{node.value}]") if isinstance(node, ast.Constant) and type(node.value) is int else None


def use_nothing(node: ast.AST) -> Change | None:
    """The result of a function without one is used."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in NOTHING:
        return Change(node.lineno, node.col_offset, node.col_offset, "unused = ")
    return None


def return_nothing(node: ast.AST) -> Change | None:
    if isinstance(node, ast.Return) and node.value is not None and node.lineno == node.end_lineno:
        assert node.end_col_offset
        return Change(node.lineno, node.col_offset, node.end_col_offset, "return")
    return None


NOTHING = ("store64", "store32", "store16", "store8", "fence", "relax", "copy")


def places(path: Path, plant: Callable[[ast.AST], Change | None]) -> Iterator[Change]:
    """Where a kind of mistake can be planted in the compiled functions of a file: at most once in a function."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and any(
            ast.unparse(each) in ("compiled", "unit") for each in function.decorator_list
        ):
            changes = [change for node in ast.walk(ast.Module(function.body, [])) if (change := plant(node))]
            returns = sum(isinstance(node, ast.Return) for node in ast.walk(function))
            if changes and (plant is not return_nothing or returns > 1):
                yield changes[len(changes) // 2]


KINDS = [misspell_field, misspell_name, drop_argument, swap_structs, allocate, use_nothing, return_nothing]


@pytest.mark.parametrize("plant", KINDS, ids=lambda function: function.__name__)
def test_mistakes_planted_into_our_code(tmp_path: Path, plant: Callable[[ast.AST], Change | None]) -> None:
    package = tmp_path / "ringplane"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    planted = set()
    for path in sorted(package.rglob("*.py")):
        # Files of policies have rules of their own (test_policy_files.py).
        if path.is_relative_to(package / "policies" / "shipped"):
            continue
        lines = path.read_text().splitlines()
        for change in list(places(path, plant))[::4]:
            line = lines[change.line - 1].encode()
            lines[change.line - 1] = (line[: change.start] + change.text.encode() + line[change.end :]).decode()
            planted.add((str(path.relative_to(package)), change.line))
        path.write_text("\n".join(lines) + "\n")
    found = check([package])
    assert len(planted) > 5
    lines = {(str(mistake.path.relative_to(package)), mistake.line) for mistake in found}
    assert planted - lines == set()
    assert lines - planted == set(), [*map(str, found)]
