"""Source `nbd`: opening an export, and what the control plane wants of it."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ringplane.block.flushes import Flushes
from ringplane.block.image import ImageError, NoAnswer
from ringplane.block.merge import MERGE_BYTES
from ringplane.block.ranges import ZEROS_SIZE
from ringplane.block.sources.nbd.connecting import PATIENCE, connect, find_places
from ringplane.block.sources.nbd.handshake import Export, HandshakeError, Silent
from ringplane.block.sources.nbd.layout import EXPORT
from ringplane.block.sources.nbd.link import Link
from ringplane.block.sources.nbd.nbd_units import UNITS
from ringplane.block.sources.nbd.protocol import (
    FLAG_SEND_FLUSH,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    LARGEST_PAYLOAD,
)
from ringplane.block.sources.nbd.reconnecting import Reconnecting
from ringplane.block.sources.service import Service
from ringplane.block.sources.source import Source
from ringplane.block.storage_limits import LARGEST_BLOCK, USUAL_BLOCK, Limits
from ringplane.native.structs import new
from ringplane.opener.opener import LOCAL, Opener
from ringplane.opener.server_places import Place
from ringplane.options.disk_config import DiskConfig
from ringplane.options.engine_names import MEMORY, NULL
from ringplane.options.image_address import RemoteImage
from ringplane.options.image_options import BLOCK_SIZES, LOCK_ON
from ringplane.options.nbd_uri import NbdUri
from ringplane.system.confinement import keep
from ringplane.system.digests import blake2b
from ringplane.system.fd import Fd
from ringplane.system.notes import in_words
from ringplane.system.seccomp import Only
from ringplane.system.signals import NONE, Signals

log = logging.getLogger(__name__)

# To connect again, a confined process makes sockets of these families only.
FAMILIES = Only(0, (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6))
TO_SET_OPTIONS = {"setsockopt": Only(1, (socket.SOL_SOCKET, socket.IPPROTO_TCP))}
TO_CONNECT = {"socket": FAMILIES, "connect": None, **TO_SET_OPTIONS}

# In the offer of a running process.
KEY = "nbd"

Connection = tuple[socket.socket, Export]


@dataclass(frozen=True, slots=True)
class Way:
    """How a server is reached: where it is, and what connects there."""

    places: Sequence[Place]
    opener: Opener

    def connect(self, export: str, signals: Signals = NONE, patience: float = PATIENCE) -> Connection:
        """Raises HandshakeError, OpenerEnded, Interrupted."""
        return connect(self.places, export, signals, patience, self.opener)


def open_source(config: DiskConfig, signals: Signals = NONE, opener: Opener = LOCAL) -> Source:
    """Connect to the server. Raises ImageError, OpenerEnded, Interrupted."""
    uri = _checked(config)
    try:
        way = _way(uri, signals, opener)
        connection = way.connect(uri.export, signals)
    except HandshakeError as error:
        kind = NoAnswer if isinstance(error, Silent) else ImageError
        raise kind(f"{uri}: the server {error}") from None
    return _source(config, way, connection[1], [connection])


def reach(server: RemoteImage, signals: Signals) -> Callable[[], object]:
    """Another process makes the connections; this one has to be able to set their options."""
    keep(TO_SET_OPTIONS)
    return lambda: None


def is_reached(config: DiskConfig, opener: Opener) -> bool:
    """Whether another process connects to the server."""
    return bool(opener.places(_checked(config).server))


def _way(uri: NbdUri, signals: Signals, opener: Opener) -> Way:
    """Through the opener if it reaches the server. Raises HandshakeError, Interrupted."""
    if places := opener.places(uri.server):
        return Way(places, opener)
    if opener.reaches(uri.server):
        raise Silent("could not be found at the start; restart ringplane when it can be found")
    return Way(find_places(uri, signals), LOCAL)


def take_over_source(config: DiskConfig, offer: Mapping[str, Any], opener: Opener = LOCAL) -> Source:
    """With the connections of the running process, which do not end when it does. Raises ImageError."""
    offered = offer[KEY]
    export = Export(**offered["export"])
    connections = [
        (socket.socket(fileno=os.dup(fd.number)), replace(export, structured=structured))
        for fd, structured in zip(offered["connections"], offered["structured"], strict=True)
    ]
    places = [
        (family, tuple(address) if isinstance(address, list) else address) for family, address in offered["places"]
    ]
    known = opener.places(_checked(config).server)
    way = Way(known, opener) if known else Way(places, LOCAL)
    source = _source(config, way, export, connections)
    source.shared = True
    if offered["flush_failed"]:
        source.set_flush_failed()
    return source


def is_offered(config: DiskConfig, offer: Mapping[str, Any]) -> bool:
    """Whether it is the same export."""
    return KEY in offer and bool(offer[KEY]["uri"] == str(config.image))


def rehearse_source(config: DiskConfig) -> Source | None:
    """A server is not changed by a connection."""
    return open_source(config)


def _checked(config: DiskConfig) -> NbdUri:
    """Raises ImageError for options that an export cannot have."""
    uri = config.image
    assert isinstance(uri, NbdUri)
    wrong = {
        "create": config.create is not None,
        "zoned": config.zoned is not None,
        "lock": config.lock == LOCK_ON,
        "buffered (direct = false)": not config.direct,
        f"engine {config.engine}": config.engine in (MEMORY, NULL),
    }
    for name, given in wrong.items():
        if given:
            raise ImageError(f"{uri}: {name} is for files and devices of this machine; leave it out for NBD")
    return uri


def _source(config: DiskConfig, way: Way, export: Export, connections: Sequence[Connection]) -> NbdSource:
    try:
        return NbdSource(config, way, export, connections)
    except BaseException:
        for sock, _ in connections:
            sock.close()
        raise


class NbdSource(Source):
    """The source of a disk."""

    units = UNITS

    def __init__(self, config: DiskConfig, way: Way, export: Export, connections: Sequence[Connection]) -> None:
        """Take over the connections, of which there may be none. Raises ImageError."""
        self._uri = _checked(config)
        self._way, self._connections = way, list(connections)
        self._export = export
        self.title = str(self._uri)
        self._check_read_only(config)
        self._check_sizes(config)
        self.size, self.read_only = self._export.size, config.read_only
        self.serial = f"ringplane-{blake2b(self.title.encode(), digest_size=5).hexdigest()}"
        self._zeros = np.frombuffer(mmap.mmap(-1, ZEROS_SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ), np.uint8)
        self._record = new(EXPORT)
        self.flushes = Flushes(self._record)
        self._record["flags"] = self._export.flags
        smallest = max(self._export.smallest, config.block_size)
        self._record["largest"] = min(self._export.largest, LARGEST_PAYLOAD) // smallest * smallest
        self._record["zeros"] = self._zeros.ctypes.data
        self._links: list[Link] = []
        # Whether another process has the connections too, and may use them.
        self.shared = False
        # The connections of the links when they were offered.
        self._offered: list[socket.socket | None] = []
        self._closed = False
        self._reconnecting = look = Reconnecting(self.title, self._connect_again, config.nbd_reconnect_delay)
        self.service = self._service = Service(lambda: look.state, lambda: look.reconnects)
        if way.opener is LOCAL:
            keep(TO_CONNECT, [] if self._uri.socket is not None else [self._uri.port])
        if not self._export.flags & FLAG_SEND_FLUSH:
            self.notice = "the server does not support flushes: it has to make writes stable itself"

    def _check_read_only(self, config: DiskConfig) -> None:
        if self._export.read_only and not config.read_only:
            raise ImageError(f"{self.title}: the server exports it read-only; --read-only serves it")

    def _check_sizes(self, config: DiskConfig) -> None:
        smallest, block = self._export.smallest, config.block_size
        if smallest > block:
            advice = f"; use --block-size {smallest}" if smallest == USUAL_BLOCK else ", which ringplane cannot serve"
            raise ImageError(f"{self.title}: the server reads and writes only blocks of {smallest} bytes{advice}")
        if self._export.size % block:
            small = BLOCK_SIZES[0]
            fits = smallest <= small and self._export.size % small == 0
            raise ImageError(
                f"{self.title}: its size of {self._export.size} bytes is not a multiple of the block size {block}; "
                f"{f'use --block-size {small}, or ' if fits else ''}change the size at the server"
            )
        if self._export.largest < block:
            raise ImageError(
                f"{self.title}: the server takes at most {self._export.largest} bytes at a time, less than a block"
            )

    @property
    def one_thread(self) -> bool:  # type: ignore[override]
        """Only some servers allow several connections to an export, and a connection is used by one thread."""
        return not self._export.many_connections

    def part(self, slots: int) -> Link:
        sock, export = self._connections.pop(0) if self._connections else self._connect()
        look, address = self._reconnecting, int(self._record.ctypes.data)
        merges = int(self._record["largest"][0]) >= MERGE_BYTES
        try:
            link = Link(address, slots, look.lost_fd, patient=look.delay > 0, merges=merges)
            self._links.append(link)
            self._service.add(link.times)
            link.begin_with(sock, structured=export.structured)
        except OSError as error:
            sock.close()
            raise ImageError(f"{self.title}: its connection cannot be used: {in_words(error)}") from None
        self._reconnecting.add(link)
        return link

    def _connect(self) -> Connection:
        """One more connection. Raises ImageError, OpenerEnded."""
        try:
            return self._connect_again()
        except HandshakeError as error:
            raise ImageError(f"{self.title}: the server {error}") from None

    def _connect_again(self, signals: Signals = NONE, patience: float = PATIENCE) -> Connection:
        """A connection to the same export. Raises HandshakeError, OpenerEnded."""
        sock, export = self._way.connect(self._uri.export, signals, patience)
        if why := _find_difference(self._export, export):
            sock.close()
            raise HandshakeError(why)
        return sock, export

    def limits(self) -> Limits:
        """The size that a server prefers is not a physical block: databases refuse those above 4096 bytes."""
        export = self._export
        preferred = export.preferred if 512 <= export.preferred <= LARGEST_BLOCK else USUAL_BLOCK
        discards = export.flags & FLAG_SEND_TRIM and not self.read_only
        return Limits(
            physical_block=min(preferred, USUAL_BLOCK),
            minimum_io=min(preferred, USUAL_BLOCK),
            optimal_io=export.preferred,
            discard=preferred if discards else 0,
            punches=bool(export.flags & FLAG_SEND_WRITE_ZEROES) and not self.read_only,
            granule=export.smallest,
        )

    def how(self, engines: str) -> str:
        count = len(self._links)
        replies = "structured replies" if self._export.structured else "simple replies"
        return f"NBD, {count} connection{'s' * (count != 1)}, {replies}"

    def start_threads(self) -> None:
        self._reconnecting.start()

    def watch(self, changed: Callable[[], None]) -> None:
        """The size does not change."""
        self.shared = False
        self._reconnecting.begin()

    def refresh_size(self) -> None:
        raise ImageError(f"{self.title}: the size of an export cannot change while it is served; restart ringplane")

    def grow(self, size: int) -> None:
        raise ImageError(
            f"{self.title}: NBD cannot change the size of an export; change it at the server, then restart ringplane"
        )

    def sync(self) -> None:
        """NBD_CMD_FLUSH. With several connections, a flush of one is a flush of all."""
        with self.flushes.checked():
            if self._links:
                # The link stores that the server has failed it; other errors do not mean that writes are lost.
                self._links[0].sync()

    def hand_over(self) -> dict[str, Any]:
        """The connections too: a server may allow only one, and no reply is under way when they change hands."""
        self._offered = [link.connection for link in self._links]
        used = [(sock, link.structured) for sock, link in zip(self._offered, self._links, strict=True) if sock]
        export = self._export
        return {
            KEY: {
                "uri": self.title,
                "places": self._way.places,
                "connections": [Fd(sock.fileno()) for sock, _ in used],
                "structured": [structured for _, structured in used],
                "export": {name: getattr(export, name) for name in Export.__dataclass_fields__},
                "flush_failed": self.flush_failed,
            }
        }

    def let_go(self) -> None:
        """See Source."""
        self.shared = True
        for link, offered in zip(self._links, self._offered, strict=True):
            try:
                link.let_go(offered)
            except OSError as error:
                raise ImageError(f"{self.title}: {error.strerror}; try again") from None

    def take_back(self) -> None:
        """See Source."""
        self.shared = False
        for link in self._links:
            link.take_back()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reconnecting.end()
        for link in self._links:
            link.close(shared=self.shared)
        self._reconnecting.close()
        for sock, _ in self._connections:
            with contextlib.suppress(OSError):
                sock.close()


def _find_difference(before: Export, now: Export) -> str:
    """Why the export cannot be used in place of what it was; empty: it can."""
    if now.size < before.size:
        return f"has made the export smaller: {now.size} bytes instead of {before.size}"
    if before.flags & ~now.flags or (now.read_only and not before.read_only):
        return "supports less than before (it was configured in another way)"
    if now.smallest > before.smallest or now.largest < before.largest:
        return "has other block sizes than before"
    return ""
