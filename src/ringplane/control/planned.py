"""A disk that a process will serve."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ringplane.options.disk_config import DiskConfig


def place(config: DiskConfig) -> str:
    """The path of the socket, by which a disk is recognised."""
    return os.path.realpath(config.socket_path or "")


@dataclass(frozen=True, slots=True)
class Planned:
    """How it will be served, and what of that was changed at run time (changes.py).

    `added`: what the process was started with does not describe it.
    """

    config: DiskConfig
    added: bool = False
    limits_changed: bool = False
    paused: bool = False
    policies_changed: bool = False

    @property
    def name(self) -> str:
        """That of the disk, which has one by now."""
        assert self.config.name is not None
        return self.config.name
