"""Saved machine code: object files with a digest, by their key (key.py), in the folders of compiled code (cache.py)."""

from __future__ import annotations

from ringplane.compiler import cache
from ringplane.system.digests import blake2b

DIGEST_SIZE = 16


def read(name: str) -> bytes | None:
    """The object file; None if it is not there, or damaged, for example by a full disk: then it is compiled again."""
    data = cache.read(name)
    if data is None or data[:DIGEST_SIZE] != _digest(data[DIGEST_SIZE:]):
        return None
    return data[DIGEST_SIZE:]


def write(name: str, code: bytes) -> None:
    cache.write(name, _digest(code) + code)


def _digest(code: bytes) -> bytes:
    return blake2b(code, digest_size=DIGEST_SIZE).digest()
