"""The fuzzer for a short while; by hand it runs as long as one likes (fuzz.py)."""

from __future__ import annotations

import time

from .conftest import Victim
from .fuzz import run_cases

SECONDS = 15.0


def test_fuzz(victim: Victim) -> None:
    end = time.monotonic() + SECONDS
    tally = run_cases(victim, lambda tally: tally.cases >= 60 and time.monotonic() > end)
    # Else it would be a fuzzer that is refused at the door.
    assert tally.answered > tally.requests / 4, tally
    assert len(tally.rules) > 10, tally
