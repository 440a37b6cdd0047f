"""Where the image of a disk is, as users write it: a path, or the address of an image elsewhere, `nbd://host/export`.

What begins with one of the SCHEMES and a colon is such an address; everything else is a path. A file whose name begins
so is written with its folder: `./nbd:x`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ringplane.options.kinds import Kind, list_from_toml, shown, text_from_toml
from ringplane.system.signals import NONE, Signals

if TYPE_CHECKING:
    from ringplane.opener.host_names import Found, Host
    from ringplane.opener.server_places import Place

# Modules of ringplane.options with a function `parse`, which makes a RemoteImage of a text or raises ValueError. If
# such a text may contain secrets, `shown_part` is what messages contain of it.
SCHEMES: dict[str, str] = {
    **dict.fromkeys(("nbd", "nbd+unix", "nbds", "nbds+unix"), "nbd_uri"),
    "rbd": "rbd_address",
}

# The same modules have a function `parse_server`, for an address without an image.

# Modules with a function `from_table`, which makes a RemoteImage of a disk's table of this name in a file or in the
# API, and the keys of such a table, `TABLE_KEYS`.
TABLES: dict[str, str] = {"nbd": "nbd_uri", "rbd": "rbd_address"}

SERVER_EXAMPLES = "examples: nbd://storage1:10809, nbd+unix:///?socket=/run/nbd.sock, rbd::id=USER:conf=PATH"

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")


@dataclass(frozen=True, slots=True)
class TableKey:
    """What is declared of a key: the type of its value in JSON, and its meaning."""

    json_type: str
    doc: str
    required: bool = False


class RemoteImage:
    """The address of an image that is not a file or device here. Each kind has a frozen dataclass of its own.

    `str` of it is for people, in messages and logs: it has nothing that is secret.
    """

    # Of the source: the key of REMOTE in block/sources/choose_source.py.
    source: ClassVar[str]
    # Whether a buffered disk needs a connection of its own, so that no connection of --allow-server is enough for it.
    buffered_alone: ClassVar[bool] = False

    @property
    def address(self) -> str:
        """What `parse_image` reads. It may contain secrets: only for those who connect with it."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The image, without what is secret."""
        return self.address

    @property
    def without_secrets(self) -> Self:
        """The same, if it has none."""
        return self

    def __str__(self) -> str:
        return self.title

    @property
    def stem(self) -> str:
        """What its disk is called by default, like the file name of an image without its suffix."""
        raise NotImplementedError

    @property
    def identity(self) -> Hashable:
        """Equal for all addresses of the same image, as far as the addresses show it."""
        raise NotImplementedError

    @property
    def server(self) -> Hashable:
        """Equal for all images that are reached in the same way; what an address without an image means."""
        raise NotImplementedError

    @property
    def of_server(self) -> str:
        """The address without the image and without secrets: what --allow-server has for it."""
        raise NotImplementedError

    @property
    def places(self) -> Sequence[Place]:
        """Where sockets connect to its server, if no name is looked up for that."""
        return ()

    @property
    def to_look_up(self) -> Host | None:
        """What is looked up for that."""
        return None

    def with_paths(self, change: Callable[[Path], Path]) -> Self:
        """The same, with each path in it changed."""
        return self


ImageAddress = Path | RemoteImage


def scheme_of(text: str) -> str:
    """The scheme of an address of an image elsewhere; empty: it is a path."""
    found = SCHEME.match(text)
    return found[1] if found is not None and found[1] in SCHEMES else ""


def parse_image(text: str) -> ImageAddress:
    """Raises ValueError if it is an address of an image elsewhere and wrong."""
    scheme = scheme_of(text)
    if not scheme:
        return Path(text)
    module = importlib.import_module(f"ringplane.options.{SCHEMES[scheme]}")
    address: RemoteImage = module.parse(text)
    return address


def parse_server(text: str) -> RemoteImage:
    """An address without an image. Raises ValueError."""
    scheme = scheme_of(text)
    if not scheme:
        raise ValueError(f"{shown(text)} is not the address of a server; {SERVER_EXAMPLES}")
    server: RemoteImage = importlib.import_module(f"ringplane.options.{SCHEMES[scheme]}").parse_server(text)
    return server


def find_places(servers: Sequence[RemoteImage], signals: Signals = NONE) -> Sequence[Found]:
    """Where sockets connect to each server, now; nowhere: it is reached in another way. Raises Interrupted."""
    # Few processes need it.
    from ringplane.opener.host_names import look_up

    hosts = [server.to_look_up for server in servers]
    found = look_up([host for host in hosts if host is not None], signals)
    return [server.places if host is None else found[host] for server, host in zip(servers, hosts, strict=True)]


def not_found(server: RemoteImage, error: OSError) -> str:
    """The error of `find_places`, as a line."""
    return f"{server}: cannot be found: {error.strerror or error}"


def shown_image(text: str) -> str:
    """Of a text for `parse_image`, which may be wrong, what messages may contain."""
    scheme = scheme_of(text)
    if not scheme:
        return text
    module = importlib.import_module(f"ringplane.options.{SCHEMES[scheme]}")
    shown_part: Callable[[str], str] | None = getattr(module, "shown_part", None)
    return text if shown_part is None else shown_part(text)


def image_of_table(name: str, table: Any) -> RemoteImage:
    """Raises ValueError."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{shown(table)} is not a table; write it as [disk.{name}]")
    address: RemoteImage = importlib.import_module(f"ringplane.options.{TABLES[name]}").from_table(table)
    return address


def keys_of_table(name: str) -> Mapping[str, TableKey]:
    """What the table of this name can have."""
    keys: Mapping[str, TableKey] = importlib.import_module(f"ringplane.options.{TABLES[name]}").TABLE_KEYS
    return keys


def load_schemes() -> None:
    """Import the modules of all schemes: a process that may open no files later reads addresses nevertheless."""
    for name in SCHEMES.values():
        importlib.import_module(f"ringplane.options.{name}")


def image_from(value: str | os.PathLike[str] | RemoteImage) -> ImageAddress:
    """What a program gives as an image: texts are read as on the command line. Raises ValueError."""
    if isinstance(value, str):
        return parse_image(value)
    return value if isinstance(value, RemoteImage) else Path(value)


def _check_image(value: Any) -> None:
    if not isinstance(value, (str, os.PathLike, RemoteImage)):
        raise ValueError(f"{shown(value)} is neither a path nor the address of an image")
    image_from(value)


def _text(value: Any) -> str:
    """A text of TOML. Raises ValueError without what may be secret; the rest is for those who parse it."""
    text_from_toml(shown_image(value) if isinstance(value, str) else value)
    return str(value)


def _written(image: ImageAddress) -> str:
    return image.address if isinstance(image, RemoteImage) else str(image)


def _with_paths(change: Callable[[Path], Path], image: ImageAddress) -> ImageAddress:
    return image.with_paths(change) if isinstance(image, RemoteImage) else change(image)


IMAGE = Kind(
    "PATH|ADDRESS",
    parse_image,
    lambda value: parse_image(_text(value)),
    _check_image,
    to_toml=_written,
    with_paths=_with_paths,
)


def _check_servers(value: Any) -> None:
    if not isinstance(value, Sequence) or not all(isinstance(each, RemoteImage) for each in value):
        raise ValueError(f"{shown(value)} is not a list of addresses of servers")


# On the command line each is given by itself.
SERVERS = Kind(
    "ADDRESS",
    parse_server,
    lambda value: tuple(parse_server(_text(each)) for each in list_from_toml(value, "addresses")),
    _check_servers,
    to_toml=lambda servers: [server.address for server in servers],
    json_types=("array",),
    with_paths=lambda change, servers: tuple(server.with_paths(change) for server in servers),
)
