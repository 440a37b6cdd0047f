"""The AIO engine when the kernel does not complete a request at once: no room, short transfers, errors."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.engines.aio import Aio, submit
from ringplane.native import aio_abi

from .rig import IN, IOERR, OK, OUT, PATIENCE, Answer, Rig, fetch_only, held, make, pattern

DISK = pattern(1 << 20)
REQUESTS = 400


@pytest.fixture
def small_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """AIO contexts for fewer requests than there are slots (one page of events: about 126)."""
    setup = aio_abi.io_setup
    monkeypatch.setattr(aio_abi, "io_setup", lambda events: setup(1))


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = make(tmp_path / "disk.img", DISK, direct=request.param, slots=512)
    yield rig
    rig.close()


@pytest.mark.usefixtures("small_context")
def test_requests_that_the_kernel_has_no_room_for_are_retried(rig: Rig) -> None:
    line = rig.line().start(size=512)
    engine = line.worker.engine._engine[0]
    with held(line.worker):
        # Aligned, so that none waits for a bounce buffer; with gaps, so that none are merged.
        reads = [line.put(IN, 2 * number, room=512, direct=0, alignment=512) for number in range(REQUESTS)]
        line.kick()
        fetch_only(line.worker)
        asked = line.worker.call(
            lambda: (submit(line.worker.engine.address), int(engine["prepared"]), bool(engine["stuck"]))
        )
    _, left, stuck = asked.result(PATIENCE)
    assert stuck
    assert 0 < left < REQUESTS
    line.wait()
    expected = [Answer(OK, 513, DISK[2 * n * 512 : 2 * n * 512 + 512]) for n in range(REQUESTS)]
    assert [line.answer(read) for read in reads] == expected
    assert int(engine["prepared"]) == 0


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """Limit the size of files that this process writes (setrlimit(2), RLIMIT_FSIZE)."""
    limit = len(DISK) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_stays_short_is_an_error(rig: Rig, file_size_limit: int) -> None:
    """The kernel writes up to the limit and nothing more: the rest is retried, and its error is the result."""
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


def test_the_error_without_room_for_a_context_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(events: int) -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(aio_abi, "io_setup", refuse)
    with pytest.raises(OSError, match=r"no room for 64 more AIO requests; raise sysctl fs\.aio-max-nr"):
        Aio(64)
