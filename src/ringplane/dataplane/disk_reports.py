"""What the log reports of the disks that a worker serves: failed requests, and images that lost pages."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ringplane.dataplane.queue import Queue
from ringplane.log.logs import DiskLog

log = logging.getLogger(__name__)


def report_sources(queues: Iterable[Queue]) -> None:
    """Log what the sources of the disks have to say, each thing once."""
    for queue in queues:
        if warning := queue.stack.source.warning():
            DiskLog(log, queue.device.name).warning("%s", warning)


def report_failures(queues: Iterable[Queue]) -> None:
    """Log the failed requests that the queues have recorded (failures.py)."""
    for queue in queues:
        queue.device.failures.take(queue.failures)
