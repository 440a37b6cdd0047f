"""What the log reports of the disks that a worker serves: failed requests, and images that lost pages."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ringplane.dataplane.queue import Queue
from ringplane.log.logs import DiskLog

log = logging.getLogger(__name__)


def report_lost_mappings(queues: Iterable[Queue]) -> None:
    """Log, once per disk, that pages of its mapped image were lost."""
    for device in {queue.device for queue in queues}:
        if device.lost_mapping and not device.lost_reported:
            device.lost_reported = True
            DiskLog(log, device.name).warning(
                "pages of the image were lost (it was truncated, or no memory is left for them); from now on "
                "it is served with system calls, and reads beyond its end fail"
            )


def report_failures(queues: Iterable[Queue]) -> None:
    """Log the failed requests that the queues have recorded (failures.py)."""
    for queue in queues:
        queue.device.failures.take(queue.failures)
