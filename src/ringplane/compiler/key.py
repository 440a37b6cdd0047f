"""The key of compiled code: a digest of all that the code depends on, so that stale code is never loaded.

Compiled code consists of its module and the modules that this one imports, directly or not: their functions become a
part of it, their constants are numbers in it. So the key contains the text of these modules, whatever their folder and
their modification times are: a fresh checkout, another installation and the layer of a container image find the same
code. It contains the compiler's own modules, the versions of Python, Numba and llvmlite, and the CPU too. Numba is not
imported for it, because a start with saved code does not need it.

A process may compile long after its start, and its package may have been replaced meanwhile: it would save what it
compiles from the old modules in its memory under the key of the new text, and the next process would crash by it. So a
file that has changed since the process looked at all of them first gives a key that no other process has.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Collection, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ringplane.system.digests import blake2b

PACKAGE = Path(__file__).resolve().parent.parent

# The CPU of this machine, and any CPU of its architecture.
NATIVE, GENERIC = "native", "generic"
# Numba's settings that change the code, except those of the CPU.
SETTINGS = ("NUMBA_OPT", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE", "NUMBA_DEBUGINFO", "NUMBA_BOUNDSCHECK")

# The import statements at the top level of a module; to parse all modules would take a third of a second.
IMPORT = re.compile(
    r"^(?:import (?P<whole>ringplane[\w.]*)"
    r"|from (?P<place>ringplane[\w.]*) import (?:\((?P<names>[^)]*)\)|(?P<few>[^(\n]*)))",
    re.MULTILINE,
)
COMMENT = re.compile(r"#.*")

# The texts of modules that are not files of the package, by their names, which nothing else has; and the modules that
# make functions of such a text.
_given: dict[str, str] = {}
_makers: dict[str, Collection[str]] = {}

# In the key of what this process must neither load nor leave for others.
_OURS = os.urandom(16).hex()

# What makes the code, and is not imported by what is compiled.
COMPILER = ("ringplane.compiler.emitter", "ringplane.compiler.pipeline")


@cache
def key_of(module: str, cpu: str = NATIVE) -> str:
    """The key of what is compiled from this module's functions for this CPU, as hexadecimal digits."""
    digest = blake2b(_compiler(cpu).encode(), digest_size=10)
    for name in sorted(sources(module).union(*map(sources, (*COMPILER, *_makers.get(module, ()))))):
        digest.update(f"\n{name} ".encode() + _digest(name))
    return digest.hexdigest()


def sources(module: str) -> set[str]:
    """The module and all modules of this package that it imports, directly or not."""
    found: set[str] = set()
    left = [module]
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            left.extend(imports(name))
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this package that importing the module imports."""
    return frozenset(name for match in IMPORT.finditer(_text(module)) for name in _imported(match))


def _imported(statement: re.Match[str]) -> Iterator[str]:
    if whole := statement["whole"]:
        yield whole
        return
    place = statement["place"]
    for each in COMMENT.sub("", statement["names"] or statement["few"]).split(","):
        if words := each.split():
            name = f"{place}.{words[0]}"
            yield name if _file(name) else place


def give_text(module: str, text: str, makers: Collection[str]) -> None:
    """The module was made from this text by these modules; its name says which text it is."""
    _given[module], _makers[module] = text, makers


@cache
def _text(module: str) -> str:
    if module in _given:
        return _given[module]
    path = _file(module) or _imported_file(module)
    assert path
    with path.open(encoding="utf-8") as file:
        text, version = file.read(), _version(os.fstat(file.fileno()))
    seen = _files().get(module)
    return text if seen is None or seen.version == version else text + _OURS


@cache
def _digest(module: str) -> bytes:
    return blake2b(_text(module).encode()).digest()


def has_key(module: str) -> bool:
    """Whether its text is known; not that of a script in a string, for example."""
    return module in _given or bool(_file(module) or _imported_file(module))


def _imported_file(module: str) -> Path | None:
    """The file of any module that has been imported."""
    name = getattr(sys.modules.get(module), "__file__", None)
    return Path(name) if name else None


def _file(module: str) -> Path | None:
    """The file of a module of this package, without importing it."""
    seen = _files().get(module)
    return seen and seen.path


class _Seen(NamedTuple):
    """A file as it was when the process looked first."""

    path: Path
    version: tuple[int, ...]


@cache
def _files() -> dict[str, _Seen]:
    """The files of all modules of this package."""
    found = {}
    for folder, _, names in os.walk(PACKAGE):
        place = ".".join([PACKAGE.name, *Path(folder).relative_to(PACKAGE).parts])
        for name in names:
            if name.endswith(".py"):
                module = place if name == "__init__.py" else f"{place}.{name[:-3]}"
                path = Path(folder, name)
                # A file may go at this moment.
                with contextlib.suppress(FileNotFoundError):
                    found[module] = _Seen(path, _version(path.stat()))
    return found


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What is different when a file has been replaced, or written."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def version(package: str) -> str:
    """The version of Numba or llvmlite, without importing it, or `importlib.metadata`, which takes 8 ms."""
    spec = find_spec(package)
    with contextlib.suppress(OSError):
        if spec and spec.origin:
            return Path(spec.origin).with_name("_version.py").read_text()
    from importlib import metadata

    return metadata.version(package)


@cache
def _compiler(cpu: str) -> str:
    """All that decides, beside the sources, about the machine code."""
    python = f"{sys.implementation.cache_tag}{sys.abiflags} {platform.machine()}"
    versions = [f"{name} {version(name)}" for name in ("numba", "llvmlite")]
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return "\n".join([python, *versions, *settings, *(_native() if cpu == NATIVE else _GENERIC)])


# What `variables` makes Numba compile for: LLVM's names of the CPU and of its features.
_GENERIC = ("generic", "")


def _native() -> tuple[str, str]:
    """The CPU that Numba compiles for: of two models that share a home folder, each has its own code."""
    from llvmlite import binding

    name = os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = f"{binding.get_host_cpu_features().flatten()} {os.environ.get('NUMBA_ENABLE_AVX', '')}"
    return binding.get_host_cpu_name() if name is None else name, features


def variables(cpu: str) -> dict[str, str]:
    """The environment in which a process compiles for this CPU."""
    if cpu == NATIVE:
        return {}
    return dict(zip(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"), _GENERIC, strict=True))
