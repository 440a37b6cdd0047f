"""`ringplane bench` on images elsewhere: both back ends on one image, which is written only if that is allowed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ceph import CephCluster
from ringplane.bench import results, run
from ringplane.cli.bench import bench

from .nbd_processes import NbdServer, qemu_nbd

SIZE = 40 << 20
QUICK = ["--rounds", "1", "--seconds", "0.1", "--warm-up", "0.02", "--depth", "8"]
BOTH = {"ringplane", "qemu-storage-daemon"}


def invoke(*words: object) -> Result:
    return CliRunner().invoke(bench, [str(word) for word in words])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdServer]:
    image = tmp_path / "disk.img"
    image.write_bytes(b"mine" * (SIZE // 4))
    started = NbdServer(qemu_nbd, image)
    yield started
    started.stop()


def measured(report: Path) -> set[tuple[str, str]]:
    """Subjects and workloads that have figures. On a slow machine there may be no request in so short a time."""
    loaded = results.load(report)
    assert all(row.cpu_us is not None for row in loaded.rows)
    return {(row.subject, row.cell.workload) for row in loaded.rows}


def test_an_export_is_only_read_unless_destroy_data_is_given(server: NbdServer, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = invoke("--against", "qemu-storage-daemon", server.uri, *QUICK, "--json", report)
    assert done.exit_code == 0, done.output
    assert "data not checked" in done.output
    assert measured(report) == {(subject, "randread") for subject in BOTH}
    assert server.image.read_bytes() == b"mine" * (SIZE // 4)
    words = ["--destroy-data", "--workload", "randwrite", "--workload", "seqread"]
    done = invoke("--against", "qemu-storage-daemon", server.uri, *QUICK, *words, "--json", report)
    assert done.exit_code == 0, done.output
    assert "all correct" in done.output
    assert measured(report) == {(subject, workload) for subject in BOTH for workload in ("randwrite", "seqread")}
    assert server.image.read_bytes()[:4] != b"mine"


def test_an_image_of_a_cluster(cluster: CephCluster, tmp_path: Path) -> None:
    address = cluster.address(cluster.new_image("40M"))
    report = tmp_path / "report.json"
    words = ["--destroy-data", "--workload", "randwrite", "--workload", "randread", "--json", report]
    done = invoke("--against", "qemu-storage-daemon", address, *QUICK, *words)
    assert done.exit_code == 0, done.output
    assert "all correct" in done.output
    assert measured(report) == {(subject, workload) for subject in BOTH for workload in ("randwrite", "randread")}


@pytest.mark.parametrize("options", [(), ("--write",)])
def test_the_floor_for_nbd(server: NbdServer, options: Sequence[str]) -> None:
    program = Path(__file__).parents[2] / "benchmarks/nbd_floor.py"
    command = [sys.executable, program, server.uri, "--rounds", "1", "--seconds", "0.05", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("us CPU") == 6
    assert (server.image.read_bytes()[:4] == b"mine") == (not options)


def test_what_is_missing_is_known_before_the_first_place_is_measured(
    server: NbdServer, cluster: CephCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.Bench, "place", lambda *_: pytest.fail("it was measured"))
    done = invoke("--against", "qemu-storage-daemon", server.uri, cluster.address("rbd/none"), *QUICK)
    assert done.exit_code == 1
    assert "ringplane did not start: rbd:rbd/none: there is no such image" in done.output
