"""The parts of a disk: opened or created at its paths, or taken over from the process that serves it now."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringplane.block.layers.layer import Layer
from ringplane.block.layers.registry import LAYERS
from ringplane.block.sources.choose_source import Offer, open_source, take_over_source
from ringplane.block.sources.source import Source
from ringplane.control.handover import socket_beside
from ringplane.control.listener import Listener, ListenError
from ringplane.opener.opener import LOCAL, Opener
from ringplane.options.disk_config import DiskConfig
from ringplane.system.signals import NONE, Signals

if TYPE_CHECKING:
    from ringplane.opener.remote_opener import RemoteOpener

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a disk."""

    source: Source
    # The highest first.
    layers: Sequence[Layer]
    # None: at a path, where it appears when the disk can be served (`listen`).
    listener: Listener | None


def open_parts(
    config: DiskConfig, undo: contextlib.ExitStack, signals: Signals = NONE, opener: RemoteOpener | None = None
) -> Parts:
    """Open the parts of a disk; `undo` closes or removes them. Without an `opener` this process opens files itself.

    Raises ImageError, ListenError, OpenerEnded, Interrupted.
    """
    source = open_source(config, signals, opener or LOCAL)
    undo.callback(source.unlink)
    undo.callback(source.close)
    layers = _open_layers(config, source, undo, opener or LOCAL)
    if config.socket_path:
        if opener is None:
            Listener.rehearse(config.socket_path, config.socket_mode, config.socket_group)
        return Parts(source, layers, None)
    listener = Listener.inherited(config.fd or 0)
    undo.callback(listener.close)
    return Parts(source, layers, listener)


def take_over_parts(
    config: DiskConfig, offer: Offer, listener: Listener, undo: contextlib.ExitStack, opener: RemoteOpener | None = None
) -> Parts:
    """Like `open_parts`, from what the process that serves the disk now has lent."""
    undo.callback(listener.close)
    source = take_over_source(config, offer, opener or LOCAL)
    undo.callback(source.close)
    layers = _open_layers(config, source, undo, opener or LOCAL, shared=True)
    return Parts(source, layers, listener)


def listen(
    config: DiskConfig, parts: Parts, undo: contextlib.ExitStack, opener: RemoteOpener | None = None
) -> Listener:
    """The socket of a disk that can be served now. Raises ListenError, OpenerEnded."""
    if parts.listener:
        return parts.listener
    assert config.socket_path
    where = config.socket_path, config.socket_mode, config.socket_group
    listener = Listener.at(*where) if opener is None else Listener.remote(opener, *where)
    undo.callback(listener.close)
    return listener


def listen_for_successors(path: Path, undo: contextlib.ExitStack) -> Listener | None:
    """Beside this socket, if path length (unix(7)) and permissions allow it."""
    try:
        listener = Listener.at(socket_beside(path), mode=0o600)
    except ListenError as error:
        log.warning("no other process will be able to take over with --upgrade: %s", error)
        return None
    undo.callback(listener.close)
    return listener


def _open_layers(
    config: DiskConfig, source: Source, undo: contextlib.ExitStack, opener: Opener, *, shared: bool = False
) -> Sequence[Layer]:
    layers = []
    for module in LAYERS:
        if layer := module.open_layer(config, source, shared=shared, opener=opener):
            if not (shared and layer.has_state):
                undo.callback(layer.unlink)
            undo.callback(layer.abandon if shared else layer.close)
            layers.append(layer)
    return layers


def report_created(config: DiskConfig, source: Source) -> None:
    """Log whether the source was created, or why not."""
    if source.created:
        log.info("%s: created", source.title)
    elif config.create not in (None, source.size):
        log.warning(
            "%s: exists with %d bytes, not the %d of create; it is served as it is",
            source.title, source.size, config.create,
        )  # fmt: skip
