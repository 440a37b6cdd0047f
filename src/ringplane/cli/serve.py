"""`ringplane serve`: serves disks in the foreground, following QEMU's back-end program conventions."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ringplane.cli.notify import ServiceManager
from ringplane.cli.parameters import blk_file, flag, on_command_line, parameters, the_image
from ringplane.cli.start_errors import start_errors, usage_errors
from ringplane.cli.types import FILE, USER
from ringplane.log.logs import FORMATS, Logs
from ringplane.options.api_options import ApiOptions
from ringplane.options.counted import counted
from ringplane.options.declare import declared
from ringplane.options.disk_config import DiskConfig, OneDisk, OwnThreads
from ringplane.options.image_address import ImageAddress
from ringplane.options.metrics_options import MetricsOptions
from ringplane.options.sizes import format_size
from ringplane.options.state_options import StateOptions
from ringplane.options.thread_options import IoThread
from ringplane.options.users import User
from ringplane.system import open_files
from ringplane.system.notes import doing
from ringplane.system.signals import WOKEN, CaughtSignals, Interrupted, end_line
from ringplane.system.signals import name as signal_name
from ringplane.system.standard_fds import move_socket

if TYPE_CHECKING:
    from ringplane.control.config import Config
    from ringplane.control.export import Export
    from ringplane.control.interface import Endpoint, Interface
    from ringplane.control.server import Server
    from ringplane.control.start import GiveUp
    from ringplane.control.state_file import StateFile
    from ringplane.dataplane.trace_events import TraceEvent
    from ringplane.opener.remote_opener import RemoteOpener

# Signals that do not stop the process.
REQUESTS = (signal.SIGHUP, signal.SIGUSR1)

LOG_LEVELS = ("debug", "info", "warning", "error")

# Seconds after which a slow stop is logged.
STOP_PATIENCE = 2.0

Given = TypeVar("Given")

# Disks, and the threads that serve them.
Described = tuple[Sequence[DiskConfig], Sequence[IoThread]]

log = logging.getLogger(__name__)

# QEMU's docs/interop/vhost-user.json, VHostUserBackendCapabilities
CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}


def print_capabilities(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """An eager option: it works without the options that serving needs."""
    if wanted and not context.resilient_parsing:
        click.echo(json.dumps(CAPABILITIES))
        context.exit()


def inherited_socket(context: click.Context, _: click.Parameter, fd: int | None) -> int | None:
    """An eager option: a front end's socket may be standard output; nothing printed from now on reaches it."""
    return fd if fd is None or context.resilient_parsing else move_socket(fd)


@click.command(short_help="Serve disks.", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=FILE, metavar="FILE", help="Serve the disks of this TOML file (docs/config.md).")
@blk_file
@parameters(OneDisk, fd={"is_eager": True, "callback": inherited_socket})
@parameters(ApiOptions, "api_", socket={"metavar": "PATH"}, allow_folders={"metavar": "PATH"})
@parameters(MetricsOptions, "metrics_")
@parameters(StateOptions)
@click.option(
    "--sandbox/--no-sandbox",
    default=None,
    help="Give up all rights that serving does not need: files, network, programs [default: as far as possible].",
)
@click.option("--user", type=USER, metavar="NAME[:GROUP]", help="Change to this user after opening everything.")
@click.option(
    "--upgrade",
    is_flag=True,
    help="Take over these disks from the running ringplane, without an interruption for its guests.",
)
@click.option(
    "--detach",
    is_flag=True,
    help="With --upgrade: return when the disks are taken over, and serve in the background, for systemctl reload.",
)
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True, help="Least level of log lines."
)
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="Format of log lines on standard error; json: an object per line.",
)
@click.option("--trace", is_flag=True, help="Print the fetch and completion of each request on standard error.")
@click.option(
    "--print-capabilities", is_flag=True, is_eager=True, expose_value=False, callback=print_capabilities,
    help="Print the capabilities of this back end as JSON, and exit.",
)  # fmt: skip
@click.pass_context
def serve(
    context: click.Context,
    /,
    config: Path | None,
    upgrade: bool,
    detach: bool,
    sandbox: bool | None,
    user: User | None,
    log_level: str,
    log_format: str,
    trace: bool,
    **options: Any,
) -> None:
    """Serve raw images, block devices or images elsewhere as vhost-user-blk disks until SIGTERM or SIGINT.

    The options describe one disk, a configuration file any number; with --api-socket there need not be one. SIGHUP
    re-reads the sizes of the images. SIGUSR1 detaches a front end from its disk if another one waits for it.

    The exit status is 0 after SIGTERM or SIGINT, 1 if something failed, 2 for wrong options.
    """
    image = options["image_path"] = the_image(options.pop("blk_file"), options["image_path"])
    api = api_options(**{name: options.pop(f"api_{name}") for name in declared(ApiOptions)})
    listen = options.pop("metrics_listen")
    metrics = MetricsOptions(listen) if listen is not None else None
    state = options.pop("state")
    if config is not None:
        refuse_other_options(context)
        file = read(config)
        disks, io_threads = file.disks, file.io_threads
        api = only(config, "api", file.api, api, "--api-socket")
        metrics = only(config, "metrics", file.metrics, metrics, "--metrics")
        if file.state is not None and state is not None:
            raise click.UsageError(f"{config} has a key state already; leave out --state")
        state = state or file.state
    elif image is None and api is not None:
        disks, io_threads = [], threads_alone(context, options)
    else:
        disks, io_threads = one_disk(**options)

    def start(signals: CaughtSignals) -> Server:
        opener = started(api, user)
        from ringplane.compiler.apart import ahead
        from ringplane.compiler.cache import DATA_PLANE

        with ahead(DATA_PLANE):
            from ringplane.control.start import serve_all

            open_files.raise_limit()
            return serve_all(
                disks,
                io_threads,
                upgradable=True,
                upgrade=upgrade,
                give_up=rights(sandbox, user, logs),
                signals=signals,
                interface=made(api),
                metrics=made_endpoint(metrics),
                opener=opener,
                traced=trace,
                state=made_state(state, sandbox, user),
            )

    begun = detached(upgrade) if detach else None
    with Logs(log_level, log_format) as logs:
        # If the caller is not one of our entry points, signals are not caught yet.
        serve_until_signal(
            context.obj or CaughtSignals(),
            start,
            config or image or "the API",
            logs,
            trace,
            begun,
        )


def detached(upgrade: bool) -> Callable[[], None]:
    """See cli/detach.py. Raises UsageError without --upgrade."""
    if not upgrade:
        raise click.UsageError("--detach is for --upgrade; a service manager runs the first process in the foreground")
    from ringplane.cli.detach import detach

    return detach()


def import_asyncio() -> None:
    """Without TLS, which takes 0.9 MB, and which this program does not use. uvicorn imports `ssl` itself."""
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    import asyncio  # noqa: F401

    if sys.modules["ssl"] is None:
        del sys.modules["ssl"]


def refuse_other_options(context: click.Context) -> None:
    """Raise UsageError for options of a single disk beside --config: they belong in the file."""
    if given := on_command_line(context, [*declared(OneDisk), "blk_file"]):
        raise click.UsageError(f"{', '.join(given)} cannot be given beside --config; write it into the file")


def one_disk(image_path: ImageAddress | None, **options: Any) -> Described:
    """The one disk that the options describe; raises UsageError."""
    if image_path is None:
        raise click.UsageError(
            "give the image with --blk-file PATH or --image ADDRESS, several disks with --config FILE, or "
            "--api-socket PATH to add disks later"
        )
    with usage_errors():
        disk = OneDisk(image_path, **options)
        return [disk.config()], disk.own_threads()


def api_options(socket: Path | None, **others: Any) -> ApiOptions | None:
    """Those of the API, if there is to be one; raises UsageError."""
    if socket is not None:
        return ApiOptions(socket, **others)
    for name, value in others.items():
        if value == ():
            continue
        if value is not None:
            given = "--allow-folder" if name == "allow_folders" else flag(f"api_{name}")
            raise click.UsageError(f"{given} is for the socket of {flag('api_socket')}")
    return None


def made(api: ApiOptions | None) -> Interface | None:
    """What serves the API. It is imported only for that."""
    if api is None:
        return None
    from ringplane.api.http import HttpApi

    return HttpApi(api)


def made_endpoint(metrics: MetricsOptions | None) -> Endpoint | None:
    """What serves metrics over TCP. It is imported only for that."""
    if metrics is None:
        return None
    from ringplane.api.metrics_endpoint import MetricsEndpoint

    return MetricsEndpoint(metrics)


def made_state(path: Path | None, sandbox: bool | None, user: User | None) -> StateFile | None:
    """The file that keeps changes."""
    if path is None:
        return None
    from ringplane.control.state_file import StateFile

    return StateFile(path, trusted=sandbox is False and user is None)


def started(api: ApiOptions | None, user: User | None) -> RemoteOpener | None:
    """The process that opens files of disks that are added. It starts beside the imports of this process."""
    if api is None or not api.allow_folders:
        return None
    from ringplane.opener.remote_opener import RemoteOpener

    return RemoteOpener(api.allow_folders, (user.uid, user.gid) if user is not None else None)


def threads_alone(context: click.Context, options: dict[str, Any]) -> Sequence[IoThread]:
    """The I/O threads of a process that begins without a disk; raises UsageError for options of a disk."""
    if given := on_command_line(context, declared(OneDisk).keys() - declared(OwnThreads).keys()):
        raise click.UsageError(f"{', '.join(given)} needs --blk-file, the image of the disk that it describes")
    with usage_errors():
        return OwnThreads(**{name: options[name] for name in declared(OwnThreads)}).threads()


def read(path: Path) -> Config:
    """The contents of a configuration file; raises ClickException if it cannot be used."""
    from ringplane.control.config import ConfigError, read_config

    try:
        return read_config(path)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def only(path: Path, table: str, in_file: Given | None, given: Given | None, flag: str) -> Given | None:
    """What a file has in this table, or the command line; raises UsageError for both."""
    if in_file is not None and given is not None:
        raise click.UsageError(f"{path} has a table [{table}] already; leave out {flag}")
    return given or in_file


def rights(sandbox: bool | None, user: User | None, logs: Logs) -> GiveUp:
    """A function that gives up rights as these options require; raises SandboxError if --sandbox is impossible."""
    from ringplane.compiler.interpreted import INTERPRETED
    from ringplane.control import sandbox as box

    if INTERPRETED and sandbox is None:
        # A debugger opens files.
        sandbox = False
    missing = box.missing() if sandbox is not False else []
    if sandbox and missing:
        raise box.SandboxError(f"--sandbox needs {' and '.join(missing)}, which this system does not have")
    if missing:
        log.warning("the sandbox is incomplete: this system does not have %s", " and ".join(missing))

    def give_up(folders: Collection[Path], exchanging_in: Path | None = None) -> None:
        if user is not None:
            box.change_user(user)
        if sandbox is not False:
            with doing("confine the process (--no-sandbox serves without)"):
                box.confine(folders, exchanging_in)
        logs.start()

    return give_up


def serve_until_signal(
    signals: CaughtSignals,
    start: Callable[[CaughtSignals], Server],
    what: object,
    logs: Logs,
    trace: bool,
    begun: Callable[[], None] | None,
) -> None:
    """Start, print how to attach, and wait until a signal or the end of an inherited connection stops the server.

    `begun` is called when it serves.
    """
    # NumPy would start one thread per CPU when it is imported. Nobody needs them, and they would not be confined.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import_asyncio()
    signals.pass_on(REQUESTS)
    manager = ServiceManager()
    try:
        with usage_errors(), start_errors():
            server = start(signals)
    except Interrupted as interrupted:
        end_line(interrupted.number)
        log.info("stopped by %s while starting; %s was not served", signal_name(interrupted.number), what)
        return
    with server:
        server.at_takeover = manager.notify_successor
        if trace:
            server.trace(trace_printer(server, logs))
        if server.interface is not None:
            logs.say(f"API on {server.interface.path}")
        if server.metrics is not None:
            logs.say(f"metrics on {server.metrics.url}")
        for export in server.exports:
            announce(export, logs)
        if len(server.exports) == 1:
            announce_hint(server.exports[0], logs)
        manager.notify_ready()
        if begun is not None:
            begun()
        attend(server, signals, logs)


def attend(server: Server, signals: CaughtSignals, logs: Logs) -> None:
    """Handle signals until the server has ended."""
    while (number := signals.next()) in REQUESTS:
        if number == signal.SIGHUP:
            server.refresh_size()
        else:
            server.make_way()
    if number:
        stop(server, signals, number, logs)
    server.wait()


def stop(server: Server, signals: CaughtSignals, number: int, logs: Logs) -> None:
    """Stop because of a signal, and log what was stopped.

    Requests in flight are waited for without a limit; if storage hangs, a second signal ends the wait.
    """
    end_line(number)
    attached = sum(export.state == "attached" for export in server.exports)
    server.request_stop()
    if not ends_within(signals, STOP_PATIENCE):
        log.warning(
            "waiting for %d requests in flight, as storage has not completed them; "
            "%s again ends the process without them (the guest gets no answer)",
            in_flight(server), signal_name(number),
        )  # fmt: skip
        if not ends_before_signal(signals):
            abandon(server, logs)
    detached = f", {attached} front end{'s' * (attached > 1)} detached" if attached else ""
    disks = ", ".join(f"{export.disk.source.title} ({export.listener})" for export in server.exports) or "no disk"
    log.info("stopped by %s: %s%s", signal_name(number), disks, detached)


def ends_within(signals: CaughtSignals, seconds: float) -> bool:
    """Whether the server ends in time. Further signals are ignored: a terminal and a parent may both send one."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if signals.next(left) == WOKEN:
            return True
    return False


def ends_before_signal(signals: CaughtSignals) -> bool:
    """Whether the server ends before the user sends another signal."""
    while (number := signals.next()) not in (WOKEN, *signals.ending):
        pass
    return number == WOKEN


def in_flight(server: Server) -> int:
    return sum(export.in_flight for export in server.exports)


def abandon(server: Server, logs: Logs) -> NoReturn:
    """End at once, like a crash: no completed request is lost, and the next process recovers the others."""
    log.warning("stopped by a second signal: %d requests in flight are left without an answer", in_flight(server))
    server.abandon()
    logs.close()
    os._exit(1)


def trace_printer(server: Server, logs: Logs) -> Callable[[TraceEvent | str], None]:
    """A function that prints events on standard error; with several disks, each with its name."""

    def print_event(event: TraceEvent | str) -> None:
        several = len(server.exports) > 1
        logs.trace(f"{event.disk} {event}" if several and not isinstance(event, str) else str(event))

    return print_event


def announce(export: Export, logs: Logs) -> None:
    """Print the disk and its socket."""
    disk, source = export.disk, export.disk.source
    if source.notice:
        logs.say(f"{source.title}: {source.notice}")
    mode = disk.how + (", read-only" if source.read_only else "")
    size = format_size(source.size)
    logs.say(f"serving {source.title} as {disk.name} ({size}, {mode}, {counted(len(disk.queues), 'queue')})")
    logs.say(f"listening on {export.socket_path or 'an inherited socket'}")


def announce_hint(export: Export, logs: Logs) -> None:
    """Print how to attach a guest."""
    if export.socket_path is not None:
        # QEMU has a comma doubled in a value.
        path = str(export.socket_path).replace(",", ",,")
        logs.say(
            "attach QEMU with:\n"
            "  -object memory-backend-memfd,id=mem,size=2G,share=on \\\n"
            "  -machine memory-backend=mem -m 2G \\\n"
            f"  -chardev {shlex.quote(f'socket,id=ringplane0,path={path}')} \\\n"
            "  -device vhost-user-blk-pci,chardev=ringplane0"
        )
