"""Disks that are served in the foreground: what is printed of them, and what signals do to them."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ringplane.cli.lean_imports import import_asyncio, import_llvm
from ringplane.cli.notify import ServiceManager
from ringplane.cli.start_errors import start_errors, usage_errors
from ringplane.log.logs import Logs
from ringplane.options.counted import counted
from ringplane.options.sizes import format_size
from ringplane.system.signals import WOKEN, CaughtSignals, Interrupted, end_line
from ringplane.system.signals import name as signal_name

if TYPE_CHECKING:
    from ringplane.control.export import Export
    from ringplane.control.server import Server
    from ringplane.dataplane.trace_events import TraceEvent

# Signals that do not stop the process.
REQUESTS = (signal.SIGHUP, signal.SIGUSR1)

# Seconds after which a slow stop is logged, and after which the process ends whatever hangs: before service managers,
# which wait 90 s (DefaultTimeoutStopSec of systemd-system.conf(5)), would kill it without a word.
STOP_PATIENCE, STOP_LIMIT = 2.0, 60.0

log = logging.getLogger(__name__)


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
    import_llvm()
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

    If storage hangs, a second signal ends the wait for requests in flight, or STOP_LIMIT.
    """
    end_line(number)
    attached = sum(export.state == "attached" for export in server.exports)
    server.request_stop()
    if not ends_within(signals, STOP_PATIENCE):
        warn_of_waiting(server, signal_name(number))
        if why := hangs(signals, STOP_LIMIT - STOP_PATIENCE):
            abandon(server, logs, why)
    detached = f", {attached} front end{'s' * (attached > 1)} detached" if attached else ""
    disks = ", ".join(f"{export.disk.source.title} ({export.listener})" for export in server.exports) or "no disk"
    log.info("stopped by %s: %s%s", signal_name(number), disks, detached)


def warn_of_waiting(server: Server, name: str) -> None:
    """The process does not end yet; `name` is that of the signal."""
    if requests := in_flight(server):
        log.warning(
            "waiting for %d requests in flight, as storage has not completed them; "
            "%s again, or %d s, ends the process without them (the guest gets no answer)",
            requests, name, STOP_LIMIT,
        )  # fmt: skip
    else:
        log.warning(
            "waiting for storage to close an image, or for a client of the API to read the end of its trace; "
            "%s again, or %d s, ends the process",
            name,
            STOP_LIMIT,
        )


def ends_within(signals: CaughtSignals, seconds: float) -> bool:
    """Whether the server ends in time. Further signals are ignored: a terminal and a parent may both send one."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if signals.next(left) == WOKEN:
            return True
    return False


def hangs(signals: CaughtSignals, seconds: float) -> str:
    """Why the end of the server is not waited for any longer; empty: it has ended."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        number = signals.next(left)
        if number == WOKEN:
            return ""
        if number in signals.ending:
            return "by a second signal"
    return f"after {STOP_LIMIT:.0f} s"


def in_flight(server: Server) -> int:
    return sum(export.in_flight for export in server.exports)


def abandon(server: Server, logs: Logs, why: str) -> NoReturn:
    """End at once, like a crash: no completed request is lost, and the next process recovers the others."""
    log.warning("stopped %s: %d requests in flight are left without an answer", why, in_flight(server))
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
