"""How fast a disk may be used, and how disks share a limit.

A limit is a leaky bucket (`meters`). The buckets of a disk, or of a group of disks, are in memory that all I/O threads
change (`shares`), and are made from the options by `limiter`. Nothing here knows of rings: `dataplane/limit_gate.py`
asks before it fetches a request, and reports what was fetched.
"""
