"""The output of `ringplane bench`: tables that fit, texts for people who do not know the code, plots."""

from __future__ import annotations

import io
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from matplotlib.text import Text
from rich.console import Console

from ringplane.bench import backends, bars, cells, console_tables, fio, markdown, places, plots, qsd, run
from ringplane.bench.results import SOCKET, Report, Storage, Subject
from ringplane.bench.themes import LIGHT
from ringplane.cli.bench import bench, described, progress, settings_of

from .reports import NATIVE, OURS, THREADS, report_of, row

URING = qsd.subject("io_uring")
DISK = Storage("/srv/images/a-rather-long-name-of-an-image-file.img (ext4)", "disk", "ext4")
POLLING = backends.ringplane("--engine io_uring --poll-us always --pin-memory")
SOMEWHERE = Subject("/run/disks/some-back-end.sock", SOCKET)
# The widest possible figures: millions of IOPS, latencies up to a second.
LARGE = {"iops": 999_912.3, "mb_s": 43_559.2, "p50_us": 23_456.7, "p99_us": 345_678.9, "p999_us": 987_654.3}


def large_report(*subjects: Subject, rounds: int) -> Report:
    """All cells of `--full`, with figures of many digits."""
    rows = [
        row(subject, number=number, cell=cell, cpu_us=99.99, **LARGE)
        for number in range(rounds)
        for cell in cells.table(cells.WORKLOADS, cells.FULL_DEPTHS, cells.FULL_QUEUES, cells.DRIVERS)
        for subject in subjects
    ]
    return report_of(*rows, subjects=subjects)


def printed(report: Report, width: int) -> str:
    console = Console(width=width, record=True)
    console_tables.show(console, report)
    return console.export_text()


REPORTS = {
    "against qemu-storage-daemon": large_report(OURS, NATIVE, URING, THREADS, rounds=3),
    "one round, with fio": large_report(OURS, NATIVE, fio.RAW, rounds=1),
    "variants": large_report(OURS, POLLING, NATIVE, rounds=2),
    "against nothing": large_report(OURS, rounds=3),
    "at a socket": large_report(SOMEWHERE, rounds=1),
}


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("name", REPORTS)
def test_tables_fit_a_terminal_and_lose_no_digit(name: str, width: int) -> None:
    text = printed(REPORTS[name], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    wanted = ["999.9", "23457", "345679", "99.99", *(["43559", "987654"] if width >= console_tables.WIDE else [])]
    for figure in wanted:
        assert re.search(rf"\b{figure}\b", text), figure


@pytest.mark.parametrize("width", [80, 100])
def test_names_of_back_ends_are_on_one_line(width: int) -> None:
    text = printed(large_report(OURS, NATIVE, URING, THREADS, rounds=1), width)
    for name in ("ringplane", "qsd native", "qsd io_uring", "qsd threads"):
        assert re.search(rf"^ .*\b{name}\b|^\w.*\b{name}\b", text, re.MULTILINE), name


def test_a_long_path_of_a_place_is_not_cut() -> None:
    report = report_of(row(OURS, 200.0))
    report.storages[0] = DISK
    report.rows = [row(OURS, 200.0, storage=DISK.name)]
    assert DISK.name in " ".join(printed(report, 60).split())


@pytest.mark.parametrize("name", REPORTS)
def test_without_a_terminal_lines_have_100_columns_at_most(tmp_path: Path, name: str) -> None:
    REPORTS[name].save(tmp_path / "report.json")
    done = CliRunner().invoke(bench, ["--report", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 100


@pytest.mark.parametrize("name", REPORTS)
def test_markdown_has_lines_of_100_columns_at_most(name: str) -> None:
    report = REPORTS[name]
    report.machine["command"] = f"ringplane bench --ringplane '--poll-us always' {'--depth 8 ' * 30}/dev/shm"
    lines = markdown.render(report).splitlines()
    assert max(len(line) for line in lines if not line.startswith("###")) <= 100


def test_markdown_has_a_command_that_can_be_pasted() -> None:
    report = report_of(row(OURS, 200.0))
    report.machine["command"] = f"ringplane bench --ringplane '--poll-us always' {'--depth 8 ' * 30}/dev/shm"
    lines = [line.strip().removesuffix("\\").strip() for line in markdown.render(report).splitlines()]
    pasted = " ".join(lines[next(n for n, line in enumerate(lines) if line.startswith("ringplane bench")) :])
    assert pasted.strip() == report.machine["command"]


def test_ratios_are_shown_only_beside_something_to_compare_with() -> None:
    assert " x " in printed(REPORTS["against qemu-storage-daemon"], 100)
    for name in ("against nothing", "at a socket"):
        text = printed(REPORTS[name], 100)
        assert not re.search(r"\bx\b|qemu-storage-daemon|qsd", text)
        assert "qsd" not in markdown.render(REPORTS[name])


def test_one_round_has_no_words_about_several() -> None:
    report = report_of(row(OURS, 200_000.0), row(NATIVE, 100_000.0))
    for text in (printed(report, 100), markdown.render(report)):
        assert not re.search(r"[Mm]edian|rounds|differ", text)
    assert "One round of 1 s per cell" in markdown.render(report)


def test_rounds_that_differ_are_mentioned_and_equal_ones_are_not() -> None:
    equal = report_of(*(row(OURS, 200.0, number) for number in range(3)))
    assert "medians of 3 rounds" in printed(equal, 100)
    assert "differ" not in printed(equal, 100)
    different = report_of(row(OURS, 200.0), row(OURS, 100.0, 1))
    assert "In 1 of 1 measured cells the IOPS of the rounds differ by more than a quarter" in printed(different, 100)


def test_a_run_is_described_in_singular_and_plural() -> None:
    place = places.parse("/tmp")
    one = run.Settings(cells=cells.table(["randread"], [1], [1], ["event"]), rounds=1)
    assert described(one, [place], [OURS], 4.2).startswith("1 cell x 1 back end x 1 round: about 4 s")
    more = run.Settings(cells=cells.table(["randread"], [1, 8], [1], ["event"]), rounds=3)
    words = described(more, [place, place], [OURS, NATIVE], 125)
    assert words.startswith("2 cells x 2 back ends x 3 rounds x 2 places: about 2 minutes")


def test_progress_keeps_its_bar_beside_a_long_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringplane.cli.bench.REDRAW", -1)
    console = Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    session = run.Bench(run.Settings(cells=[]), report_of())
    with progress(console, session, 10.0):
        session.announce(5.0, f"measure {POLLING.name}: randwrite depth 128, 16 queues, event [with more of it]")
    lines = re.split(r"[\r\n]|\x1b\[[0-9;?]*[a-zA-Z]", console.file.getvalue())  # type: ignore[attr-defined]
    drawn = next(line for line in lines if "measure" in line)
    assert re.match(r"[━ ]{12} [\d:-]{7} measure ringplane --engine io_uring", drawn)
    assert "…" not in drawn


# The help


def context_of(*words: str) -> click.Context:
    return bench.make_context("bench", list(words))


def test_help_has_the_defaults() -> None:
    """Each value after [default: ...] is used without the option."""
    context = context_of("--against", "nothing", "/tmp")
    settings = settings_of(context, context.params, only_reads=False)
    words = " ".join(bench.get_help(context).split())

    def default(option: str) -> str:
        found = re.search(rf"{option} .*?\[default: \(?([^\];]*)", words)
        assert found is not None, option
        return found[1]

    def listed(name: str) -> str:
        return ", ".join(str(value) for value in sorted({getattr(cell, name) for cell in settings.cells}))

    assert default("--workload") == listed("workload")
    assert default("--depth") == listed("depth")
    assert default("--queues") == listed("queues")
    assert default("--driver") == listed("driver")
    assert float(default("--rounds")) == settings.rounds
    assert float(default("--seconds")) == settings.seconds
    assert float(default("--warm-up")) == settings.warm_up
    assert default("--size") == "1G"
    assert settings.size == 1 << 30
    assert default("--qsd-aio") == ", ".join(qsd.AIO)
    assert (settings.backend_cpus, settings.driver_cpus) == ((), ())


def test_a_socket_is_measured_with_reads_only_as_the_help_says() -> None:
    context = context_of("/tmp/disk.sock")
    settings = settings_of(context, context.params, only_reads=True)
    assert {cell.workload for cell in settings.cells} == {"randread"}
    assert "only randread where nothing may be written" in " ".join(bench.get_help(context).split())


def test_full_keeps_given_options() -> None:
    context = context_of("--full", "--queues", "1", "--depth", "8", "/tmp")
    measured = settings_of(context, context.params, only_reads=False).cells
    assert {(cell.depth, cell.queues) for cell in measured} == {(8, 1)}
    assert {cell.workload for cell in measured} == set(cells.WORKLOADS)
    assert {cell.driver for cell in measured} == set(cells.DRIVERS)
    context = context_of("--full", "/tmp/disk.sock")
    measured = settings_of(context, context.params, only_reads=True).cells
    assert {cell.workload for cell in measured} == set(cells.READ_ONLY_WORKLOADS)


# Plots


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plots of a report with two places and twelve cells."""
    twelve = cells.table(["randread", "randrw"], [1, 32, 128], [1], ["event"])
    subjects = (OURS, NATIVE, URING, THREADS)
    rows = [
        row(subject, 100_000.0 * (number + 1), number, cell, storage=storage)
        for storage in ("/dev/shm (tmpfs)", DISK.name)
        for number in range(3)
        for cell in twelve
        for subject in subjects
    ]
    report = report_of(*rows, subjects=subjects)
    report.storages.append(DISK)
    folder = tmp_path_factory.mktemp("plots")
    plots.draw(folder, report)
    return folder


def test_plots_are_small_and_need_no_font(drawn: Path) -> None:
    pictures = sorted(drawn.iterdir())
    assert len(pictures) == 9
    for path in pictures:
        assert path.stat().st_size < 200_000, path
        if path.suffix == ".svg":
            assert "<text" not in path.read_text()


def test_plots_are_for_light_and_for_dark_pages(drawn: Path) -> None:
    light, dark = ((drawn / f"iops-cpu-1q-event{suffix}.svg").read_text() for suffix in ("", "-dark"))
    assert "fill: #ffffff" in light
    assert "fill: #ffffff" not in dark
    assert "fill: #0d1117" in dark


@pytest.mark.parametrize("depths", [[32], [1, 32], [1, 8, 32, 128]])
@pytest.mark.parametrize("subjects", [(OURS,), (OURS, NATIVE, URING, THREADS), (POLLING, OURS, NATIVE), (SOMEWHERE,)])
def test_plots_have_room_for_their_text(depths: list[int], subjects: tuple[Subject, ...]) -> None:
    rows = [
        row(subject, cell=cell, cpu_us=99.99, **LARGE)
        for cell in cells.table(["randrw", "seqwrite"], depths, [1], ["event"])
        for subject in subjects
    ]
    report = report_of(*rows, subjects=subjects)
    report.machine["cpu"] = "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz"
    figure = bars.draw(report, 1, "event", LIGHT)
    figure.draw_without_rendering()
    page = figure.bbox
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text.get_text()
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, text.get_text()


def test_the_same_report_is_the_same_plot(tmp_path: Path) -> None:
    report = report_of(row(OURS, 200_000.0), row(NATIVE, 100_000.0))
    first, second = (
        {path.name: path.read_bytes() for path in plots.draw(tmp_path / name, report)} for name in ("a", "b")
    )
    assert first == second
