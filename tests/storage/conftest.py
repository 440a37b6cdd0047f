"""These tests mount file systems, which only root may do: other users skip them, CI must not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .nbd_processes import Start, starting


@pytest.fixture(autouse=True, scope="session")
def need_root() -> None:
    if os.geteuid() != 0 and os.environ.get("CI") != "true":
        pytest.skip("file systems are mounted here, which needs root")


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an NBD server of this kind with a new image."""
    yield from starting()
