"""The rules for the disks and I/O threads of one process together, wherever they are described."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import MAX_THREADS, DiskConfig
from ringplane.options.image_address import ImageAddress, RemoteImage
from ringplane.options.kinds import shown, suggestion
from ringplane.options.limit_options import Rates, group_of, rates_of
from ringplane.options.record_options import NAME
from ringplane.options.thread_options import IoThread


class ProcessRules:
    """Compares each I/O thread and each disk with those that were added before; a disk needs its I/O threads.

    A disk is added with its `place`, by which error messages call it.
    """

    def __init__(self) -> None:
        self._threads: list[str] = []
        self._names: dict[str, str] = {}
        self._sockets: dict[object, str] = {}
        self._recordings: dict[str, str] = {}
        # The limits of each group, and who has given them.
        self._groups: dict[str, tuple[str, Rates]] = {}
        self._images: defaultdict[object, list[tuple[str, DiskConfig]]] = defaultdict(list)

    def add_thread(self, thread: IoThread) -> list[WrongOptions]:
        """What is wrong with it."""
        errors = []
        if thread.name in self._threads:
            sentence = "{name}: {value} is the name of another I/O thread already"
            errors.append(WrongOptions(sentence, value=shown(thread.name)))
        if len(self._threads) == MAX_THREADS:
            errors.append(WrongOptions("is one I/O thread too many; the maximum is {limit}", limit=MAX_THREADS))
        self._threads.append(thread.name)
        return errors

    def add_disk(self, place: str, disk: DiskConfig, image: object = None) -> list[WrongOptions]:
        """What is wrong with it. `image`: its `identity`, if it must not be looked at, because its storage may hang."""
        return [
            *self._wrong_name(place, disk),
            *self._wrong_threads(disk),
            *self._wrong_socket(place, disk),
            *self._wrong_recording(place, disk),
            *self.add_opened(place, disk, image or identity(disk.image)),
        ]

    def add_opened(self, place: str, disk: DiskConfig, image: object) -> list[WrongOptions]:
        """What is wrong with its image and its limits, of which others may have had changed ones since `add_disk`."""
        return [*self._wrong_image(place, disk, image), *self._wrong_group(place, disk)]

    def _wrong_name(self, place: str, disk: DiskConfig) -> Iterator[WrongOptions]:
        if disk.name in self._names:
            sentence = "{name}: {value} is the name of {other} already; give each its own"
            yield WrongOptions(sentence, value=shown(disk.name), other=self._names[disk.name])
        if disk.name is not None:
            self._names.setdefault(disk.name, place)

    def _wrong_threads(self, disk: DiskConfig) -> Iterator[WrongOptions]:
        for thread in disk.io_threads:
            if thread not in self._threads:
                yield WrongOptions(
                    "{io_threads}: no I/O thread has the name {name}{suggestion}",
                    name=shown(thread),
                    suggestion=suggestion(thread, self._threads),
                )

    def _wrong_socket(self, place: str, disk: DiskConfig) -> Iterator[WrongOptions]:
        path = disk.socket_path
        option, value, same = ("{socket_path}", path, _without_links(path)) if path else ("{fd}", disk.fd, disk.fd)
        if same in self._sockets:
            sentence = f"{option}: {{value}} is also the socket of {{other}}; give each disk its own"
            yield WrongOptions(sentence, value=value, other=self._sockets[same])
        self._sockets.setdefault(same, place)

    def _wrong_recording(self, place: str, disk: DiskConfig) -> Iterator[WrongOptions]:
        # With its name in it, each disk has a path of its own.
        if disk.record is None or NAME in str(disk.record):
            return
        same = _without_links(disk.record)
        if same in self._recordings:
            sentence = "{record}: {value} is also the recording of {other}; give each disk its own"
            yield WrongOptions(sentence, value=disk.record, other=self._recordings[same])
        self._recordings.setdefault(same, place)

    def _wrong_image(self, place: str, disk: DiskConfig, image: object) -> Iterator[WrongOptions]:
        same = self._images[image]
        if unshared := [other for other, before in same if not _can_share(disk, before)]:
            yield WrongOptions(
                "{image}: is also the image of {other}; disks can share an image if all are {read_only}, or if all "
                "have {share_rw} (for a migration)",
                other=unshared[0],
            )
        same.append((place, disk))

    def _wrong_group(self, place: str, disk: DiskConfig) -> Iterator[WrongOptions]:
        name, rates = group_of(disk.limits), rates_of(disk.limits)
        if not name or rates == Rates():
            return
        other, shared = self._groups.setdefault(name, (place, rates))
        if rates != shared:
            sentence = (
                "{limits}: the group {name} has other limits at {other}; its disks share one set: give it once, or the "
                "same for each"
            )
            yield WrongOptions(sentence, name=shown(name), other=other)


def check_process(disks: Sequence[DiskConfig], io_threads: Iterable[IoThread], *, least: int = 1) -> ProcessRules:
    """The rules for further disks. Raises WrongOptions for the first thing that is wrong with these.

    Disks are called by their images. There have to be `least`: none if disks can be added later.
    """
    rules = ProcessRules()
    for thread in io_threads:
        for error in rules.add_thread(thread):
            raise error.of(f"I/O thread {thread.name}: ")
    if len(disks) < least:
        raise WrongOptions("there is no disk to serve")
    for disk in disks:
        for error in rules.add_disk(str(disk.image), disk):
            raise error.of(f"{disk.image}: ")
    return rules


def _can_share(one: DiskConfig, other: DiskConfig) -> bool:
    return (one.read_only and other.read_only) or (one.share_rw and other.share_rw)


def _without_links(path: Path) -> str:
    """Equal for all paths of the same socket or file, which need not exist."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def named_identity(image: ImageAddress) -> object:
    """What `identity` is of an image that does not exist, without links in its path; it is not looked at."""
    return image.identity if isinstance(image, RemoteImage) else os.path.abspath(image)


def identity(image: ImageAddress) -> object:
    """Equal for all paths of the same image."""
    if isinstance(image, RemoteImage):
        return image.identity
    try:
        status = os.stat(image)
    except OSError:
        return os.path.realpath(image)
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
