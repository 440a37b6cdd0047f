"""The virtio-blk device of a disk: its features, configuration space and queues."""
