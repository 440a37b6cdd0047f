"""What the sources `file`, `memory` and `null` have in common: an image, which is a regular file or a block device."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

from ringplane.block.image import Image, ImageError, create_nameless
from ringplane.block.ranges import Backing
from ringplane.block.sources.source import Source
from ringplane.block.storage_limits import Limits, limits
from ringplane.system.digests import blake2b
from ringplane.system.fd import Fd


class ImageSource(Source):
    """Owns an open image."""

    def __init__(self, image: Image, *, page_cache: bool = False) -> None:
        """`page_cache`: I/O goes through it."""
        self._image = image
        self.title, self.size, self.read_only = str(image.path), image.size, image.read_only
        self.created, self.direct = image.created, image.direct
        self.file = image.path if image.is_file else None
        # /dev/disk/by-id in the guest is stable. The bytes of the path need not be UTF-8.
        digest = blake2b(os.fsencode(image.path.resolve()), digest_size=5).hexdigest()
        self.serial = f"ringplane-{digest}"
        self.backing = Backing(image.fd, page_cache=page_cache)
        self.flushes = self.backing.flushes

    def limits(self) -> Limits:
        return replace(limits(self._image.fd, read_only=self.read_only), granule=self.backing.granule)

    def limits_beside(self) -> Limits | None:
        """`limits`, tried on a writable nameless file beside a file; None if none can be created there."""
        if self.file is None:
            return self.limits()
        with contextlib.suppress(ImageError):
            fd = create_nameless(self.file.resolve(), self.size, direct=False)
            if fd is not None:
                try:
                    return limits(fd, read_only=self.read_only)
                finally:
                    os.close(fd)
        return None

    @property
    def replaced(self) -> str:
        if not self._image.is_replaced:
            return ""
        return "its path leads to another file now, or to none; the opened one is served until a restart"

    def refresh_size(self) -> None:
        self.size = self._image.current_size()

    def grow(self, size: int) -> None:
        self._image.grow(size)

    def sync(self) -> None:
        """fdatasync(2)."""
        self.backing.sync()

    def is_blank(self) -> bool:
        return self.created or self._image.is_blank()

    def erase(self, start: int, end: int) -> None:
        self._image.erase(start, end)

    def hand_over(self) -> dict[str, Any]:
        return {"image": Fd(self._image.fd)}

    def close(self) -> None:
        self._image.close()

    def unlink(self) -> None:
        self._image.unlink()

    def keep(self) -> None:
        super().keep()
        self._image.created = False
