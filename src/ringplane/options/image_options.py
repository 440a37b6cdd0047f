"""The options of an image: how it is opened, locked and divided into blocks."""

from __future__ import annotations

from ringplane.options.declare import Options, option
from ringplane.options.kinds import FLAG, OneOf
from ringplane.options.sizes import SIZE

BLOCK_SIZES = (512, 4096)

# Whether an image is locked (block/image_lock.py): where it has to be and can be, always, never.
LOCKS = LOCK_AUTO, LOCK_ON, LOCK_OFF = ("auto", "on", "off")


class ImageOptions(Options):
    """How an image is opened, and what is allowed with it."""

    create: int | None = option(
        SIZE,
        default=None,
        help="Create a sparse image if none exists.",
        doc='a size, `"512M"` or `"10G"` or a number of bytes: makes a sparse image if there is none yet',
    )
    read_only: bool = option(
        FLAG,
        default=False,
        fixed=True,
        help="Serve a read-only disk.",
        doc="`true`: writes fail",
    )
    # A wish: if the file system refuses O_DIRECT, the page cache is used.
    direct: bool = option(
        FLAG,
        default=True,
        fixed=True,
        flags=("--direct/--buffered",),
        help="Use O_DIRECT if possible [default], or the page cache.",
        doc="`true`: O_DIRECT if the file system supports it; `false`: the page cache",
    )
    share_rw: bool = option(
        FLAG,
        default=False,
        fixed=True,
        help="Let other processes with --share-rw write to the image (for migration).",
        doc="`true`: other processes that also set this may write to the image (for migration)",
    )
    lock: str = option(
        OneOf(*LOCKS),
        default=LOCK_AUTO,
        help="Lock the image as QEMU does; auto: except a read-only image on a file system without locks.",
        doc='whether the image is locked, with QEMU\'s locks: `"auto"`, `"on"`, `"off"`, see below',
    )
    block_size: int = option(
        OneOf(*BLOCK_SIZES),
        default=BLOCK_SIZES[0],
        fixed=True,
        help="Logical block size.",
        doc="512 or 4096",
    )
