"""TCP addresses to listen at, as users write them: `9464`, `127.0.0.1:9464`, `[::1]:9464`."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Any

from ringplane.options.kinds import Kind, shown, text_from_toml

LOOPBACK = "127.0.0.1"

FORM = re.compile(r"(?:(?P<v4>[\d.]+):|\[(?P<v6>[\da-fA-F.]*:[\da-fA-F:.]*)\]:)?(?P<port>\d{1,5})", re.ASCII)
HIGHEST_PORT = 0xFFFF


@dataclass(frozen=True, slots=True)
class Address:
    """A numeric IP address and a port; 0: one that is free."""

    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.family is socket.AF_INET6 else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The loopback address if there is only a port. Raises ValueError."""
    found = FORM.fullmatch(text)
    address = Address(found["v4"] or found["v6"] or LOOPBACK, int(found["port"])) if found else None
    if address is None or not _is_possible(address):
        raise ValueError(f"{shown(text)} is not an address with a port; examples: 9464, 127.0.0.1:9464, [::1]:9464")
    return address


def _is_possible(address: Address) -> bool:
    try:
        socket.inet_pton(address.family, address.host)
    except OSError:
        return False
    return address.port <= HIGHEST_PORT


def _check(value: Any) -> None:
    if not isinstance(value, Address) or not _is_possible(value):
        raise ValueError(f"{shown(value)} is not an Address with a numeric IP address and a port")


ADDRESS = Kind("ADDRESS:PORT", parse_address, lambda value: parse_address(text_from_toml(value)), _check, to_toml=str)
