"""What an installation brings beside the modules: programs, the systemd unit, QEMU's description."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .test_systemd import analyze

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel of this tree was installed to."""
    folder = tmp_path_factory.mktemp("prefix")
    where = ["--no-deps", "--ignore-installed", "--prefix", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *where, str(REPOSITORY)], check=True)
    return folder


def test_systemd_accepts_the_installed_unit(prefix: Path) -> None:
    analyze("verify", str(prefix / "lib/systemd/system/ringplane@x.service"))


def test_systemd_accepts_the_unit_where_it_is_linked(prefix: Path, tmp_path: Path) -> None:
    """As `systemctl link` and `systemctl enable` do it."""
    installed = prefix / "lib/systemd/system/ringplane@.service"
    for name in ("ringplane@.service", "ringplane@x.service"):
        (tmp_path / name).symlink_to(installed)
    analyze("verify", str(tmp_path / "ringplane@x.service"))


def test_qemu_finds_the_description(prefix: Path) -> None:
    described = json.loads((prefix / "share/qemu/vhost-user/50-ringplane.json").read_text())
    assert described["type"] == "block"
    assert (prefix / "bin" / Path(described["binary"]).name).exists()
