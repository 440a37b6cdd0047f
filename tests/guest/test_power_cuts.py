"""The laboratory finds what is planted in a guest, and nothing else: file systems, databases, a toy program.

More states of a guest that works longer (docs/crash.md has the results):

    RINGPLANE_CUT_ROUNDS=30 RINGPLANE_CUT_STATES=20000 RINGPLANE_CUT_SECONDS=7200 RINGPLANE_CUT_JOBS=12 \\
        python -m pytest -n0 -s --timeout 0 --basetemp FOLDER tests/guest/test_power_cuts.py -k 'xfs and not lying'
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringplane.crash.check_processes import cpus

from . import cut_guests
from .back_end_processes import STAND_IN, BackendFactory
from .cut_guests import Subject
from .cut_subjects import SUBJECTS
from .machines import UmlGuest

pytestmark = pytest.mark.skipif(STAND_IN, reason="only for ringplane")


def chosen(name: str, usual: int) -> int:
    return int(os.environ.get(f"RINGPLANE_CUT_{name}", usual))


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_what_is_planted_is_found(backend: BackendFactory, uml: UmlGuest, tmp_path: Path, subject: Subject) -> None:
    base, recording = cut_guests.record(backend, uml, tmp_path, subject, chosen("ROUNDS", subject.rounds))
    if subject.file_system is cut_guests.XFS:
        cut_guests.need_mounts(base)
    states, seconds = chosen("STATES", subject.states), chosen("SECONDS", 36_000)
    jobs = chosen("JOBS", cpus())
    found = cut_guests.crash(base, recording, subject, states=states, seconds=seconds, jobs=jobs)
    # Otherwise it would prove nothing.
    assert found["exhausted"] or found["tried"] >= min(states, subject.states)
    assert bool(found["failed"]) == subject.planted, found
    if subject.planted:
        assert found["smallest"]["confirmed"]
        assert cut_guests.status_replayed(base, found["smallest"], subject) != 0
