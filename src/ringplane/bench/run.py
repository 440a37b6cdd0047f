"""Measuring: all subjects side by side on a place, cell after cell, in rounds of alternating order."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ringplane.bench import backends, fio
from ringplane.bench.backends import ending
from ringplane.bench.cells import BUSY, WORKLOADS, Cell
from ringplane.bench.errors import BenchError, never
from ringplane.bench.places import SMALLEST, Place, images_of, rehearse
from ringplane.bench.results import FIO, SOCKET, Report, Row, Storage, Subject, short, sparse
from ringplane.driver import Driver, Load, Model, Result, fill, run_load
from ringplane.driver.driver_failures import FAILURES, reason
from ringplane.driver.frontend import SharedMemory
from ringplane.driver.load import Progress
from ringplane.options.image_address import ImageAddress
from ringplane.options.sizes import format_size
from ringplane.virtio.blk import VIRTIO_BLK_F_RO

# The part of an image whose contents are always known; the rest is for measured loads.
CHECKED = 64 << 20
# The time of a measurement beyond its seconds, and of a back end's start and stop, in seconds.
OVERHEAD, START = 0.06, 1.0
# The speed of filling and reading an image, in bytes per second: a guess, for the estimate.
SWEEP_RATE = 400e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to measure. Times in seconds, `size` of each image in bytes; `check` is the verified pass before each cell.

    `backend_cpus` and `driver_cpus` pin the processes; empty: any CPU.
    """

    cells: Sequence[Cell]
    rounds: int = 3
    seconds: float = 1.0
    warm_up: float = 0.2
    check: float = 0.05
    size: int = 1 << 30
    backend_cpus: Collection[int] = ()
    driver_cpus: Collection[int] = ()

    @property
    def queues(self) -> int:
        """The largest number of queues of any cell."""
        return max(cell.queues for cell in self.cells)

    @property
    def depth(self) -> int:
        """The largest depth of any cell."""
        return max(cell.depth for cell in self.cells)

    def described(self) -> dict[str, object]:
        """All settings except the cells, as values for JSON."""
        values = asdict(self)
        del values["cells"]
        return {**values, "backend_cpus": sorted(self.backend_cpus), "driver_cpus": sorted(self.driver_cpus)}


@dataclass(slots=True)
class Contents:
    """The known contents of an image. Measured loads do not use its first part once something has been written."""

    capacity: int
    model: Model | None = None
    written: bool = False  # the contents of the measured part are unknown

    @property
    def known(self) -> tuple[int, int]:
        """Offset and length of the part that the model still describes."""
        return (0, self._boundary if self.written else self.capacity)

    @property
    def measured(self) -> tuple[int, int]:
        """Offset and length of the part for measured loads: the whole image if it has no known contents to preserve."""
        return (0, self.capacity) if self.model is None else (self._boundary, self.capacity - self._boundary)

    @property
    def _boundary(self) -> int:
        return min(CHECKED, self.capacity // 4 >> 20 << 20)


@dataclass(slots=True)
class Disk:
    """A back end that is measured, and the driver at its socket, reconnected when the number of queues changes.

    All subjects of a place use the same `memory`, one after the other. How many of its pages are contiguous decides
    into how many segments a 64 KiB request is split: up to 1.6 x between two equal back ends.
    """

    subject: Subject
    socket: Path
    queue_size: int
    memory: SharedMemory
    pid: int | None = None  # None: the process at the socket
    contents: Contents | None = None
    verify: bool = True
    last_line: Callable[[], str] = lambda: ""  # the last line of its output
    driver: Driver | None = field(default=None, init=False)

    def connect(self, queues: int) -> Driver:
        """The driver with this many queues; raises BenchError."""
        if self.driver is None or len(self.driver.queues) != queues:
            self.close()
            with self.trouble("connecting"):
                self.driver = self._driver(queues)
        assert self.driver is not None
        return self.driver

    def _driver(self, queues: int) -> Driver:
        try:
            return Driver(self.socket, queues=queues, queue_size=self.queue_size, memory=self.memory)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; if it serves another front end, disconnect that first") from None

    def close(self) -> None:
        if self.driver is not None:
            self.driver.close()
            self.driver = None

    @contextlib.contextmanager
    def trouble(self, doing: str) -> Iterator[None]:
        """Turn exceptions of the driver into a BenchError that names the back end."""
        try:
            yield
        except FAILURES as error:
            raise BenchError(
                f"{self.subject.name}: {doing} failed: {reason(error)}{ending(self.last_line())}"
            ) from error


@dataclass(slots=True)
class Bench:
    """A run: its settings, its results so far, and callbacks for its progress."""

    settings: Settings
    report: Report
    announce: Callable[[float, str], None] = lambda seconds, text: None  # the work done so far, and the next step
    save: Callable[[], None] = never  # called after each round
    pulse: Callable[[], None] = never  # called several times a second; an exception from it ends the run
    done: float = 0.0

    # Places

    def check_room(self, places: Sequence[Place]) -> None:
        """Raise BenchError if the images cannot be created somewhere."""
        for place in places:
            here = [subject for subject in self.report.subjects if backends.serves(subject, place)]
            rehearse(place, len(here), self.settings.size)

    def rehearse(self, places: Sequence[Place]) -> None:
        """Start the back ends of images elsewhere, and stop them: what is missing is known before minutes of measuring.

        Raises BenchError.
        """
        for place in places:
            if place.is_remote:
                with self._all_started(place, self.report.subjects):
                    pass

    def place(self, place: Place, subjects: Sequence[Subject]) -> None:
        """Measure those of the subjects that can be measured in a place, with images there. Raises BenchError."""
        self.report.storages.append(place.storage)
        with self._all_started(place, subjects) as (disks, images):
            raw = any(subject.family == FIO and backends.serves(subject, place) for subject in subjects)
            if place.writable:
                self._fill(disks, place.is_shared)
            else:
                self._find_sizes(disks)
            self._rounds(place.storage, disks, (_path(images[0]), disks[0].contents) if raw else None)
            if place.writable:
                self._final_check(place.storage, disks[:1] if place.is_shared else disks)

    @contextlib.contextmanager
    def _all_started(
        self, place: Place, subjects: Sequence[Subject]
    ) -> Iterator[tuple[Sequence[Disk], Sequence[ImageAddress]]]:
        """The back ends of a place, and the image of each."""
        programs = [subject for subject in subjects if subject.family != FIO and backends.serves(subject, place)]
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringplane-bench-")))
            images = stack.enter_context(images_of(place, len(programs), self.settings.size))
            memory = stack.enter_context(contextlib.closing(SharedMemory()))
            disks = []
            for subject, image in zip(programs, images, strict=True):
                self._say(f"start {short(subject)} on {place.storage.name}")
                disks.append(stack.enter_context(self._started(subject, image, folder, place, memory)))
                self.done += START
            yield disks, images

    @contextlib.contextmanager
    def _started(
        self, subject: Subject, image: ImageAddress, folder: Path, place: Place, memory: SharedMemory
    ) -> Iterator[Disk]:
        settings = self.settings
        with backends.running(
            subject, image, folder, settings.queues, shared=place.is_shared, read_only=not place.writable,
            cpus=settings.backend_cpus, pulse=self.pulse,
        ) as process:  # fmt: skip
            disk = Disk(subject, process.socket, queue_size(settings.depth), memory, process.process.pid)
            disk.last_line = process.last_line
            disk.verify = backends.keeps_data(subject)
            try:
                yield disk
            finally:
                disk.close()

    def socket(self, path: Path, *, destroy: bool) -> None:
        """Measure the back end at a socket; with `destroy` its disk is overwritten. Raises BenchError."""
        subject = Subject(str(path), SOCKET)
        memory = SharedMemory()
        disk = Disk(subject, path, queue_size(self.settings.depth), memory)
        try:
            driver = disk.connect(self.settings.queues)
            if destroy and driver.features & VIRTIO_BLK_F_RO:
                raise BenchError(f"{path}: the disk is read-only; leave out --destroy-data")
            self.report.subjects.append(subject)
            storage = Storage(str(path), "disk", "unknown")
            self.report.storages.append(storage)
            if destroy:
                self._fill([disk], False)
            else:
                self._find_sizes([disk])
            self._rounds(storage, [disk], None)
            if destroy:
                self._final_check(storage, [disk])
        finally:
            disk.close()
            memory.close()

    # Contents

    def _fill(self, disks: Sequence[Disk], shared: bool) -> None:
        """Write all of each image: the same contents, and no holes."""
        for disk in disks:
            if shared and disk is not disks[0]:
                disk.contents = disks[0].contents
                continue
            self._say(f"fill the image of {short(disk.subject)}")
            driver = disk.connect(self.settings.queues)
            if driver.capacity < SMALLEST:
                raise BenchError(
                    f"{disk.subject.name}: a disk of {format_size(driver.capacity)} is too small to measure; use one "
                    f"of at least {format_size(SMALLEST)}"
                )
            disk.contents = Contents(driver.capacity)
            with disk.trouble("filling its image"):
                disk.contents.model, _ = fill(driver, progress=self._progress)
                driver.flush()
            self.done += driver.capacity / SWEEP_RATE

    def _find_sizes(self, disks: Sequence[Disk]) -> None:
        """Of images that are only read, with unknown contents."""
        for disk in disks:
            disk.contents = Contents(disk.connect(self.settings.queues).capacity)

    def _final_check(self, storage: Storage, disks: Sequence[Disk]) -> None:
        """Read and compare all known contents of each image once more."""
        for disk in disks:
            if not disk.verify or disk.contents is None:
                continue
            self._say(f"check the image of {short(disk.subject)}")
            load = Load(
                block_size=1 << 20, depth=8, pattern="sequential", passes=1, verify=True,
                model=disk.contents.model, region=disk.contents.known,
            )  # fmt: skip
            with disk.trouble("the final check of its image"):
                result = run_load(disk.connect(1), load, self._progress, disk.pid)
            self._judge(result, f"{disk.subject.name}, {storage.name}, whole image")
            self.done += disk.contents.known[1] / SWEEP_RATE

    def _judge(self, result: Result, where: str) -> None:
        self.report.sectors_checked += result.sectors_checked
        if result.mismatches:
            self.report.problems.append(
                f"{where}: {result.mismatches} wrong sectors; the first: {result.first_mismatch}"
            )
        if result.errors:
            self.report.problems.append(f"{where}: {result.errors} requests failed; the first: {result.first_error}")

    # Rounds

    def _rounds(self, storage: Storage, disks: Sequence[Disk], raw: tuple[Path, Contents | None] | None) -> None:
        """All cells, `rounds` times; in every other round the subjects are measured in reverse order."""
        self._record_sizes(disks)
        for number in range(self.settings.rounds):
            for cell in self.settings.cells:
                turns: list[Disk | None] = [*disks]
                if raw and raw_in(cell, self.settings.cells):
                    turns.append(None)
                for disk in turns if number % 2 == 0 else turns[::-1]:
                    name = short(disk.subject if disk else fio.RAW)
                    self._say(f"measure {name}: {cell}")
                    if disk is not None:
                        row = self._measure(storage, disk, cell, number)
                    else:
                        assert raw is not None
                        row = self._measure_raw(storage, *raw, cell, number)
                    self.report.rows.append(row)
            self.save()

    def _record_sizes(self, disks: Sequence[Disk]) -> None:
        """Record the sizes of existing disks, which the settings do not determine."""
        sizes = {disk.contents.capacity for disk in disks if disk.contents is not None}
        self.report.settings["disk_sizes"] = sorted(sizes.union(self.report.settings.get("disk_sizes", ())))

    def _measure(self, storage: Storage, disk: Disk, cell: Cell, number: int) -> Row:
        settings, contents, workload = self.settings, disk.contents, WORKLOADS[cell.workload]
        assert contents is not None
        driver = disk.connect(cell.queues)
        with disk.trouble(f"measuring {cell}"), backends.pinned(settings.driver_cpus):
            checked = self._verified_pass(storage, disk, cell, number)
            contents.written |= workload.writes
            load = Load(
                block_size=workload.block_size, pattern=workload.pattern, read_percent=workload.read_percent,
                depth=cell.depth, queues=cell.queues, busy_poll=cell.driver == BUSY, region=contents.measured,
                seconds=settings.seconds, warm_up=settings.warm_up, seed=number + 1,
            )  # fmt: skip
            result = run_load(driver, load, self._progress, disk.pid)
        self._judge(result, f"{disk.subject.name}, {storage.name}, {cell}")
        self.done += turn(settings)
        return Row(
            storage=storage.name,
            cell=cell,
            subject=disk.subject.name,
            round=number,
            seconds=result.seconds,
            requests=result.requests,
            iops=result.iops,
            mb_s=result.mb_per_second,
            mean_us=result.mean_us,
            p50_us=result.p50_us,
            p99_us=result.p99_us,
            p999_us=result.p999_us,
            cpu_us=result.backend_cpu_per_io_us,
            driver_cpu_us=result.driver_cpu_per_io_us,
            checked=checked,
            histogram=sparse(result.histogram),
        )

    def _verified_pass(self, storage: Storage, disk: Disk, cell: Cell, number: int) -> int:
        """A short load like the cell's whose data is compared; returns the number of sectors. Writes are read back."""
        contents, workload = disk.contents, WORKLOADS[cell.workload]
        if contents is None or contents.model is None or not disk.verify:
            return 0
        load = Load(
            block_size=workload.block_size, pattern=workload.pattern, read_percent=workload.read_percent or 50,
            depth=cell.depth, queues=cell.queues, busy_poll=cell.driver == BUSY, region=contents.known,
            seconds=self.settings.check, verify=True, model=contents.model, seed=number + 1,
        )  # fmt: skip
        result = run_load(disk.connect(cell.queues), load, self._progress, disk.pid)
        self._judge(result, f"{disk.subject.name}, {storage.name}, {cell}")
        return result.sectors_checked

    def _measure_raw(self, storage: Storage, image: Path, contents: Contents | None, cell: Cell, number: int) -> Row:
        assert contents is not None
        settings = self.settings
        contents.written |= WORKLOADS[cell.workload].writes
        with backends.pinned(settings.backend_cpus):
            result = fio.measure(image, cell, contents.measured, settings.seconds, settings.warm_up, self.pulse)
        self.done += settings.seconds + settings.warm_up + fio.OVERHEAD
        values = {name: getattr(result, name) for name in result.__slots__}
        values["histogram"] = sparse(result.histogram)
        return Row(
            storage=storage.name, cell=cell, subject=fio.RAW.name, round=number, driver_cpu_us=None, checked=0, **values
        )

    def _progress(self, _: Progress) -> None:
        self.pulse()

    def _say(self, what: str) -> None:
        self.pulse()
        self.announce(self.done, what)


def _path(image: ImageAddress) -> Path:
    """fio is for images here."""
    assert isinstance(image, Path)
    return image


def queue_size(depth: int) -> int:
    """256 descriptors, or more if `depth` needs them (with indirect descriptors: one per request)."""
    return max(256, 1 << (depth - 1).bit_length())


def raw_in(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Whether raw fio is measured with a cell: once, and not again for another driver."""
    return cell.driver == cells[0].driver


def turn(settings: Settings) -> float:
    """About how long one measurement of a back end takes, in seconds."""
    return settings.seconds + settings.warm_up + settings.check + OVERHEAD


def estimate(settings: Settings, places: Sequence[Place], subjects: Sequence[Subject]) -> float:
    """About how long `Bench.place` takes for all places, in seconds; without compiling."""
    return sum(_estimate(settings, place, subjects) for place in places)


def _estimate(settings: Settings, place: Place, subjects: Sequence[Subject]) -> float:
    here = [subject for subject in subjects if backends.serves(subject, place)]
    programs = [subject for subject in here if subject.family != FIO]
    rounds = settings.rounds * len(settings.cells) * len(programs) * turn(settings)
    if len(programs) < len(here):
        raw = sum(raw_in(cell, settings.cells) for cell in settings.cells)
        rounds += settings.rounds * raw * (settings.seconds + settings.warm_up + fio.OVERHEAD)
    swept = 1 if place.is_shared else len(programs)
    return rounds + len(programs) * START + swept * place.writable * _swept(settings) / SWEEP_RATE


def _swept(settings: Settings) -> int:
    """How many bytes of an image are written before the measurements, and read after them."""
    writes = any(WORKLOADS[cell.workload].writes for cell in settings.cells)
    return settings.size + (min(CHECKED, settings.size) if writes else settings.size)
