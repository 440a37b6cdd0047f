"""benchmarks/targets.py: how far a report meets the project's own targets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from ringplane.bench import backends, qsd
from ringplane.bench.errors import BenchError
from ringplane.bench.results import Storage
from ringplane.bench.summary import compare

from . import benchmark
from .reports import CELL, NATIVE, OURS, THREADS, report_of, row


@pytest.fixture(scope="module")
def targets() -> ModuleType:
    return benchmark.load("targets")


def test_targets_count_the_cells_that_hold_and_name_the_others(targets: ModuleType) -> None:
    shallow = dataclasses.replace(CELL, depth=1)
    report = report_of(
        row(OURS, 200.0), row(NATIVE, 100.0), row(THREADS, 25.0),
        row(OURS, 90.0, cell=shallow), row(NATIVE, 100.0, cell=shallow),
    )  # fmt: skip
    found = {outcome.target.text: outcome for outcome in targets.outcomes(compare(report))}
    every = found["IOPS, every cell"]
    assert (every.held, every.total) == (1, 2)
    assert [(at.cell, round(ratio, 2)) for at, ratio in every.missed] == [(shallow, 0.9)]
    assert found["IOPS over its aio=threads, tmpfs, depth 32 and up, event-driven"].held == 1
    # 2.0 is too little for the default engine there; the limit for aio does not apply to it.
    assert found["IOPS, tmpfs, depth 32 and up, event-driven, default engine"].held == 0
    assert "IOPS, tmpfs, depth 32 and up, event-driven, engine aio" not in found
    assert "IOPS over raw fio, depth 32 and up, image on a disk" not in found


def test_remote_storage_has_targets_of_its_own(targets: ModuleType) -> None:
    remote, theirs = Storage("rbd:rbd/disk", "rbd", "RBD"), qsd.remote_subject()
    report = report_of(
        row(OURS, 100.0, storage=remote.name, cpu_us=7.0), row(theirs, 100.0, storage=remote.name, cpu_us=10.0),
        subjects=(OURS, theirs),
    )  # fmt: skip
    report.storages[:] = [remote]
    found = {outcome.target.text: outcome.held for outcome in targets.outcomes(compare(report))}
    assert found == {"IOPS, every cell": 1, "CPU per I/O, RBD": 1}


def test_variants_are_distinguished_by_their_options(targets: ModuleType) -> None:
    aio, polling = backends.ringplane("--engine=aio"), backends.ringplane("--poll-us 50 --engine null")
    report = report_of(row(aio, 150.0), row(polling, 150.0), row(NATIVE, 100.0), subjects=(aio, polling, NATIVE))
    found = [(outcome.target.text, outcome.subject) for outcome in targets.outcomes(compare(report))]
    assert ("IOPS, tmpfs, depth 32 and up, event-driven, engine aio", aio) in found
    assert not any("default engine" in text for text, _ in found)
    assert (backends.keeps_data(aio), backends.keeps_data(polling)) == (True, False)
    assert backends.ringplane("--engine aio --engine=null").option("--engine") == "null"
    with pytest.raises(BenchError, match="No closing quotation"):
        backends.ringplane('--serial "')


@pytest.mark.parametrize("default", [0, 50])
def test_the_target_of_depth_1_depends_on_polling(
    targets: ModuleType, monkeypatch: pytest.MonkeyPatch, default: int
) -> None:
    monkeypatch.setattr(targets, "POLL_US", default)
    shallow = dataclasses.replace(CELL, depth=1)
    options = ["--poll-us 0", ""] if default else ["", "--poll-us 50"]
    sleeping, polling = (backends.ringplane(flags) for flags in options)
    rows = [row(subject, 100.0, cell=shallow) for subject in (sleeping, polling, NATIVE)]
    found = targets.outcomes(compare(report_of(*rows, subjects=(sleeping, polling, NATIVE))))
    limits = [(outcome.target.limit, outcome.subject) for outcome in found if outcome.target.text.startswith("p50")]
    assert limits == [(1.0, sleeping), (0.5, polling)]


def test_a_report_file_is_judged(targets: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report_of(row(OURS, 90.0), row(NATIVE, 100.0)).save(path)
    done = CliRunner().invoke(targets.main, [str(path)])
    assert done.exit_code == 0, done.output
    assert "IOPS, every cell: at least 1 x (ringplane): in 0 of 1\n     0.90 x  /dev/shm (tmpfs): rand" in done.output
    done = CliRunner().invoke(targets.main, [str(tmp_path / "none.json")])
    assert (done.exit_code, "Traceback" in done.output) == (1, False)
    assert "none.json: cannot be read" in done.output
