"""Installed files: the systemd unit, QEMU's description, man pages, and shell completion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from ringplane.cli.commands import COMMANDS, main
from ringplane.options.engine_names import ENGINES

from .test_systemd import analyze

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where a wheel of this tree was installed."""
    folder = tmp_path_factory.mktemp("prefix")
    where = ["--no-deps", "--ignore-installed", "--prefix", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *where, str(REPOSITORY)], check=True)
    return folder


def test_systemd_accepts_the_installed_unit(prefix: Path) -> None:
    analyze("verify", str(prefix / "lib/systemd/system/ringplane@x.service"))


def test_systemd_accepts_the_linked_unit(prefix: Path, tmp_path: Path) -> None:
    """`systemctl link` and `systemctl enable` link it like this."""
    installed = prefix / "lib/systemd/system/ringplane@.service"
    for name in ("ringplane@.service", "ringplane@x.service"):
        (tmp_path / name).symlink_to(installed)
    analyze("verify", str(tmp_path / "ringplane@x.service"))


def test_qemu_finds_the_description(prefix: Path) -> None:
    described = json.loads((prefix / "share/qemu/vhost-user/50-ringplane.json").read_text())
    assert described["type"] == "block"
    assert (prefix / "bin" / Path(described["binary"]).name).exists()


def test_man_pages(prefix: Path) -> None:
    """One page per command, with everything that its --help shows."""
    pages = prefix / "share/man/man1"
    names = dict(commands("ringplane", main))
    assert sorted(page.stem for page in pages.iterdir()) == sorted([*names, "ringplane-vhost-user-blk"])
    for name, command in names.items():
        text = formatted(pages / f"{name}.1")
        assert f"{name} - {command.short_help}" in text
        for parameter in command.params:
            assert all(option in text for option in parameter.opts if option.startswith("-"))
    assert "ringplane-vhost-user-blk [OPTIONS]" in formatted(pages / "ringplane-vhost-user-blk.1")


def commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command and all those below it, by the names of their pages."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from commands(f"{name}-{inner}", found)


def formatted(page: Path) -> str:
    """The output of man(1) without hyphenation; there must be no warnings."""
    if shutil.which("man") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("man is not installed")
        pytest.skip("man is not installed")
    command = ["man", "--warnings", "--no-hyphenation", "--local-file", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MANWIDTH": "200", "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


# compopt, which makes bash complete file names, works only in interactive shells.
COMPLETION = """
compopt() { COMPREPLY=("compopt:$*"); }
source <(_RINGPLANE_COMPLETE=bash_source "$PROGRAM")
COMP_WORDS=("$PROGRAM" "$@") COMP_CWORD=$#
_ringplane_completion "$PROGRAM" "${COMP_WORDS[$COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def complete(tmp_path: Path) -> Callable[..., list[str]]:
    """The completions that bash offers for the last word. Slow modules must not be imported for that."""
    for name in ("numba", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')")
    program = str(Path(sys.executable).with_name("ringplane"))
    environment = {**os.environ, "PROGRAM": program, "PYTHONPATH": str(tmp_path)}

    def offered(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", COMPLETION, "bash", *words], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.stderr == ""
        return done.stdout.split()

    return offered


def test_shell_completes_commands_options_and_choices(complete: Callable[..., list[str]]) -> None:
    assert complete("") == list(COMMANDS)
    assert complete("be") == ["bench"]
    assert complete("serve", "--socket-p") == ["--socket-path"]
    assert complete("serve", "--engine", "") == list(ENGINES)
    assert complete("bench", "--workload", "seq") == ["seqread", "seqwrite"]


@pytest.mark.parametrize(
    "words", [("serve", "--config"), ("serve", "--blk-file"), ("demo", "--image"), ("bench",), ("bench", "--json")]
)
def test_shell_completes_files(complete: Callable[..., list[str]], words: tuple[str, ...]) -> None:
    assert complete(*words, "") == ["compopt:-o", "default"]
