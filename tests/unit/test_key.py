"""The key of compiled code: what it depends on, and on what nothing is compiled again."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.compiler import key
from ringplane.compiler.cache import DATA_PLANE, DRIVER
from ringplane.dataplane import loop
from ringplane.driver import generator, virtqueue
from ringplane.native import sigbus

MODULES = sorted(
    ".".join(path.relative_to(key.PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in key.PACKAGE.rglob("*.py")
)
CODE = loop.__name__


def top_level(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, without TYPE_CHECKING."""
    for each in statements:
        yield each
        if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING":
            continue
        if not isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(each, part, []))


@pytest.mark.parametrize("module", MODULES)
def test_the_imports_of_each_module_are_found(module: str) -> None:
    """By the whole syntax tree; there are no relative ones."""
    tree = ast.parse(key._text(module))
    found: set[str] = set()
    for statement in top_level(tree.body):
        if isinstance(statement, ast.ImportFrom):
            assert statement.level == 0
        if isinstance(statement, ast.Import | ast.ImportFrom):
            found.update(imported(statement))
    assert key.imports(module) == {name for name in found if name.split(".")[0] == "ringplane"}


def imported(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    for each in statement.names:
        if isinstance(statement, ast.Import):
            yield each.name
        else:
            assert statement.module
            name = f"{statement.module}.{each.name}"
            yield name if name in MODULES else statement.module


def test_the_key_covers_all_modules_of_the_package_that_are_imported() -> None:
    """By what Python imports, except __init__ files, from which nothing is imported by name."""
    script = f"import sys, {CODE}; print(*(name for name in sys.modules if name.startswith('ringplane.')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = {name for name in done.stdout.split() if key._file(name).name != "__init__.py"}  # type: ignore[union-attr]
    assert key.sources(CODE) == imported
    assert "ringplane.compiler.pipeline" not in imported


def test_what_has_no_compiled_code_is_not_in_the_key() -> None:
    for module in (DATA_PLANE, DRIVER):
        packages = {name.split(".")[1] for name in key.sources(module)}
        assert not packages & {"bench", "cli", "control"}


# Another folder, other times, other texts


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The folder with a copy of the package."""
    shutil.copytree(key.PACKAGE, tmp_path / "ringplane", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def keys(folder: Path, *modules: str, **environment: str) -> list[str]:
    """Of the package in this folder, by a process of its own; without Numba."""
    script = (
        "import sys; from ringplane.compiler.key import key_of; print(*map(key_of, sys.argv[1:]))\n"
        "assert 'numba' not in sys.modules; assert 'numpy' not in sys.modules"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *modules],
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


def test_folder_and_modification_times_do_not_matter(copied: Path) -> None:
    here = keys(key.PACKAGE.parent, CODE, DATA_PLANE, DRIVER)
    for path in copied.rglob("*.py"):
        os.utime(path, (1, 1))
    assert keys(copied, CODE, DATA_PLANE, DRIVER) == here


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_constant_changes_the_key_of_what_imports_it_and_no_other(copied: Path) -> None:
    dependent = [CODE, generator.__name__, DATA_PLANE, DRIVER]
    independent = [sigbus.__name__, virtqueue.__name__]
    before = keys(copied, *dependent, *independent)
    replace(copied / "ringplane/virtio/blk.py", "SECTOR = 512", "SECTOR = 513")
    after = keys(copied, *dependent, *independent)
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert changed == [True] * len(dependent) + [False] * len(independent)


def test_the_compiler_changes_the_key(copied: Path) -> None:
    """No module with compiled code imports it, because a start with saved code does not need it."""
    found = set()
    for name in ("pipeline", "lean", "calls", "emitter", "intrinsics"):
        found.add(*keys(copied, CODE))
        replace(copied / f"ringplane/compiler/{name}.py", '"""', '"""Changed: ')
    found.add(*keys(copied, CODE))
    assert len(found) == 6


def test_the_command_line_does_not_change_the_key(copied: Path) -> None:
    before = keys(copied, CODE, DATA_PLANE, DRIVER)
    for folder in ("cli", "control", "bench"):
        for path in (copied / "ringplane" / folder).glob("*.py"):
            path.write_text("")
    assert keys(copied, CODE, DATA_PLANE, DRIVER) == before


@pytest.mark.parametrize("setting", ["NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT"])
def test_settings_that_change_the_code_change_the_key(setting: str) -> None:
    assert keys(key.PACKAGE.parent, CODE, **{setting: "2"}) != keys(key.PACKAGE.parent, CODE)


def test_the_key_has_the_cpu_that_numba_compiles_for() -> None:
    script = (
        "from ringplane.compiler import key; from numba.core.registry import cpu_target\n"
        "_, name, features = cpu_target.target_context.codegen().magic_tuple()\n"
        "known, feature = key._native(); assert (known, feature.strip()) == (name, features), (known, feature)"
    )
    for cpu in (key.NATIVE, key.GENERIC):
        subprocess.run([sys.executable, "-c", script], env={**os.environ, **key.variables(cpu)}, check=True)


def test_two_cpus_and_versions_have_different_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {key._compiler(cpu) for cpu in (key.NATIVE, key.GENERIC)}
    key._compiler.cache_clear()
    for name in ("numba", "llvmlite"):
        monkeypatch.setattr(key, "version", lambda each, name=name: "9" if each == name else "1")
        found.add(key._compiler(key.NATIVE))
        key._compiler.cache_clear()
    assert len(found) == 4


def test_what_a_process_compiles_after_its_package_was_replaced_is_for_itself(copied: Path) -> None:
    """It would be the old modules' code under the key of the new text."""
    script = (
        "import sys; from ringplane.compiler.key import key_of; key_of(sys.argv[1]); print(flush=True); input()\n"
        "print(*map(key_of, sys.argv[2:]))"
    )
    # The key of the loop needs neither.
    unchanged, changed = virtqueue.__name__, generator.__name__
    before = keys(copied, unchanged, changed)
    with subprocess.Popen(
        [sys.executable, "-c", script, loop.__name__, unchanged, changed],
        env={**os.environ, "PYTHONPATH": str(copied)},
        cwd=copied,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        path = copied / f"{changed.replace('.', '/')}.py"
        path.with_suffix(".new").write_text(path.read_text() + "\n# Changed.\n")
        path.with_suffix(".new").replace(path)
        said, _ = process.communicate("\n")
    after = keys(copied, unchanged, changed)
    here = said.split()
    assert here[0] == after[0] == before[0]
    assert len({here[1], after[1], before[1]}) == 3
