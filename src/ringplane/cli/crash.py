"""`ringplane crash`: tries what a power cut would have been allowed to leave of a recorded disk."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringplane.cli.trace import replaced
from ringplane.cli.types import FILE, SECONDS
from ringplane.system.signals import Interrupted, Signals, end_line
from ringplane.system.signals import of as signals_of

if TYPE_CHECKING:
    from ringplane.crash.laboratory import Laboratory, Tally
    from ringplane.crash.timeline import Timeline
    from ringplane.recordings.reader import Recording

FAILED, COULD_NOT_RUN = 1, 2
# States and seconds, if no others are given.
STATES, BUDGET, TIME_LIMIT = 20_000, "600", "60"


@click.command(short_help="Try what power cuts can leave of a recorded disk.")
@click.option("--base", type=FILE, required=True, help="The raw image as it was when the recording began; only read.")
@click.option("--recording", "recording_path", type=FILE, required=True, help="Made by `ringplane serve --record`.")
@click.option(
    "--check",
    metavar="COMMAND",
    required=True,
    help="Shell command whose exit status is 0 if a state is good. {image} in it is the path of the image, which it "
    "may write to; {mark} the text of the last mark before the power cut; {folder} an empty folder for its files.",
)
@click.option("--seconds", type=SECONDS, default=BUDGET, show_default=True, help="Stop after this time.")
@click.option(
    "--states",
    type=click.IntRange(1),
    metavar="N",
    default=STATES,
    show_default=True,
    help="Stop after so many.",
)
@click.option("--time-limit", type=SECONDS, default=TIME_LIMIT, show_default=True, help="Of a check; then it failed.")
@click.option(
    "--without-cache",
    is_flag=True,
    help="Completed writes are stable: only those in flight can be missing.",
)
@click.option(
    "--tear",
    type=click.Choice(["512", "4096", "none"]),
    help="Writes can be torn between units of so many bytes [default: the disk's physical blocks].",
)
@click.option("--from-mark", metavar="TEXT", help="Cut the power only after the first mark with this text.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random states.")
@click.option("--out", type=FILE, help="Where to record the smallest failing state [default: RECORDING.failing].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def crash(
    context: click.Context,
    /,
    base: Path,
    recording_path: Path,
    check: str,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Try the states that a power cut would have been allowed to leave of a disk, and run a check on each.

    A state has what was stable, and any of the other writes: those that no completed flush covers, wholly or in part.
    The likely ones come first, and those with few missing writes; then random ones. The check sees each state as a file
    in a file system in user space (FUSE), and runs on all CPUs at the same time.

    \b
    ringplane crash --base disk.img --recording disk.rec --check 'e2fsck -p {image}; e2fsck -fn {image}'

    The exit status is 0 if no state failed, 1 if one did, 2 if they could not be tried, and 128 plus the number of the
    signal that interrupted it.
    """
    signals = signals_of(context.obj)
    with could_not_run():
        recording = opened(recording_path)
        with laboratory_of(base, recording, check, signals, **options) as laboratory:
            interrupted = work(laboratory, options["seconds"], options["states"])
    saved = save(out or recording_path.with_name(f"{recording_path.name}.failing"), laboratory, recording)
    show(laboratory, recording, saved, as_json)
    if interrupted:
        click.echo(interrupted, err=True)
        raise SystemExit(interrupted.status)
    raise SystemExit(FAILED if laboratory.failure else 0)


class CouldNotTry(click.ClickException):
    """States could not be tried."""

    exit_code = COULD_NOT_RUN


@contextlib.contextmanager
def could_not_run() -> Iterator[None]:
    """Whatever goes wrong is one line, and the exit status says that no state was found good or bad."""
    needs_fuse()
    from ringplane.crash.check_processes import CouldNotRun
    from ringplane.recordings.recording_format import RecordingError

    try:
        yield
    except (CouldNotRun, RecordingError) as error:
        raise CouldNotTry(str(error)) from None
    except OSError as error:
        raise CouldNotTry(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None


def needs_fuse() -> None:
    """Raises CouldNotTry if there is no FUSE."""
    try:
        import mfusepy  # noqa: F401
    except ImportError:
        raise CouldNotTry("mfusepy is not installed: pip install 'ringplane[crash]'") from None
    except OSError as error:
        raise CouldNotTry(f"{error}; libfuse is in the package libfuse3-3 of Debian") from None
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise CouldNotTry("/dev/fuse cannot be opened; load the kernel module fuse, or give the container the device")


def opened(path: Path) -> Recording:
    """The recording; what is missing of it is printed."""
    from ringplane.recordings.reader import open_recording

    recording = open_recording(path)
    if recording.warning:
        click.echo(f"{path}: {recording.warning}", err=True)
    return recording


@contextlib.contextmanager
def laboratory_of(
    base: Path,
    recording: Recording,
    command: str,
    signals: Signals,
    *,
    time_limit: float,
    without_cache: bool,
    tear: str | None,
    from_mark: str | None,
    seed: int,
    **others: Any,
) -> Iterator[Laboratory]:
    """What is to be tried, and the processes that do it."""
    from ringplane.crash.check_process import Experiment
    from ringplane.crash.check_processes import check_processes, cpus
    from ringplane.crash.crash_states import Enumeration
    from ringplane.crash.laboratory import Laboratory
    from ringplane.crash.power_cuts import power_cuts
    from ringplane.crash.sector_contents import SectorContents
    from ringplane.crash.tearing import Tearing
    from ringplane.crash.timeline import timeline_of

    if "{image}" not in command:
        raise click.UsageError("--check does not contain {image}, which becomes the path of the image")
    timeline = timeline_of(recording, cache=not without_cache)
    cuts = power_cuts(timeline, since(timeline, from_mark))
    contents = SectorContents(mapped(base, recording.header.size), recording, timeline.writes)
    experiment = Experiment(contents, timeline, cuts, command, time_limit)
    enumeration = Enumeration(cuts, Tearing(unit(tear, recording.header.physical_block_size)), seed)
    number = cpus()
    with check_processes(experiment, number, signals) as processes:
        yield Laboratory(experiment, enumeration, processes, number)


def since(timeline: Timeline, text: str | None) -> int:
    """The time from which on the power can be cut. Raises CouldNotTry."""
    if text is None:
        return 0
    found = next((mark.index + 1 for mark in timeline.marks if mark.text == text), None)
    if found is None:
        marks = ", ".join(dict.fromkeys(mark.text for mark in timeline.marks)) or "none"
        raise CouldNotTry(f"the recording has no mark {text!r}; its marks: {marks}")
    return found


def unit(tear: str | None, physical_block_size: int) -> int:
    """In which units writes are torn, in bytes."""
    if tear is None:
        return 4096 if physical_block_size >= 4096 else 512
    return 0 if tear == "none" else int(tear)


def mapped(base: Path, size: int) -> memoryview:
    """The content of the base image, as large as the recorded disk. Raises OSError, CouldNotTry."""
    with base.open("rb") as file:
        found = file.seek(0, os.SEEK_END)
        if found != size:
            raise CouldNotTry(f"{base}: has {found} bytes, and the recorded disk {size}; it is not its base image")
        return memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))


def work(laboratory: Laboratory, seconds: float, states: int) -> Interrupted | None:
    """Try states until the end, or until a signal."""
    from ringplane.crash.laboratory import Budget

    try:
        with progress(laboratory, seconds, states):
            laboratory.run(Budget(states, seconds))
            laboratory.minimise()
    except Interrupted as interrupted:
        end_line(interrupted.number)
        return interrupted
    return None


@contextlib.contextmanager
def progress(laboratory: Laboratory, seconds: float, states: int) -> Iterator[None]:
    """Show how much of the budget is used, and what has been found."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def announce(tally: Tally) -> None:
            done = max(tally.seconds / seconds, tally.tried / states)
            bar.update(task, completed=done, description=f"{tally.tried} tried, {tally.failed} failed")

        laboratory.announce = announce
        yield


def save(out: Path, laboratory: Laboratory, recording: Recording) -> Path | None:
    """Record the failing state, if there is one. Raises ClickException."""
    from ringplane.crash.failing_recording import write_failing

    if laboratory.failure is None:
        return None
    experiment, state = laboratory.experiment, laboratory.failure.state
    with replaced(out, "wb") as file:
        write_failing(file, recording, experiment.timeline, state, state.earliest(experiment.marked(state)))
    return out


def show(laboratory: Laboratory, recording: Recording, saved: Path | None, as_json: bool) -> None:
    """Print what was found."""
    from ringplane.crash.crash_report import lines, report_of

    report = report_of(laboratory, recording, saved)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
        return
    for line in lines(report):
        click.echo(line)
