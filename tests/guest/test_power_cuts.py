"""The laboratory finds what is planted in a guest, and nothing else: a file system, and a database."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import cut_guests
from .back_end_processes import STAND_IN, BackendFactory
from .machines import UmlGuest

pytestmark = pytest.mark.skipif(STAND_IN, reason="only for ringplane")

# States of each; that is enough to find what is planted.
STATES = 150


@pytest.mark.parametrize("name", cut_guests.SUBJECTS)
def test_what_is_planted_is_found(backend: BackendFactory, uml: UmlGuest, tmp_path: Path, name: str) -> None:
    subject = cut_guests.SUBJECTS[name]
    base, recording = cut_guests.record(backend, uml, tmp_path, subject)
    found = cut_guests.crash(base, recording, subject, states=STATES)
    # Otherwise it would prove nothing.
    assert found["tried"] == STATES
    assert bool(found["failed"]) == subject.planted, found
