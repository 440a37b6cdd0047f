"""The data plane: compiled Python that fetches requests from the rings, executes them, and completes them.

A **ring** (virtqueue) is memory that the guest's driver and we, the device, share. The driver writes a **chain** of
descriptors (addresses and lengths of buffers in guest memory) for each request, makes it *available*, and may **kick**
us: a write to an eventfd. A request is a header (type, sector), data, and a status byte that we write. We then mark the
chain *used*, and may **notify** the driver through another eventfd, which becomes an interrupt in the guest.

Read the files in the order of a request's life: `state` (the structs), `fetch` (ring to request), `execute` (request
to engine), `complete` (engine to ring), `loop` (the event loop over all of it), `worker` (the thread around the loop).
A worker is in several files: `worker_state` (its WORKER struct, with `slots` and `bounce_buffers`), `served_rings` (how
a ring starts, drains and stops), `place_ring` (where it is in memory), `retired_memory` and `pinning` (the memory
tables that requests use), `disk_reports` (what the log gets of the disks).
What they use: `ring_rules` (the errors of a driver that break a ring), `merge` and `flush` (I/O for several requests),
`helper_threads` (for operations that would block), `zones` (zoned disks), `failures` and `trace` (what the log gets),
`dirty` (migration), `signaller` (notifications that never block), `tune` (the choice of a polling policy), `queue` (the
Python owners of disks and queues).
"""
