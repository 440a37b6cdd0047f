"""A disk that a PC boots from: a FAT file system with kernel and initramfs, and SYSLINUX.

The file system is the whole disk, without a partition table. A master boot record would load the next stage to its own
address, and QEMU's emulated processor (TCG) would continue with the old code that it has translated there, because it
does not notice writes to memory by another process (the back end).
"""

import subprocess
from pathlib import Path

from . import kernels

PROGRAMS = {"mkfs.fat": "dosfstools", "mcopy": "mtools", "syslinux": "syslinux"}

CONFIG = """\
SERIAL 0 115200
DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND {options}
"""


def make(image: Path, kernel: Path, initrd: bytes, options: str, folder: Path) -> None:
    """Turn an existing raw image into a bootable disk; a test may use any of its free space."""
    programs = {name: str(kernels.program(name, package)) for name, package in PROGRAMS.items()}
    files = {"vmlinuz": kernel.read_bytes(), "initrd": initrd, "syslinux.cfg": CONFIG.format(options=options).encode()}
    run(programs["mkfs.fat"], "-F", "16", str(image))
    for name, content in files.items():
        (folder / name).write_bytes(content)
        run(programs["mcopy"], "-i", str(image), str(folder / name), f"::/{name}")
    run(programs["syslinux"], "--install", str(image))


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
