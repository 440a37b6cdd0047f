"""`ringplane replay`: plays a recording on an image or on a back end, and verifies what is there then."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringplane.cli.demo import interruptible
from ringplane.cli.export import read
from ringplane.cli.types import FILE
from ringplane.options.counted import counted
from ringplane.system.signals import Signals
from ringplane.system.signals import of as signals_of

if TYPE_CHECKING:
    from ringplane.driver.play_targets import Target
    from ringplane.driver.playing import Played

# Differences that are shown.
SHOWN = 10


@click.command(short_help="Replay a recording.")
@click.argument("recording", type=FILE)
@click.argument("target", type=FILE, metavar="IMAGE | SOCKET")
@click.option("--fast", is_flag=True, help="As fast as possible [default: at the recorded times].")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read all of it back, and compare.")
@click.pass_context
def replay(context: click.Context, recording: Path, target: Path, fast: bool, verify: bool) -> None:
    """Play a RECORDING (`ringplane serve --record`) on an IMAGE, or on the disk of the back end at a vhost-user SOCKET.

    What is there is overwritten. What was in flight together is in flight together again on a back end.

    The exit status is 0 if all is there that was written, 1 if it is not or something fails, 2 for wrong options, and
    128 plus the number of a signal that came.
    """
    from ringplane.driver.playing import Player

    signals = signals_of(context.obj)
    recorded = read(recording)
    if target.exists() and target.samefile(recording):
        raise click.ClickException(f"{target}: is the recording itself; name the image that is to be overwritten")
    with interruptible("the recording was not played to its end"), _errors(target), _opened(target, signals) as disk:
        if disk.size < recorded.header.size:
            raise click.ClickException(
                f"{target}: has {disk.size} bytes, and the recorded disk had {recorded.header.size}; take a larger one"
            )
        player = Player(recorded, disk)
        click.echo(_summary(player.play(timed=not fast, check=signals.check)))
        if verify:
            _report(target, player.differences(signals.check))


@contextlib.contextmanager
def _opened(path: Path, signals: Signals) -> Iterator[Target]:
    """The disk at this path. Raises OSError, ConnectionError, Interrupted."""
    from ringplane.driver import Driver
    from ringplane.driver.play_targets import ImageTarget, SocketTarget

    if stat.S_ISSOCK(path.stat().st_mode):
        with Driver(path) as driver:
            yield SocketTarget(driver)
        return
    with contextlib.closing(ImageTarget(path, signals)) as image:
        yield image


@contextlib.contextmanager
def _errors(target: Path) -> Iterator[None]:
    """What fails, in one line."""
    from ringplane.driver.driver_failures import FAILURES, reason

    try:
        yield
    except FAILURES as error:
        raise click.ClickException(f"{target}: {reason(error)}") from None


def _summary(played: Played) -> str:
    unsupported = f"; {played.unsupported} not supported there" if played.unsupported else ""
    left_out = f"; {played.left_out} left out that had failed or not ended" if played.left_out else ""
    return (
        f"{counted(played.requests, 'request')} in {played.seconds:.3f} s, recorded in {played.recorded_seconds:.3f} s"
        f"{unsupported}{left_out}"
    )


def _report(target: Path, differences: Iterator[tuple[int, int]]) -> None:
    number = size = 0
    for offset, length in differences:
        number, size = number + 1, size + length
        if number <= SHOWN:
            click.echo(f"{target}: {length} bytes at {offset} are not what was written last", err=True)
    if number:
        raise click.ClickException(f"{target}: {size} bytes in {counted(number, 'range')} are not as written")
    click.echo("verified: everything is there that was written last")
