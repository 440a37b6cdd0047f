"""A mixed life of one process for a short while; by hand it lasts as long as one likes (soak.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from unit.rig import need_engine

from .soak import soak, soaked

SECONDS, WINDOW = 12.0, 3.0


@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_soak(engine: str) -> None:
    need_engine(engine)
    with soaked(engine) as process:
        samples = soak(process, SECONDS, WINDOW, lambda sample: None)
        # What is held is compared inside; a leak of each front end's memory could not be missed here.
        assert samples[-1].anonymous_kib < samples[0].anonymous_kib + 16 * 1024, samples
    assert not Path(process.folder).exists()
