"""A process that compiles: started ahead, given its arguments, ended when nobody needs it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ringplane.compiler import apart
from ringplane.compiler.cache import Place
from ringplane.system.signals import Interrupted, Signals

# Reads its arguments as `run_child` does.
MODULE = "import sys, pathlib; pathlib.Path(sys.argv[1], 'got').write_text(sys.stdin.read())"
NAME = "made_for_test_apart"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[subprocess.Popen[bytes]]:
    """The processes that are started, for a module that is not in the cache."""
    (tmp_path / f"{NAME}.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(apart, "place", lambda: Place(tmp_path))
    monkeypatch.setattr(apart, "is_cached", lambda module: False)
    processes = []
    start = apart._start

    def start_one(*arguments: object) -> subprocess.Popen[bytes]:
        processes.append(start(*arguments))  # type: ignore[arg-type]
        return processes[-1]

    monkeypatch.setattr(apart, "_start", start_one)
    return processes


def test_the_process_started_ahead_compiles(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    with apart.ahead(NAME):
        assert len(started) == 1
        apart.compile_apart(NAME, arguments=["a", "b"])
    assert [each.returncode for each in started] == [0]
    assert (tmp_path / "got").read_text().split() == [apart.GO, "a", "b"]


def test_another_module_has_a_process_of_its_own(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    with apart.ahead("made_for_nothing"):
        apart.compile_apart(NAME)
    assert started[1].returncode == 0
    assert started[0].returncode != 0


def test_an_unused_process_is_ended(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), apart.ahead(NAME):
        raise ValueError("wrong")
    assert [each.returncode for each in started] == [-9]
    assert not (tmp_path / "got").exists()


def test_what_is_cached_starts_nothing(started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "is_cached", lambda module: True)
    with apart.ahead(NAME):
        pass
    assert started == []


def test_an_interrupted_process_is_ended(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    class Interrupting(Signals):
        def wait(self, fd: int, timeout: float | None = None) -> bool:
            raise Interrupted(2)

    (tmp_path / f"{NAME}.py").write_text("import time; time.sleep(1000)")
    with pytest.raises(Interrupted):
        apart.compile_apart(NAME, Interrupting())
    assert [each.returncode for each in started] == [-9]
