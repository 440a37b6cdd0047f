"""`ringplane bench`: measures back ends, one at its socket or several side by side, and checks their data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ringplane.cli.types import CPUS, FILE, FOLDER, SECONDS, SIZE, WARM_UP
from ringplane.options.counted import counted
from ringplane.options.image_address import scheme_of
from ringplane.system.signals import Interrupted, Signals, end_line
from ringplane.system.signals import of as signals_of

if TYPE_CHECKING:
    from rich.console import Console

    from ringplane.bench.places import Place
    from ringplane.bench.results import Report, Subject
    from ringplane.bench.run import Bench, Settings

QSD, NOTHING = "qemu-storage-daemon", "nothing"
AIO = ("native", "io_uring", "threads")
EVENT, BUSY, BOTH = "event", "busy", "both"
DRIVERS = (EVENT, BUSY)
WORKLOADS = ("randread", "randwrite", "randrw", "seqread", "seqwrite")
DEPTHS = (1, 8, 32, 128)
# The progress bar is drawn at most this often, in seconds: nothing else should run during a measurement.
REDRAW = 0.25
# The width of tables if there is no terminal, in columns.
WIDTH = 100

# Parameters that are valid for some uses only.
OF_QSD = ("qsd_aio", "qsd_iothread")
OF_LOCAL_IMAGES = ("qsd_aio", "with_fio", "size")
OF_STARTED = (*OF_QSD, "variants", "with_fio", "pin_back_end", "size")
OF_MEASURING = (
    *("targets", "against", "workloads", "depths", "queues", "driver", "full", "rounds", "seconds", "warm_up"),
    *("pin_driver", "destroy_data", "json_path", *OF_STARTED),
)


@click.command(short_help="Measure back ends side by side.")
@click.argument("targets", nargs=-1, type=click.Path(readable=False), metavar="SOCKET | PLACE...")
@click.option(
    "--against",
    type=click.Choice([QSD, NOTHING]),
    help="Start ringplane, and this back end beside it, on images at each PLACE.",
)
@click.option(
    "--ringplane", "variants", multiple=True, metavar="OPTIONS",
    help="Options of `ringplane serve` for the ringplane that is measured; repeat it to compare variants.",
)  # fmt: skip
@click.option(
    "--qsd-aio", multiple=True, type=click.Choice(AIO), default=AIO, show_default=True,
    help="qemu-storage-daemon's ways of I/O; repeatable.",
)  # fmt: skip
@click.option("--qsd-iothread", is_flag=True, help="Run qemu-storage-daemon's export in an iothread.")
@click.option(
    "--fio", "with_fio", is_flag=True, help="Measure fio on ringplane's image too: the storage without a virtqueue."
)
@click.option(
    "--workload", "workloads", multiple=True, type=click.Choice(WORKLOADS), default=("randread", "randwrite"),
    help="Load; repeatable [default: randread, randwrite; only randread where nothing may be written].",
)  # fmt: skip
@click.option(
    "--depth", "depths", multiple=True, type=click.IntRange(1, 1024), default=DEPTHS, show_default=True,
    help="Requests in flight per queue; repeatable.",
)  # fmt: skip
@click.option(
    "--queues", multiple=True, type=click.IntRange(1, 64), default=(1,), show_default=True,
    help="Queues that are used at a time; repeatable.",
)  # fmt: skip
@click.option(
    "--driver", type=click.Choice([*DRIVERS, BOTH]), default=EVENT, show_default=True,
    help="The driver sleeps until it is notified (event), or polls the rings (busy).",
)  # fmt: skip
@click.option(
    "--full", is_flag=True, help="All workloads, 1 and 2 queues, both drivers, except where these options are given."
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Measurements of each cell.")
@click.option("--seconds", type=SECONDS, default="1", show_default=True, help="Length of each measurement.")
@click.option(
    "--warm-up", type=WARM_UP, default="0.2", show_default=True, help="Seconds of load before each measurement."
)
@click.option("--size", type=SIZE, default="1G", show_default=True, help="Size of each new image.")
@click.option("--pin-back-end", type=CPUS, metavar="CPUS", help="CPUs for back ends and fio [default: all].")
@click.option("--pin-driver", type=CPUS, metavar="CPUS", help="CPUs for the driver [default: all].")
@click.option(
    "--destroy-data", is_flag=True,
    help="Allow writing to what exists: the disk behind SOCKET, or a PLACE that is an image, a block device or an "
    "ADDRESS. ALL DATA IN IT IS LOST.",
)  # fmt: skip
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write all results there, after each round.")
@click.option(
    "--plot",
    "plot_directory",
    type=FOLDER,
    metavar="DIRECTORY",
    help="Write plots there, as SVG and PNG (needs matplotlib).",
)
@click.option(
    "--markdown", "markdown_path", type=FILE, metavar="FILE",
    help="Write tables into a new FILE, or between the markers of an existing one.",
)  # fmt: skip
@click.option(
    "--section", default="", metavar="NAME", help="The section of the --markdown FILE, if it has markers for several."
)
@click.option(
    "--report", "report_path", type=FILE, metavar="FILE",
    help="Measure nothing: show the results of an earlier --json FILE, and write its --plot and --markdown.",
)  # fmt: skip
@click.pass_context
def bench(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    report_path: Path | None,
    json_path: Path | None,
    plot_directory: Path | None,
    markdown_path: Path | None,
    section: str,
    **options: Any,
) -> None:
    """Measure vhost-user-blk back ends: IOPS, latency and CPU time per request; and check the data that they return.

    \b
    ringplane bench /tmp/disk.sock
        any back end, at its socket; only reads, unless --destroy-data is given
    ringplane bench --against qemu-storage-daemon /dev/shm /var/tmp
        ringplane beside qemu-storage-daemon, each on an image of its own
    ringplane bench --against qemu-storage-daemon rbd:rbd/test nbd://server/test
        both on the same image elsewhere; only reads, unless --destroy-data is given

    A PLACE is a directory (images are created in it and removed afterwards), loop:DIRECTORY (the same, behind loop
    devices; needs root), a new file, with --destroy-data an existing image or block device, or the ADDRESS of an image
    in a Ceph cluster (rbd:POOL/IMAGE) or on an NBD server (nbd://, nbd+unix://). All back ends share an image that
    exists. In each round each cell (workload, depth, queues, driver) is measured on one back end after the other, in
    alternating order. Before each measurement a short load of the same kind is verified, and at the end the whole
    image.

    The exit status is 0 if all data was right, 1 if any byte was wrong or something failed, 2 for wrong options, and
    128 plus the number of the signal that interrupted it (130 after Ctrl-C, 143 after SIGTERM).
    """
    from rich.console import Console

    from ringplane.bench import results
    from ringplane.bench.errors import BenchError

    started = time.time()
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH)
    try:
        check_outputs(json_path, plot_directory, markdown_path, section)
        if report_path:
            refuse(context, OF_MEASURING, "--report measures nothing")
            report = results.load(report_path)
        else:
            report = measured(context, console, signals_of(context.obj), targets, json_path, **options)
        put_out(console, report, json_path, plot_directory, markdown_path, section)
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    except Interrupted as interrupted:
        saved = json_path is not None and json_path.exists() and json_path.stat().st_mtime >= started
        kept = f"; complete rounds are in {json_path}" if saved else ""
        stopped = "; back ends have been stopped and images removed" if options["against"] else ""
        end_line(interrupted.number)
        click.echo(f"{interrupted}{stopped}{kept}", err=True)
        raise SystemExit(interrupted.status) from None
    if report.problems:
        raise SystemExit(1)


def check_outputs(
    json_path: Path | None, plot_directory: Path | None, markdown_path: Path | None, section: str
) -> None:
    """Raise BenchError for files that cannot be written; called before measuring."""
    from ringplane.bench import files, markdown, plots

    if json_path:
        files.check(json_path)
    if plot_directory:
        plots.require()
        files.check_directory(plot_directory)
    if markdown_path:
        markdown.check(markdown_path, section)


def refuse(context: click.Context, names: Collection[str], why: str) -> None:
    """Raise click.UsageError if any of these parameters was given."""
    given = [
        parameter.human_readable_name if isinstance(parameter, click.Argument) else parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names and is_given(context, str(parameter.name))
    ]
    if given:
        raise click.UsageError(f"{why}: leave out {', '.join(given)}")


def is_given(context: click.Context, name: str) -> bool:
    """Whether a parameter was given on the command line."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def put_out(
    console: Console,
    report: Report,
    json_path: Path | None,
    plot_directory: Path | None,
    markdown_path: Path | None,
    section: str,
) -> None:
    """Print a report and write it to the files given by options."""
    from ringplane.bench import console_tables, machine, markdown, plots

    console.print(machine.sentence(report.machine), markup=False)
    console.print()
    console_tables.show(console, report)
    if json_path:
        report.save(json_path)
    if plot_directory:
        paths = plots.draw(plot_directory, report)
        console.print(f"{len(paths)} plots in {plot_directory}", markup=False, soft_wrap=True)
    if markdown_path:
        markdown.write(markdown_path, report, section)


def measured(
    context: click.Context,
    console: Console,
    signals: Signals,
    targets: tuple[str, ...],
    json_path: Path | None,
    against: str | None,
    destroy_data: bool,
    **options: Any,
) -> Report:
    """Run the bench of these options; raises BenchError, Interrupted, and click.UsageError for conflicting options."""
    from ringplane.bench import machine, results, run
    from ringplane.bench.errors import never
    from ringplane.driver.compile_driver import warm_up

    chosen = places_of(context, targets, destroy_data) if against else []
    writes = all(place.writable for place in chosen) if against else destroy_data
    settings = settings_of(context, options, only_reads=not writes)
    report = results.Report(machine.describe(), settings.described())
    save = (lambda: report.save(json_path)) if json_path else never
    session = run.Bench(settings, report, pulse=signals.check, save=save)
    warm_up(signals)
    if against:
        if against == NOTHING:
            refuse(context, OF_QSD, f"--against {NOTHING} does not start {QSD}")
        report.subjects += subjects_of(against, options, chosen)
        side_by_side(console, session, chosen)
        return report
    socket = socket_of(context, targets)
    seconds = settings.rounds * len(settings.cells) * run.turn(settings)
    with progress(console, session, seconds):
        session.socket(socket, destroy=destroy_data)
    return report


def side_by_side(console: Console, session: Bench, places: Sequence[Place]) -> None:
    """Measure the subjects of the report in these places; raises BenchError, Interrupted."""
    from ringplane.bench import run

    settings, subjects = session.settings, session.report.subjects
    session.check_room(places)
    seconds = run.estimate(settings, places, subjects)
    console.print(described(settings, places, subjects, seconds))
    with progress(console, session, seconds):
        # The first one shows what is missing when it is measured.
        session.rehearse(places[1:])
        for place in places:
            session.place(place, subjects)


def settings_of(context: click.Context, options: dict[str, Any], *, only_reads: bool) -> Settings:
    """The cells and times given by options; raises click.UsageError for writes if only reads are allowed."""
    from ringplane.bench import cells, places, run

    full = {"workloads": WORKLOADS, "queues": cells.FULL_QUEUES, "driver": BOTH} if options["full"] else {}
    chosen = options | {name: value for name, value in full.items() if not is_given(context, name)}
    workloads = list(chosen["workloads"])
    if only_reads:
        if not is_given(context, "workloads"):
            workloads = [name for name in workloads if name in cells.READ_ONLY_WORKLOADS]
        refused = [name for name in workloads if name not in cells.READ_ONLY_WORKLOADS]
        if refused:
            raise click.UsageError(
                f"{', '.join(refused)} would overwrite the disk behind the socket or address; add --destroy-data to "
                "allow it: ALL DATA ON THE DISK IS LOST"
            )
    if chosen["size"] % (1 << 20) or chosen["size"] < places.SMALLEST:
        raise click.UsageError(f"--size must be a multiple of 1M and at least {places.SMALLEST >> 20}M")
    driver = chosen["driver"]
    return run.Settings(
        cells=cells.table(workloads, chosen["depths"], chosen["queues"], DRIVERS if driver == BOTH else (driver,)),
        rounds=chosen["rounds"],
        seconds=chosen["seconds"],
        warm_up=chosen["warm_up"],
        size=chosen["size"],
        backend_cpus=chosen["pin_back_end"] or (),
        driver_cpus=chosen["pin_driver"] or (),
    )


def subjects_of(against: str, options: dict[str, Any], places: Sequence[Place]) -> list[Subject]:
    """The back ends to measure side by side; raises BenchError for programs that are not installed."""
    from ringplane.bench import backends, fio

    subjects = [backends.ringplane(flags) for flags in options["variants"] or [""]]
    if against == QSD:
        subjects += qsd_subjects(options, places)
    if options["with_fio"]:
        fio.require()
        subjects.append(fio.RAW)
    if len({subject.name for subject in subjects}) < len(subjects):
        raise click.UsageError("two --ringplane are the same; leave one out")
    for subject in subjects:
        backends.require(subject)
    return subjects


def qsd_subjects(options: dict[str, Any], places: Sequence[Place]) -> list[Subject]:
    """The variants of qemu-storage-daemon."""
    from ringplane.bench import qsd

    iothread = options["qsd_iothread"]
    local = [qsd.subject(aio, iothread) for aio in dict.fromkeys(options["qsd_aio"])]
    return [
        *(local if not all(place.is_remote for place in places) else []),
        *([qsd.remote_subject(iothread)] if any(place.is_remote for place in places) else []),
    ]


def places_of(context: click.Context, targets: tuple[str, ...], destroy: bool) -> list[Place]:
    """The given places; raises BenchError and click.UsageError."""
    from ringplane.bench import places

    if not targets:
        raise click.UsageError("name at least one PLACE: a directory, loop:DIRECTORY, a new file or an ADDRESS")
    chosen = [places.parse(text, destroy=destroy) for text in targets]
    for number, place in enumerate(chosen):
        if place.identity in [other.identity for other in chosen[:number]]:
            raise click.UsageError(f"{place.address} is given twice; leave one out")
    if all(place.is_remote for place in chosen):
        refuse(context, OF_LOCAL_IMAGES, "every PLACE is an image elsewhere")
    return chosen


def socket_of(context: click.Context, targets: tuple[str, ...]) -> Path:
    """The given socket; raises click.UsageError if the argument is something else."""
    if len(targets) != 1:
        raise click.UsageError(f"name one SOCKET, or start back ends with --against {QSD} PLACE")
    if scheme_of(targets[0]):
        raise click.UsageError(f"{targets[0]} is the address of an image; add --against {QSD} or --against {NOTHING}")
    path = Path(targets[0])
    if not path.exists():
        raise click.UsageError(f"{path} does not exist; start a back end that listens there, or use --against {QSD}")
    if not path.is_socket():
        raise click.UsageError(
            f"{path} is not a socket; to start back ends on images there, add --against {QSD} or --against {NOTHING}"
        )
    refuse(context, OF_STARTED, "the back end at a SOCKET is already running (only --against starts back ends)")
    return path


def described(settings: Settings, places: Sequence[Place], subjects: Sequence[Subject], seconds: float) -> str:
    """The number of measurements, and about how long they take."""
    from ringplane.compiler.cache import is_cached

    parts = [
        counted(len(settings.cells), "cell"),
        counted(len(subjects), "back end"),
        counted(settings.rounds, "round"),
        *([counted(len(places), "place")] if len(places) > 1 else []),
    ]
    minutes = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
    first = "" if is_cached() else "; this first start compiles ringplane, which takes longer"
    return f"{' x '.join(parts)}: about {minutes}{first}"


@contextlib.contextmanager
def progress(console: Console, session: Bench, seconds: float) -> Iterator[None]:
    """Show the progress of a run, drawn between measurements and not during them."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(12), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    # A longer description would squeeze the bar and the time.
    room = console.width - 12 - len(" 0:00:00 ") - 1
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=seconds)
        drawn = 0.0

        def announce(done: float, text: str) -> None:
            nonlocal drawn
            if time.monotonic() - drawn > REDRAW:
                bar.update(task, completed=done, description=text[:room], refresh=True)
                drawn = time.monotonic()

        session.announce = announce
        yield
