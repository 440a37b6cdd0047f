"""System errors in words: the operation that failed, which the kernel's own message does not name, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

# By errno, for any system call: the process or the machine has run out of a resource.
REMEDIES = {
    errno.EMFILE: "this process may open {} files; raise the limit (ulimit -n, systemd's LimitNOFILE=)",
    errno.ENFILE: "the machine has too many open files; raise sysctl fs.file-max",
    errno.ENOMEM: "there is not enough memory; raise the limit (ulimit -v, systemd's MemoryMax=)",
}

NO_THREAD = "no thread can be started; raise the limit (ulimit -u, systemd's TasksMax=)"


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Add a note to an OSError from the block: `cannot WHAT`."""
    try:
        yield
    except OSError as error:
        error.add_note(f"cannot {what}")
        raise


def in_words(error: OSError) -> str:
    """The operation (the notes of the error), the file, the error, and the advice."""
    why = error.strerror or str(error)
    # The text of an engine's error has its own advice.
    if error.errno in REMEDIES and type(error) is OSError:
        why = REMEDIES[error.errno].format(_limit())
    name = [os.fsdecode(error.filename)] if error.filename is not None else []
    return ": ".join([*getattr(error, "__notes__", ()), *name, why])


def _limit() -> str:
    """How many files this process may open; a process that has given up its rights cannot find out."""
    try:
        return f"only {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    except OSError:
        return "no more"
