"""`ringplane serve`: serve a disk in the foreground, following QEMU's back-end program conventions."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from ringplane.cli.sizes import Size

ENGINES = ("auto", "io_uring", "aio")
LOG_LEVELS = ("debug", "info", "warning", "error")

# QEMU's docs/interop/vhost-user.json, VHostUserBackendCapabilities
CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}


def print_capabilities(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """An eager option: it works without the options that serving needs."""
    if wanted and not context.resilient_parsing:
        click.echo(json.dumps(CAPABILITIES))
        context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--blk-file", "--image", required=True, type=Path, help="Raw image file or block device to serve.")
@click.option("--socket-path", type=Path, help="UNIX socket to listen at.")
@click.option("--fd", type=int, help="Inherited socket (its file descriptor) instead of --socket-path.")
@click.option("--read-only", is_flag=True, help="Serve a read-only disk.")
@click.option("--create", type=Size(), metavar="SIZE", help="Create a sparse image first; never over an existing file.")
@click.option("--num-queues", type=click.IntRange(1, 64), help="Virtqueues [default: one per CPU up to 4].")
@click.option("--io-threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Threads that serve them.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="How I/O is done.")
@click.option("--direct/--buffered", default=True, help="O_DIRECT where it is possible [default], or the page cache.")
@click.option("--share-rw", is_flag=True, help="Let others that say --share-rw write to the image (a migration).")
@click.option("--serial", help="Serial number that the guest sees, up to 20 bytes [default: from the image's path].")
@click.option("--block-size", type=click.Choice(["512", "4096"]), default="512", show_default=True)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option("--trace", is_flag=True, help="Print each request's fetch and completion on standard error.")
@click.option(
    "--print-capabilities", is_flag=True, is_eager=True, expose_value=False, callback=print_capabilities,
    help="Print what this back end can do, as JSON, and exit.",
)  # fmt: skip
def serve(
    blk_file: Path, socket_path: Path | None, fd: int | None, log_level: str, trace: bool, **options: Any
) -> None:
    """Serve a raw image or block device as a vhost-user-blk disk until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.WARNING, format="ringplane: %(levelname)s: %(message)s", stream=sys.stderr)
    # Ours alone: Numba and asyncio have debug messages of their own.
    logging.getLogger("ringplane").setLevel(log_level.upper())
    if (socket_path is None) == (fd is None):
        raise click.UsageError("give either --socket-path PATH or --fd N")
    serial = options["serial"]
    if serial is not None and len(os.fsencode(serial)) > 20:
        raise click.UsageError(f"--serial {serial!r} has {len(os.fsencode(serial))} bytes; the device has room for 20")
    if serial is not None and not serial.isprintable():
        raise click.UsageError(f"--serial {serial!r} is not text that can be printed")
    options["block_size"] = int(options["block_size"])
    serve_until_signal(blk_file, socket_path, fd, trace, options)


def serve_until_signal(
    blk_file: Path, socket_path: Path | None, fd: int | None, trace: bool, options: dict[str, Any]
) -> None:
    """Start the export, say how to attach to it, and wait until a signal or an inherited connection's end stops it."""
    from ringplane.export import Export
    from ringplane.export import serve as start
    from ringplane.image import ImageError
    from ringplane.listener import ListenError

    exports: list[Export] = []

    def on_signal(number: int, frame: object) -> None:
        if not exports:
            # Still compiling, or opening the image: what was made is undone on the way out.
            raise SystemExit(0)

    # The C handler writes to this from whatever thread the kernel picked; a Python handler runs only when the main
    # thread happens to wake up, which a lock wait does not always do.
    signalled, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        exports.append(start(blk_file, socket_path, fd=fd, **options))
    except (ImageError, ListenError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    with exports[0] as export:
        if trace:
            export.trace(lambda event: print(event, file=sys.stderr, flush=True))
        announce(export, wanted_direct=options["direct"])
        export.stop_when_readable(signalled)
        export.wait()


def announce(export: Any, *, wanted_direct: bool) -> None:
    """Say what is served where, and how to attach a guest."""
    disk, image = export.disk, export.disk.image
    if wanted_direct and not image.direct:
        click.echo(f"{image.path}: its file system refuses O_DIRECT; using the page cache")
    mode = ("O_DIRECT" if image.direct else "buffered") + (", read-only" if image.read_only else "")
    queues = len(disk.queues)
    click.echo(f"serving {image.path} ({image.size / 2**30:.2f} GiB, {mode}, {queues} queues)")
    click.echo(f"listening on {export.socket_path or 'an inherited socket'}")
    if export.socket_path is not None:
        click.echo(
            "attach QEMU with:\n"
            "  -object memory-backend-memfd,id=mem,size=2G,share=on -machine memory-backend=mem -m 2G \\\n"
            f"  -chardev socket,id=ringplane0,path={export.socket_path} \\\n"
            f"  -device vhost-user-blk-pci,chardev=ringplane0,num-queues={queues}"
        )
    sys.stdout.flush()
