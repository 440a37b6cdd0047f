"""Finds the problems that would stop `serve`, with the code of serve, but creates, changes and serves nothing.

Images are opened for reading only. A file without a name takes the place of an image that is not created yet.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ringplane.block.image import ImageError
from ringplane.block.layers.registry import LAYERS
from ringplane.block.sources.choose_source import rehearse_source
from ringplane.control import listener, state_file
from ringplane.control.config import Config
from ringplane.control.listener import ListenError
from ringplane.control.sandbox import change_user
from ringplane.control.state_file import StateError
from ringplane.control.tcp_listener import bound
from ringplane.dataplane.worker import Worker
from ringplane.device.disk import check_switches, impossible_with
from ringplane.opener.remote_opener import find_folder_problem
from ringplane.options.api_options import ApiOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import find_places, not_found
from ringplane.options.metrics_options import MetricsOptions
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
        if config.api is not None:
            problems += _of_api(config.api)
        if config.metrics is not None:
            problems += _of_metrics(config.metrics)
        if config.state is not None:
            problems += _of_state(config.state)
        for disk in config.disks:
            threads = [workers[name] for name in disk.io_threads if name in workers]
            problems += _of_disk(disk, threads, undo)
    return problems


def _of_user(user: User) -> list[str]:
    """The change is for good, so a child process tries it."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        error = child.submit(change_user, user).exception()
    return [str(error)] if error else []


def _of_api(api: ApiOptions) -> list[str]:
    problems = [problem for folder in api.allow_folders if (problem := find_folder_problem(folder))]
    found = zip(api.allow_servers, find_places(api.allow_servers), strict=True)
    problems += [not_found(server, places) for server, places in found if isinstance(places, OSError)]
    try:
        listener.check(api.socket, api.socket_group)
    except ListenError as error:
        problems.append(str(error))
    return problems


def _of_state(path: Path) -> list[str]:
    try:
        state_file.check(path)
    except StateError as error:
        return [str(error)]
    return []


def _of_metrics(metrics: MetricsOptions) -> list[str]:
    try:
        bound(metrics.listen).close()
    except ListenError as error:
        return [str(error)]
    return []


def _of_disk(disk: DiskConfig, workers: Sequence[Worker], undo: contextlib.ExitStack) -> list[str]:
    problems: list[str] = []
    for look in (partial(_look_at_source, disk, workers, undo), partial(_look_at_socket, disk)):
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


def _look_at_source(disk: DiskConfig, workers: Sequence[Worker], undo: contextlib.ExitStack) -> None:
    source = rehearse_source(disk)
    if source is None:
        return
    # All are open at the same time, as in serve: this process may not open enough files for all of them.
    undo.callback(source.close)
    layers = [layer for module in LAYERS if (layer := module.check(disk, source))]
    limits = source.check([worker.engine for worker in workers])
    if limits:
        check_switches(disk.features, limits, source, impossible_with(layers))
