"""Imports go one way: a folder imports only folders below it, and its modules do not import each other in a circle."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src/ringplane"
ARCHITECTURE = Path(__file__).parents[2] / "docs/architecture.md"

# From bottom to top. A name without a folder is a module of the package's root: `__init__` is what programs import.
ORDER = (
    *("system", "opener", "options", "log", "recordings", "compiler", "native", "metrics", "limits", "guest_memory"),
    *("vhost_user", "virtio", "inflight", "engines", "policies", "block", "dataplane", "device", "session", "control"),
    *("__init__", "api", "client", "driver", "bench", "crash", "cli", "__main__"),
)

# What `ringplane --help` imports beside Python's own modules, and of us: it has to be quick, and must work without
# NumPy, Numba and rich.
HELP_IMPORTS = {"click"}
HELP_FOLDERS = {"cli", "log", "options", "system"}


def module_name(path: Path) -> str:
    """The name below the package: `control.export`; `driver` for driver/__init__.py; `__init__` for the root."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """The package's modules that a file imports, anywhere: also in functions and for type checking only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            # A name of a package is a module of it, or something that its __init__ has.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, inner = name.partition(".")
            if root == "ringplane":
                yield next((each for each in (inner, inner.rpartition(".")[0]) if each in MODULES), "__init__")


IMPORTS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def folder(module: str) -> str:
    return module.partition(".")[0]


def test_the_order_has_every_folder() -> None:
    assert sorted(ORDER) == sorted({folder(module) for module in MODULES})


def test_imports_go_downwards() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if ORDER.index(folder(other)) > ORDER.index(folder(module))
    ]
    assert wrong == [], f"folders from bottom to top: {', '.join(ORDER)}"


def test_modules_of_a_folder_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module: {other for other in others if folder(other) == folder(module)} for module, others in IMPORTS.items()
    }
    # Raises CycleError, which names the modules.
    graphlib.TopologicalSorter(graph).prepare()


def test_imports_of_a_folder_are_found(tmp_path: Path) -> None:
    """In functions, for type checking, of a module or of a name in it, and of the package itself."""
    file = tmp_path / "module.py"
    file.write_text(
        "import os, ringplane.system.libc\n"
        "from ringplane import __version__\n"
        "from ringplane.control import listener\n"
        "from ringplane.driver import Driver\n"
        "if TYPE_CHECKING:\n    from ringplane.block.image import Image\n"
        "def function():\n    from ringplane.cli.serve import serve\n"
    )
    expected = {"system.libc", "__init__", "control.listener", "driver", "block.image", "cli.serve"}
    assert set(imported(file)) == expected


def test_no_two_modules_have_the_same_name() -> None:
    """Of the package or of the tests: in a traceback or a list of open files the name alone says which one it is."""
    tests = Path(__file__).parents[1]
    # The names of the policies that ship are those that users write.
    modules = [path for path in [*PACKAGE.rglob("*.py"), *tests.rglob("*.py")] if path.parent.name != "shipped"]
    names = Counter(path.stem for path in modules)
    assert {name for name, count in names.items() if count > 1} - {"__init__", "conftest"} == set()


def test_architecture_shows_the_same_order() -> None:
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    assert tuple(rows) == ORDER


HELP = """
import json, sys
before = set(sys.modules)
from ringplane.cli import main
sys.argv = ["ringplane", "--help"]
try:
    main()
finally:
    print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""


def test_help_imports_only_what_is_quick() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120)
    assert "Usage: ringplane" in done.stdout
    names = [name.split(".") for name in json.loads(done.stderr.splitlines()[-1])]
    others = {name[0] for name in names} - sys.stdlib_module_names
    assert others - {"ringplane"} == HELP_IMPORTS
    assert {name[1] for name in names if name[0] == "ringplane" and len(name) > 1} <= HELP_FOLDERS
