"""The address of an export of an NBD server: doc/uri.md of the NBD specification, or a table with QEMU's names; no TLS.

nbd://HOST[:PORT]/EXPORT            nbd+unix:///EXPORT?socket=PATH
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

from ringplane.opener.server_places import Place
from ringplane.options.image_address import RemoteImage, TableKey
from ringplane.options.kinds import shown, suggestion, text_from_toml

if TYPE_CHECKING:
    from ringplane.opener.host_names import Host

# IANA's
DEFAULT_PORT = 10809

# A string of the protocol has at most this many bytes; and sun_path of unix(7) without the final zero.
LONGEST_EXPORT, LONGEST_SOCKET = 4096, 107

NO_TLS = "NBD over TLS is not supported; use nbd:// through a tunnel or in a network that you trust"

# In a configuration file and in the API; and the keys of `server`, of which `type` says only what the others say too.
TABLE_KEYS = {
    "server": TableKey(
        "object",
        'where it is: `{"host": "HOST", "port": "PORT"}`, or `{"path": "PATH"}` of a UNIX socket',
        required=True,
    ),
    "export": TableKey("string", "the name of the export; without it the one with the empty name"),
}
TCP_KEYS, UNIX_KEYS, TYPES = {"host", "port"}, {"path"}, {"inet": "host", "unix": "path"}

SERVERS = 'examples: { host = "storage1", port = "10809" }, { path = "/run/nbd.sock" }'

EXAMPLES = "examples: nbd://server:10809/disk1, nbd+unix:///disk1?socket=/run/nbd.sock"


@dataclass(frozen=True, slots=True)
class NbdUri(RemoteImage):
    """An export of the server at `socket`, or, without one, at `host` and `port`."""

    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    socket: Path | None = None

    source: ClassVar[str] = "nbd"

    @property
    def address(self) -> str:
        if self.socket is not None:
            return f"nbd+unix:///{quote(self.export)}?socket={quote(os.fsencode(self.socket))}"
        host = f"[{self.host}]" if ":" in self.host else quote(self.host)
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"nbd://{host}{port}/{quote(self.export)}"

    @property
    def stem(self) -> str:
        """The name of the export, or of the server if the export has none."""
        return Path(self.export).stem or (self.socket.stem if self.socket is not None else self.host)

    @property
    def identity(self) -> Hashable:
        return self.server, self.export

    @property
    def server(self) -> Hashable:
        return self.source, (self.host.lower(), self.port) if self.socket is None else os.path.realpath(self.socket)

    @property
    def of_server(self) -> str:
        return replace(self, export="").address

    @property
    def places(self) -> Sequence[Place]:
        return () if self.socket is None else [(socket.AF_UNIX, str(self.socket))]

    @property
    def to_look_up(self) -> Host | None:
        return (self.host, self.port) if self.socket is None else None

    def with_paths(self, change: Callable[[Path], Path]) -> NbdUri:
        return self if self.socket is None else replace(self, socket=change(self.socket))


def parse(text: str) -> NbdUri:
    """Raises ValueError."""
    try:
        return _parsed(text)
    except ValueError as error:
        raise ValueError(f"{shown(text)}: {error}") from None


def parse_server(text: str) -> NbdUri:
    """The address without an export. Raises ValueError."""
    uri = parse(text)
    if uri.export:
        raise ValueError(f"{shown(text)}: names an export; {uri.of_server} is the server with all its exports")
    return uri


def _parsed(text: str) -> NbdUri:
    scheme, _, rest = text.partition(":")
    if scheme.startswith("nbds"):
        raise ValueError(NO_TLS)
    if not rest.startswith("//"):
        raise ValueError(f"is not an NBD address; {EXAMPLES}; a file of this name is written with ./ before it")
    parts = urlsplit(text)
    if parts.fragment or "#" in text:
        raise ValueError("an NBD address has no part that begins with #; write %23 in the name of an export")
    export = _checked_export(_decoded(parts.path.removeprefix("/"), "the name of the export"))
    return _over_unix(parts, export) if scheme == "nbd+unix" else _over_tcp(parts, export)


def _over_unix(parts: SplitResult, export: str) -> NbdUri:
    if parts.netloc:
        raise ValueError(f"nbd+unix has no host: three slashes come before the name of the export; {EXAMPLES}")
    given = dict(parameter.partition("=")[::2] for parameter in parts.query.split("&"))
    if given.keys() != {"socket"} or parts.query.count("=") != 1:
        raise ValueError(f"its only parameter is socket, the path of the server's socket; {EXAMPLES}")
    return NbdUri(export, socket=_checked_socket(_decoded(given["socket"], "the path of the socket")))


def _over_tcp(parts: SplitResult, export: str) -> NbdUri:
    if "@" in parts.netloc:
        raise ValueError("a user is for NBD over TLS, which is not supported; leave it out")
    if parts.query:
        raise ValueError(f"it has no parameters; {EXAMPLES}")
    host = _decoded(parts.hostname or "", "the host")
    if not host:
        raise ValueError(f"the host is missing; {EXAMPLES}")
    # Raises ValueError.
    port = parts.port
    return NbdUri(export, host, DEFAULT_PORT if port is None else _checked_port(port))


def from_table(table: Mapping[str, Any]) -> NbdUri:
    """The export that a table of a configuration file describes, with the names of QEMU's `blockdev-add`.

    Raises ValueError.
    """
    for key in table:
        if key.startswith("tls-"):
            raise ValueError(f"{key}: {NO_TLS}")
        if key == "reconnect-delay":
            raise ValueError("reconnect-delay is a key of the disk: write nbd-reconnect-delay in [[disk]]")
        if key not in TABLE_KEYS:
            raise ValueError(f"unknown key {shown(key)}{suggestion(key, TABLE_KEYS)}")
    if "server" not in table:
        raise ValueError(f"server is missing; {SERVERS}")
    try:
        export = _checked_export(text_from_toml(table["export"])) if "export" in table else ""
    except ValueError as error:
        raise ValueError(f"export: {error}") from None
    try:
        return _at_server(table["server"], export)
    except ValueError as error:
        raise ValueError(f"server: {error}") from None


def _at_server(server: Any, export: str) -> NbdUri:
    if not isinstance(server, Mapping):
        raise ValueError(f"{shown(server)} is not a table; {SERVERS}")
    keys = server.keys() - {"type"}
    wanted = server.get("type", "unix" if "path" in keys else "inet")
    if keys not in ({"host"}, TCP_KEYS, UNIX_KEYS) or TYPES.get(str(wanted)) not in keys:
        raise ValueError(f"{shown(dict(server))} is not an address; {SERVERS}")
    if "path" in keys:
        return NbdUri(export, socket=_checked_socket(text_from_toml(server["path"])))
    return NbdUri(export, text_from_toml(server["host"]), _port(server.get("port", DEFAULT_PORT)))


def _port(value: Any) -> int:
    """QEMU writes it as a text."""
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(f"{shown(value)} is not a port, which is a number from 1 to 65535")
    return _checked_port(int(value))


def _checked_export(export: str) -> str:
    if len(export.encode()) > LONGEST_EXPORT:
        raise ValueError(f"the name of an export has at most {LONGEST_EXPORT} bytes")
    return export


def _checked_socket(path: str) -> Path:
    if not 0 < len(os.fsencode(path)) <= LONGEST_SOCKET:
        raise ValueError(f"the path of a socket has 1 to {LONGEST_SOCKET} bytes")
    return Path(path)


def _checked_port(port: int) -> int:
    if not 0 < port < 1 << 16:
        raise ValueError("a port is a number from 1 to 65535")
    return port


def _decoded(text: str, what: str) -> str:
    try:
        found = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None
    if "\0" in found or not found.isprintable():
        raise ValueError(f"{what} contains characters that cannot be printed")
    return found
