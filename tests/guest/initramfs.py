"""Initramfs archives: the programs, shared libraries and kernel modules of a test guest, and its init script."""

import gzip
import lzma
import re
import stat
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

INIT = """\
#!/bin/busybox sh
# Everything before the script: mounts, modules, and the wait for the disk.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin
mkdir -p /proc /sys /dev /tmp /mnt
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
while read -r module; do
    insmod "/modules/$module" || echo "guest: insmod $module failed"
done < /modules/order
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 50 ]; do
    usleep 100000
    tries=$((tries + 1))
done
echo "guest: running the script"
sh /script < /dev/null 2>&1
status=$?
# From here on the kernel must not write into the line that the host waits for.
dmesg -n 1
printf '\\nRINGPLANE-GUEST-RESULT: %d\\n' $status
poweroff -f
"""

# The modules that /init needs; each may be built into the kernel. ext4 requests crc32c by the name of the algorithm,
# which is in no "depends" line, so the module that provides it everywhere is listed here.
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
# User-mode Linux has no PCI: its virtio transport is built in.
UML_MODULES = ("virtio_blk", "crc32c_generic", "ext4")

UNPACK: dict[str, Callable[[bytes], bytes]] = {".ko": bytes, ".xz": lzma.decompress, ".gz": gzip.decompress}


@dataclass(frozen=True)
class Entry:
    """One file of an archive."""

    path: PurePosixPath
    data: bytes
    mode: int = stat.S_IFREG | 0o755


def text(path: str, content: str) -> Entry:
    return Entry(PurePosixPath(path), content.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """A cpio archive in the "newc" format, padded to let the kernel accept another one right behind it."""
    files = {entry.path: entry for entry in entries}
    folders = {folder for path in files for folder in path.parents if folder.name}
    # Folders sort before their contents; the kernel does not create missing folders.
    made = [Entry(folder, b"", stat.S_IFDIR | 0o755) for folder in sorted(folders)]
    members = [*made, *files.values(), Entry(PurePosixPath("/TRAILER!!!"), b"", 0)]
    return b"".join(member(number, entry) for number, entry in enumerate(members, 1))


def member(number: int, entry: Entry) -> bytes:
    name = str(entry.path).lstrip("/").encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, 4 device numbers, length of the name, check
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return padded(header + name) + padded(entry.data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def libraries(program: Path) -> list[Path]:
    """The shared libraries of a program, including its loader; none for a static program."""
    told = subprocess.run(["ldd", str(program)], capture_output=True, text=True)
    if "not found" in told.stdout:
        raise FileNotFoundError(f"a library of {program} is missing:\n{told.stdout}")
    found = [Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", told.stdout, re.MULTILINE)]
    # The C library loads this one when a thread is cancelled; it is not among the dependencies.
    unwinders = [path.with_name("libgcc_s.so.1") for path in found if path.name == "libc.so.6"]
    return found + [path for path in unwinders if path.exists()]


def program_entries(programs: Iterable[Path]) -> list[Entry]:
    """Programs and libraries at the same paths as on the host, where the loader finds them."""
    paths = {path for program in programs for path in (program, *libraries(program))}
    return [Entry(PurePosixPath(path), path.read_bytes()) for path in sorted(paths)]


def module_name(file_name: str) -> str:
    return file_name.partition(".ko")[0].replace("-", "_")


def depends(module: bytes) -> list[str]:
    """The modules that a module depends on, from its own modinfo section."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def module_entries(folder: Path, wanted: Sequence[str]) -> list[Entry]:
    """The wanted modules with their dependencies, and the order in which to load them.

    The order comes from the modules themselves and not from modules.dep, because kernel packages do not contain that:
    depmod writes it when a package is installed, and here the package may only have been unpacked.
    """
    files = {module_name(path.name): path for path in folder.rglob("*.ko*")}
    built_in = {module_name(line.rpartition("/")[2]) for line in (folder / "modules.builtin").read_text().splitlines()}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in built_in or name in loaded:
            return
        if name not in files:
            raise FileNotFoundError(f"kernel module {name} is neither in {folder} nor built in")
        content = UNPACK[files[name].suffix](files[name].read_bytes())
        for needed in depends(content):
            load(needed)
        loaded[name] = content

    for name in wanted:
        load(name)
    entries = [Entry(PurePosixPath(f"/modules/{name}.ko"), content) for name, content in loaded.items()]
    return [*entries, text("/modules/order", "".join(f"{name}.ko\n" for name in loaded))]


SETTINGS = Path("/etc/mke2fs.conf")


def build(
    busybox: Path, programs: Iterable[Path], modules: Path, wanted: Sequence[str], files: Iterable[Path] = ()
) -> bytes:
    """Everything except the script. Many guests share it, so it is built and compressed once."""
    settings = [SETTINGS] if SETTINGS.exists() else []
    entries = [
        Entry(PurePosixPath("/bin/busybox"), busybox.read_bytes()),
        *program_entries(programs),
        *module_entries(modules, wanted),
        *(text(str(path), path.read_text()) for path in (*settings, *files)),
    ]
    return padded(gzip.compress(archive(entries), compresslevel=1))


def with_script(base: bytes, script: str) -> bytes:
    """An initramfs that runs a script: the kernel unpacks concatenated archives one after the other."""
    return base + archive([text("/init", INIT), text("/script", script)])
