"""What the virtio specification defines: ring formats, the virtio-blk and zoned layouts, features; one file each.

`inflight` is from the vhost-user specification: the layout of the memory that records which requests are in flight.
"""
