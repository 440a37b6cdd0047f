"""The cache of compiled code: its folder, deleted files, and supported versions of Numba."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest

from ringplane.compiler import cache, jit, key, numba_version, pipeline

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forgotten_place() -> Iterator[None]:
    """A process finds the place for compiled code only once."""
    cache.place.cache_clear()
    yield
    cache.place.cache_clear()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / "base"
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(base))
    return base


def test_only_old_versions_and_no_other_files_are_deleted(base: Path) -> None:
    assert cache.place() == cache.Place(base)
    name, number = "ringplane.dataplane.loop.run-01234567", cache.KEPT_VERSIONS + 3
    strangers = [base / each for each in ("documents", "run.code", f"{name}-abc.code", f"{name}-{0:020x}.txt")]
    others = [base / f"{name[:-1]}8-{0:020x}.code", base / f"{name}-{0:020x}.complete"]
    versions = [base / f"{name}-{each:020x}.code" for each in range(number)]
    stranger, staging, abandoned = base / "folder", base / ".compiling-a", base / "a.code.12.unfinished"
    fresh = [base / ".compiling-b", base / "b.code.12.unfinished"]
    for folder in (stranger, staging, fresh[0]):
        folder.mkdir()
        (folder / "run.code").touch()
    fresh[1].touch()
    for age, path in enumerate([*strangers, *others, *versions, stranger, staging, abandoned]):
        if not path.is_dir():
            path.touch()
        os.utime(path, (age, age))
    cache.forget_old_versions()
    assert set(base.iterdir()) == {*strangers, *others, *versions[-cache.KEPT_VERSIONS :], stranger, *fresh}


def test_what_is_loaded_is_not_old(base: Path) -> None:
    cache.write("name", b"content")
    os.utime(base / "name", (1, 1))
    assert cache.read("name") == b"content"
    assert (base / "name").stat().st_mtime > 1


def test_the_folder_is_private_and_files_in_it_appear_as_a_whole(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("name", b"content")
    assert stat.S_IMODE(base.stat().st_mode) == 0o700
    assert [path.name for path in base.iterdir()] == ["name"]

    def fill_up(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    cache.write("other", b"content")
    assert [path.name for path in base.iterdir()] == ["name"]


def mark(folder: Path, *names: str, cpu: str = key.NATIVE) -> None:
    (folder / cache.mark_name(cache.DATA_PLANE, cpu)).write_text("\n".join(names))


@pytest.mark.parametrize("cpu", [key.NATIVE, key.GENERIC])
def test_what_is_marked_is_cached_while_all_its_files_exist(base: Path, cpu: str) -> None:
    base.mkdir()
    mark(base, "a.code", "b.code", cpu=cpu)
    (base / "a.code").touch()
    assert not cache.is_cached()
    (base / "b.code").touch()
    assert cache.is_cached()
    assert not cache.is_cached(cache.DRIVER)


def test_damaged_code_is_compiled_again(base: Path) -> None:
    function: Any = jit._increment

    def call() -> tuple[int, bool]:
        """The result, and whether the code was loaded."""
        whole = jit.Whole(function.__wrapped__)
        loaded = whole._read() is not None
        return whole(41), loaded

    assert call() == (42, False)
    (saved,) = base.iterdir()
    code = saved.read_bytes()
    assert call() == (42, True)
    for part in (b"", code[: len(code) // 2]):
        saved.write_bytes(part)
        assert call() == (42, False)
        assert call() == (42, True)


# Unusable folders


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only place for temporary folders."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(cache, "_temporary_places", lambda: [str(place)])
    monkeypatch.setattr(cache, "_temporary", None)
    return place


def obstacle(monkeypatch: pytest.MonkeyPatch, base: Path) -> str:
    """The message about a requested folder that is unusable; a temporary one takes its place."""
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(base))
    found = cache.place()
    assert found.folder is not None
    assert found.folder.name.startswith(cache.TEMPORARY)
    assert base not in cache.folders()
    assert found.folder in cache.folders()
    assert cache.variables() == {"RINGPLANE_CACHE_DIR": str(found.folder)}
    assert "\n" not in found.short_lived
    assert found.short_lived.startswith(f"RINGPLANE_CACHE_DIR={base} ")
    return found.short_lived.removeprefix(f"RINGPLANE_CACHE_DIR={base} ")


def test_a_file(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert obstacle(monkeypatch, tmp_path / "file") == "is not a folder; name one"
    cache.place.cache_clear()
    assert obstacle(monkeypatch, tmp_path / "file" / "cache") == "is not a folder; name one"


def test_a_folder_that_is_writable_by_others(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    assert obstacle(monkeypatch, tmp_path).endswith("whose code would run here; chmod go-w it")
    # The advice helps.
    tmp_path.chmod(0o775 & ~0o022)
    cache.place.cache_clear()
    assert cache.place() == cache.Place(tmp_path)


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
    monkeypatch.setenv("RINGPLANE_CACHE_DIR", str(tmp_path / "full"))
    found = cache.place()
    assert found.folder is not None
    assert found.folder.parent == temporary
    assert found.short_lived.endswith("/full has no room for 4 MiB (No space left on device); make room")


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


def test_code_is_saved_in_the_users_cache_if_the_chosen_one_is_only_for_reading(
    monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    """For example that of a container image, of another version."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    base.mkdir()
    (base / "old").write_text("chosen")
    with read_only(base):
        assert cache.read("old") == b"chosen"
        assert not cache.is_cached()
        assert list(tmp_path.iterdir()) == [base]
        assert cache.place() == cache.Place(tmp_path / "home/ringplane")
        cache.write("new", b"home")
        assert cache.read("new") == b"home"
        mark(tmp_path / "home/ringplane")
        assert cache.is_cached()


def test_a_read_only_file_system(monkeypatch: pytest.MonkeyPatch, temporary: Path, base: Path) -> None:
    """The home too."""
    base.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    with read_only(base):
        found = cache.place()
    assert found.folder is not None
    assert found.folder.parent == temporary
    assert found.short_lived == (
        f"{base}/ringplane cannot be written by user {os.geteuid()} (Read-only file system); "
        "set RINGPLANE_CACHE_DIR to a folder that this user can write to"
    )


def test_a_read_only_cache_with_compiled_code_is_used(base: Path) -> None:
    """For example in a container image."""
    base.mkdir()
    mark(base)
    with read_only(base):
        assert cache.is_cached()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    """expanduser() keeps the ~ for a user that is not in passwd(5); a folder of that name must not be created."""
    for name in ("RINGPLANE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    found = cache.place()
    assert found.short_lived == (
        "no home folder is known; set RINGPLANE_CACHE_DIR to a folder that this user can write to"
    )
    assert found.folder is not None
    assert found.folder.parent == temporary
    assert list(tmp_path.iterdir()) == [temporary]


def test_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, temporary: Path, base: Path) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse_files(errno.EROFS))
    assert cache.place().folder is None
    cache.write("name", b"content")
    assert cache.read("name") is None
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
    numba_version.check(lambda: jit.works(pipeline))
    assert "Numba 0.99.0rc1 is newer than what ringplane was tested with (0.61 to 0.68)" in caplog.text


@pytest.mark.parametrize("missing", ["numba.core.codegen.JITCodeLibrary", "numba.core.types.misc.unliteral"])
@pytest.mark.parametrize(
    "command", [["-m", "ringplane", "serve"], ["-c", "import ringplane.cli as c; c.vhost_user_blk()"]]
)
def test_an_incompatible_numba_is_a_one_line_error(tmp_path: Path, missing: str, command: list[str]) -> None:
    module, _, name = missing.rpartition(".")
    (tmp_path / "sitecustomize.py").write_text(f"import {module}\ndel {module}.{name}\n")
    # Saved code would be served: it does not need Numba.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "RINGPLANE_CACHE_DIR": str(tmp_path / "empty")}
    options = ["--blk-file", "image", "--create", "1M", "--socket-path", "socket"]
    done = subprocess.run(
        [sys.executable, *command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"\S+ ringplane: INFO: compiling the data plane; .*\n"
        r"Error: ringplane does not work with Numba \S+ \(.*\); install another one: pip install 'numba.*'\n",
        done.stderr,
    )
    assert not (tmp_path / "image").exists()
