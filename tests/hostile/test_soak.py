"""A short run of the mixed load on one process; soak.py runs it by hand for any length of time."""

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
        # soak() compares fds, threads and mappings; a leak of the memory of each front end would show clearly here.
        assert samples[-1].anonymous_kib < samples[0].anonymous_kib + 16 * 1024, samples
    assert not Path(process.folder).exists()
