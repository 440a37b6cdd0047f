"""`ringplane bench`: measure back ends, one at its socket or several side by side, and check their data."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringplane.cli.types import CPUS, FILE, FOLDER, SIZE

if TYPE_CHECKING:
    from rich.console import Console

    from ringplane.bench.places import Place
    from ringplane.bench.results import Report, Subject
    from ringplane.bench.run import Bench, Settings

QSD, NOTHING = "qemu-storage-daemon", "nothing"
AIO = ("native", "io_uring", "threads")
WORKLOADS = ("randread", "randwrite", "randrw", "seqread", "seqwrite")
DEPTHS = (1, 8, 32, 128)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# At most so often is the progress bar drawn, in seconds: nothing but what is measured shall run.
REDRAW = 0.25
WIDTH = 140


@click.command(short_help="Measure back ends side by side.")
@click.argument("targets", nargs=-1, type=click.Path(readable=False), metavar="SOCKET | PLACE...")
@click.option("--against", type=click.Choice([QSD, NOTHING]), help="Start ringplane, and this beside it, on PLACEs.")
@click.option("--ringplane", "variants", multiple=True, metavar="FLAGS", help="A variant: flags of `ringplane serve`.")
@click.option("--qsd-aio", multiple=True, type=click.Choice(AIO), help="Its variants [default: all].")
@click.option("--qsd-iothread", is_flag=True, help="Its export in an iothread, not in its main loop.")
@click.option("--fio", "with_fio", is_flag=True, help="Also raw fio (io_uring) on ringplane's image, as the limit.")
@click.option(
    "--workload", "workloads", multiple=True, type=click.Choice(WORKLOADS), help="[default: randread, randwrite]"
)
@click.option("--depth", "depths", multiple=True, type=click.IntRange(1, 1024), help="[default: 1, 8, 32, 128]")
@click.option("--queues", multiple=True, type=click.IntRange(1, 64), help="[default: 1]")
@click.option(
    "--driver", type=click.Choice(["event", "busy", "both"]), help="Sleep until called, or spin. [default: event]"
)
@click.option("--full", is_flag=True, help="All workloads and depths, 1 and 2 queues, both drivers, where not given.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.01), default=1.0, show_default=True, help="Of each measurement.")
@click.option("--warm-up", type=click.FloatRange(0), default=0.2, show_default=True, help="Seconds before each.")
@click.option("--size", type=SIZE, default="1G", show_default=True, help="Of each image.")
@click.option("--pin-back-end", type=CPUS, metavar="CPUS", help="Where back ends (and fio) run.")
@click.option("--pin-driver", type=CPUS, metavar="CPUS", help="Where the driver runs.")
@click.option(
    "--destroy-data", is_flag=True,
    help="Allow writing to what exists: the disk behind SOCKET, or a PLACE that is an image or block device. "
    "ALL DATA IN IT IS LOST.",
)  # fmt: skip
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write everything there, after each round.")
@click.option("--plot", "plot_folder", type=FOLDER, metavar="FOLDER", help="Draw PNGs there (needs matplotlib).")
@click.option("--markdown", "markdown_path", type=FILE, metavar="FILE", help="Put the tables between FILE's markers.")
@click.option(
    "--report", "report_path", type=FILE, metavar="FILE", help="Measure nothing: show an earlier --json FILE."
)
def bench(
    targets: tuple[str, ...],
    report_path: Path | None,
    json_path: Path | None,
    plot_folder: Path | None,
    markdown_path: Path | None,
    **options: Any,
) -> None:
    """Measure vhost-user-blk back ends: IOPS, latency, CPU time per request; and check the data that they read.

    \b
    ringplane bench /tmp/disk.sock
        any back end, at its socket; only reads, unless --destroy-data is given
    ringplane bench --against qemu-storage-daemon /dev/shm /var/tmp loop:/dev/shm
        ringplane beside qemu-storage-daemon, each on an image of its own

    A PLACE is a folder (images are made in it, and removed), loop:FOLDER (such images behind loop devices; needs
    root), a new file, or with --destroy-data an existing image or block device, which all back ends then share. In each
    round each cell is measured on one back end after the other, in alternating order. Before each measurement a short
    load of the same kind is verified; the whole image is at the end. Exits with status 1 if any byte was wrong.
    """
    from rich.console import Console

    from ringplane.bench import markdown, plots, results
    from ringplane.bench.errors import BenchError, Interrupted

    started = time.time()
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH)
    try:
        if markdown_path:
            markdown.check(markdown_path)
        if plot_folder:
            plots.require()
        if json_path and not json_path.parent.is_dir():
            raise BenchError(f"{json_path}: there is no folder {json_path.parent}")
        if report_path:
            if targets:
                raise click.UsageError("--report measures nothing: leave out SOCKET or PLACE")
            report = results.load(report_path)
        else:
            with signals() as pulse:
                report = measured(console, pulse, targets, json_path, **options)
        put_out(console, report, json_path, plot_folder, markdown_path)
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    except Interrupted as interrupted:
        saved = json_path is not None and json_path.exists() and json_path.stat().st_mtime >= started
        kept = f"; complete rounds are in {json_path}" if saved else ""
        click.echo(f"interrupted{kept}", err=True)
        raise SystemExit(128 + interrupted.number) from None
    if report.problems:
        raise SystemExit(1)


def put_out(
    console: Console, report: Report, json_path: Path | None, plot_folder: Path | None, markdown_path: Path | None
) -> None:
    """Show a report and write it wherever it is wanted."""
    from ringplane.bench import machine, markdown, plots, tables

    console.print(machine.sentence(report.machine), soft_wrap=True)
    tables.show(console, report)
    if json_path:
        report.save(json_path)
    if plot_folder:
        paths = plots.draw(plot_folder, report)
        console.print(f"{len(paths)} plots in {plot_folder}")
    if markdown_path:
        markdown.write(markdown_path, report)


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], None]]:
    """Take signals that ask for the end; yields what raises Interrupted once one has come."""
    from ringplane.bench.errors import Interrupted

    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}

    def pulse() -> None:
        if came:
            raise Interrupted(came[0])

    try:
        yield pulse
        pulse()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measured(
    console: Console,
    pulse: Callable[[], None],
    targets: tuple[str, ...],
    json_path: Path | None,
    against: str | None,
    destroy_data: bool,
    **options: Any,
) -> Report:
    """Do what the options say; raises BenchError, Interrupted, and click.UsageError for options that do not fit."""
    from ringplane.bench import machine, places, results, run

    settings = settings_of(options, only_reads=against is None and not destroy_data)
    report = results.Report(machine.describe(), settings.described())
    session = run.Bench(settings, report, pulse=pulse, save=lambda: report.save(json_path) if json_path else None)
    if against is None:
        socket = socket_of(targets, options)
        seconds = settings.rounds * len(settings.cells) * run.turn(settings)
        with progress(console, session, seconds):
            session.socket(socket, destroy=destroy_data)
        return report
    if not targets:
        raise click.UsageError("say where the images shall lie: a folder, loop:FOLDER or a new file")
    report.subjects += subjects_of(against, options)
    chosen = [places.parse(text, destroy=destroy_data) for text in targets]
    for place in chosen:
        places.rehearse(place, len(report.subjects), settings.size)
    seconds = run.estimate(settings, chosen, report.subjects)
    console.print(described(settings, chosen, report.subjects, seconds), soft_wrap=True)
    with progress(console, session, seconds):
        for place in chosen:
            session.place(place, report.subjects)
    return report


def settings_of(options: dict[str, Any], *, only_reads: bool) -> Settings:
    """The cells and times that were asked for; raises click.UsageError for writes where only reads are allowed."""
    from ringplane.bench import cells, places, run

    full = options["full"]
    possible = cells.READ_ONLY_WORKLOADS if only_reads else WORKLOADS
    default = possible if full or only_reads else ("randread", "randwrite")
    workloads = options["workloads"] or default
    refused = [workload for workload in workloads if workload not in possible]
    if refused:
        raise click.UsageError(
            f"{', '.join(refused)} would overwrite the disk behind the socket: only with --destroy-data, which loses "
            "ALL DATA on it"
        )
    if options["size"] % (1 << 20) or options["size"] < places.SMALLEST:
        raise click.UsageError(f"--size: a multiple of 1M, {places.SMALLEST >> 20}M at least")
    driver = options["driver"] or ("both" if full else cells.EVENT)
    table = cells.table(
        workloads,
        options["depths"] or DEPTHS,
        options["queues"] or (cells.FULL_QUEUES if full else (1,)),
        cells.DRIVERS if driver == "both" else (driver,),
    )
    return run.Settings(
        cells=table,
        rounds=options["rounds"],
        seconds=options["seconds"],
        warm_up=options["warm_up"],
        size=options["size"],
        backend_cpus=options["pin_back_end"] or (),
        driver_cpus=options["pin_driver"] or (),
    )


def subjects_of(against: str, options: dict[str, Any]) -> list[Subject]:
    """All that shall be measured side by side; raises BenchError."""
    from ringplane.bench import backends, fio

    subjects = [backends.ringplane(flags) for flags in options["variants"] or [""]]
    if against == QSD:
        aios = dict.fromkeys(options["qsd_aio"] or AIO)
        subjects += [backends.qemu_storage_daemon(aio, options["qsd_iothread"]) for aio in aios]
    if options["with_fio"]:
        fio.require()
        subjects.append(fio.RAW)
    if len({subject.name for subject in subjects}) < len(subjects):
        raise click.UsageError("two variants of --ringplane are the same")
    return subjects


def socket_of(targets: tuple[str, ...], options: dict[str, Any]) -> Path:
    """The socket that was named; raises click.UsageError when something else was."""
    if len(targets) != 1:
        raise click.UsageError("name one SOCKET, or start back ends with --against qemu-storage-daemon PLACE...")
    path = Path(targets[0])
    if not path.is_socket():
        raise click.UsageError(
            f"{path} is no socket; to start back ends on an image there, say --against {QSD} (or {NOTHING})"
        )
    names = {"variants": "ringplane", "with_fio": "fio"}
    for name in ("variants", "qsd_aio", "qsd_iothread", "with_fio", "pin_back_end"):
        if options[name]:
            flag = names.get(name, name.replace("_", "-"))
            raise click.UsageError(f"--{flag} is for back ends that the bench starts (--against)")
    return path


def described(settings: Settings, places: Sequence[Place], subjects: Sequence[Subject], seconds: float) -> str:
    """What will be done, and how long it will take."""
    count = f"{len(settings.cells)} cells, {len(subjects)} to measure, {settings.rounds} rounds, {len(places)} places"
    minutes = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{count}: about {minutes} (a first start that compiles takes some seconds more)"


@contextlib.contextmanager
def progress(console: Console, session: Bench, seconds: float) -> Iterator[None]:
    """Show how far a run is, drawn between measurements and not during them."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(24), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=seconds)
        drawn = 0.0

        def tell(done: float, text: str) -> None:
            nonlocal drawn
            if time.monotonic() - drawn > REDRAW:
                bar.update(task, completed=done, description=text, refresh=True)
                drawn = time.monotonic()

        session.tell = tell
        yield
