"""Imports of other packages without those of their modules that `serve` does not use: each of them takes memory.

This is for our own process only: a program that calls ringplane may use these modules itself.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def import_asyncio() -> None:
    """Without TLS, which takes 0.9 MB. uvicorn imports `ssl` itself."""
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    import asyncio  # noqa: F401

    if sys.modules["ssl"] is None:
        del sys.modules["ssl"]


class _Unused(ModuleType):
    """A module of which nothing is used."""

    def __getattr__(self, name: str) -> object:
        return object


def import_llvm() -> None:
    """Without what writes LLVM's IR, which takes 0.9 MB. A compiler imports it itself.

    llvmlite needs it for a conversion of types (`TypeRef.as_ir`) that Numba does not use.
    """
    if "llvmlite.ir" in sys.modules:
        return
    import llvmlite

    llvmlite.ir = _Unused("llvmlite.ir")
    importlib.import_module("llvmlite.binding")
    del llvmlite.ir
