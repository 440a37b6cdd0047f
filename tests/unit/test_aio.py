"""The AIO engine where the kernel does not do what it was asked at once: no room, short transfers, refusals."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.engines import aio
from ringplane.engines.aio import submit

from .rig import IN, IOERR, OK, OUT, PATIENCE, Answer, Rig, fetch_only, held, make, pattern

DISK = pattern(1 << 20)
REQUESTS = 400


@pytest.fixture
def small_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """AIO contexts with room for fewer requests than there are slots (a page of events: 126 or so)."""
    setup = aio.libc.io_setup
    monkeypatch.setattr(aio.libc, "io_setup", lambda events: setup(1))


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = make(tmp_path / "disk.img", DISK, direct=request.param, slots=512)
    yield rig
    rig.close()


@pytest.mark.usefixtures("small_context")
def test_what_the_kernel_has_no_room_for_is_queued_and_tried_again(rig: Rig) -> None:
    line = rig.line().start(size=512)
    engine = line.worker.engine._engine[0]
    with held(line.worker):
        # Aligned, so that none of them waits for a bounce buffer; apart, so that none is merged with another.
        reads = [line.put(IN, 2 * number, room=512, direct=0, alignment=512) for number in range(REQUESTS)]
        line.kick()
        fetch_only(line.worker)
        asked = line.worker.call(lambda: (submit(engine), int(engine["prepared"]), bool(engine["stuck"])))
    _, left, stuck = asked.result(PATIENCE)
    assert stuck
    assert 0 < left < REQUESTS
    line.wait()
    expected = [Answer(OK, 513, DISK[2 * n * 512 : 2 * n * 512 + 512]) for n in range(REQUESTS)]
    assert [line.answer(read) for read in reads] == expected
    assert int(engine["prepared"]) == 0


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """No file of this process may grow, or be written, beyond so many bytes (setrlimit(2), RLIMIT_FSIZE)."""
    limit = len(DISK) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_stays_short_is_an_error(rig: Rig, file_size_limit: int) -> None:
    """The kernel writes up to the limit, then nothing more: the rest is tried, and its failure is the answer."""
    line = rig.line().start()
    data = pattern(8192, 7)
    written = line.do(OUT, file_size_limit // 512 - 8, data, alignment=512)
    assert written == Answer(IOERR, 1, b"")
    half = file_size_limit - 4096
    assert rig.content() == DISK[:half] + data[:4096] + DISK[file_size_limit:]


def test_writes_after_a_failed_one_are_not_lost(rig: Rig, file_size_limit: int) -> None:
    line = rig.line().start()
    assert line.do(OUT, file_size_limit // 512, pattern(512, 1), alignment=512).status == IOERR
    assert line.do(OUT, 3, pattern(512, 2), alignment=512) == Answer(OK, 1, b"")
    assert rig.content() == DISK[:1536] + pattern(512, 2) + DISK[2048:]


def test_no_room_for_a_context_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(events: int) -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(aio.libc, "io_setup", refuse)
    with pytest.raises(OSError, match=r"no room for 64 more AIO requests: raise sysctl fs\.aio-max-nr"):
        aio.Aio(64)
