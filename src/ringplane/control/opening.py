"""The parts of a disk: opened or created at its paths, or taken over from the process that serves it now."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringplane.block.formats import describe, find_format
from ringplane.block.image import Image
from ringplane.block.image import create as create_image
from ringplane.block.layers.layer import Layer
from ringplane.block.layers.registry import LAYERS
from ringplane.control.handover import socket_beside
from ringplane.control.listener import Listener, ListenError
from ringplane.control.taking_over import Predecessor
from ringplane.options.disk_config import DiskConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a disk."""

    image: Image
    # The highest first.
    layers: Sequence[Layer]
    # None: at a path, where it appears when the disk can be served (`listen`).
    listener: Listener | None
    # By this start, because it did not exist.
    created: bool


def open_parts(config: DiskConfig, undo: contextlib.ExitStack) -> Parts:
    """Open the parts of a disk; `undo` closes or removes them. Raises ImageError, ListenError."""
    created = _create_if_missing(config, undo)
    image = Image(config.image, config)
    undo.callback(image.close)
    if found := find_format(image.fd, image.size):
        log.warning("%s", describe(found, config.image))
    layers = []
    for module in LAYERS:
        if layer := module.open_layer(config, image, new=created, shared=False):
            undo.callback(_remove, layer)
            undo.callback(layer.close)
            layers.append(layer)
    if config.socket_path:
        Listener.rehearse(config.socket_path, config.socket_mode, config.socket_group)
        return Parts(image, layers, None, created)
    listener = Listener.inherited(config.fd or 0)
    undo.callback(listener.close)
    return Parts(image, layers, listener, created)


def take_over_parts(config: DiskConfig, predecessor: Predecessor, index: int, undo: contextlib.ExitStack) -> Parts:
    """Like `open_parts`, from the process that serves disk `index` now."""
    fd, size = predecessor.image(index)
    image = Image(config.image, config, fd=fd)
    undo.callback(image.close)
    image.size = size
    layers = []
    for module in LAYERS:
        if layer := module.open_layer(config, image, new=False, shared=True):
            undo.callback(layer.abandon)
            layers.append(layer)
    listener = predecessor.listener(index)
    undo.callback(listener.close)
    return Parts(image, layers, listener, created=False)


def listen(config: DiskConfig, parts: Parts, undo: contextlib.ExitStack) -> Listener:
    """The socket of a disk that can be served now. Raises ListenError."""
    if parts.listener:
        return parts.listener
    assert config.socket_path
    listener = Listener.at(config.socket_path, config.socket_mode, config.socket_group)
    undo.callback(listener.close)
    return listener


def listen_for_successors(disks: Sequence[DiskConfig], undo: contextlib.ExitStack) -> Listener | None:
    """Beside the first disk's socket, if it has one, and if path length (unix(7)) and permissions allow it."""
    path = disks[0].socket_path
    if path is None:
        return None
    try:
        listener = Listener.at(socket_beside(path), mode=0o600)
    except ListenError as error:
        log.warning("no other process will be able to take over with --upgrade: %s", error)
        return None
    undo.callback(listener.close)
    return listener


def _create_if_missing(config: DiskConfig, undo: contextlib.ExitStack) -> bool:
    """Returns whether it was: a service has `create` at each start, and later starts leave the image as it is."""
    if config.create is None or config.image.exists():
        return False
    create_image(config.image, config.create)
    undo.callback(_remove, config.image)
    return True


def report_created(config: DiskConfig, parts: Parts) -> None:
    """Log whether the image was created, or why not."""
    if parts.created:
        log.info("%s: created", config.image)
    elif config.create not in (None, parts.image.size):
        log.warning(
            "%s: exists with %d bytes, not the %d of create; it is served as it is",
            config.image, parts.image.size, config.create,
        )  # fmt: skip


def _remove(made: Path | Layer) -> None:
    """Remove what was made; a process that has given up the right to do so leaves it, and reports the first error."""
    with contextlib.suppress(OSError):
        made.unlink()
