"""The installed systemd unit: systemd rates its exposure as low, and it allows the calls of ringplane."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ringplane.control import sandbox

REPOSITORY = Path(__file__).resolve().parents[2]
UNIT = REPOSITORY / "share" / "systemd" / "ringplane@.service"

# Tenths of what `systemd-analyze security` counts from 0 (nothing is exposed) to 10.
EXPOSURE = 10

# System calls before ringplane confines itself, besides those that the sandbox allows, as seen with strace(1).
AT_THE_START = (
    *("openat", "execve", "clone3", "wait4", "vfork", "socket", "bind", "listen", "connect", "mkdir", "getdents64"),
    *("pipe2", "io_setup", "io_uring_setup", "prlimit64", "seccomp", "landlock_create_ruleset", "landlock_add_rule"),
    *("landlock_restrict_self", "rename", "rmdir", "access", "getuid", "socketpair", "capget", "set_tid_address"),
)


def analyze(*arguments: str) -> str:
    """Run systemd-analyze, which must succeed; it may have only messages that it has of a plain unit as well."""
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is not installed")
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True)
    messages = set(done.stderr.splitlines())
    if messages and arguments[-1].endswith(".service"):
        messages -= messages_of_a_plain_unit(*arguments[:-1])
    assert (done.returncode, messages) == (0, set()), done.stdout + done.stderr
    return done.stdout


def messages_of_a_plain_unit(*arguments: str) -> set[str]:
    """It reads the units that every unit depends on, and newer releases have messages about those of Debian."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain.service")
        plain.write_text("[Service]\nExecStart=/bin/true\n")
        done = subprocess.run(["systemd-analyze", *arguments, str(plain)], capture_output=True, text=True)
    return set(done.stderr.splitlines())


def settings(name: str) -> list[str]:
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def test_the_exposure_is_low() -> None:
    analyze("security", "--offline=true", f"--threshold={EXPOSURE}", str(UNIT))


def calls(words: str) -> set[str]:
    """The system calls in a list of names and @groups."""
    found: set[str] = set()
    for word in words.split():
        found |= group(word) if word.startswith("@") else {word}
    return found


def group(name: str) -> set[str]:
    members = [line.strip() for line in analyze("syscall-filter", name).splitlines()[1:]]
    return calls(" ".join(each for each in members if not each.startswith("#")))


def test_its_filter_allows_all_needed_calls() -> None:
    allowed: set[str] = set()
    for words in settings("SystemCallFilter"):
        allowed = allowed - calls(words[1:]) if words.startswith("~") else allowed | calls(words)
    needed = {*sandbox.ALLOWED, *sandbox.limited(), *AT_THE_START}
    assert needed - allowed == set()
    assert not allowed & {"ptrace", "mount", "bpf", "init_module", "capset", "mlock", "add_key"}


@pytest.mark.parametrize("mistake", [False, True])
def test_only_messages_about_other_units_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: bool
) -> None:
    """A systemd that has a message about a unit of Debian, which every unit depends on."""
    program = tmp_path / "systemd-analyze"
    ours = 'case "$2" in */ours.service) echo "ours.service: a mistake" >&2;; esac\n' if mistake else ""
    program.write_text(f"#!/bin/sh\necho '/usr/lib/systemd/system/theirs.service: a mistake' >&2\n{ours}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    expected = pytest.raises(AssertionError, match=r"ours\.service: a mistake") if mistake else contextlib.nullcontext()
    with expected:
        analyze("verify", str(tmp_path / "ours.service"))
