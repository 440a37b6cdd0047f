"""Moderation: replies of a server are taken together, instead of waking the I/O thread for each.

A server that has many requests replies to one at a time. Each reply would wake the thread, which would wake the driver,
and the server for the next request: that was half of the CPU time of deep 4 KiB reads over NBD. Network cards have the
same problem, and the same remedy. The thread sleeps until about a quarter of the requests that wait for a reply has
been answered. The server still has the others, so it does not run out of work: with qemu-nbd a read at depth 128 takes
2.9 instead of 7.0 us of CPU time, and there are no fewer of them per second.

Not if a request takes time that does not depend on the others, as with a server far away: then each would take longer
(20 % fewer at depth 32 with a delay of 1 ms). The thread's tuner notices that (dataplane/tune.py), and pauses belong to
only one of its policies. And not for large requests: while the thread sleeps, data fill the socket, and leave the
CPU's cache.
Tried with RBD: it gains nothing there, because librbd has threads of its own that wake up for each reply.

A source calls `moderate` when replies have come. The event loop sleeps as long as it asks for (dataplane/loop.py).
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.native.structs import struct

# The share of requests to be answered in a pause, and its end whatever happens, in nanoseconds.
SHARE, LONGEST = 4, 250_000
# What fits into the buffers of a socket: while the thread sleeps, nobody takes it from there.
BUFFERED = 64 << 10

# `gap`: nanoseconds from one reply to the next, on average. `at`: when the last ones came.
MODERATION = struct("gap", "at")


@compiled
def moderate(channel, moderation, now, came, waiting, size):
    """So many replies have come, for requests of `size` bytes each; for so many the reply is still to come."""
    if came > 0:
        gap = min((now - moderation.at) // came, LONGEST)
        moderation.gap += (gap - moderation.gap) // 4
        moderation.at = now
    batch = min(waiting // SHARE, BUFFERED // max(size, 1))
    channel.pause = min(batch * moderation.gap, LONGEST) if batch > 1 else 0
