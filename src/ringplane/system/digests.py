"""BLAKE2b, which hashlib has from here too. hashlib itself loads OpenSSL, which takes 0.5 MB."""

from __future__ import annotations

from _blake2 import blake2b

__all__ = ["blake2b"]
