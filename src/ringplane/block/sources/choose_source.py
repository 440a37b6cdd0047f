"""The registry of sources: the options of a disk say which one it has; docs/hacking.md says how to add one."""

from __future__ import annotations

import importlib
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from ringplane.block import image, mapped_image
from ringplane.block.formats import describe, describe_elsewhere, find_format, format_of
from ringplane.block.image import Image, ImageError
from ringplane.block.sources.file import FileSource
from ringplane.block.sources.memory import MemorySource
from ringplane.block.sources.null import NullSource
from ringplane.block.sources.source import Source
from ringplane.opener.opener import LOCAL, Opener
from ringplane.options.disk_config import DiskConfig
from ringplane.options.engine_names import AUTO, MEMORY, NULL
from ringplane.options.image_address import RemoteImage
from ringplane.system.confinement import is_confined
from ringplane.system.signals import NONE, Signals

log = logging.getLogger(__name__)

# The modules of the sources whose images are not files or devices here, by the `source` of their addresses
# (options/image_address.py). They are imported only when a disk has one.
REMOTE: dict[str, str] = {
    "nbd": "ringplane.block.sources.nbd.nbd_source",
    "rbd": "ringplane.block.sources.rbd",
}

# What the running process of a planned restart offers (`Source.hand_over`), and the `size` that it serves.
Offer = Mapping[str, Any]


class NotReached(ImageError):
    """A confined process cannot connect to the server of the image."""

    def __init__(self, what: str, right: str) -> None:
        """`right`: what to do now."""
        super().__init__(f"{what}; {right}")
        self.what, self.right = what, right


class RemoteModule(Protocol):
    """What such a module defines. `title`, `size` and so on of the source are as for all (source.py)."""

    def open_source(self, config: DiskConfig, signals: Signals, opener: Opener) -> Source:
        """Raises ImageError, NoAnswer if the server does not answer in time, OpenerEnded, Interrupted."""

    def take_over_source(self, config: DiskConfig, offer: Offer, opener: Opener) -> Source:
        """Raises ImageError."""

    def reach(self, server: RemoteImage, signals: Signals) -> Callable[[], object]:
        """Do what makes `is_reached` true for images of this server in a confined process; returns what ends that.

        Raises ImageError, NoAnswer, Interrupted.
        """

    def is_reached(self, config: DiskConfig, opener: Opener) -> bool:
        """Whether a confined process can open the image."""

    def is_offered(self, config: DiskConfig, offer: Offer) -> bool: ...

    def rehearse_source(self, config: DiskConfig) -> Source | None:
        """Raises ImageError."""


def _module_of(image: RemoteImage) -> RemoteModule:
    return cast(RemoteModule, importlib.import_module(REMOTE[image.source]))


def import_all() -> None:
    """Import the modules of all sources, for what is to be compiled in advance."""
    for name in REMOTE.values():
        importlib.import_module(name)


def reach(server: RemoteImage, signals: Signals = NONE) -> Callable[[], object]:
    """Prepare for disks whose images are on this server, which a confined process adds; returns what ends that.

    Raises ImageError, NoAnswer, Interrupted.
    """
    return _module_of(server).reach(server, signals)


def _reached_module(config: DiskConfig, image: RemoteImage, opener: Opener) -> RemoteModule:
    """Raises ImageError if this process is confined, and cannot connect to the server."""
    if is_confined() and not (REMOTE[image.source] in sys.modules and _module_of(image).is_reached(config, opener)):
        raise _not_reached(config, image, opener)
    return _module_of(image)


def _not_reached(config: DiskConfig, image: RemoteImage, opener: Opener) -> NotReached:
    what = f"{image}: this process may not connect to its server any more"
    if image.buffered_alone and not config.direct:
        return NotReached(
            f"{what}, and a buffered disk needs a connection of its own",
            "leave out buffered (direct = false), or start ringplane with this disk",
        )
    if opener.reaches(image.server):
        return NotReached(f"{image}: its server could not be reached at the start", "restart ringplane when it answers")
    return NotReached(what, f"start ringplane with --allow-server {shlex.quote(image.of_server)}, or with this disk")


def open_source(config: DiskConfig, signals: Signals = NONE, opener: Opener = LOCAL) -> Source:
    """Open the source of a disk, or create it if the options say so. Raises ImageError, OpenerEnded, Interrupted.

    A source opens files, and connects, through the `opener` only: the process that adds a disk later may not do so
    itself.
    """
    if isinstance(config.image, RemoteImage):
        remote = _reached_module(config, config.image, opener).open_source(config, signals, opener)
        if found := format_of(remote.start):
            log.warning("%s", describe_elsewhere(found, remote.title))
        return remote
    opened = image.open_or_create(config.image, config, signals, opener)
    try:
        source = _of_image(opened, config.engine)
    except BaseException:
        opened.unlink()
        raise
    if found := find_format(opened.fd, opened.size):
        log.warning("%s", describe(found, config.image))
    return source


def take_over_source(config: DiskConfig, offer: Offer, opener: Opener = LOCAL) -> Source:
    """Make the source that a running process offers. Raises ImageError."""
    if isinstance(config.image, RemoteImage):
        return _module_of(config.image).take_over_source(config, offer, opener)
    return _of_image(image.take_over(config.image, config, offer["image"], offer["size"]), config.engine)


def is_offered(config: DiskConfig, offer: Offer) -> bool:
    """Whether the running process serves what these options name. Raises OSError."""
    if isinstance(config.image, RemoteImage):
        return _module_of(config.image).is_offered(config, offer)
    # Without this key the running process has an image elsewhere.
    return "image" in offer and image.is_open(config.image, offer["image"])


def rehearse_source(config: DiskConfig) -> Source | None:
    """Like `open_source`, but creates and changes nothing; None if a new source cannot be imitated."""
    if isinstance(config.image, RemoteImage):
        return _module_of(config.image).rehearse_source(config)
    opened = image.rehearse(config.image, config)
    return None if opened is None else _of_image(opened, config.engine)


def _of_image(opened: Image, engine: str) -> Source:
    """The source that the name of the engine means. Raises ImageError; the image is closed then."""
    try:
        if engine == NULL:
            return NullSource(opened)
        if engine in (AUTO, MEMORY) and mapped_image.is_memory(opened.fd):
            return MemorySource(opened, required=engine == MEMORY)
        if engine == MEMORY:
            raise ImageError(
                f"{opened.path}: engine memory serves only images on tmpfs and hugetlbfs; "
                "use --engine auto for this image"
            )
        return FileSource(opened)
    except BaseException:
        opened.close()
        raise
