"""`ringplane crash`: tries what a power cut would have been allowed to leave of a recorded disk."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ringplane.cli.trace import check_writable, replaced
from ringplane.cli.types import FILE, SECONDS
from ringplane.system.signals import Interrupted, Signals, end_line
from ringplane.system.signals import of as signals_of

if TYPE_CHECKING:
    from ringplane.crash.laboratory import Laboratory
    from ringplane.crash.timeline import Timeline
    from ringplane.recordings.entries import Header
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
    help="Stop after so many states.",
)
@click.option("--time-limit", type=SECONDS, default=TIME_LIMIT, show_default=True, help="After it a check has failed.")
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
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the random states.")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Checks at a time [default: the number of CPUs].")
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
    in a file system in user space (FUSE), and runs on all CPUs at the same time (--jobs).

    \b
    ringplane crash --base disk.img --recording disk.rec --check 'e2fsck -p {image}; e2fsck -fn {image}'

    A failing state is made smaller, for as long as --seconds again at most, and recorded.

    The exit status is 0 if no state failed, 1 if one did, 2 if they could not be tried, and 128 plus the number of the
    signal that interrupted it. What was found until then is printed in each case.
    """
    signals = signals_of(context.obj)
    out = out or recording_path.with_name(f"{recording_path.name}.failing")
    with could_not_run():
        recording = opened(recording_path)
        check_writable(out)
        with laboratory_of(base, recording, check, signals, **options) as laboratory:
            stopped = work(laboratory, options["seconds"], options["states"])
        if isinstance(stopped, Interrupted):
            end_line(stopped.number)
        elif stopped and not laboratory.tally.tried:
            raise stopped
    saved, problem = save(out, laboratory, recording)
    show(laboratory, recording, saved, stopped, as_json)
    if problem:
        click.echo(f"Error: {problem}", err=True)
    if stopped:
        end(stopped)
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
    except Interrupted as interrupted:
        end_line(interrupted.number)
        end(interrupted)
    except (CouldNotRun, RecordingError, click.ClickException, OSError) as error:
        end(error)


def end(why: Exception) -> NoReturn:
    """Exit with one line."""
    if isinstance(why, Interrupted):
        click.echo(why, err=True)
        raise SystemExit(why.status) from None
    raise CouldNotTry(text_of(why)) from None


def text_of(error: Exception) -> str:
    """One line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def needs_fuse() -> None:
    """Raises CouldNotTry if there is no FUSE."""
    try:
        import mfusepy  # noqa: F401
    except ImportError:
        raise CouldNotTry("mfusepy is not installed: pip install 'ringplane[crash]'") from None
    except OSError as error:
        raise CouldNotTry(f"{error}; libfuse is in the package libfuse3-3 of Debian") from None
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        how = "load the kernel module fuse, or give the container the device"
        raise CouldNotTry(f"/dev/fuse cannot be opened: {error.strerror}; {how}") from None


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
    states: int,
    jobs: int | None,
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

    timeline = timeline_of(recording, cache=not without_cache)
    check_command(command, timeline)
    cuts = power_cuts(timeline, since(timeline, from_mark))
    contents = SectorContents(mapped(base, recording.header), recording, timeline.writes, signals.check)
    experiment = Experiment(contents, timeline, cuts, command, time_limit)
    enumeration = Enumeration(cuts, Tearing(unit(tear, recording.header.physical_block_size)), seed, most=states)
    number = jobs or cpus()
    with check_processes(experiment, number, signals) as processes:
        yield Laboratory(experiment, enumeration, processes, number, signals)


def check_command(command: str, timeline: Timeline) -> None:
    """Raises CouldNotTry if it cannot be run."""
    if "{image}" not in command:
        raise CouldNotTry("--check does not contain {image}, which becomes the path of the image")
    # Its exit status would be that of a failed check.
    parsed = subprocess.run(["/bin/sh", "-n", "-c", command], capture_output=True, text=True)
    if parsed.returncode:
        raise CouldNotTry(f"--check: {parsed.stderr.strip()}")
    wrong = next((mark for mark in timeline.marks if "\0" in mark.text), None)
    if wrong and "{mark}" in command:
        raise CouldNotTry(f"entry {wrong.index}: the text of this mark has a NUL byte; use a check without {{mark}}")


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


def mapped(base: Path, header: Header) -> memoryview:
    """The content of the base image, as large as the recorded disk. Raises OSError, CouldNotTry."""
    with base.open("rb") as file:
        found = file.seek(0, os.SEEK_END)
        if found != header.size:
            raise CouldNotTry(
                f"{base}: has {found} bytes, and the recorded disk {header.size}; it is not its base image"
            )
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(header.image)):
                click.echo(f"{base}: is the recorded disk itself; it has to have its content from before", err=True)
        # An empty file cannot be mapped.
        return memoryview(mmap.mmap(file.fileno(), found, prot=mmap.PROT_READ) if found else b"")


def work(laboratory: Laboratory, seconds: float, states: int) -> Exception | None:
    """Try states until the end, or until a signal or an error stops it."""
    from ringplane.crash.check_processes import CouldNotRun
    from ringplane.crash.laboratory import Budget

    try:
        with progress(laboratory, seconds, states):
            laboratory.run(Budget(states, seconds))
            laboratory.minimise(seconds)
    except (CouldNotRun, Interrupted, OSError) as error:
        return error
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
        tally = laboratory.tally

        def announce() -> None:
            done = max(tally.seconds / seconds, tally.tried / states)
            text = f"{tally.tried} tried, {tally.failed} failed"
            if tally.smaller_tried:
                done = tally.smaller_seconds / seconds
                text += f"; making the failing state smaller: {tally.smaller_tried} tried"
            bar.update(task, completed=done, description=text)

        laboratory.announce = announce
        yield


def save(out: Path, laboratory: Laboratory, recording: Recording) -> tuple[Path | None, str]:
    """Record the failing state, if there is one; returns where, and why it could not be recorded."""
    from ringplane.crash.failing_recording import write_failing

    if laboratory.failure is None:
        return None, ""
    experiment, state = laboratory.experiment, laboratory.failure.state
    try:
        with replaced(out, "wb") as file:
            write_failing(file, recording, experiment.timeline, state, state.earliest(experiment.marked(state)))
    except click.ClickException as error:
        return None, error.message
    return out, ""


def show(
    laboratory: Laboratory, recording: Recording, saved: Path | None, stopped: Exception | None, as_json: bool
) -> None:
    """Print what was found."""
    from ringplane.crash.crash_report import lines, report_of

    report = report_of(laboratory, recording, saved, text_of(stopped) if stopped else None)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
        return
    for line in lines(report):
        click.echo(line)
