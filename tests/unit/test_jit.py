"""The cache of compiled code: which folder is used, and which files are deleted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.native import jit


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(tmp_path))
    jit.cache_directory.cache_clear()
    yield tmp_path
    jit.cache_directory.cache_clear()


def test_only_old_versions_and_no_other_files_are_deleted(base: Path) -> None:
    strangers = [base / name for name in ("documents", "data-plane", "data-plane-" + "x" * 20, "0" * 20)]
    versions = [base / f"data-plane-{number:020x}" for number in range(8)]
    for age, folder in enumerate([*strangers, *versions]):
        folder.mkdir()
        os.utime(folder, (age, age))
    (base / "file").touch()
    current = jit.cache_directory()
    current.mkdir()
    jit.forget_old_versions()
    assert set(base.iterdir()) == {*strangers, base / "file", current, *versions[-(jit.KEPT_VERSIONS - 1) :]}


def test_a_folder_that_others_may_write_to_is_not_used(base: Path) -> None:
    base.chmod(0o777)
    assert jit.cache_directory().parent != base


def test_the_folder_is_private_and_named_after_the_version(base: Path) -> None:
    assert jit.cache_directory() == base / jit.version_folder()
    assert jit.FOLDER.fullmatch(jit.version_folder())
