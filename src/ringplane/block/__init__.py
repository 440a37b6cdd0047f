"""The block path: block I/Os on their way through the layers of a disk to its source, and back.

Read `io` (the block I/O and its channel), `stack` (layers and source), `route` (the way through the layers), `events`
(fds that layers and sources wait for), `transfer` (pieces: short transfers, bounce buffers, and `merge`, `flush`), then
a source in `sources` and a layer in `layers`. `helper_threads` do what would block; `ranges` discards and zeroes there.
The other modules are for the control plane: images (`image`, `formats`), what their storage can do (`storage_limits`),
zone files.
"""
