"""How many files this process may open (getrlimit(2), RLIMIT_NOFILE)."""

from __future__ import annotations

import errno
import os
import resource

# The open files of one disk with one front end that has a few queues.
FEWEST_FILES = 64


def raise_limit() -> None:
    """Raise the soft limit to the hard limit.

    Each attached disk has some fds for itself, three for each queue, and one for each piece of guest memory. Raises
    OSError if the limit is too low for one disk with one front end.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if 0 <= hard < FEWEST_FILES:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
