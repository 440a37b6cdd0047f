"""Passing trace events to a receiver on the control thread while they happen, without delaying anything else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ringplane.dataplane.trace_events import TraceEvent, TraceReader
from ringplane.dataplane.tracer import CAPACITY

log = logging.getLogger(__name__)

TRACE_INTERVAL = 0.05
TRACE_PORTION = 1000


async def report_trace(readers: Sequence[TraceReader], receive: Callable[[TraceEvent | str], None]) -> None:
    """Call `receive` with each event, or with a line about lost events, until cancelled."""
    reported = 0

    def report(limit: int) -> int:
        nonlocal reported
        events = [event for reader in readers for event in reader.events(limit)]
        for event in events:
            receive(event)
        lost = sum(reader.lost for reader in readers)
        if lost > reported:
            receive(f"{lost - reported} trace events lost")
            reported = lost
        return len(events)

    try:
        while True:
            # In small portions: messages from front ends and signals must not wait for a slow receiver.
            await asyncio.sleep(0 if report(TRACE_PORTION) else TRACE_INTERVAL)
    except OSError as error:
        log.warning("tracing has stopped: %s", error)
    except asyncio.CancelledError:
        # At the end, when all queues have been drained: the remaining events.
        report(CAPACITY)
