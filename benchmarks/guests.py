"""ringplane and qemu-storage-daemon with real guests: fio inside user-mode Linux and QEMU, interleaved, medians.

    .venv/bin/pip install -e '.[test]'
    python benchmarks/guests.py --guest uml --guest qemu --place /dev/shm --place /var/tmp

One guest has a disk of each back end, so that any influence of the guest and the machine affects all of them: in each
round each cell is measured on one disk after the other, in an order that changes from round to round. The machines are
those of tests/guest, which describes the supported kernels; QEMU runs without KVM.

User-mode Linux consists of several processes that take turns, with one processor in total. By default the host's
scheduler sometimes wakes them across CPUs and sometimes not, and the results vary between 7 and 30 thousand IOPS with
any back end. So the guest is confined to one CPU, and the back ends to the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console
from rich.table import Table

from ringplane.bench import backends, machine, places, qsd
from ringplane.bench.cells import WORKLOADS
from ringplane.bench.errors import BenchError
from ringplane.bench.results import RINGPLANE, Subject
from ringplane.driver.process import cpu_ns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from guest import initramfs, kernels, workloads
from guest.machines import Guest, GuestError, QemuGuest, UmlGuest

FORMAT = "ringplane-guests-1"
GUESTS = ("uml", "qemu")
DEPTHS = (1, 8, 32)
BEGIN, END = "<!-- guests:begin -->", "<!-- guests:end -->"

MIB = 1 << 20
MEMORY_MIB = 512
# The maximum time for booting and ending a guest, and for a run beyond its seconds: an emulated guest is slow.
BOOT, OVERHEAD = 180.0, 10.0
FIGURES = ("iops", "mean_us", "p50_us", "p99_us", "cpu_us")
# Runs during which other processes used more of a CPU than this do not count, unless a cell has no other runs.
QUIET = 0.1
TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")

# The guest's script prints this for each run, with its number and fio's line.
SAID = "fio-run"
# Positions in fio's terse output, version 3 ("HOWTO", terse output); reads and writes are reported together.
VERSION, ERROR, KIB, RUNTIME_MS, PERCENTILES, MEAN_US = 0, 4, 5, 8, slice(17, 37), 39


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of fio in a guest: a cell on the disk of a subject. Round -1 is the warm-up, which is not counted."""

    round: int
    workload: str
    depth: int
    subject: int


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one run: latencies as seen by the guest, and CPU time of the back end, in microseconds."""

    guest: str
    place: str
    workload: str
    depth: int
    subject: str
    round: int
    iops: float
    mean_us: float
    p50_us: float
    p99_us: float
    cpu_us: float
    strangers: float  # share of a CPU that other processes used
    pinned: bool = False  # the guest to one CPU, the back ends to the others

    @property
    def quiet(self) -> bool:
        return self.strangers <= QUIET


@dataclass(frozen=True, slots=True)
class Fio:
    """One line of fio's terse output. Latency is from before the submission until the completion is seen."""

    iops: float
    requests: float
    mean_us: float
    p50_us: float
    p99_us: float


def parse_fio(line: str, block_size: int) -> Fio:
    """Read a line of fio's terse output (version 3, reads and writes reported together); raises ValueError."""
    fields = line.split(";")
    if len(fields) <= MEAN_US or fields[VERSION] != "3":
        raise ValueError(f"this is no terse output of fio, version 3: {line!r}")
    # fio reports whole requests per second, which is 0 for a disk that completed only a few.
    requests, runtime = int(fields[KIB]) * 1024 / block_size, int(fields[RUNTIME_MS])
    if fields[ERROR] != "0" or requests <= 0 or runtime <= 0:
        raise ValueError(f"fio failed or did nothing: {line!r}")
    percentiles = {
        float(name): float(value) for name, _, value in (each.partition("%=") for each in fields[PERCENTILES])
    }
    return Fio(requests * 1000 / runtime, requests, float(fields[MEAN_US]), percentiles[50], percentiles[99])


# The guest's part


def plan(cells: Sequence[tuple[str, int]], subjects: int, rounds: int) -> list[Turn]:
    """All runs in order: a warm-up of each disk, then the rounds, each starting with another disk."""
    turns = [Turn(-1, *cells[0], subject) for subject in range(subjects)]
    for number in range(rounds):
        # Every other round the other way round.
        order = [(number + (-1) ** number * position) % subjects for position in range(subjects)]
        turns += [Turn(number, *cell, subject) for cell in cells for subject in order]
    return turns


def device(subject: int) -> str:
    return f"vd{chr(ord('a') + subject)}"


def fio_options(turn: Turn) -> str:
    """The options for a cell."""
    workload = WORKLOADS[turn.workload]
    kind = {0: "write", 100: "read"}.get(workload.read_percent, "rw")
    pattern = "rand" if workload.pattern == "random" else ""
    mix = f" --rwmixread={workload.read_percent}" if kind == "rw" else ""
    return f"--rw={pattern}{kind}{mix} --bs={workload.block_size} --iodepth={turn.depth}"


def script(turns: Sequence[Turn], sizes: Sequence[int], seconds: float) -> str:
    """The guest's script: it runs fio once per turn. The `sizes` of the disks, in bytes, identify them."""
    area = min(sizes) // MIB
    checks = "\n".join(f"check {device(number)} {size // 512}" for number, size in enumerate(sizes))
    runs = "\n".join(f"{number} {device(turn.subject)} {fio_options(turn)}" for number, turn in enumerate(turns))
    body = f"""\
check() {{ # name, sectors
    tries=0
    while [ ! -b "/dev/$1" ] && [ $tries -lt 50 ]; do usleep 100000; tries=$((tries + 1)); done
    [ "$(cat "/sys/block/$1/size")" = "$2" ] || give_up "$1 is not the disk that it should be"
}}
{checks}
cat > /tmp/runs << END
{runs}
END
while read -r number device options; do
    fio --name=run --filename="/dev/$device" --size={area}M --direct=1 --ioengine=libaio --thread --norandommap \\
        --time_based --runtime={round(seconds * 1000)}ms --disk_util=0 --unified_rw_reporting=1 --clat_percentiles=0 \\
        --lat_percentiles=1 --output-format=terse --terse-version=3 $options < /dev/null > /tmp/fio.txt 2>&1 ||
        {{ cat /tmp/fio.txt; give_up "fio $device $options"; }}
    echo "{SAID} $number $(grep '^3;' /tmp/fio.txt)"
done < /tmp/runs
"""
    return workloads.script(body + workloads.CLEAN_LOG.replace("vda", "vd[a-z]"))


def make_guest(kind: str, folder: Path) -> Guest:
    """A type of machine with fio in it; raises BenchError if something is not installed."""
    try:
        kernel = kernels.uml_kernel() if kind == "uml" else kernels.qemu_kernel()
        if kind == "qemu":
            kernels.program("qemu-system-x86_64", "qemu-system-x86")
        programs = [kernels.program("fio", "fio")]
        busybox = kernels.program("busybox", "busybox-static")
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        raise BenchError(str(missing)) from None
    modules = initramfs.UML_MODULES if kind == "uml" else initramfs.MODULES
    base = initramfs.build(busybox, programs, kernel.modules, modules)
    return (UmlGuest if kind == "uml" else QemuGuest)(folder, lambda workload: base, kernel.image)


# The host's part


def stranger_ticks() -> int:
    """CPU time of the whole machine so far, without this process and its descendants, in ticks (proc(5))."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    children: dict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                children[int(fields[1])].append(int(entry.name))
                # utime, stime, and those of children that were waited for
                ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    ours = [os.getpid()]
    for pid in ours:
        ours += children[pid]
    return user + nice + system + irq + softirq - sum(ticks.get(pid, 0) for pid in ours)


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished run: fio's result, CPU time of the back end per request in us, and that of other processes."""

    turn: Turn
    fio: Fio
    cpu_us: float
    strangers: float


@dataclass
class Watch:
    """Reads the console while the guest runs, and the CPU time of a back end after each run on its disk.

    A back end is idle while the disks of the others are measured, so reading its CPU time about every 50 ms is enough.
    """

    console: Path
    pids: Sequence[int]
    turns: Sequence[Turn]
    measured: list[Measured] = field(default_factory=list)
    position: int = 0
    cpu_before: dict[int, int] = field(default_factory=dict)
    before: tuple[float, int] = (0.0, 0)  # clock, strangers' ticks

    def look(self) -> None:
        """Read new lines; an incomplete line is left for the next call."""
        with self.console.open("rb") as file:
            file.seek(self.position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(f"{SAID} "):
                _, number, said = line.split(" ", 2)
                self.take(int(number), said)

    def take(self, number: int, said: str) -> None:
        if number != len(self.measured):
            raise GuestError(f"the guest tells of run {number} after run {len(self.measured) - 1}")
        turn = self.turns[number]
        try:
            result = parse_fio(said, WORKLOADS[turn.workload].block_size)
            cpu = cpu_ns(self.pids[turn.subject])
        except (ValueError, ProcessLookupError) as error:
            raise GuestError(str(error)) from None
        now = time.monotonic(), stranger_ticks()
        strangers = (now[1] - self.before[1]) * TICK_US / 1e6 / (now[0] - self.before[0])
        spent = cpu - self.cpu_before.get(turn.subject, cpu)
        self.cpu_before[turn.subject], self.before = cpu, now
        self.measured.append(Measured(turn, result, spent / 1000 / result.requests, max(0.0, strangers)))


def fill(image: Path, size: int) -> None:
    """Make an image without holes."""
    block = random.Random(size).randbytes(MIB)
    with image.open("r+b") as file:
        for _ in range(size // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def serving(
    subjects: Sequence[Subject], place: places.Place, size: int, queues: int, cpus: Collection[int], folder: Path
) -> Iterator[tuple[list[backends.Running], list[int]]]:
    """All back ends, each with its own full image, and the images' sizes, which differ slightly."""
    sizes = [size + number * MIB for number in range(len(subjects))]
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(places.images(place, len(subjects), size))
        started = []
        for subject, image, real in zip(subjects, made, sizes, strict=True):
            os.truncate(image, real)
            fill(image, real)
            started.append(stack.enter_context(backends.running(subject, image, folder, queues, cpus=cpus)))
        yield started, sizes


def split_cpus() -> tuple[set[int], set[int]]:
    """One CPU for the guest, the others for the back ends; raises BenchError if there is only one."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise BenchError("there is one CPU only: --no-pin is wanted")
    return {first}, set(others)


def measure(
    kind: str,
    place: places.Place,
    subjects: Sequence[Subject],
    turns: Sequence[Turn],
    size: int,
    seconds: float,
    pin: bool,
) -> list[Row]:
    """Boot a guest, let it measure everything in one place, and return the rows; raises BenchError."""
    if place.how != "folder":
        raise BenchError(f"{place.path} is not a folder")
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="ringplane-") as name:
        folder = Path(name)
        guest = make_guest(kind, folder)
        guest_cpus, backend_cpus = split_cpus() if pin else (set(), set())
        with serving(subjects, place, size, guest.cpus, backend_cpus, folder) as (started, sizes):
            watch = Watch(folder / "console.txt", [each.process.pid for each in started], turns)

            def check() -> None:
                for each in started:
                    if each.process.poll() is not None:
                        raise GuestError(f"{each.subject.name} ended by itself: {each.last_line()}")
                watch.look()

            initrd = folder / "initrd"
            text = script(turns, sizes, seconds)
            initrd.write_bytes(initramfs.with_script(guest.initramfs(workloads.Workload(text)), text))
            command = guest.command([each.socket for each in started], initrd, MEMORY_MIB, guest.cpus)
            deadline = BOOT + len(turns) * (seconds + OVERHEAD)
            try:
                with backends.pinned(guest_cpus):
                    result = guest.run_command(command, watch.console, deadline, check)
                watch.look()
            except GuestError as error:
                raise BenchError(f"{kind} guest: {error}") from None
        if result.status != 0 or len(watch.measured) != len(turns):
            last = "\n".join(result.console.splitlines()[-20:])
            raise BenchError(f"{kind} guest: {len(watch.measured)} of {len(turns)} runs succeeded; it says:\n{last}")
    return [row(kind, place.storage.name, subjects, each, pin) for each in watch.measured if each.turn.round >= 0]


def row(kind: str, place: str, subjects: Sequence[Subject], measured: Measured, pinned: bool) -> Row:
    turn, fio = measured.turn, measured.fio
    return Row(
        guest=kind,
        place=place,
        workload=turn.workload,
        depth=turn.depth,
        subject=subjects[turn.subject].name,
        round=turn.round,
        iops=fio.iops,
        mean_us=fio.mean_us,
        p50_us=fio.p50_us,
        p99_us=fio.p99_us,
        cpu_us=measured.cpu_us,
        strangers=measured.strangers,
        pinned=pinned,
    )


# Output

Medians = dict[str, dict[str, float]]  # subject, figure


def summarize(rows: Iterable[Row]) -> dict[tuple[str, str, bool], dict[tuple[str, int], Medians]]:
    """Medians of the quiet rounds by guest, place and pinning, then by workload and depth, in the order of a table.

    "runs" is the number of rounds, "counted" the number of quiet ones; if there are none, all rounds are used.
    """
    values: dict[tuple[str, str, bool, str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        values[row.guest, row.place, row.pinned, row.workload, row.depth, row.subject].append(row)
    tables: dict[tuple[str, str, bool], dict[tuple[str, int], Medians]] = {}
    order = list(WORKLOADS)
    for (guest, place, pinned, workload, depth, subject), found in sorted(
        values.items(), key=lambda item: (GUESTS.index(item[0][0]), *item[0][1:3], order.index(item[0][3]), item[0][4])
    ):
        cell = tables.setdefault((guest, place, pinned), {}).setdefault((workload, depth), {})
        counted = [row for row in found if row.quiet] or found
        cell[subject] = {name: statistics.median(getattr(row, name) for row in counted) for name in FIGURES}
        cell[subject] |= {"counted": len(counted) if counted[0].quiet else 0, "runs": len(found)}
    return tables


def title(guest: str, place: str, pinned: bool) -> str:
    name = "user-mode Linux" if guest == "uml" else "QEMU without KVM"
    confined = ", the guest confined to one CPU and the back ends to the others" if pinned else ""
    return f"fio in {name}, image on {place}{confined}"


def is_ours(subject: str) -> bool:
    return subject.split()[0] == RINGPLANE


def best(cell: Medians) -> dict[str, float] | None:
    """The best value of the others for each figure, which may come from different ones; None without any."""
    others = [figures for subject, figures in cell.items() if not is_ours(subject)]
    if not others:
        return None
    return {name: (max if name == "iops" else min)(figures[name] for figures in others) for name in FIGURES}


def ratio(mine: dict[str, float], other: dict[str, float] | None, name: str) -> str:
    return f"{mine[name] / other[name]:.2f}" if other and other[name] else ""


def numbers(figures: dict[str, float]) -> list[str]:
    return [
        f"{figures['iops'] / 1000:.1f}",
        *(f"{figures[name]:.0f}" for name in FIGURES[1:4]),
        f"{figures['cpu_us']:.1f}",
    ]


def show(rows: Sequence[Row], console: Console) -> None:
    """Every back end's medians; for ringplane also the ratio to the best of the others."""
    for about, cells in summarize(rows).items():
        shown = Table(title=f"{title(*about)}; x: against the best of the others in that figure")
        headings = ["cell", "depth", "back end"]
        for heading in ("k IOPS", "mean us", "p50 us", "p99 us", "CPU us per I/O"):
            headings += [heading, "x"]
        for heading in (*headings, "quiet"):
            shown.add_column(heading, justify="left" if heading in ("cell", "back end") else "right")
        for (workload, depth), cell in cells.items():
            other = best(cell)
            for position, (subject, figures) in enumerate(cell.items()):
                ratios = [ratio(figures, other, name) if is_ours(subject) else "" for name in FIGURES]
                pairs = [text for pair in zip(numbers(figures), ratios, strict=True) for text in pair]
                quiet = f"{figures['counted']:.0f}/{figures['runs']:.0f}"
                shown.add_row(workload, str(depth), subject, *pairs, quiet, end_section=position == len(cell) - 1)
        console.print(shown)


def markdown(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """One table for each guest and place, one line for each cell and variant of ringplane."""
    lines = [f"{settings['machine']}; medians of {settings['rounds']} rounds of {settings['seconds']:g} s."]
    noisy = sum(not row.quiet for row in rows)
    if noisy:
        lines[0] += (
            f" In {noisy} of {len(rows)} runs others used more than {QUIET:.0%} of a CPU: these do not count, unless a "
            "cell has only such."
        )
    for about, cells in summarize(rows).items():
        lines += ["", f"{title(*about)}; each ratio is to the best of qemu-storage-daemon's modes in that figure:", ""]
        lines.append("| cell | depth | back end | k IOPS | ratio | mean us | ratio | p50 us | ratio | p99 us | ratio "
                     "| CPU us per I/O | ratio |")  # fmt: skip
        lines.append("|---|---|---|" + "---|" * 10)
        for (workload, depth), cell in cells.items():
            other = best(cell)
            for subject in filter(is_ours, cell):
                mine = cell[subject]
                pairs = zip(numbers(mine), (ratio(mine, other, name) for name in FIGURES), strict=True)
                texts = [text for pair in pairs for text in pair]
                lines.append(f"| {WORKLOADS[workload].title} | {depth} | {subject} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def put_between_markers(text: str, section: str) -> str:
    """The text with a new part between the markers; raises BenchError without exactly one pair of markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise BenchError(f"one line {BEGIN} and, below it, one line {END} are wanted")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def with_section(path: Path, section: str) -> str:
    """A file's text with a section between its markers; raises BenchError."""
    try:
        return put_between_markers(path.read_text(), section)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except BenchError as error:
        raise BenchError(f"{path}: {error}") from None


# JSON


def save(path: Path, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    path.write_text(
        json.dumps({"format": FORMAT, "settings": settings, "rows": [asdict(row) for row in rows]}, indent=1)
    )


def load(paths: Sequence[Path]) -> tuple[list[Row], dict[str, Any]]:
    """The rows of all files together, and the settings of the last; raises BenchError."""
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    for path in paths:
        try:
            whole = json.loads(path.read_text())
            if whole["format"] != FORMAT:
                raise ValueError("another format")
            rows += [Row(**row) for row in whole["rows"]]
            settings = whole["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path}: cannot be read as a result of this benchmark: {error!r}") from None
    return rows, settings


@click.command()
@click.option("--guest", "kinds", type=click.Choice(GUESTS), multiple=True, default=GUESTS, show_default=True)
@click.option("--place", "place_names", multiple=True, default=("/dev/shm", "/var/tmp"), show_default=True,
              help="A folder for the images.")  # fmt: skip
@click.option("--workload", "names", type=click.Choice(list(WORKLOADS)), multiple=True, default=tuple(WORKLOADS))
@click.option("--depth", "depths", type=click.IntRange(1), multiple=True, default=DEPTHS, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Of each run of fio.")
@click.option(
    "--size", "size_mib", type=click.IntRange(32), default=256, show_default=True, help="Of an image, in MiB."
)
@click.option("--ringplane", "variants", multiple=True, default=("",), metavar="FLAGS",
              help="A variant of ringplane: more flags of `ringplane serve`; can be repeated.")  # fmt: skip
@click.option("--qsd", "modes", type=click.Choice(qsd.AIO), multiple=True, default=qsd.AIO,
              show_default=True, help="A mode of qemu-storage-daemon; can be repeated.")  # fmt: skip
@click.option("--iothread", is_flag=True, help="Give qemu-storage-daemon's exports an iothread, which polls.")
@click.option("--pin/--no-pin", default=None,
              help="The guest on one CPU, the back ends on the others [default: only user-mode Linux].")  # fmt: skip
@click.option("--json", "json_path", type=Path, help="Write all results there.")
@click.option("--markdown", "markdown_path", type=Path, help=f"Write tables between {BEGIN} and {END} of that file.")
@click.option("--from", "sources", type=Path, multiple=True,
              help="Measure nothing: show what was written by --json; can be repeated.")  # fmt: skip
def main(
    kinds: Sequence[str], place_names: Sequence[str], names: Sequence[str], depths: Sequence[int], rounds: int,
    seconds: float, size_mib: int, variants: Sequence[str], modes: Sequence[str], iothread: bool, pin: bool | None,
    json_path: Path | None, markdown_path: Path | None, sources: Sequence[Path],
) -> None:  # fmt: skip
    """Measure all back ends' disks in real guests, side by side, and print the medians."""
    try:
        if markdown_path:
            # Before minutes of measuring, check that an existing file has the markers.
            with_section(markdown_path, "")
        if sources:
            rows, settings = load(sources)
        else:
            settings = {
                "machine": machine.sentence(machine.describe()),
                "rounds": rounds,
                "seconds": seconds,
            }
            subjects = [backends.ringplane(flags) for flags in variants]
            subjects += [qsd.subject(mode, iothread) for mode in modes]
            turns = plan([(name, depth) for name in names for depth in depths], len(subjects), rounds)
            rows = []
            for kind in kinds:
                for place in map(places.parse, place_names):
                    click.echo(f"{kind} guest, {place.storage.name}: {len(turns)} runs of {seconds:g} s", err=True)
                    rows += measure(
                        kind, place, subjects, turns, size_mib * MIB, seconds, kind == "uml" if pin is None else pin
                    )
                    if json_path:
                        save(json_path, rows, settings)
        if json_path:
            save(json_path, rows, settings)
        show(rows, Console(width=160))
        if markdown_path:
            markdown_path.write_text(with_section(markdown_path, markdown(rows, settings)))
    except BenchError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
