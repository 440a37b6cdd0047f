"""The cache of compiled code: its folder, deleted files, and supported versions of Numba."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest

from ringplane.compiler import cache, jit, numba_version

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(tmp_path))
    cache.find_cache.cache_clear()
    yield tmp_path
    cache.find_cache.cache_clear()


def test_only_old_versions_and_no_other_files_are_deleted(base: Path) -> None:
    strangers = [base / name for name in ("documents", "data-plane", "data-plane-" + "x" * 20, "0" * 20)]
    versions = [base / f"data-plane-{number:020x}" for number in range(8)]
    for age, folder in enumerate([*strangers, *versions]):
        folder.mkdir()
        os.utime(folder, (age, age))
    (base / "file").touch()
    current = cache.cache_directory()
    current.mkdir()
    cache.forget_old_versions()
    assert set(base.iterdir()) == {*strangers, base / "file", current, *versions[-(cache.KEPT_VERSIONS - 1) :]}


def test_a_folder_that_others_may_write_to_is_not_used(base: Path) -> None:
    base.chmod(0o777)
    assert cache.cache_directory().parent != base


def test_the_folder_is_private_and_named_after_the_version(base: Path) -> None:
    assert cache.cache_directory() == base / cache.version_folder()
    assert cache.FOLDER.fullmatch(cache.version_folder())


# Unusable folders


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only place for temporary folders."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(cache, "_temporary_places", lambda: [str(place)])
    cache.find_cache.cache_clear()
    yield place
    cache.find_cache.cache_clear()


def obstacle(monkeypatch: pytest.MonkeyPatch, base: Path) -> str:
    """The message about a requested folder that is unusable; a temporary one takes its place."""
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(base))
    found = cache.find_cache()
    assert found.folder is not None
    assert found.folder.parent.name.startswith(cache.TEMPORARY)
    assert "\n" not in found.short_lived
    assert found.short_lived.startswith(f"RINGPLANE_CACHE_DIR={base} ")
    return found.short_lived.removeprefix(f"RINGPLANE_CACHE_DIR={base} ")


def test_a_file(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert obstacle(monkeypatch, tmp_path / "file") == "is not a folder; name one"
    cache.find_cache.cache_clear()
    assert obstacle(monkeypatch, tmp_path / "file" / "cache") == "is not a folder; name one"


def test_a_folder_that_is_writable_by_others(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    assert obstacle(monkeypatch, tmp_path).endswith("whose code would run here; chmod go-w it")
    # The advice helps.
    tmp_path.chmod(0o775 & ~0o022)
    cache.find_cache.cache_clear()
    assert cache.find_cache() == cache.Cache(tmp_path / cache.version_folder())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make folders of other users")
def test_a_folder_of_another_user(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    os.chown(tmp_path, 54321, 54321)
    assert obstacle(monkeypatch, tmp_path) == ("belongs to user 54321, whose code would run here; chown it to user 0")


def refuse_files(code: int) -> Any:
    def refuse(**options: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def test_a_full_file_system(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    def allocate(fd: int, start: int, size: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{tmp_path}/full/"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert obstacle(monkeypatch, tmp_path / "full") == "has no room for 4 MiB (No space left on device); make room"


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    if os.getuid() != 0:
        pytest.skip("only root can mount")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_file_system(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with read_only(base):
        text = obstacle(monkeypatch, base)
    assert text == f"cannot be written by user {os.geteuid()} (Read-only file system)"


def test_a_read_only_cache_with_compiled_code_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For example in a container image, if ringplane was started once when it was built."""
    base = tmp_path / "base"
    filled = base / cache.version_folder() / "ringplane"
    filled.mkdir(parents=True)
    (filled.parent / "data-plane.complete").touch()
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(base))
    with read_only(base):
        cache.find_cache.cache_clear()
        assert cache.find_cache() == cache.Cache(base / cache.version_folder())
        assert cache.is_cached()
    cache.find_cache.cache_clear()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    """expanduser() keeps the ~ for a user that is not in passwd(5); a folder of that name must not be created."""
    for name in ("RINGPLANE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    found = cache.find_cache()
    assert found.short_lived == (
        "no home folder is known; set RINGPLANE_CACHE_DIR to a folder that this user can write to"
    )
    assert found.folder is not None
    assert found.folder.parent.parent == temporary
    assert list(tmp_path.iterdir()) == [temporary]


def test_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse_files(errno.EROFS))
    found = cache.find_cache()
    assert found.folder is None
    assert not cache.is_cached()
    cache.forget_old_versions()
    cache.remove_temporary_cache()


# Numba


def test_the_checked_versions_match_the_package_requirement() -> None:
    bound = re.search(r'"numba>=([\d.]+),<([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert bound
    assert bound[1] == "{}.{}".format(*numba_version.OLDEST)
    assert bound[2] == f"{numba_version.NEWEST[0]}.{numba_version.NEWEST[1] + 1}"


@pytest.mark.parametrize("version", ["0.61.0", "0.68.1"])
def test_a_known_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str) -> None:
    monkeypatch.setattr(numba, "__version__", version)
    numba_version.check(lambda: False)
    assert not caplog.text


def test_an_old_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba, "__version__", "0.59.1")
    with pytest.raises(
        numba_version.UnsupportedNumba, match=r"Numba 0\.59\.1 \(it is too old\); .* pip install 'numba"
    ):
        numba_version.check(lambda: True)


def test_a_new_numba_that_works(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(numba, "__version__", "0.99.0rc1")
    numba_version.check(jit._works)
    assert "Numba 0.99.0rc1 is newer than what ringplane was tested with (0.61 to 0.68)" in caplog.text


@pytest.mark.parametrize("missing", ["numba.core.codegen.JITCodeLibrary", "numba.core.types.misc.unliteral"])
@pytest.mark.parametrize(
    "command", [["-m", "ringplane", "serve"], ["-c", "import ringplane.cli as c; c.vhost_user_blk()"]]
)
def test_an_incompatible_numba_is_a_one_line_error(tmp_path: Path, missing: str, command: list[str]) -> None:
    module, _, name = missing.rpartition(".")
    (tmp_path / "sitecustomize.py").write_text(f"import {module}\ndel {module}.{name}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = ["--blk-file", "image", "--create", "1M", "--socket-path", "socket"]
    done = subprocess.run(
        [sys.executable, *command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"Error: ringplane does not work with Numba \S+ \(.*\); install another one: pip install 'numba.*'\n",
        done.stderr,
    )
    assert not (tmp_path / "image").exists()
