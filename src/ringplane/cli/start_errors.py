"""Errors at the start of a disk, as one line for the person who started it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

import click

from ringplane.cli.parameters import flag
from ringplane.options.declare import WrongOptions

# By errno, for any system call: the process or the machine has run out of a resource.
REMEDIES = {
    errno.EMFILE: "this process may open only {} files; raise the limit (ulimit -n, systemd's LimitNOFILE=)",
    errno.ENFILE: "the machine has too many open files; raise sysctl fs.file-max",
    errno.ENOMEM: "there is not enough memory; raise the limit (ulimit -v, systemd's MemoryMax=)",
}
NO_THREAD = "no thread can be started; raise the limit (ulimit -u, systemd's TasksMax=)"


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn wrong values and combinations of options into a UsageError."""
    try:
        yield
    except WrongOptions as error:
        raise click.UsageError(error.spelled(flag)) from None


@contextlib.contextmanager
def start_errors() -> Iterator[None]:
    """Turn errors of disks, sockets and the machine into a ClickException."""
    from ringplane.block.image import ImageError
    from ringplane.control.handover import HandoverError
    from ringplane.control.listener import ListenError

    try:
        yield
    except (ImageError, ListenError, HandoverError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(in_words(error)) from None
    except MemoryError:
        raise click.ClickException(REMEDIES[errno.ENOMEM]) from None
    except RuntimeError as error:
        raise click.ClickException(NO_THREAD if "start new thread" in str(error) else str(error)) from None


def in_words(error: OSError) -> str:
    """The operation (the notes of the error, see `ringplane.system.notes`), the file, the error, and the advice."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    why = REMEDIES[error.errno].format(limit) if error.errno in REMEDIES else error.strerror or str(error)
    name = [os.fsdecode(error.filename)] if error.filename is not None else []
    return ": ".join([*getattr(error, "__notes__", ()), *name, why])
