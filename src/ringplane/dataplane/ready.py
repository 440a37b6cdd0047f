"""The list of queues from which a worker fetches next."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.dataplane.state import QUEUE
from ringplane.native.access import address_of, view


@compiled
def mark_ready(worker, queue):
    """Append the queue to the list of queues to fetch from, if it is in no list yet."""
    if queue.ready:
        return
    queue.ready = 1
    queue.next_ready = 0
    if worker.ready:
        view(worker.ready_last, QUEUE).next_ready = address_of(queue)
    else:
        worker.ready = address_of(queue)
    worker.ready_last = address_of(queue)
