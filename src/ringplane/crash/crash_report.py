"""What the laboratory has found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from errno import errorcode
from pathlib import Path

from ringplane.crash.check_process import Experiment
from ringplane.crash.crash_states import State
from ringplane.crash.disk_state import bit_runs
from ringplane.crash.laboratory import Failure, Laboratory
from ringplane.crash.timeline import SECTOR, Mark
from ringplane.options.counted import counted
from ringplane.recordings.entries import KIND_NAMES
from ringplane.recordings.reader import Recording
from ringplane.system.signals import name

# So many missing writes are listed.
MOST_LISTED = 20
# Python does not convert much larger numbers to text (sys.get_int_max_str_digits).
MOST_BITS = 10_000


@dataclass(frozen=True, slots=True)
class MissingWrite:
    """A write that is missing, or of which only some sectors are `there`: runs of them, as first one and number."""

    entry: int
    kind: str
    # 0, or the -errno with which it failed.
    result: int
    offset: int
    length: int
    there: list[tuple[int, int]]

    def __str__(self) -> str:
        there = ", ".join(f"{start}-{start + count - 1}" for start, count in self.there)
        what = f"only its sectors {there} are there" if there else "is missing"
        failed = f", which failed ({errorcode.get(-self.result, -self.result)})" if self.result else ""
        return f"entry {self.entry}, {self.kind} of {self.length} bytes at {self.offset}{failed}: {what}"


@dataclass(frozen=True, slots=True)
class FoundState:
    """The smallest state on which the check failed."""

    # So many entries had ended when the power was cut.
    after: int
    missing: list[MissingWrite]
    reordered: bool
    mark_before: str | None
    mark_after: str | None
    # Of the check: None if its time was over.
    exit_status: int | None
    output: str
    # Whether the check failed on it when it was repeated; None: it was not repeated.
    confirmed: bool | None
    recording: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run."""

    entries: int
    cuts: int
    possible: int
    tried: int
    same: int
    failed: int
    seconds: float
    exhausted: bool
    in_vain: bool
    # So many more, to make the failing state smaller.
    smaller_tried: int
    smaller_seconds: float
    # Loop devices that checks have left.
    detached: int
    # Why it ended before it was finished, if it did.
    stopped: str | None
    smallest: FoundState | None

    def as_json(self) -> dict[str, object]:
        """For programs. A number of states that JSON's readers would round is a text too, and rounded if it is huge."""
        exact = self.possible.bit_length() <= MOST_BITS
        return asdict(self) | {"possible": str(self.possible) if exact else rounded(self.possible)}


def report_of(laboratory: Laboratory, recording: Recording, saved: Path | None, stopped: str | None) -> Report:
    """What a laboratory has found until it was finished or `stopped`; the failing state is `saved` there."""
    tally, failure = laboratory.tally, laboratory.failure
    return Report(
        entries=len(recording),
        cuts=len(laboratory.enumeration.cuts),
        possible=laboratory.enumeration.possible,
        tried=tally.tried,
        same=tally.same,
        failed=tally.failed,
        seconds=round(tally.seconds, 3),
        exhausted=tally.exhausted,
        in_vain=tally.in_vain,
        smaller_tried=tally.smaller_tried,
        smaller_seconds=round(tally.smaller_seconds, 3),
        detached=tally.detached,
        stopped=stopped,
        smallest=found_state(laboratory.experiment, failure, recording, saved) if failure else None,
    )


def found_state(experiment: Experiment, failure: Failure, recording: Recording, saved: Path | None) -> FoundState:
    """A failing state in words."""
    state, verdict = failure.state, failure.verdict
    after = state.earliest(experiment.marked(state))
    before, behind = experiment.timeline.mark_before(after), experiment.timeline.mark_after(after)
    return FoundState(
        after=after,
        missing=[missing_write(recording, state, place) for place in state.missing(experiment.marked(state))],
        reordered=bool(state.order),
        mark_before=text_of(before),
        mark_after=text_of(behind),
        exit_status=verdict.status,
        output=verdict.output,
        confirmed=failure.repeated,
        recording=str(saved) if saved else None,
    )


def missing_write(recording: Recording, state: State, place: int) -> MissingWrite:
    entry = recording[state.cut.pending[place].index]
    there = [(start, end - start) for start, end in bit_runs(state.kept[place])]
    length = entry.length // SECTOR * SECTOR
    return MissingWrite(entry.index, KIND_NAMES[entry.kind], entry.result, entry.offset, length, there)


def text_of(mark: Mark | None) -> str | None:
    return mark.text if mark else None


def lines(report: Report) -> Iterator[str]:
    """For people."""
    rate = f", {report.tried / report.seconds:.0f} per second" if report.seconds else ""
    yield (
        f"{counted(report.cuts, 'power cut')}, {rounded(report.possible)} states possible, {report.tried} tried "
        f"({report.same} were the same as others), {report.failed} failed; {report.seconds:.1f} s{rate}"
    )
    if report.exhausted:
        yield "all states have been tried"
    if report.in_vain:
        yield "nothing new is left to try, although these are not all states that are possible"
    if report.detached:
        yield f"checks have left {counted(report.detached, 'loop device')}, which were detached: let them do it"
    if report.smaller_tried:
        yield f"{report.smaller_tried} more tried to make the failing state smaller; {report.smaller_seconds:.1f} s"
    if report.smallest:
        yield from lines_of_state(report.smallest, report.entries)


def lines_of_state(found: FoundState, entries: int) -> Iterator[str]:
    yield f"the smallest failing state: the power is cut after {found.after} of {entries} entries"
    yield f"  last mark before: {found.mark_before or 'none'}; first mark after: {found.mark_after or 'none'}"
    if found.reordered:
        yield "  writes that were in flight at the same time reached the disk in another order"
    if not found.missing:
        yield "  nothing is missing of what was written before"
    yield from (f"  {each}" for each in found.missing[:MOST_LISTED])
    if len(found.missing) > MOST_LISTED:
        yield f"  and {counted(len(found.missing) - MOST_LISTED, 'other write')}"
    yield f"  the check {ended(found.exit_status)}{REPEATED[found.confirmed]}"
    yield from (f"  | {line}" for line in found.output.splitlines())
    if found.recording:
        yield f"  recorded in {found.recording}; `ringplane replay` makes this state of a copy of the base image"


def ended(status: int | None) -> str:
    """How a check has ended."""
    if status is None:
        return "did not end in time"
    return f"ended with status {status}" if status >= 0 else f"was ended by {name(-status)}"


REPEATED = {True: "", False: ", and succeeded when it was repeated", None: ", and was not repeated"}


def rounded(number: int) -> str:
    """A number that may be very large."""
    if number < 1_000_000:
        return str(number)
    return f"about 10^{math.floor(math.log10(number))}"
