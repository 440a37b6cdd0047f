"""`ringplane demo`: serves a temporary image without guest or root, verifies every block, and measures."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from ringplane.cli.types import FILE, SECONDS, SIZE
from ringplane.system.signals import Interrupted, end_line
from ringplane.system.signals import of as signals_of


@click.command(short_help="Try ringplane without a guest.")
@click.option("--image", type=FILE, help="Where to make the image [default: a temporary folder]; removed afterwards.")
@click.option("--size", type=SIZE, default="256M", show_default=True, help="Size of the image.")
@click.option("--seconds", type=SECONDS, default="2", show_default=True, help="Length of each measurement.")
@click.pass_context
def demo(context: click.Context, image: Path | None, size: int, seconds: float) -> None:
    """Try ringplane without a guest: start a disk, write and verify every block, then measure it.

    A real `ringplane serve` process serves a new image; this process drives it over the socket as a guest would.

    The exit status is 0 if all data was right, 1 if a single byte came back wrong or something failed, 2 for wrong
    options, and 128 plus the number of the signal that interrupted it (130 after Ctrl-C, 143 after SIGTERM).
    """
    if image and image.exists():
        raise click.ClickException(f"{image}: exists already; the demo overwrites nothing, name a new file")
    if size < 4 << 20 or size % 4096:
        raise click.ClickException(f"--size {size} is not a multiple of 4096 of at least 4M")
    # rich takes a while to import, and `ringplane --help` imports this file.
    from rich.console import Console

    from ringplane.cli.demonstration import compile_first, run_demo

    console, signals = Console(highlight=False), signals_of(context.obj)
    check_room(image, size)
    with interruptible("the next start compiles instead"):
        compile_first(console, signals)
    with interruptible("the disk has been stopped and its image removed"):
        good = run_demo(console, signals, image, size, seconds)
    if not good:
        raise SystemExit(1)


def check_room(image: Path | None, size: int) -> None:
    """Raise ClickException if there is no room for the image, which is written completely."""
    from ringplane.bench import places
    from ringplane.bench.errors import BenchError

    folder = image.parent if image else Path(tempfile.gettempdir())
    if not folder.is_dir():
        raise click.ClickException(f"{folder}: is not a folder; create it or choose another path")
    try:
        places.check_room(folder, size)
    except BenchError as error:
        raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def interruptible(consequence: str) -> Iterator[None]:
    """Print one line about the effect of a signal, and exit."""
    try:
        yield
    except Interrupted as interrupted:
        end_line(interrupted.number)
        click.echo(f"{interrupted}; {consequence}", err=True)
        raise SystemExit(interrupted.status) from None
