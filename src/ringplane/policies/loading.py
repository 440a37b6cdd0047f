"""Policies from files: read once, checked, and made units. The text of the file is the key of their compiled code."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

import ringplane.policies
from ringplane.compiler.jit import Whole, compiled
from ringplane.compiler.key import give_text
from ringplane.compiler.units import Unit
from ringplane.native.access import view
from ringplane.options.kinds import suggestion
from ringplane.policies.arrays import NAMES, with_calls
from ringplane.policies.declaring import POLICY, Function, Mistake, Program, memory_layout, visible_layout
from ringplane.policies.io_view import FIELDS, POLICY_IO
from ringplane.system.digests import blake2b

if TYPE_CHECKING:
    from ringplane.compiler.inference import Mistake as MistakeInLine

SHIPPED = Path(__file__).with_name("shipped")
# What decides about the compiled code of a text, beside what it imports: how it is changed, and what is rejected.
MAKERS = (
    *(f"ringplane.policies.{each}" for each in ("loading", "file_rules", "arrays")),
    *(f"ringplane.compiler.{each}" for each in ("checker", "policy_flow")),
)
# A policy in a file that ships.
DECLARED = re.compile(r"^@policy\(.*\)\ndef (\w+)\(", re.MULTILINE)


# All that this process has read, by their addresses (`_key`).
_found: dict[tuple[str, str], LoadedPolicy] = {}


class PolicyError(Exception):
    """A policy cannot be used; the text has a line for each mistake, with file and line number where there is one."""


@dataclass(frozen=True, eq=False)
class LoadedPolicy:
    """A policy that can run. `down` and `up` (which it may not have) are units, called with the addresses my, io."""

    path: Path
    program: Program
    down: Unit
    up: Unit | None
    # It asks for the time, which takes longer than all else.
    needs_time: bool

    @property
    def code(self) -> str:
        """Another one for each text of the file."""
        return str(self.program.function.__module__)

    @property
    def units(self) -> tuple[Unit, ...]:
        return (self.down,) if self.up is None else (self.down, self.up)


class PolicyUnit(Unit):
    """A function of a policy. A process that compiles it gets the text of its file, which was checked here."""

    def __init__(self, function: Function, path: Path, text: str, name: str) -> None:
        # Not among the units that are known: it is compiled only for a disk that has the policy.
        Whole.__init__(self, function, defined=True)
        # Without the digest: of each name only some versions are kept (compiler/cache.py).
        self.name = f"{function.__module__.rpartition('_')[0]}.{name}"
        self._file = str(path.absolute()), text

    @property
    def job(self) -> str:
        return POLICY + json.dumps([*self._file, self.name])


def policy_unit(job: str) -> Unit:
    """The unit of this job. Raises PolicyError."""
    path, text, name = json.loads(job.removeprefix(POLICY))
    units = (unit for each in _load(Path(path), text) for unit in each.units)
    return next(unit for unit in units if unit.name == name)


def shipped() -> dict[str, Path]:
    """The files of the policies that ship, by the names of these."""
    files = sorted(SHIPPED.glob("*.py"))
    return {name: path for path in files for name in DECLARED.findall(path.read_text())}


def find_policy(address: str, check: bool = False, read: Callable[[Path], str] | None = None) -> LoadedPolicy:
    """FILE.py:NAME, FILE.py with one policy, or the name of one that ships. Raises PolicyError, and what `read` raises.

    With `check` its functions are checked even if they were compiled before.
    """
    path, name = find_file(address)
    chosen = choose_policy(path, (read or read_text)(path), name, check=check)
    remember(address, chosen)
    return chosen


def find_file(address: str) -> tuple[Path, str]:
    """The file of a policy and the name in it, which may be empty. Raises PolicyError if none of the name ships."""
    path, name = split_address(address)
    if path is None:
        path = shipped().get(name)
        if path is None:
            raise PolicyError(f"no policy {name} ships (one of your own is FILE.py:NAME){suggestion(name, shipped())}")
    return path, name


def choose_policy(path: Path, text: str, name: str, *, check: bool = False) -> LoadedPolicy:
    """The policy of this name, or the only one, of a file with this text. Raises PolicyError.

    With `check` its functions are checked even if they were compiled before.
    """
    try:
        return _chosen(path, text, name, check=check)
    except (RecursionError, MemoryError):
        raise PolicyError(f"{path}: it is nested too deeply, or needs too much memory") from None


def _chosen(path: Path, text: str, name: str, *, check: bool) -> LoadedPolicy:
    found = {each.program.name: each for each in _load(path, text)}
    if not name and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        raise PolicyError(f"{path} has the policies {', '.join(found)}; name one: {path}:NAME")
    chosen = found[name]
    if check or not all(unit.is_cached() for unit in chosen.units):
        check_functions(path, text, list(found.values()))
    return chosen


def found_before(address: str) -> LoadedPolicy | None:
    """What this process has found at this address, whatever its file is now."""
    return _found.get(_key(address))


def remember(address: str, loaded: LoadedPolicy) -> None:
    """For `found_before`, also with the name of the policy."""
    path, _ = split_address(address)
    for each in (address, *([f"{path}:{loaded.program.name}"] if path is not None else [])):
        _found[_key(each)] = loaded


def _key(address: str) -> tuple[str, str]:
    """The absolute path of the file, and the name in it."""
    path, name = split_address(address)
    return "" if path is None else os.path.abspath(path), name


def split_address(address: str) -> tuple[Path | None, str]:
    """The file, if there is one, and the name, which may be empty."""
    file, _, name = address.rpartition(":")
    if file.endswith(".py"):
        return Path(file), name
    return (Path(address), "") if address.endswith(".py") else (None, address)


def read_policies(path: Path) -> list[LoadedPolicy]:
    """The policies of a file, whose functions are not checked yet. Raises PolicyError."""
    return _load(path, read_text(path))


def read_text(path: Path) -> str:
    """That of a file of policies. Raises PolicyError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PolicyError(f"{path} is not a text in UTF-8; save it as one") from None


@functools.cache
def _load(path: Path, text: str) -> list[LoadedPolicy]:
    # compiler/inference.py, which only a file of policies needs.
    from ringplane.policies.file_rules import mistakes

    try:
        tree = ast.parse(text, str(path))
    except SyntaxError as error:
        raise PolicyError(f"{path}:{error.lineno or 1}: {error.msg}") from None
    except ValueError as error:
        raise PolicyError(f"{path}: {error}") from None
    _raise_any(mistakes(tree, path, frozenset(ringplane.policies.__all__)))
    module = _run(path, text, with_calls(tree))
    programs = {id(each): each for each in vars(module).values() if isinstance(each, Program)}
    if not programs:
        raise PolicyError(f"{path} has no policy; a function with @policy(...) is one")
    needs_time = any(isinstance(node, ast.Attribute) and node.attr == "time" for node in ast.walk(tree))
    return [_loaded(path, text, module.__name__, each, needs_time) for each in programs.values()]


def _run(path: Path, text: str, tree: ast.Module) -> ModuleType:
    """Run what declares the policies."""
    digest = blake2b(text.encode(), digest_size=8).hexdigest()
    name = f"policy_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}_{digest}"
    give_text(name, text, MAKERS)
    module = ModuleType(name)
    module.__file__ = str(path)
    vars(module).update(NAMES)
    try:
        exec(compile(tree, str(path), "exec"), vars(module))
    except Exception as error:
        line = max(
            (frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)),
            default=1,
        )
        what = str(error) if isinstance(error, Mistake) else f"{type(error).__name__}: {error}"
        raise PolicyError(f"{path}:{line}: {what}") from None
    return module


def _loaded(path: Path, text: str, module: str, program: Program, needs_time: bool) -> LoadedPolicy:
    layout = memory_layout(program.declared)
    unit = functools.partial(_unit, path, text, module, layout)
    # No policy has a dot in its name.
    up = unit(f"{program.name}.result", program.after) if program.after else None
    return LoadedPolicy(path, program, unit(program.name, program.function), up, needs_time)


def _unit(path: Path, text: str, module: str, layout: np.dtype[np.void], name: str, function: Function) -> PolicyUnit:
    namespace: dict[str, Any] = {
        "function": compiled(function), "view": view, "POLICY_IO": POLICY_IO, "LAYOUT": layout, "__name__": module,
    }  # fmt: skip
    exec("def run(my, io):\n    return function(view(io, POLICY_IO), view(my, LAYOUT))\n", namespace)
    return PolicyUnit(namespace["run"], path, text, name)


def check_functions(path: Path, text: str, policies: list[LoadedPolicy]) -> None:
    """Raises PolicyError for mistakes in the functions of a file with this text."""
    from ringplane.compiler.checker import check_policies
    from ringplane.compiler.policy_flow import CHANGING, IO
    from ringplane.compiler.shapes import Shape, Struct

    io: Shape = frozenset({Struct(IO, np.dtype([(name, "<i8") for name in FIELDS]))})
    passed: dict[str, tuple[Shape, ...]] = {}
    for each in policies:
        declared = each.program.declared
        metadata: Mapping[str, Any] = {CHANGING: (*declared.counters, *declared.states)}
        layout = visible_layout(declared)
        my: Shape = frozenset({Struct(declared.__name__, np.dtype(layout.descr, metadata=dict(metadata)))})
        for function in filter(None, (each.program.function, each.program.after)):
            passed[function.__name__] = (io, my)
    # The path as it was given.
    _raise_any([replace(each, path=path) for each in check_policies(path, text, passed)])


def _raise_any(mistakes: list[MistakeInLine]) -> None:
    if mistakes:
        raise PolicyError("\n".join(map(str, mistakes)))
