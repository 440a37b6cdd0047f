"""A short run of the fuzzer; fuzz.py runs it by hand for any length of time."""

from __future__ import annotations

import time

from .conftest import Victim
from .fuzz import run_cases

SECONDS = 15.0


def test_fuzz(victim: Victim) -> None:
    end = time.monotonic() + SECONDS
    tally = run_cases(victim, lambda tally: tally.cases >= 60 and time.monotonic() > end)
    # Otherwise all requests would be rejected before they reach the code to be tested.
    assert tally.answered > tally.requests / 4, tally
    assert len(tally.rules) > 10, tally
