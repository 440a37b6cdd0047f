"""`ringplane export`: a recording in the formats of other programs."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from ringplane.cli.types import FILE
from ringplane.options.counted import counted

if TYPE_CHECKING:
    from ringplane.recordings.reader import Recording

# The modules of `ringplane.recordings` that write them.
FORMATS = {"dm-log-writes": "dm_log_writes", "fio": "fio_iolog", "blktrace": "blktrace_binary"}


@click.command(short_help="Export a recording for other programs.")
@click.argument("format", type=click.Choice(list(FORMATS)))
@click.argument("recording", type=FILE)
@click.argument("out", type=FILE)
def export(format: str, recording: Path, out: Path) -> None:
    """Write a RECORDING (`ringplane serve --record`) to the new file OUT, in the FORMAT of other programs.

    dm-log-writes: a log of the kernel's device-mapper target, for replay-log and xfstests. fio: an iolog for
    `fio --read_iolog OUT --replay_redirect IMAGE`. blktrace: a trace for blkparse, btt and fio; to be read by
    `blkparse -i NAME`, OUT has to be NAME.blktrace.0.
    """
    from ringplane.recordings.recording_format import RecordingError

    module = importlib.import_module(f"ringplane.recordings.{FORMATS[format]}")
    recorded = read(recording)
    try:
        with new_file(out) as file:
            left_out = module.export(recorded, file)
    except RecordingError as error:
        raise click.ClickException(f"{recording}: {error}") from None
    except FileExistsError:
        raise click.ClickException(f"{out}: exists already; name another file or remove it") from None
    except OSError as error:
        raise click.ClickException(f"{out}: {error.strerror}") from None
    without = f"; {left_out} left out, which this format has no place for" if left_out else ""
    click.echo(f"{out}: {counted(len(recorded) - left_out, 'request')} and marks{without}")


def read(path: Path) -> Recording:
    """The recording; what is missing in it is printed. Raises ClickException."""
    from ringplane.recordings.reader import open_recording
    from ringplane.recordings.recording_format import RecordingError

    try:
        recording = open_recording(path)
    except RecordingError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from None
    if recording.warning:
        click.echo(f"Warning: {path}: {recording.warning}", err=True)
    return recording


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at the path when it is complete, for its owner only: it has the guest's data.

    Raises OSError, also if there is one already.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
        yield file
        file.flush()
        os.link(file.name, path)
