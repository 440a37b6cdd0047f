"""An I/O thread to be started, as users describe it."""

from __future__ import annotations

from dataclasses import dataclass

from ringplane.options.engines import AUTO
from ringplane.options.values import check_cpus

# Longer than it takes to wake up a sleeping driver (20 to 40 us in a virtual machine), so that such drivers too find
# the thread awake; measured in docs/benchmarks/findings.md.
POLL_US = 50


@dataclass(frozen=True, slots=True)
class IoThread:
    """An I/O thread to be started. It runs only on `cpus`, or on all CPUs of this process.

    `poll_us`: the most microseconds that it polls the rings before it sleeps; None: it never sleeps.
    `pin_memory`: it keeps the memory of its guests pinned, if its engine is io_uring.

    Raises ValueError for CPUs that this process may not use.
    """

    name: str
    engine: str = AUTO
    cpus: frozenset[int] | None = None
    poll_us: int | None = POLL_US
    pin_memory: bool = False

    def __post_init__(self) -> None:
        if self.cpus is not None:
            check_cpus(self.cpus)
