"""The benchmark of the loop's stages: it times the real loop, and covers all requests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import stages

from ringplane.dataplane import worker


@pytest.mark.parametrize("engine", ["null", "aio"])
def test_the_stages_match_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr(worker, "run", worker.run)
    found = stages.measure(tmp_path, 1 << 20, engine, 4096, 8, 0.1)
    first, last = (
        ("wait_for_events", "serve_ready", "end_turn"),
        ("submit", "complete_all", "answer_all", "publish_all"),
    )
    assert {*first, *last} <= found.keys()
    assert found["serve_ready"] > 0
    assert found["all"] == pytest.approx(sum(found.values()) - found["all"])
