"""What a guest does is recorded: the recording makes the same disk, and has the marks that the guest made."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringplane.recordings import entries
from ringplane.recordings.reader import open_recording
from unit.test_record import played

from . import host, workloads
from .back_end_processes import STAND_IN, BackendFactory
from .machines import UmlGuest


@pytest.mark.skipif(STAND_IN, reason="only for ringplane")
def test_a_recorded_guest(backend: BackendFactory, uml: UmlGuest, disk_image: Path, tmp_path: Path) -> None:
    before, path = disk_image.read_bytes(), tmp_path / "disk.rec"
    disk = backend(disk_image, num_queues=1, extra=["--record", str(path)])
    uml.run(disk, workloads.marks(open_recording(path).header.token))
    disk.stop()
    recording = open_recording(path)
    assert recording.complete
    after = played(recording, before)
    assert after == disk_image.read_bytes()
    marks = [entry for entry in recording if entry.kind == entries.MARK]
    assert [mark.text for mark in marks] == ["mounted", "synced", "unmounted"]
    # Between the first two marks ext4 has made the file stable: all writes before the last flush are covered by it.
    flushes = [entry for entry in recording if entry.kind == entries.FLUSH and entry.index < marks[1].index]
    assert flushes
    assert flushes[-1].began > marks[0].index
    # At the last mark it is clean.
    (tmp_path / "played.img").write_bytes(played(recording[: marks[-1].index], before))
    host.check_filesystem(tmp_path / "played.img")
