"""Images that look like another format: one log line says so, its command works, and nothing else changes."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ringplane
from ringplane.block.formats import FORMATS, Format, find_format
from ringplane.block.image import Image, ImageError
from ringplane.driver import Driver
from ringplane.options.image_options import ImageOptions

from .rig import loop_device, pattern
from .test_image import needs

SIZE = 1 << 20
CONTENT = pattern(SIZE // 2) + bytes(SIZE // 2)

Maker = Callable[[Path, Path], object]


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def by_qemu(name: str, *options: str) -> Maker:
    return lambda raw, made: run(needs("qemu-img"), "convert", "-f", "raw", "-O", name, *options, raw, made)


def packed_by(program: str) -> Maker:
    return lambda raw, made: subprocess.run([program, "-c", raw], stdout=made.open("wb"), check=True)


MAKERS = {
    "qcow": by_qemu("qcow"),
    "qcow2": by_qemu("qcow2"),
    "qcow2, an old one": by_qemu("qcow2", "-o", "compat=0.10"),
    "qed": by_qemu("qed"),
    "vmdk": by_qemu("vmdk"),
    "vmdk, a descriptor": by_qemu("vmdk", "-o", "subformat=monolithicFlat"),
    "vhdx": by_qemu("vhdx"),
    "vdi": by_qemu("vdi"),
    "vhd": by_qemu("vpc", "-o", "force_size=on"),
    "vhd of fixed size": by_qemu("vpc", "-o", "subformat=fixed,force_size=on"),
    "parallels": by_qemu("parallels"),
    "gzip": packed_by("gzip"),
    "xz": packed_by("xz"),
    "zstd": packed_by("zstd"),
    "bzip2": packed_by("bzip2"),
}


def to_block(image: Path, size: int = 512) -> None:
    """Round up the size, because a size that is not a multiple of the block size is an error."""
    os.truncate(image, -(-image.stat().st_size // size) * size)


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[Callable[[Path], list[str]]]:
    """Serve an image for a moment, and return the logged warnings."""

    def serve(image: Path, **options: object) -> list[str]:
        before = len(caplog.records)
        with (
            ringplane.serve(image, tmp_path / "socket", num_queues=1, **options),
            Driver(tmp_path / "socket") as driver,
        ):  # type: ignore[arg-type]
            # It is served as raw bytes.
            with image.open("rb") as file:
                assert driver.read(0, 4096) == file.read(4096)
            assert driver.capacity >= 4096
        return [r.getMessage() for r in caplog.records[before:] if r.levelname == "WARNING"]

    return serve


@pytest.mark.parametrize("name", MAKERS)
def test_the_logged_command_makes_a_raw_image(name: str, tmp_path: Path, warnings_of: Callable[..., list[str]]) -> None:
    """This includes a path with a space."""
    raw, image = tmp_path / "content", tmp_path / "an image"
    raw.write_bytes(CONTENT)
    MAKERS[name](raw, image)
    original = image.read_bytes()
    padded = tmp_path / "padded"
    shutil.copy(image, padded)
    to_block(padded, 4096)
    if "fixed" in name:
        # This format is recognised by its end.
        padded = image
    if padded.stat().st_size < 4096:
        os.truncate(padded, 4096)
    (line,) = warnings_of(padded)
    assert line.startswith(f"{padded}: looks like a ")
    assert "\n" not in line
    if image.stat().st_size % 512:
        with pytest.raises(ImageError, match=r"is not a multiple of the block size 512; it looks like a ") as error:
            Image(image)
        line = str(error.value)
        assert "truncate" not in line
    else:
        line = line.replace(shlex.quote(str(padded)), shlex.quote(str(image)))
    command = line.split("make a raw image with: ")[1].replace(
        shlex.quote(f"{padded}.raw"), shlex.quote(f"{image}.raw")
    )
    subprocess.run(command, shell=True, check=True)
    made = Path(f"{image}.raw").read_bytes()
    assert made[:SIZE] == CONTENT
    assert not made[SIZE:].strip(b"\0")
    assert image.read_bytes() == original
    os.rename(f"{image}.raw", raw)
    assert warnings_of(raw) == []


def test_an_encrypted_container_may_be_intended(tmp_path: Path, warnings_of: Callable[..., list[str]]) -> None:
    image = tmp_path / "luks"
    image.write_bytes(b"LUKS\xba\xbe\0\2" + bytes(SIZE - 8))
    (line,) = warnings_of(image)
    assert line == (
        f"{image}: looks like a LUKS container, and is served as raw bytes: "
        "the guest sees the encrypted container, which is right if the guest itself opens it"
    )


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_an_image_on_a_block_device(
    tmp_path: Path, sector: int, direct: bool, warnings_of: Callable[..., list[str]]
) -> None:
    """O_DIRECT needs whole sectors; the command must not write to the folder of the device's node."""
    file = tmp_path / "file"
    file.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(SIZE - 8))
    with loop_device(file, "--sector-size", str(sector)) as device:
        (line,) = warnings_of(device, direct=direct, block_size=sector)
        assert line.startswith(f"{device}: looks like a qcow2 image")
        assert line.endswith(f"qemu-img convert -f qcow2 -O raw {device} {device.name}.raw")


@pytest.mark.parametrize("each", FORMATS, ids=lambda each: f"{each.name} {each.magic!r}")
def test_each_magic_is_found(each: Format, tmp_path: Path) -> None:
    path = tmp_path / "image"
    for size in (4096, 64 << 10, (64 << 10) + 512, (1 << 20) - 512):
        content = bytearray(size)
        content[each.offset % size : each.offset % size + len(each.magic)] = each.magic
        path.write_bytes(content)
        for direct in (True, False):
            with contextlib.closing(Image(path, ImageOptions(direct=direct))) as image:
                found = find_format(image.fd, image.size)
                assert found is not None
                assert found.name == each.name


@pytest.mark.parametrize(
    "content",
    [
        bytes(SIZE),
        pattern(SIZE),
        b"QFI" + bytes(SIZE - 3),
        bytes(1) + b"QFI\xfb" + bytes(SIZE - 5),
        bytes(SIZE - 4096) + b"vhdxfile" + bytes(4088),
        bytes(SIZE - 1024) + b"conectix" + bytes(1016),
        bytes(510) + b"\x55\xaa" + bytes(SIZE - 512),
    ],
    ids=["zeros", "noise", "a part", "one byte late", "at the end", "not in the last sector", "a boot sector"],
)
def test_a_raw_image_is_not_mentioned(tmp_path: Path, content: bytes, warnings_of: Callable[..., list[str]]) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    assert warnings_of(path) == []


def test_a_guest_that_writes_another_format_keeps_a_raw_disk(
    tmp_path: Path, warnings_of: Callable[..., list[str]]
) -> None:
    """The next process serves the same bytes, and only logs one more line."""
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    header = b"QFI\xfb\0\0\0\3" + b"/etc/passwd".rjust(504, b"\0")
    with ringplane.serve(path, tmp_path / "socket", num_queues=1), Driver(tmp_path / "socket") as driver:
        driver.write(0, header)
        driver.flush()
    assert len(warnings_of(path)) == 1
    assert path.read_bytes() == header + bytes(SIZE - 512)


def test_the_format_of_an_unreadable_image_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with path.open("rb") as file:
        assert find_format(file.fileno(), SIZE) is None
