"""`ringplane serve`: serves disks in the foreground, following QEMU's back-end program conventions."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import resource
import shlex
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from ringplane.cli.errors import start_errors
from ringplane.cli.notify import ServiceManager
from ringplane.cli.types import CPUS, FEATURE, FILE, GROUP, MODE, POLL_TIME, SIZE, USER, ZONES
from ringplane.log.logs import FORMATS, Logs
from ringplane.options.disk_config import DiskConfig
from ringplane.options.engines import ENGINES
from ringplane.options.values import (
    LOCK_AUTO,
    LOCKS,
    MAX_QUEUES,
    User,
    check_physical_block_size,
    check_serial,
    format_size,
)
from ringplane.system.notes import doing
from ringplane.system.signals import WOKEN, CaughtSignals, Interrupted, end_line
from ringplane.system.signals import name as signal_name
from ringplane.system.standard_fds import move_socket

if TYPE_CHECKING:
    from ringplane.control.export import Export
    from ringplane.control.server import Server
    from ringplane.control.start import GiveUp
    from ringplane.dataplane.trace import TraceEvent

# Signals that do not stop the process.
REQUESTS = (signal.SIGHUP, signal.SIGUSR1)

LOG_LEVELS = ("debug", "info", "warning", "error")
BESIDE_CONFIG = ("config", "upgrade", "sandbox", "user", "log_level", "log_format", "trace", "print_capabilities")

# Seconds after which a slow stop is logged.
STOP_PATIENCE = 2.0

# The open files of one disk with one front end that has a few queues.
FEWEST_FILES = 64

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
@click.option("--blk-file", "--image", type=FILE, help="Raw image file or block device to serve.")
@click.option("--socket-path", type=FILE, help="UNIX socket to listen on.")
@click.option(
    "--socket-mode", type=MODE, metavar="MODE", help="Mode of the socket, for example 0660 [default: by the umask]."
)
@click.option(
    "--socket-group", type=GROUP, metavar="GROUP", help="Group of the socket; the mode is then 0660 by default."
)
@click.option(
    "--fd", type=int, is_eager=True, callback=inherited_socket,
    help="File descriptor of an inherited socket, instead of --socket-path.",
)  # fmt: skip
@click.option("--read-only", is_flag=True, help="Serve a read-only disk.")
@click.option("--create", type=SIZE, metavar="SIZE", help="Create a sparse image if none exists.")
@click.option(
    "--num-queues",
    type=click.IntRange(1, MAX_QUEUES),
    default=MAX_QUEUES,
    show_default=True,
    help="Number of virtqueues; unused ones cost nothing.",
)
@click.option("--io-threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of I/O threads.")
@click.option(
    "--cpus",
    type=CPUS,
    multiple=True,
    metavar="LIST",
    help="CPUs of the I/O threads, for example 2-3 or 0,2; repeat it for the next I/O thread [default: all].",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="I/O by io_uring or Linux AIO; memory: copies, for images on tmpfs; null: no I/O, for measurements.",
)
@click.option(
    "--poll-us",
    type=POLL_TIME,
    default="50",
    show_default=True,
    metavar="N|always",
    help="Poll the rings for up to N microseconds before sleeping, if that pays off; always: never sleep.",
)
@click.option(
    "--pin-memory",
    is_flag=True,
    help="Pin guest memory once instead of per I/O: less CPU with io_uring, but all of it stays allocated.",
)
@click.option("--direct/--buffered", default=True, help="Use O_DIRECT if possible [default], or the page cache.")
@click.option(
    "--lock",
    type=click.Choice(LOCKS),
    default=LOCK_AUTO,
    show_default=True,
    help="Lock the image as QEMU does; auto: except a read-only image on a file system without locks.",
)
@click.option(
    "--share-rw", is_flag=True, help="Let other processes with --share-rw write to the image (for migration)."
)
@click.option("--serial", help="Serial number for the guest, up to 20 bytes [default: from the image path].")
@click.option(
    "--block-size", type=click.Choice(["512", "4096"]), default="512", show_default=True, help="Logical block size."
)
@click.option(
    "--physical-block-size",
    type=SIZE,
    metavar="SIZE",
    help="Physical block size for the guest, up to 64K [default: that of the storage].",
)
@click.option(
    "--feature",
    "features",
    type=FEATURE,
    multiple=True,
    metavar="NAME=on|off",
    help="Offer a feature or not, for example packed=off; docs/features.md lists the names.",
)
@click.option(
    "--zoned",
    type=ZONES,
    metavar="SIZE[,...]",
    help="Zoned disk on a new image, for example 64M,capacity=48M,conventional=4,max-open=8,max-active=12.",
)
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
    sandbox: bool | None,
    user: User | None,
    log_level: str,
    log_format: str,
    trace: bool,
    **options: Any,
) -> None:
    """Serve raw images or block devices as vhost-user-blk disks until SIGTERM or SIGINT.

    The options describe one disk, a configuration file any number. SIGHUP re-reads the sizes of the images. SIGUSR1
    detaches a front end from its disk if another one waits for it.

    The exit status is 0 after SIGTERM or SIGINT, 1 if something failed, 2 for wrong options.
    """
    if config is not None:
        refuse_other_options(context)
        start = functools.partial(start_config, config)
    else:
        check_options(**options, upgrade=upgrade)
        options["block_size"] = int(options["block_size"])
        options["features"] = dict(options["features"])
        start = functools.partial(start_disk, **options)
    with Logs(log_level, log_format) as logs:
        # If the caller is not one of our entry points, signals are not caught yet.
        serve_until_signal(
            context.obj or CaughtSignals(),
            lambda signals: start(upgrade=upgrade, give_up=rights(sandbox, user, logs), signals=signals),
            config or options["blk_file"],
            logs,
            trace,
        )


def refuse_other_options(context: click.Context) -> None:
    """Raise UsageError for options of a single disk beside --config: they belong in the file."""
    given = [
        "/".join([parameter.opts[0], *parameter.secondary_opts])
        for parameter in context.command.params
        if parameter.name not in BESIDE_CONFIG
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{', '.join(given)} cannot be given beside --config; write it into the file")


def check_options(
    blk_file: Path | None,
    socket_path: Path | None,
    fd: int | None,
    io_threads: int,
    cpus: tuple[frozenset[int], ...],
    serial: str | None,
    block_size: str,
    physical_block_size: int | None,
    zoned: object,
    share_rw: bool,
    upgrade: bool,
    socket_mode: int | None,
    socket_group: int | None,
    **_: Any,
) -> None:
    """Check combinations of options, which click does not check; raises UsageError."""
    if blk_file is None:
        raise click.UsageError("give the image with --blk-file PATH, or several disks with --config FILE")
    if (socket_path is None) == (fd is None):
        raise click.UsageError("give either --socket-path PATH or --fd N")
    if fd is not None and (socket_mode, socket_group) != (None, None):
        raise click.UsageError("--socket-mode and --socket-group are for the socket of --socket-path, not for --fd")
    if upgrade and socket_path is None:
        raise click.UsageError("--upgrade needs --socket-path, by which the running process is found")
    if len(cpus) not in (0, 1, io_threads):
        raise click.UsageError(
            f"--cpus is given {len(cpus)} times; give it once, or once for each of {io_threads} I/O threads"
        )
    if zoned and share_rw:
        raise click.UsageError("--zoned and --share-rw exclude each other: each process has write pointers of its own")
    if serial is not None:
        try:
            check_serial(serial)
        except ValueError as error:
            raise click.UsageError(f"--serial {error}") from None
    if physical_block_size is not None:
        try:
            check_physical_block_size(physical_block_size, int(block_size))
        except ValueError as error:
            raise click.UsageError(f"--physical-block-size: {error}") from None


def start_disk(
    blk_file: Path,
    io_threads: int,
    cpus: tuple[frozenset[int], ...],
    engine: str,
    poll_us: int | None,
    pin_memory: bool,
    upgrade: bool,
    give_up: GiveUp,
    signals: CaughtSignals,
    **options: Any,
) -> Server:
    """Serve the one disk that the options describe."""
    from ringplane.control.start import make_io_threads, serve_all

    threads = make_io_threads(io_threads, cpus, engine, poll_us, pin_memory)
    disk = DiskConfig(blk_file, [thread.name for thread in threads], engine=engine, **options)
    raise_fd_limit()
    return serve_all([disk], threads, upgradable=True, upgrade=upgrade, give_up=give_up, signals=signals)


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

    def give_up(folders: Collection[Path]) -> None:
        if user is not None:
            box.change_user(user)
        if sandbox is not False:
            with doing("confine the process (--no-sandbox serves without)"):
                box.confine(folders)
        logs.start()

    return give_up


def start_config(path: Path, **options: Any) -> Server:
    """Serve the disks of a configuration file; raises ClickException if it cannot be used."""
    from ringplane.control.config import ConfigError, read_config
    from ringplane.control.start import serve_all

    try:
        config = read_config(path)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    raise_fd_limit()
    return serve_all(config.disks, config.io_threads, upgradable=True, **options)


def raise_fd_limit() -> None:
    """Raise the soft limit to the hard limit.

    Each attached disk has some fds for itself, three for each queue, and one for each piece of guest memory. Raises
    OSError if the limit is too low for one disk with one front end.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if 0 <= hard < FEWEST_FILES:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def serve_until_signal(
    signals: CaughtSignals, start: Callable[[CaughtSignals], Server], what: Path, logs: Logs, trace: bool
) -> None:
    """Start, print how to attach, and wait until a signal or the end of an inherited connection stops the server."""
    # NumPy would start one thread per CPU when it is imported. Nobody needs them, and they would not be confined.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signals.pass_on(REQUESTS)
    manager = ServiceManager()
    try:
        with start_errors():
            server = start(signals)
    except Interrupted as interrupted:
        end_line(interrupted.number)
        log.info("stopped by %s while starting; %s was not served", signal_name(interrupted.number), what)
        return
    with server:
        if trace:
            server.trace(trace_printer(server, logs))
        for export in server.exports:
            announce(export, logs)
        if len(server.exports) == 1:
            announce_hint(server.exports[0], logs)
        manager.notify_ready()
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
    disks = ", ".join(f"{export.disk.image.path} ({export.listener})" for export in server.exports)
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
    """A function that prints events on standard error; with several disks, each with the name of its image."""
    names = {export.device: f"{export.disk.image.path.name} " for export in server.exports}

    def print_event(event: TraceEvent | str) -> None:
        disk = names[event.device] if len(names) > 1 and not isinstance(event, str) else ""
        logs.trace(f"{disk}{event}")

    return print_event


def announce(export: Export, logs: Logs) -> None:
    """Print the disk and its socket."""
    disk, image = export.disk, export.disk.image
    if export.config.direct and disk.through_page_cache:
        logs.say(f"{image.path}: its file system refuses O_DIRECT; using the page cache")
    mode = disk.how + (", read-only" if image.read_only else "")
    logs.say(f"serving {image.path} ({format_size(image.size)}, {mode}, {len(disk.queues)} queues)")
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
