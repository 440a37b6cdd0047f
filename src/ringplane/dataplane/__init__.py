"""The data plane: compiled Python that fetches requests from the rings, executes them, and completes them.

A **ring** (virtqueue) is memory that the guest's driver and we, the device, share. The driver writes a **chain** of
descriptors (addresses and lengths of buffers in guest memory) for each request, makes it *available*, and may **kick**
us: a write to an eventfd. A request is a header (type, sector), data, and a status byte that we write. We then mark the
chain *used*, and may **notify** the driver through another eventfd, which becomes an interrupt in the guest. There are
two formats of rings, split and packed: virtio/split.py and virtio/packed.py explain them, and virtio/ring.py calls the
functions of the right one.

A **slot** is the memory of one request that is in flight: a REQUEST struct, and a BLOCK_IO struct of the same number.
A request becomes a **block I/O**, which takes its way through the layers of the disk (their **stack**) to its source,
where the bytes are, and back. That is the subject of the folder `block`, which knows nothing of rings; block/io.py has
the struct.

One word for each step: a request *begins* when its chain was taken and it is checked; its block I/O is *submitted* to
the stack of the disk, *started* at the source and *finished* by it. Then the request is *answered*: it gets its status,
its chain is *used*, and its slot *released*.

How to read a compiled function
===============================

Functions with `@compiled` are compiled into those that call them, and run without the GIL. All their values are int64.
`view(address, QUEUE)` is the struct at an address: its fields are read and written like attributes of an object, and
`address_of` gives its address. A struct refers to another one by its address, and lists are linked through fields that
begin with `next`. `load16`, `store16` and so on access guest memory (native/access.py). A `@unit` is compiled apart,
and called by its address with `call`: `call(worker.mark_ring, ...)` calls the unit `mark_ring`. What few requests need
is such a unit, so that the loop takes less time to compile (`UNITS` in worker_state.py). System calls return -errno;
nothing raises or allocates.

The order of reading
====================

In the order of a request's life: `state` (the structs), `fetch` (ring to request), `requests` (request to block I/O),
`answer` (block I/O to ring), `loop` (the event loop over all of it), `worker` (the thread around the loop). Read
virtio/split.py before `fetch`, and skip what is for packed rings, the in-flight region (`inflight`: requests survive a
crash of this process) and the dirty log (`dirty`: live migration) at first: a ring works without them.

A worker is in several files: `worker_state` (its WORKER struct, with `slots`), `served_rings` (how a ring starts,
drains and stops, with the table of its states in `ring_states`), `place_ring` (where it is in memory), `retired_memory`
and `pinning` (the memory tables that requests use), `disk_reports` (what the log gets of the disks).

What they use: `ring_rules` (the errors of a driver that break a ring), `request_types` (those that only some disks
have) with `zone_requests` (those of zoned disks), `failures` (what the log gets), `tracer`, `trace_events` and
`trace_layout` (what happens to each request, for those who ask), `signaller` (notifications that never block), `ready`
and `limit_gate` (which queues are fetched from, and which ones limits hold), `tune` (the choice of a polling policy),
`queue` (the Python owners of devices and queues). `compile_data_plane` compiles all of it before a start.
"""
