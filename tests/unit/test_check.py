"""`ringplane check` lists all problems and creates nothing; `serve` starts exactly if there are none."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ringplane
from ringplane.block import mapped_image
from ringplane.block.image import ImageError
from ringplane.cli.check import check
from ringplane.control.config import ConfigError, examine, read_config
from ringplane.control.listener import ListenError
from ringplane.control.rehearsal import find_problems
from ringplane.system import huge_pages
from ringplane.system.open_files import FEWEST_FILES

DISK = '[[disk]]\nimage = "a.img"\nsocket-path = "a.sock"\nnum-queues = 1\n'
CREATED = f'{DISK}create = "1M"\n'
NOBODY = 65534


def checked(folder: Path, text: str) -> Result:
    """Check a configuration file; its folder must not change."""
    path = folder / "disks.toml"
    path.write_text(text)
    before = everything(folder)
    done = CliRunner().invoke(check, [str(path)])
    assert everything(folder) == before
    return done


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """The files in a folder, with their times of modification and sizes."""
    return {path.name: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.iterdir()}


def serve(path: Path) -> ringplane.Server:
    config = read_config(path)
    return ringplane.serve_all(config.disks, config.io_threads)


def image(folder: Path, size: int = 1 << 20) -> None:
    with open(folder / "a.img", "wb") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    "text",
    [
        CREATED,
        f'[[io-thread]]\nengine = "aio"\n[[io-thread]]\n{CREATED}',
        f"{CREATED}features = {{ write-zeroes = true, discard = false }}",
        f'{CREATED}zoned = "64K"',
        f"{CREATED}read-only = true",
    ],
    ids=["one disk", "two threads", "features", "zoned", "read-only"],
)
def test_serve_starts_if_there_are_no_problems(tmp_path: Path, text: str) -> None:
    # The first time the image is created, then it exists.
    for _ in range(2):
        done = checked(tmp_path, text)
        threads = "2 I/O threads" if "io-thread" in text else "1 I/O thread"
        assert (done.exit_code, done.output) == (0, f"ok: 1 disk, {threads}\n")
        serve(tmp_path / "disks.toml").stop()


def nothing(folder: Path) -> None:
    pass


def folder_as_image(folder: Path) -> None:
    (folder / "a.img").mkdir()


def odd_image(folder: Path) -> None:
    image(folder, 1 << 20 | 512)


def data_without_zones(folder: Path) -> None:
    (folder / "a.img").write_bytes(b"data" * 65536)


def damaged_zones(folder: Path) -> None:
    image(folder)
    (folder / "a.img.zones").write_bytes(b"no zones")


def link_to_nothing(folder: Path) -> None:
    (folder / "a.img").symlink_to(folder / "nothing")


def file_as_socket(folder: Path) -> None:
    image(folder)
    (folder / "a.sock").touch()


@pytest.mark.parametrize(
    ("make", "text", "words"),
    [
        (nothing, DISK, "a.img: no such file"),
        (folder_as_image, DISK, "a.img: neither a regular file nor a block device"),
        (odd_image, f"{DISK}block-size = 4096", "is not a multiple of the block size 4096"),
        (nothing, f"{DISK}create = 513", "is not a multiple of the block size 512"),
        (nothing, f'{DISK}create = "9999999T"', "cannot be made "),
        (
            nothing,
            '[[disk]]\nimage = "no/a.img"\nsocket-path = "a.sock"\ncreate = "1M"',
            "no does not exist; create it or choose another path",
        ),
        (link_to_nothing, CREATED, "is a symbolic link whose target does not exist"),
        (nothing, CREATED.replace("a.sock", "no/a.sock"), "no does not exist; create it or choose another path"),
        (nothing, CREATED.replace("a.sock", "disks.toml/a"), "disks.toml does not exist; create it or choose"),
        (nothing, CREATED.replace("a.sock", "a" * 200), "the path of a socket has at most 107 bytes"),
        (file_as_socket, DISK, "a.sock: exists and is not a socket"),
        (data_without_zones, f'{DISK}zoned = "64K"', "has data, but "),
        (damaged_zones, f'{DISK}zoned = "64K"', "a.img.zones: "),
        (damaged_zones, DISK, "a.img.zones"),
        (nothing, f"{CREATED}features = {{ lifetime = true }}", "lifetime cannot be offered"),
        (nothing, f'{CREATED}engine = "null"\nfeatures = {{ discard = true }}', "discard cannot be offered"),
        (nothing, f"{CREATED}read-only = true\nfeatures = {{ write-zeroes = true }}", "write-zeroes cannot be offered"),
        (nothing, f"{DISK}colour = 1", 'unknown key "colour"'),
    ],
)
def test_serve_reports_the_same_problem(tmp_path: Path, make: object, text: str, words: str) -> None:
    """It does not start either, with the same message."""
    assert callable(make)
    make(tmp_path)
    done = checked(tmp_path, text)
    assert done.exit_code == 1
    assert words in done.output
    with pytest.raises((ConfigError, ImageError, ListenError, OSError)) as refusal:
        serve(tmp_path / "disks.toml")
    assert str(refusal.value) in done.output


def test_all_problems_are_listed(tmp_path: Path) -> None:
    (tmp_path / "b.sock").touch()
    second = '[[disk]]\nimage = "b.img"\nsocket-path = "b.sock"\nserial = 1\n'
    done = checked(tmp_path, f"colour = 1\n[[io-thread]]\npoll-us = -1\n{DISK}{second}{CREATED}")
    assert done.exit_code == 1
    found = [line.removeprefix(f"{tmp_path / 'disks.toml'}: ") for line in done.output.splitlines()]
    for words in (
        'unknown key "colour"',
        "[[io-thread]] 1: poll-us: ",
        "[[disk]] 2 (b.img): serial: ",
        "[[disk]] 3 (a.img): socket-path: ",
        "[[disk]] 3 (a.img): image: is also the image of [[disk]] 1 (a.img)",
        f"{tmp_path / 'a.img'}: no such file",
        f"{tmp_path / 'b.img'}: no such file",
        f"{tmp_path / 'b.sock'}: exists and is not a socket",
    ):
        assert any(line.startswith(words) for line in found), (words, found)


def test_a_disk_that_is_being_served_is_in_use(tmp_path: Path) -> None:
    image(tmp_path)
    with ringplane.serve(tmp_path / "a.img", tmp_path / "a.sock", num_queues=1):
        done = checked(tmp_path, DISK)
    assert "a.img: is in use already" in done.output
    assert "a.sock: another process is listening there" in done.output


def test_missing_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(check, [str(tmp_path / "none.toml")])
    assert (done.exit_code, done.output) == (
        1,
        f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory\n",
    )


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that all users can reach."""
    with tempfile.TemporaryDirectory(prefix="ringplane-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_missing_permissions_are_problems(everybodys: Path) -> None:
    image(everybodys)
    os.chmod(everybodys / "a.img", 0o644)
    path = everybodys / "disks.toml"
    path.write_text(f'{DISK}[[disk]]\nimage = "b.img"\nsocket-path = "b.sock"\ncreate = "1M"')
    found = problems_of_nobody(path)
    assert f"{everybodys / 'a.img'}: may not be opened for writing" in found
    assert f"{everybodys / 'a.sock'}: user 65534 may not create a socket in the folder" in found
    assert f"{everybodys / 'b.img'}: user 65534 may not create a file in the folder" in found


def problems_of_nobody(path: Path) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write, "\n".join(find_problems(examine(path)[0])).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, encoding="utf-8") as text:
        return text.read()


# What the process needs


def run_check(folder: Path, text: str, files: int) -> tuple[int, list[str]]:
    """`ringplane check` in a process that may open only so many files: its exit status and messages."""
    (folder / "disks.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "ringplane", "check", "disks.toml"],
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("files", [8, FEWEST_FILES - 1])
def test_too_few_open_files(tmp_path: Path, files: int) -> None:
    """The message is that of serve."""
    message = f"Error: this process may open only {files} files; raise the limit (ulimit -n, systemd's LimitNOFILE=)"
    assert run_check(tmp_path, CREATED, files) == (1, [message])


def test_too_few_open_files_for_all_disks(tmp_path: Path) -> None:
    image(tmp_path)
    disks = "".join(
        f'[[disk]]\nimage = "a.img"\nsocket-path = "{n}.sock"\nread-only = true\n' for n in range(FEWEST_FILES)
    )
    status, problems = run_check(tmp_path, disks, FEWEST_FILES)
    assert status == 1
    assert all(problem.endswith("a.img: cannot be opened: Too many open files") for problem in problems)


def test_the_user_that_serve_becomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(groups: list[int]) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)
    (tmp_path / "disks.toml").write_text(CREATED)
    done = CliRunner().invoke(check, [str(tmp_path / "disks.toml"), "--user", "daemon"])
    assert done.exit_code == 1
    assert "cannot become user daemon: Operation not permitted; only root can change the user" in done.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_trying_the_user_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "disks.toml").write_text(CREATED)
    done = CliRunner().invoke(check, [str(tmp_path / "disks.toml"), "--user", "nobody"])
    assert (done.exit_code, os.geteuid()) == (0, 0), done.output


@pytest.mark.parametrize(
    ("free", "limit", "grown", "enough"), [(256, 0, 0, True), (255, 0, 0, False), (255, 9, 8, True)]
)
def test_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, limit: int, grown: int, enough: bool
) -> None:
    """Simulated: each page of an image in memory is a huge page, and the image has 256, all of them holes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        image(Path(folder))
        (tmp_path / "disks.toml").write_text(DISK.replace("a.img", f"{folder}/a.img"))
        page = os.stat(folder).st_blksize
        assert page == 4096
        pool = tmp_path / "hugepages-4kB"
        pool.mkdir()
        counts = {"free_hugepages": free, "nr_overcommit_hugepages": limit, "surplus_hugepages": grown}
        for name, count in counts.items():
            (pool / name).write_text(f"{count}\n")
        monkeypatch.setattr(huge_pages, "SYSFS", tmp_path)
        monkeypatch.setattr(mapped_image, "has_huge_pages", lambda fd: True)
        problems = find_problems(read_config(tmp_path / "disks.toml"))
    assert len(problems) == (0 if enough else 1)
    assert all("huge pages are reserved for all of it: raise sysctl vm.nr_hugepages" in problem for problem in problems)
