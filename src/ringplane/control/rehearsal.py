"""Finds the problems that would stop `serve`, with the code of serve, but creates, changes and serves nothing.

Images are opened for reading only. A file without a name takes the place of an image that is not created yet.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from functools import partial

from ringplane.block.image import Image, ImageError, create_nameless
from ringplane.block.layers.registry import LAYERS
from ringplane.block.sources.choose_source import check_engines, check_huge_pages, kind_of_source
from ringplane.block.sources.memory import MemorySource
from ringplane.block.sources.null import NullSource
from ringplane.block.storage_limits import Limits, limits
from ringplane.control import listener
from ringplane.control.config import Config
from ringplane.control.listener import ListenError
from ringplane.control.sandbox import change_user
from ringplane.dataplane.worker import Worker
from ringplane.device.disk import check_switches, impossible_with, reasons_without_io
from ringplane.options.disk_config import DiskConfig
from ringplane.options.users import User
from ringplane.system.notes import in_words


def find_problems(config: Config, user: User | None = None) -> list[str]:
    """One line for each problem; `user`: the one that `serve` shall become."""
    problems = _of_user(user) if user else []
    with contextlib.ExitStack() as undo:
        workers: dict[str, Worker] = {}
        # All exist at the same time, because each locks memory, and there may be too little for all of them.
        for each in config.io_threads:
            try:
                workers[each.name] = Worker(each.name, engine=each.engine)
                undo.callback(workers[each.name].stop)
            except OSError as error:
                problems.append(f"[[io-thread]] {each.name}: {in_words(error)}")
        for disk in config.disks:
            threads = [workers[name] for name in disk.io_threads if name in workers]
            problems += _of_disk(disk, threads, undo)
    return problems


def _of_user(user: User) -> list[str]:
    """The change is for good, so a child process tries it."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        error = child.submit(change_user, user).exception()
    return [str(error)] if error else []


def _of_disk(disk: DiskConfig, workers: Sequence[Worker], undo: contextlib.ExitStack) -> list[str]:
    problems: list[str] = []
    for look in (partial(_look_at_image, disk, workers, undo), partial(_look_at_socket, disk)):
        try:
            look()
        except (ImageError, ListenError) as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(in_words(error))
    return problems


def _look_at_socket(disk: DiskConfig) -> None:
    assert disk.socket_path is not None
    listener.check(disk.socket_path, disk.socket_group)


def _look_at_image(disk: DiskConfig, workers: Sequence[Worker], undo: contextlib.ExitStack) -> None:
    image = _opened(disk)
    if image is None:
        return
    # All are open at the same time, as in serve: this process may not open enough files for all of them.
    undo.callback(image.close)
    layers = [layer for module in LAYERS if (layer := module.check(disk, image))]
    kind = kind_of_source(image, disk.engine)
    check_engines(image, kind, reasons_without_io(workers))
    if kind is MemorySource:
        check_huge_pages(image)
    found = Limits() if kind is NullSource else _limits(disk, image)
    if found:
        check_switches(disk.features, found, image, impossible_with(layers))


def _opened(disk: DiskConfig) -> Image | None:
    """The image, or a nameless one like the image that will be created; None if there is neither."""
    if disk.create is None or disk.image.exists():
        return Image(disk.image, disk, rehearsal=True)
    fd = create_nameless(disk.image, disk.create, direct=disk.direct)
    return None if fd is None else Image(disk.image, disk, fd=fd)


def _limits(disk: DiskConfig, image: Image) -> Limits | None:
    """The limits, tried on a writable nameless file beside the image; None if none can be created there."""
    if not image.is_file:
        return limits(image.fd, read_only=disk.read_only)
    try:
        fd = create_nameless(image.path.resolve(), image.size, direct=False)
    except ImageError:
        return None
    if fd is None:
        return None
    try:
        return limits(fd, read_only=disk.read_only)
    finally:
        os.close(fd)
