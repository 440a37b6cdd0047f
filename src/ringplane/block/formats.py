"""Images that look like another format than raw: their formats, and the commands that make raw images of them.

They are still served as raw bytes. Data that a guest writes into its disk must never decide how the disk is opened
(see CVE-2026-27211), so a format that is found here leads to a log line or a better error message, nothing else.
"""

from __future__ import annotations

import mmap
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

# The largest block that O_DIRECT requires of an image that can be served (image.py); the kernel reads some more ahead.
PIECE, READ_AHEAD = 4096, 64 << 10
FOOTER = 512


ENCRYPTED = "the guest sees the encrypted container, which is right if the guest itself opens it"


@dataclass(frozen=True, slots=True)
class Format:
    """`command` makes a raw image of it, if that makes sense: shell words with places for `image` and `raw`.

    `magic` is at `offset` bytes from the image's start; if that is negative, from its end.
    """

    name: str
    command: str
    magic: bytes
    offset: int = 0

    def command_for(self, path: Path) -> str:
        """The command for this image; empty if there is none."""
        raw = f"{path}.raw" if path.is_file() else f"{path.name}.raw"
        return self.command.format(image=shlex.quote(str(path)), raw=shlex.quote(raw))


def _qemu_img(name: str) -> str:
    return f"qemu-img convert -f {name} -O raw {{image}} {{raw}}"


def _unpacked_by(program: str) -> str:
    return f"{program} -dc {{image}} > {{raw}}"


# From QEMU's block/*.c, LUKS's on-disk format, RFC 1952, the formats of xz and Zstandard.
FORMATS = (
    Format("qcow image", _qemu_img("qcow"), b"QFI\xfb\0\0\0\1"),
    Format("qcow2 image", _qemu_img("qcow2"), b"QFI\xfb"),
    Format("QED image", _qemu_img("qed"), b"QED\0"),
    Format("VMDK image", _qemu_img("vmdk"), b"KDMV"),
    Format("VMDK image", _qemu_img("vmdk"), b"COWD"),
    Format("VMDK descriptor", _qemu_img("vmdk"), b"# Disk DescriptorFile"),
    Format("VHDX image", _qemu_img("vhdx"), b"vhdxfile"),
    Format("VDI image", _qemu_img("vdi"), b"\x7f\x10\xda\xbe", offset=64),
    Format("Parallels image", _qemu_img("parallels"), b"WithoutFreeSpace"),
    Format("Parallels image", _qemu_img("parallels"), b"WithouFreSpacExt"),
    Format("LUKS container", "", b"LUKS\xba\xbe"),
    Format("gzip file", _unpacked_by("gzip"), b"\x1f\x8b\x08"),
    Format("xz file", _unpacked_by("xz"), b"\xfd7zXZ\0"),
    Format("Zstandard file", _unpacked_by("zstd"), b"\x28\xb5\x2f\xfd"),
    *(Format("bzip2 file", _unpacked_by("bzip2"), b"BZh%d1AY&SY" % level) for level in range(1, 10)),
    Format("VHD image", _qemu_img("vpc"), b"conectix"),
    # A VHD of fixed size has its magic only at its end.
    Format("VHD image", _qemu_img("vpc"), b"conectix", offset=-FOOTER),
)


def find_format(fd: int, size: int) -> Format | None:
    """The format of an open image of `size` bytes; None for raw. Reads 4 KiB twice, and works with O_DIRECT."""
    last = max(0, size - 1) // PIECE * PIECE
    return format_of(_read(fd, 0), _read(fd, last)[: size - last])


def format_of(start: bytes, end: bytes = b"") -> Format | None:
    """The format of an image that begins and ends like this; None for raw."""
    for each in FORMATS:
        piece = start if each.offset >= 0 else end
        if piece[each.offset :].startswith(each.magic):
            return each
    return None


def _read(fd: int, offset: int) -> bytes:
    """PIECE bytes from `offset`, or fewer at the end; empty if they cannot be read.

    They do not stay in the page cache: another host may still write to the image (a migration).
    """
    with mmap.mmap(-1, PIECE) as memory:
        try:
            found = memory[: os.preadv(fd, [memory], offset)]
            os.posix_fadvise(fd, offset, READ_AHEAD, os.POSIX_FADV_DONTNEED)
            return found
        except OSError:
            return b""


def describe(found: Format, path: Path) -> str:
    """One line for the log about an image that looks like this."""
    line = f"{path}: looks like a {found.name}, and is served as raw bytes: "
    if command := found.command_for(path):
        return f"{line}the guest sees the {found.name} itself; if that is not wanted, make a raw image with: {command}"
    return f"{line}{ENCRYPTED}"


def describe_elsewhere(found: Format, title: str) -> str:
    """The same of an image on another machine."""
    line = f"{title}: looks like a {found.name}, and is served as raw bytes: "
    if not found.command:
        return f"{line}{ENCRYPTED}"
    program = found.command.split()[0]
    return f"{line}the guest sees the {found.name} itself; if that is not wanted, make a raw image of it with {program}"
