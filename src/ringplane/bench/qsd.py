"""qemu-storage-daemon on an image: its command line, for files and devices here and for images elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ringplane.bench.errors import BenchError
from ringplane.bench.results import QSD, Subject
from ringplane.options.image_address import ImageAddress, RemoteImage
from ringplane.options.nbd_uri import NbdUri
from ringplane.options.rbd_address import RbdImage

AIO = ("native", "io_uring", "threads")

# In the flags of a subject: it serves images elsewhere, for which `aio` has no meaning.
REMOTE = "remote"
IOTHREAD = "iothread"

# The name of the node that is exported.
DISK = "disk"


def subject(aio: str, iothread: bool = False) -> Subject:
    """qemu-storage-daemon with `aio`, its export in the main loop or in an iothread (which polls up to 32 us)."""
    return _subject(aio, aio, iothread)


def remote_subject(iothread: bool = False) -> Subject:
    """qemu-storage-daemon for images elsewhere."""
    return _subject("", REMOTE, iothread)


def _subject(name: str, flag: str, iothread: bool) -> Subject:
    words = [QSD, name, IOTHREAD if iothread else ""]
    return Subject(" ".join(filter(None, words)), QSD, (flag, *([IOTHREAD] if iothread else [])))


def command(
    subject: Subject, image: ImageAddress, socket: Path, queues: int, *, shared: bool, read_only: bool
) -> list[str]:
    """The command line. Raises BenchError for an address that it cannot be given."""
    iothread = IOTHREAD in subject.flags
    export = (
        f"type=vhost-user-blk,id=export,node-name={DISK},addr.type=unix,addr.path={socket},"
        f"writable={'off' if read_only else 'on'},num-queues={queues}{',iothread=iothread' if iothread else ''}"
    )
    nodes = _nodes(image, subject.flags[0], shared)
    if read_only:
        nodes[-1]["read-only"] = True
    return [
        QSD,
        *(["--object", "iothread,id=iothread"] if iothread else []),
        *(word for node in nodes for word in ("--blockdev", json.dumps(node))),
        *("--export", export),
    ]


def _nodes(image: ImageAddress, aio: str, shared: bool) -> list[dict[str, Any]]:
    """The block devices (blockdev-add of QEMU's QMP reference), the exported one last. Raises BenchError."""
    if isinstance(image, RemoteImage):
        return [{"node-name": DISK, "driver": image.source, **_remote(image)}]
    file = {
        "driver": "host_device" if image.is_block_device() else "file", "node-name": "file", "filename": str(image),
        "cache": {"direct": True}, "aio": aio, **({"locking": "off"} if shared else {}),
    }  # fmt: skip
    return [file, {"driver": "raw", "node-name": DISK, "file": "file"}]


def _remote(image: RemoteImage) -> dict[str, Any]:
    if isinstance(image, NbdUri):
        return {"server": _server(image), "export": image.export}
    assert isinstance(image, RbdImage)
    if image.settings or image.key_file or image.encrypt_format:
        raise BenchError(
            f"{image.title}: {QSD} takes Ceph's options and keys from a file only, and encryption is not measured; put "
            "options and keys into the file of conf=PATH, or use --against nothing"
        )
    names = ("pool", "namespace", "image", "snapshot", "conf", "user")
    given = {name: str(value) for name in names if (value := getattr(image, name))}
    # As ringplane has it: without librbd's cache.
    return {**given, "cache": {"direct": True}}


def _server(uri: NbdUri) -> dict[str, str]:
    if uri.socket is not None:
        return {"type": "unix", "path": str(uri.socket)}
    return {"type": "inet", "host": uri.host, "port": str(uri.port)}
