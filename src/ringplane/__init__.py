"""ringplane: a vhost-user-blk back end whose data plane is Python, compiled by Numba, outside the GIL."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
__all__ = ["DiskConfig", "Export", "IoThread", "Server", "serve", "serve_all"]

# That of typing, without the time that importing it takes: a command catches signals after this (system/signals.py).
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from ringplane.control.export import Export
    from ringplane.control.server import Server
    from ringplane.control.start import serve, serve_all
    from ringplane.options.disk_config import DiskConfig
    from ringplane.options.thread_options import IoThread


def __getattr__(name: str) -> Any:
    # Numba takes a quarter of a second to import; `ringplane --help` shall not wait for it.
    if name in __all__:
        from ringplane.control import start

        return getattr(start, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
