"""These tests mount file systems, which only root may do: other users skip them, CI must not."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def need_root() -> None:
    if os.geteuid() != 0 and os.environ.get("CI") != "true":
        pytest.skip("file systems are mounted here, which needs root")
