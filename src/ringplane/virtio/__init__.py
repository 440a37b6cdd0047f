"""What the virtio specification lays down: ring formats and virtio-blk layouts, one file each."""
