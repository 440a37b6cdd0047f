"""`ringplane bench`: short measurements, verified data, everything removed, nothing overwritten."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ringplane.bench import backends, cells, curves, fio, markdown, places, qsd, results, run, summary
from ringplane.bench.errors import BenchError
from ringplane.bench.results import Report
from ringplane.cli.bench import bench
from ringplane.metrics import histogram
from ringplane.options.image_address import RemoteImage, parse_image
from ringplane.system.signals import Interrupted

from .reports import CELL, NATIVE, OURS, THREADS, report_of, row
from .waiting import wait_until

QSD = shutil.which("qemu-storage-daemon")
# Long enough for a back end to get its time slices beside a driver that spins.
AT_SOCKET = ["--rounds", "1", "--seconds", "0.1", "--warm-up", "0.02"]
QUICK = [*AT_SOCKET, "--size", "32M"]


def need(program: str | None, name: str) -> None:
    if not program:
        assert os.environ.get("CI") != "true", f"{name} is not installed, and CI must not skip these tests"
        pytest.skip(f"{name} is not installed")


def invoke(*words: object) -> Result:
    return CliRunner().invoke(bench, [str(word) for word in words])


# With hand-made data


def test_medians_and_the_best_of_each_figure() -> None:
    report = report_of(
        *(row(OURS, iops, number) for number, iops in enumerate((300.0, 100.0, 200.0))),
        *(row(NATIVE, iops, number, p50_us=4.0, cpu_us=8.0) for number, iops in enumerate((100.0, 90.0, 110.0))),
        row(THREADS, 25.0, p50_us=5.0, cpu_us=4.0),
        row(fio.RAW, 400.0),
    )
    (at,) = summary.compare(report)
    assert (at.figures.iops, at.fastest) == (200.0, NATIVE)
    assert at.best is not None
    assert (at.best.iops, at.best.p50_us, at.best.cpu_us) == (100.0, 4.0, 4.0)
    assert (at.ratio("iops"), at.ratio("p50_us"), at.ratio("cpu_us")) == (2.0, 2.5, 0.5)
    assert at.raw is not None
    assert (at.others[THREADS].iops, at.raw.iops) == (25.0, 400.0)


def test_a_back_end_that_completes_nothing_has_no_latency() -> None:
    idle = {"requests": 0, "p50_us": 0.0, "p99_us": 0.0, "p999_us": 0.0, "cpu_us": 0.0}
    report = report_of(row(OURS, 200.0), row(NATIVE, 0.0, **idle), row(THREADS, 100.0, p50_us=20.0))
    (at,) = summary.compare(report)
    assert (at.others[NATIVE].p50_us, at.others[NATIVE].cpu_us) == (None, None)
    assert (at.ratio("iops"), at.ratio("p50_us"), at.ratio("cpu_us")) == (2.0, 0.5, 1.0)


def test_raw_fio_is_the_limit_for_both_drivers() -> None:
    busy = dataclasses.replace(CELL, driver="busy")
    report = report_of(row(OURS, 90.0), row(OURS, 80.0, cell=busy), row(fio.RAW, 100.0))
    assert [at.raw is not None and at.raw.iops for at in summary.compare(report)] == [100.0, 100.0]


def test_json_round_trip(tmp_path: Path) -> None:
    report = report_of(row(OURS, 200.0, cpu_us=None), row(NATIVE, 100.0))
    report.problems.append("something")
    report.save(tmp_path / "report.json")
    assert results.load(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert list(results.merged(report.rows).nonzero()[0]) == [100, 120]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "ringplane-bench-1", "rows": []}'])
def test_files_that_are_not_reports_are_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    done = invoke("--report", path)
    assert done.exit_code == 1
    assert str(path) in done.output


def test_markdown_goes_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text(f"before\n\n{markdown.BEGIN}\nearlier\n{markdown.END}\nafter\n")
    markdown.write(path, report_of(row(OURS, 200_000.0), row(NATIVE, 100_000.0)))
    text = path.read_text()
    assert text.startswith(f"before\n\n{markdown.BEGIN}\n\n")
    assert text.endswith(f"\n{markdown.END}\nafter\n")
    assert "earlier" not in text
    assert "| randread | 32 | 200.0 | 100.0 | 2.00 |" in text
    again = path.read_text()
    markdown.write(path, report_of(row(OURS, 200_000.0), row(NATIVE, 100_000.0)))
    assert path.read_text().count(markdown.BEGIN) == again.count(markdown.BEGIN) == 1
    markdown.write(tmp_path / "new.md", report_of(row(OURS, 1.0)))
    assert (tmp_path / "new.md").read_text().startswith(markdown.BEGIN)


def test_a_file_has_markers_for_several_sections(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    begin, end = markdown.markers("remote")
    path.write_text(f"{markdown.BEGIN}\nlocal\n{markdown.END}\nbetween\n{begin}\nearlier\n{end}\nafter\n")
    report = tmp_path / "report.json"
    report_of(row(OURS, 200_000.0), row(NATIVE, 100_000.0)).save(report)
    assert invoke("--report", report, "--markdown", path, "--section", "remote").exit_code == 0
    text = path.read_text()
    assert text.startswith(f"{markdown.BEGIN}\nlocal\n{markdown.END}\nbetween\n{begin}\n\n### /dev/shm (tmpfs)")
    assert text.endswith(f"\n{end}\nafter\n")
    assert "earlier" not in text
    done = invoke("--report", report, "--markdown", path, "--section", "others")
    assert (done.exit_code, path.read_text()) == (1, text)
    assert "<!-- ringplane bench: end others -->" in done.output


def test_markdown_without_markers_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "mine.md"
    path.write_text("mine")
    done = invoke("--against", "nothing", tmp_path, "--markdown", path)
    assert done.exit_code == 1
    assert "needs these two lines" in done.output
    assert path.read_text() == "mine"


def test_a_report_is_shown_without_measuring(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.json"
    report_of(row(OURS, 200_000.0), row(NATIVE, 100_000.0)).save(path)
    done = invoke("--report", path, "--plot", tmp_path / "plots", "--markdown", tmp_path / "tables.md")
    assert done.exit_code == 0, done.output
    for text in ("200.0", "2.00", "all correct"):
        assert text in done.output
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        f"{name}{suffix}"
        for name in ("iops-cpu-1q-event", "latency-dev-shm-tmpfs-1q-event")
        for suffix in ("-dark.svg", ".png", ".svg")
    ]
    assert "200.0" in (tmp_path / "tables.md").read_text()


def test_wrong_data_makes_the_exit_status_1(tmp_path: Path) -> None:
    report = report_of(row(OURS, 200.0))
    report.problems.append("ringplane [x]: 3 wrong sectors")
    report.save(tmp_path / "report.json")
    done = invoke("--report", tmp_path / "report.json")
    assert done.exit_code == 1
    assert "FAILED" in done.output
    assert "ringplane [x]: 3 wrong sectors" in done.output


def test_fio_bins_are_counted_like_ringplane_s() -> None:
    values = [0, 1, 15, 16, 31, 32, 1000, 123_456, 10**9]
    ours = np.zeros(histogram.BUCKETS, np.int64)
    for value in values:
        histogram.count(ours.ctypes.data, value)
    job = {
        "mixed": {
            "lat_ns": {"mean": 2000.0, "bins": {str(value): 1 for value in values}},
            "total_ios": 10, "runtime": 50, "iops": 200.0, "bw_bytes": 819_200,
        },
        "usr_cpu": 10.0, "sys_cpu": 30.0, "job_runtime": 100,
    }  # fmt: skip
    measured = fio.parse(job)
    assert np.array_equal(measured.histogram, ours)
    # 40 % of two jobs' 50 ms, over ten requests.
    assert (measured.cpu_us, measured.mean_us, measured.mb_s) == (pytest.approx(4000.0), 2.0, 0.8192)


def test_curves_are_monotonic() -> None:
    counts = np.zeros(histogram.BUCKETS, np.int64)
    counts[100:200] = 50
    assert (np.diff(curves.curve(counts)) >= 0).all()


# Errors


def test_an_existing_image_is_never_overwritten_silently(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_text("mine")
    done = invoke("--against", "nothing", image, *QUICK)
    assert done.exit_code == 1
    assert "exists already" in done.output
    assert "--destroy-data" in done.output
    assert image.read_text() == "mine"


def test_images_beside_a_new_one_overwrite_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk.img.2").write_text("mine")
    with (
        pytest.raises(BenchError, match="exists already"),
        places.images(places.parse(f"{tmp_path}/disk.img"), 2, 4096),
    ):
        pytest.fail("not reached")
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img.2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one SOCKET, or start back ends with --against"),
        (["/nowhere"], "/nowhere does not exist; start a back end that listens there"),
        (["/tmp"], "/tmp is not a socket; to start back ends on images there, add --against"),
        (["--against", "nothing"], "name at least one PLACE"),
        (["--against", "nothing", "/nowhere/disk.img"], "the directory /nowhere does not exist; create it first"),
        (["--against", "nothing", "loop:/nowhere"], "the directory /nowhere does not exist; create it first"),
        (["--against", "nothing", "/dev/null", "--destroy-data"], "neither a regular file nor a block device"),
        (["--against", "nothing", "/tmp", "/tmp/"], "/tmp is given twice; leave one out"),
        (["--against", "nothing", "/proc"], "/proc: the images need 1 GiB, but only 0 bytes are free"),
        (["--against", "nothing", "/tmp", "--size", "1M"], "--size must be a multiple of 1M and at least 32M"),
        (["--against", "nothing", "/tmp", "--size", "1000000T"], "the images need 976.56 PiB, but only"),
        (["--against", "nothing", "/tmp", "--pin-driver", "x"], "not a list of CPUs"),
        (["--against", "nothing", "/tmp", "--ringplane", "", "--ringplane", ""], "two --ringplane are the same"),
        (["--against", "nothing", "/tmp", "--qsd-aio", "native"], "leave out --qsd-aio"),
        (["--against", "nothing", "/tmp", "--seconds", "nan"], "is not a number of seconds from 0.01 to 86400"),
        (["--against", "nothing", "/tmp", "--warm-up", "-1"], "is not a number of seconds from 0 to 86400"),
        (["/nowhere", "--workload", "randwrite"], "ALL DATA"),
        (["nbd://host/disk"], "nbd://host/disk is the address of an image; add --against qemu-storage-daemon or"),
        (["--against", "nothing", "rbd:x"], "rbd:x: image is missing; the form is rbd:POOL"),
        (["--against", "nothing", "nbds://host/disk"], "NBD over TLS is not supported"),
        (["--against", "nothing", "nbd://host/disk", "nbd://HOST:10809/disk"], "nbd://host/disk is given twice"),
        (["--against", "nothing", "nbd://host/disk", "--workload", "randwrite"], "behind the socket or address; add"),
        (
            ["--against", "nothing", "nbd://host/disk", "--size", "1G"],
            "every PLACE is an image elsewhere: leave out --s",
        ),
        (
            ["--against", "nothing", "rbd:a/b:key=secret"],
            "rbd:a/b: a report shows the command, and no key may be in it",
        ),
        (["--report", "/nowhere", "/tmp"], "--report measures nothing: leave out SOCKET | PLACE..."),
        (["--report", "/nowhere", "--rounds", "1", "--full"], "--report measures nothing: leave out --full, --rounds"),
        (["--report", "/nowhere"], "/nowhere: cannot be read"),
        (["--against", "nothing", "/tmp", "--json", "/nowhere/x.json"], "the directory /nowhere does not exist"),
        (["--against", "nothing", "/tmp", "--json", "/proc/x.json"], "/proc/x.json: cannot be written"),
        (["--against", "nothing", "/tmp", "--json", "/tmp"], "/tmp: is not a regular file; name another file"),
        (["--against", "nothing", "/tmp", "--json", "/dev/null"], "/dev/null: is not a regular file"),
        (["--against", "nothing", "/tmp", "--markdown", "/nowhere/x.md"], "the directory /nowhere does not exist"),
        (["--against", "nothing", "/tmp", "--plot", "/proc/plots"], "/proc/plots: cannot be written"),
        (["--against", "nothing", "/tmp", "--plot", "/dev/null/plots"], "/dev/null is not a directory"),
    ],
)
def test_impossible_arguments_are_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(run.Bench, "place", lambda *_: pytest.fail("it was measured"))
    done = invoke(*words)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "qemu-storage-daemon"], "qemu-storage-daemon is not installed: apt install qemu-system-common"),
        (["--against", "nothing", "--fio"], "fio is not installed: apt install fio, or leave out --fio"),
    ],
)
def test_programs_that_are_not_installed_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = invoke(*words, tmp_path)
    assert (done.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert message in done.output


def test_plots_without_matplotlib_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = invoke("--against", "nothing", tmp_path, "--plot", tmp_path / "plots")
    assert (done.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert "--plot needs matplotlib: pip install matplotlib" in done.output
    assert "pip install '.[bench]'" in done.output


@pytest.fixture
def deserted(tmp_path: Path) -> Path:
    """A socket at which nothing listens any more."""
    path = tmp_path / "disk.sock"
    with socket.socket(socket.AF_UNIX) as once:
        once.bind(str(path))
    return path


def test_a_socket_at_which_nothing_listens(deserted: Path) -> None:
    done = invoke(deserted)
    assert done.exit_code == 1
    assert done.output == (
        f"Error: {deserted}: connecting failed: nothing listens at this socket; start the back end first\n"
    )


@pytest.mark.parametrize("option", ["--size=64M", "--fio", "--qsd-iothread", "--ringplane=--engine aio"])
def test_options_of_back_ends_that_are_started_are_not_for_a_socket(deserted: Path, option: str) -> None:
    done = invoke(deserted, option)
    assert done.exit_code == 2
    assert f"leave out {option.partition('=')[0]}" in " ".join(done.output.split())


def test_a_disk_full_while_a_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BenchError, match=r"report\.json: cannot be written: No space left on device"):
        report_of(row(OURS, 200.0)).save(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_back_end_that_does_not_start_is_reported_with_its_last_line(tmp_path: Path) -> None:
    done = invoke("--against", "nothing", tmp_path, "--ringplane", "--engine nonsense", *QUICK)
    assert done.exit_code == 1
    assert "ringplane --engine nonsense did not start: Invalid value for '--engine'" in done.output
    assert "'nonsense' is not one of" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "node"),
    [
        (
            "nbd+unix:///disk%201?socket=/run/a,b.sock",
            {"driver": "nbd", "server": {"type": "unix", "path": "/run/a,b.sock"}, "export": "disk 1"},
        ),
        (
            "nbd://[::1]:1234/disk",
            {"driver": "nbd", "server": {"type": "inet", "host": "::1", "port": "1234"}, "export": "disk"},
        ),
        (
            "rbd:pool/space/image@snap:id=user:conf=/etc/some.conf",
            {
                "driver": "rbd", "pool": "pool", "namespace": "space", "image": "image", "snapshot": "snap",
                "user": "user", "conf": "/etc/some.conf", "cache": {"direct": True},
            },
        ),
    ],
)  # fmt: skip
def test_qemu_storage_daemon_gets_the_same_image(address: str, node: dict[str, object], tmp_path: Path) -> None:
    place = places.parse(address)
    assert isinstance(place.address, RemoteImage)
    words = backends.command(qsd.remote_subject(), place.address, tmp_path / "sock", 1, read_only=not place.writable)
    assert json.loads(words[words.index("--blockdev") + 1]) == {"node-name": "disk", **node, "read-only": True}
    assert "writable=off" in words[-1]
    ours = backends.command(OURS, place.address, tmp_path / "sock", 1, read_only=not place.writable)
    assert parse_image(ours[ours.index("--image") + 1]) == place.address
    assert "--read-only" in ours


def test_a_missing_driver_of_qemu_storage_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = """qemu-storage-daemon: --blockdev {"driver": "rbd"}: Unknown driver 'rbd'"""
    monkeypatch.setattr(backends, "command", lambda *_, **__: ["sh", "-c", 'echo "$0" >&2; exit 1', says])
    with (
        pytest.raises(BenchError) as error,
        backends.running(qsd.remote_subject(), places.parse("rbd:rbd/disk").address, tmp_path, 1),
    ):
        pass
    assert str(error.value) == ("qemu-storage-daemon did not start: Unknown driver 'rbd'; apt install qemu-block-extra")


def test_a_server_that_leaves_the_second_client_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "START_DEADLINE", 0.0)
    monkeypatch.setattr(backends, "command", lambda *_, **__: ["sleep", "60"])
    words = "the server has to accept two clients at a time (qemu-nbd --shared=2)"
    address = places.parse("nbd://host/disk").address
    with (
        pytest.raises(BenchError, match=f"did not listen within 0 s; {re.escape(words)}"),
        backends.running(OURS, address, tmp_path, 1),
    ):
        pass


def test_qemu_storage_daemon_cannot_be_given_all_of_an_address(tmp_path: Path) -> None:
    for more in ("rados_osd_op_timeout=3", "keyfile=/etc/key", "encrypt-format=luks2:encrypt-key-file=/etc/key"):
        address = places.parse(f"rbd:pool/image:{more}").address
        with pytest.raises(BenchError, match="rbd:pool/image: qemu-storage-daemon takes"):
            backends.command(qsd.remote_subject(), address, tmp_path / "sock", 1)


# With back ends


def test_side_by_side(tmp_path: Path) -> None:
    need(QSD, "qemu-storage-daemon")
    need(shutil.which("fio"), "fio")
    path = tmp_path / "report.json"
    words = ["--workload", "randread", "--workload", "randrw", "--depth", "8", "--queues", "1"]
    words += ["--queues", "2", "--driver", "both", "--qsd-aio", "native", "--fio", "--json", path]
    place = tmp_path / "images"
    place.mkdir()
    done = invoke("--against", "qemu-storage-daemon", place, *words, *QUICK)
    assert done.exit_code == 0, done.output
    assert "all correct" in done.output
    assert list(place.iterdir()) == []
    report = results.load(path)
    counted = {subject.name: sum(row.subject == subject.name for row in report.rows) for subject in report.subjects}
    # fio is measured with the first of the drivers only.
    assert counted == {"ringplane": 8, "qemu-storage-daemon native": 8, "raw fio": 4}
    assert all(row.requests and row.iops and row.p50_us for row in report.rows)
    # A slow machine may measure a cell without reading any of the verified sectors.
    for subject in ("ringplane", "qemu-storage-daemon native"):
        assert any(row.checked for row in report.rows if row.subject == subject)
    assert all(row.cpu_us is not None for row in report.rows)
    # The measured load did not overwrite the verified sectors, and all of them were read at the end.
    assert report.sectors_checked > 2 * (8 << 20) // 512


def test_variants_share_an_existing_image_that_may_be_destroyed(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(48 << 20)
    words = ["--workload", "randrw", "--depth", "8", "--ringplane", "", "--ringplane", "--engine aio"]
    words += ["--qsd-aio", "threads"] if QSD else []
    words += ["--markdown", str(tmp_path / "tables.md")]
    against = "qemu-storage-daemon" if QSD else "nothing"
    done = invoke("--against", against, image, "--destroy-data", *words, *QUICK)
    assert done.exit_code == 0, done.output
    assert image.stat().st_size == 48 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "tables.md"]
    assert "disks of 48 MiB." in (tmp_path / "tables.md").read_text()


def test_a_socket_is_only_read_unless_destroy_data_is_given(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"mine" * (8 << 20))
    with backends.running(backends.ringplane(), image, tmp_path, 2) as backend:
        done = invoke(backend.socket, "--depth", "4", *AT_SOCKET)
        assert done.exit_code == 0, done.output
        assert "randread" in done.output
        assert "randwrite" not in done.output
        assert "data not checked" in done.output
        assert image.read_bytes() == b"mine" * (8 << 20)
        done = invoke(
            backend.socket, "--workload", "seqwrite", "--depth", "4", "--queues", "2", "--destroy-data", *AT_SOCKET
        )
        assert done.exit_code == 0, done.output
        assert "all correct" in done.output
        assert image.read_bytes()[:4] != b"mine"
        done = invoke(backend.socket, "--queues", "3", *AT_SOCKET)
        assert done.exit_code == 1
        assert "the back end has 2 queues, not 3" in done.output


def test_a_read_only_disk_is_not_written(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"mine" * (8 << 20))
    with backends.running(backends.ringplane("--read-only"), image, tmp_path, 1) as backend:
        done = invoke(backend.socket, "--destroy-data", *AT_SOCKET)
    assert done.exit_code == 1
    assert "the disk is read-only" in done.output


@pytest.mark.parametrize("workload", ["randread", "randwrite"])
def test_an_image_that_was_damaged_meanwhile_is_detected(tmp_path: Path, workload: str) -> None:
    settings = run.Settings(
        cells=cells.table([workload], [8], [1], ["event"]), rounds=1, seconds=0.05, warm_up=0.0, size=32 << 20
    )
    report = Report({}, {}, subjects=[OURS])
    damaged = []

    def damage(seconds: float, text: str) -> None:
        if "check" in text:
            (image,) = tmp_path.glob("*/1.img")
            with image.open("r+b") as file:
                file.seek(1 << 20)
                file.write(b"damaged")
            damaged.append(image)

    run.Bench(settings, report, announce=damage).place(places.parse(str(tmp_path)), [OURS])
    assert damaged
    assert len(report.problems) == 1
    assert "whole image: 1 wrong sectors; the first: sector 2048" in report.problems[0]


def test_an_interruption_ends_a_run_and_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = run.Settings(cells=[CELL], rounds=1, seconds=60, size=32 << 20)
    measuring = []

    def announce(seconds: float, text: str) -> None:
        if "measure" in text:
            measuring.append(text)

    def pulse() -> None:
        if measuring:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        run.Bench(settings, Report({}, {}), announce=announce, pulse=pulse).place(places.parse(str(tmp_path)), [OURS])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_process_image_or_socket(tmp_path: Path, number: signal.Signals) -> None:
    against = ["--against", "qemu-storage-daemon"] if QSD else ["--against", "nothing"]
    words = ["--seconds", "60", "--size", "32M", "--rounds", "1", "--json", str(tmp_path / "report.json")]
    place = tmp_path / "images"
    place.mkdir()
    command = [sys.executable, "-m", "ringplane", "bench", *against, str(place), *words]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    wanted = 4 if QSD else 1
    wait_until(lambda: len(using(tmp_path, ".sock")) == wanted or process.poll() is not None)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "interrupted" in errors
    assert using(tmp_path, "") == []
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert list(place.iterdir()) == []


def using(folder: Path, text: str) -> list[str]:
    """The command lines of all processes that contain `text` in a folder's name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command and text in command and int(path.parent.name) != os.getpid():
            found.append(command)
    return found


def test_loop_devices_are_created_and_removed(tmp_path: Path) -> None:
    place = places.parse(f"loop:{tmp_path}")
    try:
        places.rehearse(place, 1, 1 << 20)
    except BenchError as error:
        pytest.skip(str(error))
    with places.images(place, 2, 1 << 20) as paths:
        assert all(path.is_block_device() for path in paths)
        assert len(attached(tmp_path)) == 2
    assert attached(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def attached(folder: Path) -> list[str]:
    """The loop devices whose file is in this folder."""
    done = subprocess.run(["losetup", "--list", "--json"], capture_output=True, text=True, check=True)
    devices = json.loads(done.stdout)["loopdevices"] if done.stdout.strip() else []
    return [device["name"] for device in devices if device["back-file"].startswith(str(folder))]


def test_missing_permission_for_loop_devices_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="losetup is not installed"):
        places.rehearse(places.parse(f"loop:{tmp_path}"), 1, 1 << 20)
    program = tmp_path / "losetup"
    program.write_text("#!/bin/sh\necho losetup: cannot find an unused loop device: Permission denied >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BenchError, match="Permission denied; loop devices need root"):
        places.rehearse(places.parse(f"loop:{tmp_path}"), 1, 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["losetup"]


# Cells and the command line


def test_the_full_table_has_all_cells() -> None:
    full = cells.table(cells.WORKLOADS, cells.FULL_DEPTHS, cells.FULL_QUEUES, cells.DRIVERS)
    assert len(full) == len(set(full)) == 5 * 4 * 2 * 2
    settings = run.Settings(cells=full)
    subjects = [OURS, NATIVE, THREADS, fio.RAW]
    one = run.estimate(settings, [places.parse("/tmp")], subjects)
    # Three back ends in 80 cells, fio in 40, three rounds of 1.2 s at least.
    assert one > 3 * (3 * 80 + 40) * 1.2
    assert run.estimate(settings, [places.parse("/tmp")] * 2, subjects) == pytest.approx(2 * one)


def test_serving_imports_nothing_of_the_bench() -> None:
    code = (
        "import sys; from ringplane.cli.commands import main; "
        "main(['serve', '--help'], standalone_mode=False); "
        "print([name for name in sys.modules if name.startswith(('rich', 'matplotlib', 'ringplane.bench'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_a_disk_that_is_too_small_is_rejected(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    done = invoke("--against", "nothing", image, "--destroy-data", *QUICK)
    assert done.exit_code == 1
    assert "too small" in done.output
    assert image.stat().st_size == 1 << 20
