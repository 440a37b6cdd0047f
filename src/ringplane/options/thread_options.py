"""The options of I/O threads."""

from __future__ import annotations

from ringplane.options.cpus import CPUS
from ringplane.options.declare import Options, option
from ringplane.options.durations import POLL_TIME
from ringplane.options.engine_names import AUTO, THREAD_ENGINES
from ringplane.options.kinds import FLAG, NAME, OneOf

# Longer than it takes to wake up a sleeping driver (20 to 40 us in a virtual machine), so that such drivers too find
# the thread awake; measured in docs/benchmarks/findings.md.
POLL_US = 50


class ThreadOptions(Options):
    """How an I/O thread works."""

    # None: always.
    poll_us: int | None = option(
        POLL_TIME,
        default=POLL_US,
        help="Poll the rings for up to N microseconds before sleeping, if that pays off; always: never sleep.",
        doc="the maximum time in microseconds for which it polls the rings before it sleeps, if polling improves "
        'throughput; `"always"`: it never sleeps and uses a whole CPU',
    )
    pin_memory: bool = option(
        FLAG,
        default=False,
        help="Pin guest memory once instead of per I/O: less CPU with io_uring, but all of it stays allocated.",
        doc="`true`: with io_uring, guest memory is pinned once instead of for each request; all of it is then "
        "allocated, a balloon cannot free any of it, and it counts as locked memory (`ulimit -l`)",
    )


class IoThread(ThreadOptions):
    """An I/O thread to be started. It runs only on `cpus`, or on all CPUs of this process.

    Raises ValueError for CPUs that this process may not use.
    """

    name: str = option(
        NAME,
        kw_only=False,
        doc="its name in `io-threads` and in log lines",
        doc_default='`"io0"` for the first table, `"io1"` for the second, ...',
    )
    engine: str = option(
        OneOf(*THREAD_ENGINES),
        kw_only=False,
        default=AUTO,
        doc='`"auto"`, `"io_uring"`, `"aio"`',
        doc_default='`"auto"`: the best that the kernel allows',
    )
    cpus: frozenset[int] | None = option(
        CPUS,
        kw_only=False,
        default=None,
        doc='the CPUs that it may run on, `[2, 3]` or `"2-3"`; a subset of those that the process may use',
        doc_default="all of those",
    )
