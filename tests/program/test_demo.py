"""`ringplane demo`: verifies, measures, leaves nothing behind, and fails when a byte is wrong."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ringplane.cli.demo import demo
from ringplane.driver import load

from .interrupts import children, wait_until

QUICK = ["--size", "8M", "--seconds", "0.1"]


def test_demo_verifies_and_measures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ringplane", "demo", "--image", str(tmp_path / "disk.img"), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified: all 16,384 sectors" in done.stdout
    assert "no mismatch, no error" in done.stdout
    for text in ("random read", "70/30, verified", "CPU us per I/O", "serving a new disk of 8 MiB"):
        assert text in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_byte_makes_the_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "disk.img"
    fill = load.fill

    def fill_and_damage(*args: Any, **options: Any) -> Any:
        result = fill(*args, **options)
        with image.open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"damaged")
        return result

    monkeypatch.setattr(load, "fill", fill_and_damage)
    done = CliRunner().invoke(demo, ["--image", str(image), *QUICK])
    assert done.exit_code == 1
    # One or more: later loads may also read the damaged sector before they write it.
    text = " ".join(done.output.split())
    assert re.search(r"FAILED: \d+ sectors wrong, 0 requests failed; the first: sector 2048", text), text
    assert not image.exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--size", "900T"], r"Error: .*: the images need 900 TiB, but only .* are free; choose a smaller --size"),
        (["--image", "/nowhere/x"], "Error: /nowhere: is not a folder; create it or choose another path"),
    ],
)
def test_what_cannot_be_written_is_refused(options: list[str], line: str) -> None:
    done = CliRunner().invoke(demo, options)
    assert done.exit_code == 1
    assert re.fullmatch(line, done.output.strip())


def test_a_failed_write_ends_it_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "a write failed: writing sector 0 ended with status 1")

    monkeypatch.setattr(load, "fill", fail)
    done = CliRunner().invoke(demo, ["--image", str(tmp_path / "disk.img"), *QUICK])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("Error: the disk failed: a write failed: ")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_compiles_nothing() -> None:
    """It uses the ordinary cache, as the first run did."""
    command = [sys.executable, "-m", "ringplane", "demo", *QUICK]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"})
    assert "compil" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a path that is short enough for sockets in any process of a test run."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["compiling", "serving"])
def test_a_signal_ends_it_and_leaves_nothing(
    tmp_path: Path, temporary: Path, stage: str, number: signal.Signals
) -> None:
    """The exit status is that of a command that a signal has ended, and one line says so."""
    environment = os.environ | {"TMPDIR": str(temporary)}
    if stage == "compiling":
        environment["RINGPLANE_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "ringplane", "demo", "--size", "8M", "--seconds", "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        while not (line := process.stdout.readline()).startswith(stage):
            assert line
        wait_until(lambda: bool(children(process.pid)))
        (child,) = children(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.startswith(f"interrupted by {number.name}; ")
    assert len(errors.splitlines()) == 1
    assert not Path(f"/proc/{child}").exists()
    assert list(temporary.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_text("mine")
    done = CliRunner().invoke(demo, ["--image", str(image)])
    assert done.exit_code == 1
    assert "exists already" in done.output
    assert image.read_text() == "mine"


def test_invalid_sizes(tmp_path: Path) -> None:
    for size in ("1M", str((4 << 20) + 512)):
        done = CliRunner().invoke(demo, ["--image", str(tmp_path / "disk.img"), "--size", size])
        assert done.exit_code == 1
        assert "not a multiple of 4096 of at least 4M" in done.output
    assert list(tmp_path.iterdir()) == []


def test_invalid_seconds() -> None:
    for seconds in ("nan", "inf", "0", "-1", "x"):
        done = CliRunner().invoke(demo, ["--seconds", seconds])
        assert done.exit_code == 2
        assert f"Invalid value for '--seconds': '{seconds}'" in done.output
