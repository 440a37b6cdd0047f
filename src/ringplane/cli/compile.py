"""`ringplane compile`: compiles everything ahead, so that the first start is as fast as any other."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from ringplane.cli.demo import interruptible
from ringplane.cli.types import FOLDER
from ringplane.options.sizes import format_size
from ringplane.system.signals import of as signals_of

# Those of compiler/key.py, repeated here because `ringplane --help` shall be quick.
CPUS = ("native", "generic")


@click.command(short_help="Compile ahead of the first start.")
@click.option("--into", type=FOLDER, metavar="FOLDER", help="Fill this folder [default: the user's own cache].")
@click.option("--shared", is_flag=True, help="Fill the folder of this installation, which all its users read.")
@click.option(
    "--cpu",
    type=click.Choice(CPUS),
    default="native",
    show_default=True,
    help="Compile for this machine's CPU, or for any CPU of its architecture.",
)
@click.pass_context
def compile(context: click.Context, into: Path | None, shared: bool, cpu: str) -> None:
    """Compile everything that any disk and any command may need, which otherwise the first start does.

    For packages and container images, which the user of a service cannot write to: docs/containers.md.

    The exit status is 0 if everything is there, 1 if something failed, 2 for wrong options, and 128 plus the number of
    the signal that interrupted it.
    """
    if into and shared:
        raise click.UsageError("give either --into FOLDER or --shared")
    from ringplane.cli.compilation import Incomplete, fill, made
    from ringplane.compiler import cache

    into = cache.SHARED if shared else into
    try:
        folder = into or cache.own()
        with interruptible(f"nothing was added to {folder}"), made(folder, 0o755 if into else 0o700):
            files = fill(folder, cpu, signals_of(context.obj))
    except (cache.Unusable, Incomplete) as error:
        raise click.ClickException(f"{error}{'' if into else '; give --into FOLDER'}") from None
    size = sum(path.stat().st_size for path in files)
    machine = "this CPU" if cpu == "native" else f"any {platform.machine()} CPU"
    click.echo(f"compiled for {machine}: {len(files)} files, {format_size(size)}, in {folder}")
