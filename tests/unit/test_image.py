"""Images: creating, opening, sizes, and locks that ringplane and QEMU both respect."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ringplane
from ringplane.block import image
from ringplane.block.image import Image, ImageError
from ringplane.driver import Driver
from ringplane.options.declare import WrongOptions
from ringplane.options.image_options import ImageOptions

from .rig import loop_device, pattern

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    image.create(path, SIZE)
    return path


def refusal(path: Path, **options: bool | int) -> str:
    """The one-line error of opening this image."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        Image(path, ImageOptions(**options))  # type: ignore[arg-type]
    assert set(os.listdir("/proc/self/fd")) == before, "a refused image stayed open"
    text = str(caught.value)
    assert "\n" not in text
    return text


def needs(program: str) -> str:
    """The path of the program; without it the test is skipped, or fails in CI."""
    found = shutil.which(program)
    if found is None:
        reason = f"{program} is not installed (Debian package qemu-utils)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


# Creating.


def test_create_makes_a_sparse_file_that_others_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    image.create(path, 1 << 30)
    status = path.stat()
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (1 << 30, 0, 0o600)


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_create_never_changes_existing_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="nothing is created over it"):
        image.create(path, SIZE)
    assert not (tmp_path / "elsewhere").exists()
    if kind == "file":
        assert path.read_bytes() == b"precious"


def test_create_in_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing does not exist; create it or choose another path"):
        image.create(tmp_path / "missing" / "new.img", SIZE)


def test_create_with_an_impossible_size_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "huge.img"
    with pytest.raises(ImageError, match="cannot be made"):
        image.create(path, 2**62)
    assert not path.exists()


# Opening.


def test_an_image_knows_its_size_and_closes_once(path: Path) -> None:
    opened = Image(path)
    fd = opened.fd
    assert opened.size == SIZE
    opened.close()
    opened.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_read_only_image_cannot_be_written(path: Path) -> None:
    with (
        contextlib.closing(Image(path, ImageOptions(read_only=True))) as opened,
        pytest.raises(OSError, match="Bad file descriptor"),
    ):
        os.pwrite(opened.fd, b"x", 0)


def test_buffered_io_needs_no_alignment(path: Path) -> None:
    with contextlib.closing(Image(path, ImageOptions(direct=False))) as opened:
        assert not opened.direct
        assert opened.alignment == image.UNALIGNED


def test_direct_io_works_at_the_stated_alignment(path: Path) -> None:
    with contextlib.closing(Image(path)) as opened:
        if not opened.direct:
            pytest.skip(f"the file system of {path} refuses O_DIRECT")
        memory, block = opened.alignment.memory, opened.alignment.block
        with mmap.mmap(-1, 8192) as anonymous, memoryview(anonymous) as room:
            content = bytes(range(256)) * (block // 256)
            # An address that is a multiple of the required alignment, but of nothing larger.
            room[memory : memory + block] = content
            assert os.pwritev(opened.fd, [room[memory : memory + block]], block) == block
    assert path.read_bytes()[block : 2 * block] == content


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EIO])
def test_a_file_system_without_direct_io_is_not_an_error(
    path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(name: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(error, os.strerror(error))
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    with contextlib.closing(Image(path)) as opened:
        assert not opened.direct
        assert opened.alignment == image.UNALIGNED


# Errors.


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.img") == (
        f"{tmp_path / 'no.img'}: no such file; --create SIZE (in a configuration file: create) makes one"
    )


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder(tmp_path: Path, read_only: bool) -> None:
    text = refusal(tmp_path, read_only=read_only)
    assert "Is a directory" in text or "neither a regular file nor a block device" in text


@pytest.mark.parametrize("read_only", [False, True])
def test_a_character_device(read_only: bool) -> None:
    assert "neither a regular file nor a block device" in refusal(Path("/dev/null"), read_only=read_only, direct=False)


def test_a_fifo_is_rejected_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    texts: list[str] = []

    def open_it() -> None:
        try:
            Image(path, ImageOptions(read_only=True)).close()
        except ImageError as error:
            texts.append(str(error))

    opening = threading.Thread(target=open_it, daemon=True)
    opening.start()
    opening.join(2)
    waited = opening.is_alive()
    if waited:
        # Unblocks it, so that it does not outlive the test.
        writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        opening.join()
        os.close(writer)
    assert not waited, "opening a fifo waits for somebody to write into it"
    assert "neither a regular file nor a block device" in texts[0]


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.img"
    path.touch()
    assert "is empty" in refusal(path)


@pytest.mark.parametrize("size", [1, 511, SIZE + 1])
def test_a_size_that_is_not_a_multiple_of_the_block_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    text = refusal(path)
    assert "not a multiple of the block size 512" in text
    # The command that the message recommends must help.
    subprocess.run(text.split("with: ")[1].split(), check=True)
    Image(path).close()


def test_a_size_that_is_not_a_multiple_of_large_blocks(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(4096 + 512))
    assert "not a multiple of the block size 4096" in refusal(path, block_size=4096)
    Image(path, ImageOptions(block_size=512, direct=False)).close()


@pytest.mark.parametrize("block_size", [0, 1, 256, 513, 1024, 8192])
def test_a_block_size_that_is_not_supported(block_size: int) -> None:
    with pytest.raises(WrongOptions, match=f"^block_size: {block_size} is not one of 512, 4096$"):
        ImageOptions(block_size=block_size)


@pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
def test_a_file_of_another_user(path: Path) -> None:
    path.chmod(0o400)
    assert "--read-only serves it" in refusal(path)
    path.chmod(0)
    assert refusal(path, read_only=True).endswith(f"may not be opened by user {os.geteuid()}; change its owner or mode")


# Locking. Two opens in one process exclude each other like two processes.

RW: dict[str, bool] = {}
RO = {"read_only": True}
SHARED = {"share_rw": True}
SHARED_RO = {"read_only": True, "share_rw": True}


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [(RW, RW), (RW, RO), (RO, RW), (RW, SHARED), (SHARED, RW), (RO, SHARED), (SHARED, RO)]
)
def test_opens_that_exclude_each_other(
    path: Path, first: dict[str, bool], second: dict[str, bool], direct: bool
) -> None:
    with contextlib.closing(Image(path, ImageOptions(**first, direct=direct))):
        assert "is in use already" in refusal(path, **second, direct=direct)
    Image(path, ImageOptions(**second, direct=direct)).close()


@pytest.mark.parametrize(("first", "second"), [(RO, RO), (SHARED, SHARED), (SHARED, SHARED_RO), (RO, SHARED_RO)])
def test_opens_that_do_not_exclude_each_other(path: Path, first: dict[str, bool], second: dict[str, bool]) -> None:
    with (
        contextlib.closing(Image(path, ImageOptions(**first))),
        contextlib.closing(Image(path, ImageOptions(**second))),
    ):
        pass


def test_a_refused_opener_does_not_lock(path: Path) -> None:
    with contextlib.closing(Image(path, ImageOptions(read_only=True))):
        refusal(path)
        Image(path, ImageOptions(read_only=True)).close()


def test_another_process_is_refused_and_a_killed_one_leaves_no_lock(path: Path) -> None:
    program = "import sys, pathlib; from ringplane.block.image import Image; i = Image(pathlib.Path(sys.argv[1]))"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{program}; print('open', flush=True); sys.stdin.read()", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin
    assert holder.stdout
    with holder:
        assert holder.stdout.readline() == b"open\n"
        assert "is in use" in refusal(path)
        holder.kill()
    Image(path).close()


def qemu_io(path: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    program = [needs("qemu-io"), "-f", "raw", *options, "-c", command, str(path)]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", ["write 0 512", "read 0 512"])
def test_qemu_cannot_open_an_image_that_ringplane_writes(path: Path, command: str) -> None:
    with contextlib.closing(Image(path)):
        refused = qemu_io(path, command)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    assert qemu_io(path, command).returncode == 0


def test_qemu_does_not_copy_an_image_that_ringplane_writes(path: Path, tmp_path: Path) -> None:
    program = [needs("qemu-img"), "convert", "-f", "raw", "-O", "raw", str(path), str(tmp_path / "copy")]
    with contextlib.closing(Image(path)):
        assert subprocess.run(program, capture_output=True, timeout=60, check=False).returncode != 0
    assert subprocess.run(program, capture_output=True, timeout=60, check=False).returncode == 0


def test_qemu_may_read_but_not_write_an_image_that_ringplane_reads(path: Path) -> None:
    with contextlib.closing(Image(path, ImageOptions(read_only=True))):
        assert qemu_io(path, "read 0 512", "-r").returncode == 0
        assert qemu_io(path, "write 0 512").returncode != 0


def test_ringplane_cannot_open_an_image_that_qemu_writes(path: Path) -> None:
    program = [needs("qemu-io"), "-f", "raw", str(path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as qemu:
        assert qemu.stdin
        assert qemu.stdout
        qemu.stdin.write("write 0 512\n")
        while "wrote 512" not in qemu.stdout.readline():
            assert qemu.poll() is None
        assert "is in use" in refusal(path)
        assert "is in use" in refusal(path, read_only=True)
        qemu.stdin.write("quit\n")
    Image(path).close()


# Block devices.


def test_a_block_device_has_the_size_of_its_storage(path: Path) -> None:
    with loop_device(path) as device, contextlib.closing(Image(device)) as opened:
        assert opened.size == SIZE
        assert "is in use" in refusal(device)


def test_a_read_only_block_device_is_served_read_only_or_not_at_all(path: Path) -> None:
    with loop_device(path, "--read-only") as device:
        assert "--read-only serves it" in refusal(device)
        with contextlib.closing(Image(device, ImageOptions(read_only=True))) as opened:
            assert opened.size == SIZE


def test_a_block_device_is_served(path: Path, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(64 << 10)
    with (
        loop_device(path) as device,
        ringplane.serve(device, tmp_path / "socket", num_queues=1) as export,
        Driver(tmp_path / "socket") as disk,
    ):
        assert export.disk.source.direct
        disk.write(4096, data)
        disk.flush()
        assert disk.read(4096, len(data)) == data
        assert path.read_bytes()[4096 : 4096 + len(data)] == data


OPTIONS: dict[str, dict[str, bool | int]] = {
    "--block-size 4096": {"block_size": 4096},
    "--block-size 512": {"block_size": 512},
    "--block-size 512 --buffered": {"block_size": 512, "direct": False},
    "--buffered": {"direct": False},
}


def advised(text: str) -> list[dict[str, bool | int]]:
    """The options that an error message recommends."""
    return [OPTIONS[each] for each in text.rpartition("; use ")[2].split(" or ")]


@pytest.mark.parametrize("sector", [1024, 2048, 4096, 8192, 16384, 65536])
def test_the_error_for_large_sectors_says_what_to_do(path: Path, sector: int) -> None:
    with loop_device(path, "--sector-size", str(sector)) as device:
        for block_size in (512, 4096):
            if block_size >= sector:
                continue
            text = refusal(device, block_size=block_size)
            assert f"transfers only blocks of {sector} bytes with O_DIRECT" in text
            ways = advised(text)
            assert len(ways) == (2 if sector <= 4096 else 1)
            for options in ways:
                Image(device, ImageOptions(**{"block_size": block_size, **options})).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("sector", [512, 1024, 2048])
def test_the_error_for_a_device_of_partial_blocks_says_what_to_do(path: Path, sector: int) -> None:
    """truncate(1) cannot extend a device, so the message must not recommend it."""
    os.truncate(path, 4096 + sector)
    with loop_device(path, "--sector-size", str(sector)) as device:
        for block_size in (512, 4096):
            if block_size == 512 == sector:
                continue
            text = refusal(device, block_size=block_size)
            assert "truncate" not in text
            (options,) = advised(text)
            Image(device, ImageOptions(**{"block_size": block_size, **options})).close()  # type: ignore[arg-type]


def test_the_recommended_command_quotes_the_path(tmp_path: Path) -> None:
    path = tmp_path / "it's an image; $HOME"
    path.write_bytes(bytes(513))
    subprocess.run(refusal(path).split("with: ")[1], shell=True, check=True)
    Image(path).close()


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_an_image_that_direct_io_cannot_read_uses_the_page_cache(
    path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(image.libc, "direct_io_alignment", lambda fd: None)
    monkeypatch.setattr(image.os, "preadv", refuse)
    with contextlib.closing(Image(path)) as opened:
        assert not opened.direct
        assert opened.alignment == image.UNALIGNED
        assert not fcntl.fcntl(opened.fd, fcntl.F_GETFL) & os.O_DIRECT
    monkeypatch.setattr(image.os, "pread", refuse)
    assert refusal(path).endswith(f"cannot be read: {os.strerror(error)}")


def test_bytes_are_overwritten_if_holes_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(image.libc, "fallocate", refuse)
    path, hole, size = tmp_path / "image", 1 << 20, 4 << 20
    with path.open("wb") as file:
        file.write(pattern(hole))
        file.seek(2 * hole)
        file.write(pattern(hole))
        file.truncate(size)
    with contextlib.closing(Image(path, ImageOptions(direct=False))) as opened:
        opened.erase(4096, size - 4096)
    assert path.read_bytes() == pattern(hole)[:4096] + bytes(size - 4096)
    assert path.stat().st_blocks * 512 < 3 * hole, "holes were filled"
