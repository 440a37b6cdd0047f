"""The tests run with pytest-xdist or without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_without_xdist() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run([*command, str(Path(__file__))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 test collected" in done.stdout
