"""Errors at the start of a disk, as one line for the person who started it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

import click

from ringplane.cli.parameters import flag
from ringplane.options.declare import WrongOptions
from ringplane.system.notes import NO_THREAD, REMEDIES, in_words


@contextlib.contextmanager
def usage_errors(spell: Callable[[str], str] = flag) -> Iterator[None]:
    """Turn wrong values and combinations of options, whose names are spelled by `spell`, into a UsageError."""
    try:
        yield
    except WrongOptions as error:
        raise click.UsageError(error.spelled(spell)) from None


@contextlib.contextmanager
def start_errors() -> Iterator[None]:
    """Turn errors of disks, sockets and the machine into a ClickException."""
    from ringplane.block.image import ImageError
    from ringplane.control.handover import HandoverError
    from ringplane.control.listener import ListenError
    from ringplane.opener.opener import OpenerEnded

    try:
        yield
    except (ImageError, ListenError, OpenerEnded, HandoverError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(in_words(error)) from None
    except MemoryError:
        raise click.ClickException(REMEDIES[errno.ENOMEM]) from None
    except RuntimeError as error:
        raise click.ClickException(NO_THREAD if "start new thread" in str(error) else str(error)) from None
