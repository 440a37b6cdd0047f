"""`ringplane compile`, and what is compiled after a change."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringplane.cli import compilation
from ringplane.compiler import apart, cache, key
from ringplane.driver import generator, virtqueue
from ringplane.options.sizes import format_size
from ringplane.system.signals import NONE

from .counting import compiled, counting
from .interrupts import children, wait_until

SOON = 300.0
COMMAND = [sys.executable, "-m", "ringplane", "compile"]


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)], env=os.environ | environment, capture_output=True, text=True, umask=0o077
    )


@pytest.fixture(scope="module", autouse=True)
def own_cache() -> None:
    """The cache of all tests has everything, and what follows copies it."""
    done = run()
    assert done.returncode == 0, done.stderr


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    folder = tmp_path / "new" / "filled"
    done = run("--into", folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def modules() -> Iterator[tuple[Path, str]]:
    for path in key.PACKAGE.rglob("*.py"):
        yield path, ".".join(path.relative_to(key.PACKAGE.parent).with_suffix("").parts)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_filled_for_all_users(filled: Path) -> None:
    assert stat.S_IMODE(filled.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in filled.iterdir()} == {0o644}
    for what in (cache.DATA_PLANE, cache.DRIVER):
        assert cache.is_complete(filled, what, key.NATIVE)
        assert not cache.is_complete(filled, what, key.GENERIC)


def test_every_unit_is_compiled(filled: Path) -> None:
    """All engines, sources and layers, although this machine may not have some of them."""
    units = {
        f"{module}.{name}"
        for path, module in modules()
        for name in re.findall(r"^@unit\ndef (\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(units) > 10
    assert units <= {name.partition("-")[0] for name in names(filled)}


def test_a_complete_folder_stays_as_it_is(filled: Path) -> None:
    before = {path: path.stat() for path in filled.iterdir()}
    done = run("--into", filled)
    size = sum(status.st_size for status in before.values())
    assert done.returncode == 0
    assert done.stdout.startswith(f"compiled for this CPU: {len(before)} files, {format_size(size)}, in {filled}")
    assert {path: path.stat() for path in filled.iterdir()} == before


def test_there_is_a_module_for_everything_that_is_compiled_ahead() -> None:
    """Each module with a main function that a child process runs."""
    assert {module for path, module in modules() if "    run_child(" in path.read_text()} == {
        cache.DATA_PLANE,
        cache.DRIVER,
    }


@pytest.mark.parametrize("into", ["/dev/null", "/dev/null/folder"])
def test_what_is_not_a_folder_is_refused(into: str) -> None:
    done = run("--into", into)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {into} is not a folder; name one\n"


def test_a_folder_from_which_nothing_would_be_loaded_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = run("--into", tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("can be written by other users, whose code would run here; chmod go-w it\n")
    assert not names(tmp_path)


def test_without_a_home_a_folder_must_be_named() -> None:
    done = run(RINGPLANE_CACHE_DIR="", XDG_CACHE_HOME="relative")
    assert done.returncode == 1
    assert done.stderr == "Error: no home folder is known; give --into FOLDER\n"


def test_two_folders_are_too_many(tmp_path: Path) -> None:
    done = run("--into", tmp_path, "--shared")
    assert done.returncode == 2
    assert "give either --into FOLDER or --shared" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "new" / "folder"
    environment = os.environ | {"RINGPLANE_CACHE_DIR": str(tmp_path / "empty")}
    command = [*COMMAND, "--into", str(folder)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: any(folder.glob(".compiling-*/*.code")))
        (compiler,) = children(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=SOON)
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == f"interrupted by {number.name}; nothing was added to {folder}"
    assert not Path(f"/proc/{compiler}").exists()
    assert not list(tmp_path.iterdir())


def test_what_is_incomplete_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_half(what: str, signals: object, units: object, folder: Path, cpu: str) -> None:
        (folder / "some.code").touch()

    monkeypatch.setattr(compilation, "compile_apart", compile_half)
    monkeypatch.setattr(cache, "folders", list)
    with pytest.raises(compilation.Incomplete), compilation.made(tmp_path / "folder", 0o755):
        compilation.fill(tmp_path / "folder", key.NATIVE, NONE)
    assert not list(tmp_path.iterdir())


# Changes


Serve = Callable[..., Path]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The folder with a copy of the package, with other modification times."""
    folder = tmp_path / "copied"
    shutil.copytree(key.PACKAGE, folder / "ringplane", ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*.py"):
        os.utime(path, (1, 1))
    return folder


@pytest.fixture
def start(copied: Path, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """A start of `serve` from the copy until it listens; the functions that were compiled."""

    def start() -> list[str]:
        command = [sys.executable, "-m", "ringplane", "serve", "--socket-path", "socket"]
        with subprocess.Popen(
            [*command, "--blk-file", "image", "--create", "1M"],
            env=os.environ | counting(copied),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            assert any(line.startswith("listening on") for line in process.stdout)
            process.terminate()
        assert process.returncode == 0
        return compiled(copied)

    return start


def test_another_checkout_and_a_change_of_the_command_line_compile_nothing(
    copied: Path, start: Callable[[], list[str]]
) -> None:
    serve = copied / "ringplane/cli/serve.py"
    serve.write_text(serve.read_text().replace('"listening on ', '"listening on the socket '))
    (copied / "README.md").touch()
    assert start() == []


def test_a_changed_constant_compiles_what_depends_on_it(copied: Path, tmp_path: Path) -> None:
    """The load generator knows sectors, the function that reads its used ring does not."""
    blk = copied / "ringplane/virtio/blk.py"
    text = blk.read_text()
    assert "SECTOR = 512" in text
    blk.write_text(text.replace("SECTOR = 512", "SECTOR = 1024"))
    folder = tmp_path / "code"
    folder.mkdir()
    for path in cache.own().glob("*.code"):
        shutil.copy(path, folder)
    before = names(folder)
    command = [sys.executable, "-m", cache.DRIVER, folder]
    subprocess.run(command, input=apart.GO.encode(), env=os.environ | counting(copied), check=True)
    new = {name.partition("-")[0] for name in names(folder) - before}
    assert new == {f"{generator.__name__}.drive", cache.DRIVER}
    assert f"{generator.__name__}.drive" in compiled(copied)
    assert f"{virtqueue.__name__}.reap_at" not in compiled(copied)
