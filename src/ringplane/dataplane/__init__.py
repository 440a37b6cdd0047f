"""The data plane: compiled Python that fetches requests from the rings, executes them, and completes them.

A **ring** (virtqueue) is memory that the guest's driver and we, the device, share. The driver writes a **chain** of
descriptors (addresses and lengths of buffers in guest memory) for each request, makes it *available*, and may **kick**
us: a write to an eventfd. A request is a header (type, sector), data, and a status byte that we write. We then mark the
chain *used*, and may **notify** the driver through another eventfd, which becomes an interrupt in the guest.

One word for each step: a request *begins* when its chain was taken and it is checked; its block I/O is *submitted* to
the stack of the disk, *started* at the source and *finished* by it. Then the request is *answered*: it gets its status,
its chain is *used*, and its slot *released*.

A request becomes a **block I/O**, which takes its way through the layers of the disk to its source, and back: that is
the subject of the folder `block`, which knows nothing of rings.

Read the files in the order of a request's life: `state` (the structs), `fetch` (ring to request), `requests` (request
to block I/O), `answer` (block I/O to ring), `loop` (the event loop over all of it), `worker` (the thread around the
loop).

A worker is in several files: `worker_state` (its WORKER struct, with `slots`), `served_rings` (how a ring starts,
drains and stops), `place_ring` (where it is in memory), `retired_memory` and `pinning` (the memory tables that requests
use), `disk_reports` (what the log gets of the disks).

What they use: `ring_rules` (the errors of a driver that break a ring), `zone_requests` (request types of zoned
disks), `failures` and `trace` (what the log gets), `dirty` (migration), `signaller` (notifications that never block),
`tune` (the choice of a polling policy), `queue` (the Python owners of devices and queues).
"""
