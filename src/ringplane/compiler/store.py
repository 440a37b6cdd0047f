"""Numba's cache, replaced: compiled functions by their key (key.py) in the folders of compiled code (cache.py).

Numba's own cache names its folder after the path of the source file and compares modification times, knows nothing of
the files of callees, and reads no folder that it cannot write to.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

from ringplane.compiler import cache
from ringplane.compiler.key import GENERIC, NATIVE, has_key, key_of
from ringplane.compiler.numba_version import UnsupportedNumba

try:
    from numba.core.caching import NullCache
    from numba.core.compiler import CompileResult
    from numba.core.serialize import dumps
except ImportError as error:
    raise UnsupportedNumba(error) from None


class Store(NullCache):  # type: ignore[misc]
    """The saved code of one function, for each signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._module = function.__module__

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled code, or None. Code for this CPU is preferred to code for any CPU.

        Numba loads all its definitions for compiling here (0.2 s, 7 MB); machine code does not need them.
        """
        for cpu in (NATIVE, GENERIC):
            data = cache.read(self.file_name(signature, cpu))
            if data is not None and (content := _unpickle(data)) is not None:
                return CompileResult._rebuild(target, *content)
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        if compiled.library.has_dynamic_globals:
            warnings.warn(f"{self._name} is not saved: it contains addresses of this process", stacklevel=2)
        else:
            cache.write(self.file_name(signature, NATIVE), dumps(compiled._reduce()))

    def file_name(self, signature: Any, cpu: str) -> str:
        arguments = hashlib.blake2b(str(signature).encode(), digest_size=4).hexdigest()
        return cache.file_name(f"{self._name}-{arguments}", key_of(self._module, cpu), "code")


def store_of(function: Callable[..., Any]) -> Any:
    """The cache of this function; none for a closure, whose code depends on more than its text, or without a text."""
    return Store(function) if not function.__closure__ and has_key(function.__module__) else NullCache()


def _unpickle(data: bytes) -> Any:
    """None if the data is damaged, for example by a full disk: then it is compiled again."""
    try:
        return pickle.loads(data)
    except Exception:
        return None
