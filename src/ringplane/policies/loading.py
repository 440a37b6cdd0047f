"""Policies from files: read, checked, and made units. The text of the file is the key of their compiled code."""

from __future__ import annotations

import ast
import functools
import os
import re
import traceback
from collections.abc import Mapping
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
from ringplane.policies.arrays import NAMES, with_calls
from ringplane.policies.declaring import POLICY, Function, Mistake, Program, memory_layout, visible_layout
from ringplane.policies.io_view import FIELDS, POLICY_IO
from ringplane.system.confinement import is_confined
from ringplane.system.digests import blake2b

if TYPE_CHECKING:
    from ringplane.compiler.inference import Mistake as MistakeInLine

SHIPPED = Path(__file__).with_name("shipped")
# A policy in a file that ships.
DECLARED = re.compile(r"^@policy\(.*\)\ndef (\w+)\(", re.MULTILINE)


# All that this process has read, by their addresses (`_key`).
_found: dict[tuple[str, str], LoadedPolicy] = {}


class PolicyError(Exception):
    """A policy cannot be used; the text has a line for each mistake, with file and line number where there is one."""


class NotReadable(PolicyError):
    """This process is confined, and has not read the policy before that."""


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
    """A function of a policy. Others than this process find it by the path of the file."""

    def __init__(self, function: Function, job: str) -> None:
        # Not among the units that are known: it is compiled only for a disk that has the policy.
        Whole.__init__(self, function)
        # Without the digest: of each name only some versions are kept (compiler/cache.py).
        self.name = f"{function.__module__.rpartition('_')[0]}.{function.__name__}"
        self._job = job

    @property
    def job(self) -> str:
        return self._job


def policy_unit(job: str) -> Unit:
    """The unit of this job. Raises PolicyError."""
    function, _, path = job.removeprefix(POLICY).partition(" ")
    for each in read_policies(Path(path)):
        for unit in each.units:
            if unit.job == job:
                return unit
    raise PolicyError(f"{path} has no {function}")


def shipped() -> dict[str, Path]:
    """The files of the policies that ship, by the names of these."""
    files = sorted(SHIPPED.glob("*.py"))
    return {name: path for path in files for name in DECLARED.findall(path.read_text())}


def find_policy(address: str, check: bool = False) -> LoadedPolicy:
    """FILE.py:NAME, FILE.py with one policy, or the name of one that ships. Raises PolicyError.

    With `check` its functions are checked even if they were compiled before.
    """
    path, name = split_address(address)
    if path is None:
        path = shipped().get(name)
        if path is None:
            names = ", ".join(shipped())
            raise PolicyError(f"no policy {name} ships, but {names}; a policy of your own is FILE.py:NAME")
    found = {each.program.name: each for each in read_policies(path)}
    if not name and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        raise PolicyError(f"{path} has the policies {', '.join(found)}; name one: {path}:NAME")
    chosen = found[name]
    if check or not all(unit.is_cached() for unit in chosen.units):
        check_functions(path, list(found.values()))
    _found[_key(address)] = _found[_key(f"{path}:{name}")] = chosen
    return chosen


def usable_policy(address: str) -> LoadedPolicy:
    """As `find_policy`; a confined process has only those that it found before, also for other disks."""
    if not is_confined():
        return find_policy(address)
    found = _found.get(_key(address))
    if found is None or not all(unit.is_loaded for unit in found.units):
        raise NotReadable(
            f"this process may not read or compile policies any more; start it with {address} for one of its disks, "
            "which may be switched off (enabled=no), or with --no-sandbox"
        )
    return found


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
    try:
        return _load(path, path.read_text(encoding="utf-8"))
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
    _raise_any(mistakes(tree, path, frozenset(ringplane.policies.__all__)))
    module = _run(path, text, with_calls(tree))
    programs = {id(each): each for each in vars(module).values() if isinstance(each, Program)}
    if not programs:
        raise PolicyError(f"{path} has no policy; a function with @policy(...) is one")
    needs_time = any(isinstance(node, ast.Attribute) and node.attr == "time" for node in ast.walk(tree))
    return [_loaded(path, module.__name__, each, needs_time) for each in programs.values()]


def _run(path: Path, text: str, tree: ast.Module) -> ModuleType:
    """Run what declares the policies."""
    digest = blake2b(text.encode(), digest_size=8).hexdigest()
    name = f"policy_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}_{digest}"
    give_text(name, text)
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


def _loaded(path: Path, module: str, program: Program, needs_time: bool) -> LoadedPolicy:
    layout = memory_layout(program.declared)
    down = _unit(path, module, program.name, program.function, layout)
    after = program.after
    up = _unit(path, module, f"{program.name}_result", after, layout) if after else None
    return LoadedPolicy(path, program, down, up, needs_time)


def _unit(path: Path, module: str, name: str, function: Function, layout: np.dtype[np.void]) -> PolicyUnit:
    namespace: dict[str, Any] = {
        "function": compiled(function), "view": view, "POLICY_IO": POLICY_IO, "LAYOUT": layout, "__name__": module,
    }  # fmt: skip
    exec(f"def {name}(my, io):\n    return function(view(io, POLICY_IO), view(my, LAYOUT))\n", namespace)
    return PolicyUnit(namespace[name], f"{POLICY}{name} {path.absolute()}")


def check_functions(path: Path, policies: list[LoadedPolicy]) -> None:
    """Raises PolicyError for mistakes in the functions of a file."""
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
    _raise_any([replace(each, path=path) for each in check_policies(path, passed)])


def _raise_any(mistakes: list[MistakeInLine]) -> None:
    if mistakes:
        raise PolicyError("\n".join(map(str, mistakes)))
