"""Loading machine code: an object file becomes memory of this process that can be called, without Numba."""

from __future__ import annotations

import functools
from typing import Any

# The symbol of the function that is called from outside, in each object file.
SYMBOL = "ringplane"

# What was loaded; it is unloaded with these objects.
_loaded: list[Any] = []


def load(code: bytes) -> int:
    """The address of the object file's function; it stays valid until the process ends."""
    from llvmlite.binding import JITLibraryBuilder

    builder = JITLibraryBuilder().add_object_img(code).export_symbol(SYMBOL).add_current_process()
    _loaded.append(builder.link(_linker(), str(len(_loaded))))
    return int(_loaded[-1][SYMBOL])


@functools.cache
def _linker() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.create_lljit_compiler()
