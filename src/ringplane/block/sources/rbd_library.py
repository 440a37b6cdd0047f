"""librados and librbd, by ctypes: loaded when a disk needs them. Each call releases the GIL.

Source of the functions: <rados/librados.h> and <rbd/librbd.h>. They return -errno, which becomes an OSError here.
Facts that this file depends on:
- Nothing may be forked after rados_create(3): the child has none of the library's threads, and its locks.
- Each call may wait for the cluster, for as long as it does not answer. Nothing can be cancelled.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

RADOS, RBD = "librados.so.2", "librbd.so.1"

# enum rbd_encryption_format_t
ENCRYPTION_FORMATS = {"luks1": 0, "luks2": 1}

# Room for a name or an ID that the libraries return; RBD_MAX_BLOCK_NAME_SIZE is less.
NAME_ROOM = 256

Handle = ctypes.c_void_p


class MissingLibrary(Exception):
    """The text is one line that says which, and what to do."""


class ImageInfo(ctypes.Structure):
    """rbd_image_info_t"""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("object_size", ctypes.c_uint64),
        ("objects", ctypes.c_uint64),
        ("order", ctypes.c_int),
        ("prefix", ctypes.c_char * 24),
        ("parent_pool", ctypes.c_int64),
        ("parent_name", ctypes.c_char * 96),
    )


class LuksOptions(ctypes.Structure):
    """rbd_encryption_luks1_format_options_t, and the same of luks2"""

    _fields_ = (("algorithm", ctypes.c_int), ("passphrase", ctypes.c_char_p), ("size", ctypes.c_size_t))


# What the functions that are used take. They return an int, but for the RESULTS.
_TEXT, _OUT = ctypes.c_char_p, ctypes.c_void_p
_U64, _SIZE = ctypes.c_uint64, ctypes.c_size_t
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "rados_create": (_OUT, _TEXT),
    "rados_conf_read_file": (Handle, _TEXT),
    "rados_conf_set": (Handle, _TEXT, _TEXT),
    "rados_conf_get": (Handle, _TEXT, _OUT, _SIZE),
    "rados_connect": (Handle,),
    "rados_shutdown": (Handle,),
    "rados_cluster_fsid": (Handle, _OUT, _SIZE),
    "rados_ioctx_create": (Handle, _TEXT, _OUT),
    "rados_ioctx_set_namespace": (Handle, _TEXT),
    "rados_ioctx_get_id": (Handle,),
    "rados_ioctx_destroy": (Handle,),
    "rbd_create4": (Handle, _TEXT, _U64, Handle),
    "rbd_remove": (Handle, _TEXT),
    "rbd_image_options_create": (_OUT,),
    "rbd_image_options_destroy": (Handle,),
    "rbd_open": (Handle, _TEXT, _OUT, _TEXT),
    "rbd_open_read_only": (Handle, _TEXT, _OUT, _TEXT),
    "rbd_close": (Handle,),
    "rbd_stat": (Handle, _OUT, _SIZE),
    "rbd_get_size": (Handle, _OUT),
    "rbd_get_id": (Handle, _OUT, _SIZE),
    "rbd_get_stripe_count": (Handle, _OUT),
    "rbd_resize": (Handle, _U64),
    "rbd_flush": (Handle,),
    "rbd_invalidate_cache": (Handle,),
    "rbd_read": (Handle, _U64, _SIZE, _OUT),
    "rbd_encryption_load": (Handle, ctypes.c_int, _OUT, _SIZE),
    "rbd_update_watch": (Handle, _OUT, _OUT, _OUT),
    "rbd_update_unwatch": (Handle, _U64),
}
RESULTS: dict[str, Any] = {
    "rados_shutdown": None,
    "rados_ioctx_set_namespace": None,
    "rados_ioctx_get_id": ctypes.c_int64,
    "rbd_read": ctypes.c_ssize_t,
    "rados_ioctx_destroy": None,
    "rbd_image_options_create": None,
    "rbd_image_options_destroy": None,
}


class Library:
    """Both libraries: their functions by name."""

    def __init__(self) -> None:
        """Raises MissingLibrary."""
        self._rados, self._rbd = _load(RADOS, "librados2"), _load(RBD, "librbd1")

    def call(self, name: str, *arguments: Any) -> int:
        """Its result; raises OSError with the errno that it returns."""
        result = int(self._function(name)(*arguments) or 0)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def created(self, name: str, *arguments: Any) -> int:
        """What the function stores through a pointer: a handle or a number."""
        handle = ctypes.c_uint64()
        self.call(name, *(ctypes.byref(handle) if each is RESULT else each for each in arguments))
        return handle.value

    def text(self, name: str, *arguments: Any) -> str:
        """What the function writes into a buffer, which it gets, with its size, as the last arguments."""
        room = ctypes.create_string_buffer(NAME_ROOM)
        self.call(name, *arguments, room, NAME_ROOM)
        return room.value.decode(errors="replace")

    def address(self, name: str) -> int:
        """The address of a function of librbd, for compiled code."""
        return ctypes.cast(getattr(self._rbd, name), ctypes.c_void_p).value or 0

    def has(self, name: str) -> bool:
        """Whether this version of librbd has the function."""
        return hasattr(self._rbd, name)

    @functools.cache  # noqa: B019  (there is one object)
    def _function(self, name: str) -> Any:
        function = getattr(self._rados if name.startswith("rados_") else self._rbd, name)
        function.argtypes = ARGUMENTS[name]
        function.restype = RESULTS.get(name, ctypes.c_int)
        return function


# Stands for the pointer through which a function returns a handle or a number (`Library.created`).
RESULT = object()


@functools.cache
def library() -> Library:
    """Load it, once. Raises MissingLibrary."""
    return Library()


def _load(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        # The error names the library.
        raise MissingLibrary(f"{error}; install Debian's package {package}") from None
