"""Mistakes in a file of policies: each is one line with file and line number, and nothing of the file has run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.compiler import key
from ringplane.compiler.checker import check_policies
from ringplane.compiler.key import NATIVE
from ringplane.policies import __all__ as interface
from ringplane.policies.loading import PolicyError, find_policy, policy_unit, read_policies, shipped, split_address
from ringplane.policies.parameter_kinds import DURATION, OPERATION, RANGE, REAL, SIZE, WHOLE, one_of
from ringplane.policies.running import RunningPolicy

from .policy_texts import own_policy
from .test_policies import SAMPLES

# Each is the body of a policy `own(io, my)`, or with `===` the end of its file. A line with a mistake ends with `#!`
# and a part of what is reported; without such a line nothing is wrong.
EXAMPLES = """
return PASS
---
io.offset = 5 #!io.offset cannot be changed; what a policy returns changes the I/O
return PASS
---
my.number = 5 #!number is a parameter, which only users change
return PASS
---
my.area[0] = 5 #!area is a parameter, which only users change
return PASS
---
my.table = 5 #!table is an array
return PASS
---
my.last = my.table #!`my.table` is an array
return PASS
---
return my.tabel[0] #!Own has no field tabel (did you mean table?)
---
return io.ofset #!I/O has no field ofset (did you mean offset?)
---
return EIO #!`EIO` is not an answer; an answer is PASS, fail(errno)
---
return -EIO #!`-EIO` is not an answer
---
return PASS if io.fua else 3 #!`3` is not an answer
---
if io.operation == READ: #!own() ends after this without a value
    return PASS
---
return fail() #!fail() takes 1 argument, but gets 0
---
return load8(my, 0) #!load8() needs the I/O, `io`, not `my`
---
number = 1
return load8(number, 0) #!load8() needs the I/O, `io`, not `number`
---
store8(io, my, 0) #!store8() needs a number, not `my`
return PASS
---
return view(0, 0) #!unknown name view
---
return open(1) #!open() is not possible in compiled code
---
return fail(ENOENT) #!unknown name ENOENT
---
x = [1, 2] #!a list is not possible in compiled code
return PASS
---
return io.__class__ #!`io.__class__` is not possible in a policy
---
pair = (1, 2)
return pair[0] #!only an array of the policy has items
---
my.table[0], my.last = 1, 2 #!assign to `my.table[0]` in a statement of its own
return PASS
---
my.seen = my.share #!a float is stored in `my.seen`
return PASS
---
return math.log(2.0) #!math.log() is not a function that compiled code can call
---
my.last = int(math.pi * my.share) + len(my.table)
other = io
return PASS if other.length > my.area[1] else delay(1.5 * my.share)
---
other = my
other.number = 1 #!number is a parameter
return PASS
---
import os #!import is not possible in compiled code
return PASS
---
return delay(len(io.length)) #!`io.length` has no len(); only an array of the policy has one
---
return delay(len(my.last)) #!`my.last` has no len()
---
return delay(len(my)) #!`my` has no len()
---
pair = (1, 2)
return delay(len(pair)) #!`pair` has no len()
---
===
@compiled
def helper(number):
    return 1 + helper(number - 1) if number > 0 else 0 #!helper() calls itself, which compiled code cannot do
---
===
@compiled
def odd(number):
    return 1 + even(number - 1) if number > 0 else 0 #!even() calls odd() again
@compiled
def even(number):
    return 2 + odd(number - 1) if number > 0 else 0 #!odd() calls even() again
@compiled
def both(number):
    return even(number) + odd(number)
---
===
@compiled
def change(io):
    store8(io, 0, 1) #!store8() needs data: write @policy(Own, data=True)
    return PASS
@policy(Own)
def other(io, my):
    return change(io)
@policy(Own, data=True)
def third(io, my):
    return change(io)
---
===
@own.result
def look(io, my):
    return PASS if load8(io, 0) else fail(EIO) #!load8() needs data: write @policy(Own, data=True)
---
===
import os #!a policy cannot import os
---
===
from ringplane.native.access import view #!a policy cannot import ringplane.native.access
---
===
from ringplane.policies import io_view #!ringplane.policies has no io_view
---
===
from ringplane.policies import * #!import * is not possible
---
===
from ringplane.policies import random as r #!random cannot get another name
---
===
print("hello") #!`print('hello')`: only imports, constants, classes and functions are possible here
---
===
TABLE = open("/etc/passwd") #!open() cannot be called here
---
===
TABLE = ().__class__ #!`().__class__` is not possible here
---
===
def helper(a): #!helper() needs one decorator: @policy(CLASS), @policy(CLASS, data=True), @NAME.result or @compiled
    return a
---
===
@compiled
def helper(io, my):
    my.number = io.length #!number is a parameter
    return 0
@policy(Own)
def other(io, my):
    return PASS if helper(io, my) else HANG
---
===
class More(Policy):
    key: int = 7 #!key needs a value: parameter(...), counter(...) or state(...)
---
===
class More(Policy): #!key has no type; write key: int = ..., or float or bool
    key: str = counter("text")
---
===
class More(Policy): #!name is taken; choose another name
    name: int = counter("text")
---
===
class More(object): #!write class More(Policy)
    pass
---
===
class More(Policy): #!its default: 2 is not from 0 to 1
    key: float = parameter("2", "text", 0.0, 1.0)
---
===
@policy(Own)
def other(io): #!other() needs two parameters: io and my
    return PASS
---
===
@own.result
def own(io, my): #!own has a meaning already, of line 17; choose another name
    return PASS
---
===
policy = policy #!policy has a meaning already, of line 5
---
===
store8 = store8 #!store8 has a meaning already
---
===
A, B, A = 1, 2, 3 #!A has a meaning already
---
===
class Own(Policy): #!Own has a meaning already
    pass
---
===
from math import own #!own has a meaning already
---
===
@compiled
def len(number): #!len is taken; choose another name
    return number
---
===
ringplane_get_item = 5 #!ringplane_get_item is taken
---
===
from math import __loader__ #!__loader__ is taken
---
===
LOADER = math.__loader__ #!`math.__loader__` is not possible here
---
===
put = store8
@policy(Own, data=True)
def other(io, my):
    put(io, my, 1) #!store8() needs a number, not `my`
    return PASS
---
===
@policy(Own, data=__import__("os").abort())
def other(io, my): #!other() needs one decorator: @policy(CLASS), @policy(CLASS, data=True)
    return PASS
---
===
@policy(__import__("os").abort())
def other(io, my): #!other() needs one decorator
    return PASS
---
===
def ( #!invalid syntax
---
===
HALF, THIRD = 1 / 2, 1 / 3
NAMES = one_of("a", "b")
class More(Policy):
    kind: int = parameter("b", "text", kind=NAMES)
@policy(More)
def other(io, my):
    return PASS if my.kind else fail(int(HALF * EIO))
"""


@pytest.mark.parametrize("example", EXAMPLES.strip().split("\n---\n"))
def test_a_mistake_is_one_line(tmp_path: Path, example: str) -> None:
    body, ends, rest = example.partition("===\n")
    text = own_policy("return PASS") + rest if ends else own_policy(body, data=True)
    path = tmp_path / "own.py"
    path.write_text(text)
    wanted = [
        (number, line.partition("#!")[2].strip()) for number, line in enumerate(text.splitlines(), 1) if "#!" in line
    ]
    found: list[str] = []
    try:
        find_policy(f"{path}:own", check=True)
    except PolicyError as error:
        found = str(error).splitlines()
    assert len(found) == len(wanted), found
    for line, (number, words) in zip(found, wanted, strict=True):
        place, _, what = line.partition(": ")
        assert words in what
        # A class is wrong as a whole.
        assert place == f"{path}:{number}" or "class More" in text


def test_what_the_check_cannot_evaluate_is_a_mistake(tmp_path: Path) -> None:
    """A call of it would pass unchecked."""
    path = tmp_path / "own.py"
    text = own_policy("return WRONG()") + 'WRONG = max(1, "2")\n'
    assert [each.text for each in check_policies(path, text, {})] == ["`WRONG` cannot be evaluated"]


def test_nothing_beside_a_file_of_policies_runs(tmp_path: Path) -> None:
    """A module of the same name as one that may be imported."""
    for name in ("errno", "math", "errno.EIO", "ringplane.policies"):
        (tmp_path / f"{name}.py").write_text(f"EIO = pi = open({str(tmp_path / 'ran')!r}, 'w')")
    text = own_policy("return fail(EIO) if math.pi > 3 else PASS")
    (tmp_path / "own.py").write_text(text)
    assert check_policies(tmp_path / "own.py", text, {}) == []
    find_policy(f"{tmp_path}/own.py:own", check=True)
    assert not (tmp_path / "ran").exists()


def test_the_text_that_was_checked_is_compiled(tmp_path: Path) -> None:
    """Also if the file is another one when a process beside compiles it."""
    path = tmp_path / "own.py"
    path.write_text(own_policy("my.found += 1\nreturn PASS", "return PASS"))
    units = find_policy(str(path)).units
    path.write_text(own_policy("return unchecked(io)"))
    compiled = [policy_unit(each.job) for each in units]
    assert [each.name for each in compiled] == [each.name for each in units]
    assert [each.file_name(NATIVE) for each in compiled] == [each.file_name(NATIVE) for each in units]
    path.unlink()
    assert all("\n" not in each.job and policy_unit(each.job).address() for each in units)


@pytest.mark.parametrize("module", ["ringplane.policies.arrays", "ringplane.compiler.policy_flow"])
def test_code_is_compiled_again_when_what_makes_or_checks_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy(f"my.found += 1\nreturn PASS  # {module}"))
    unit = find_policy(str(path)).down
    before = unit.file_name(NATIVE)
    digest = key._digest
    monkeypatch.setattr(key, "_digest", lambda name: digest(name) + (b"other" if name == module else b""))
    key.key_of.cache_clear()
    assert unit.file_name(NATIVE) != before


def test_the_function_for_results_has_a_name_that_no_policy_has(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        own_policy("return PASS", "return PASS") + "@policy(Own)\ndef own_result_(io, my):\n    return PASS\n"
    )
    path.write_text(path.read_text().replace("def own_result(", "def result(").replace("own_result_", "own_result"))
    units = [unit for each in read_policies(path) for unit in each.units]
    assert sorted(unit.name for unit in units) == ["policy_own.own", "policy_own.own.result", "policy_own.own_result"]


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("")
    for address, words in (
        (f"{tmp_path}/missing.py", "missing.py cannot be read: No such file or directory"),
        (f"{tmp_path}/none.py", "none.py has no policy; a function with @policy(...) is one"),
        (f"{SAMPLES}/sample_error.py:eror", "sample_error.py has the policies error; name one: "),
        ("eror", 'no policy eror ships (one of your own is FILE.py:NAME); did you mean "error"?'),
    ):
        with pytest.raises(PolicyError) as error:
            find_policy(address)
        assert words in str(error.value)


def test_no_file_that_ships_has_the_name_of_something_else() -> None:
    """`from ringplane.policies import delay` is the answer, not a module."""
    names = {path.stem for path in SAMPLES.parents[2].glob("src/ringplane/policies/*.py")}
    assert names & set(interface) == set()
    assert all(path.is_file() for path in shipped().values())


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("error", (None, "error")),
        ("a/b.py", (Path("a/b.py"), "")),
        ("a/b.py:c", (Path("a/b.py"), "c")),
        ("a:b.py:c", (Path("a:b.py"), "c")),
    ],
)
def test_addresses(address: str, parts: tuple[Path | None, str]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (WHOLE, "0x10", 16),
        (WHOLE, 7, 7),
        (REAL, "0.25", 0.25),
        (REAL, 1, 1.0),
        (SIZE, "64K", 65536),
        (SIZE, "0", 0),
        (DURATION, "5ms", 5000),
        (DURATION, "1.5 s", 1_500_000),
        (DURATION, "20", 20),
        (OPERATION, "write", 1),
        (RANGE, "1M-2M", (1 << 20, 2 << 20)),
        (RANGE, "-512", (0, 512)),
        (RANGE, "all", (0, (1 << 63) - 1)),
        (one_of("a", "b"), "b", 1),
    ],
)
def test_values(kind: object, given: object, value: object) -> None:
    found = kind.value(given)  # type: ignore[attr-defined]
    assert found == value
    assert kind.value(kind.shown(found)) == found  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (WHOLE, "x", '"x" is not a whole number'),
        (WHOLE, True, "true is not a whole number"),
        (WHOLE, 1.5, "1.5 is not a whole number"),
        (WHOLE, 1 << 64, "18446744073709551616 is not a whole number"),
        (REAL, "nan", '"nan" is not a number'),
        (SIZE, "-1", '"-1" is not a size'),
        (DURATION, "5 days", '"5 days" is not a time; examples: 5ms, 20us, 1.5s'),
        (DURATION, "-5ms", '"-5ms" is not a time'),
        (OPERATION, "wirte", '"wirte" is not one of any, read, write'),
        (OPERATION, 1, "1 is not one of any"),
        (RANGE, "2M-1M", '"2M-1M" is not a range of bytes; examples: 1M-2M, 64K-, all'),
        (RANGE, None, "null is not a range"),
    ],
)
def test_wrong_values(kind: object, given: object, words: str) -> None:
    with pytest.raises(ValueError, match="is not") as error:
        kind.value(given)  # type: ignore[attr-defined]
    assert words in str(error.value)


@settings(max_examples=200)
@given(us=st.integers(0, 3_600_000_000), first=st.integers(0, 3_600_000_000), number=st.integers(0, (1 << 40) - 1))
def test_a_time_in_an_answer_is_exact_enough(us: int, first: int, number: int) -> None:
    from ringplane.policies.answers import DELAYED, TORN, after, delay, delay_of, kind_of, number_of, tear

    answer = after(us, tear(number))
    assert (kind_of(answer), number_of(answer)) == (TORN, number)
    assert us - us // 16384 <= delay_of(answer) <= us
    both = after(us, delay(first))
    assert delay_of(both) == min(us + first, 3_600_000_000)
    assert kind_of(both) == (DELAYED if us + first else 0)


def test_declarations_are_read_without_a_compiler() -> None:
    """Nor does a start with compiled code import it."""
    program = (
        "import sys, ringplane.policies.loading as loading; "
        f"loading.read_policies(loading.Path({str(SAMPLES / 'sample_error.py')!r})); "
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_default_of_each_parameter_is_shown_as_users_write_it() -> None:
    policy = RunningPolicy("error", find_policy(f"{SAMPLES}/sample_error.py"), {"range": "1M-"})
    assert policy.shown() == {"operation": "any", "range": "1048576-", "probability": "1", "errno": "5", "seed": "0"}
