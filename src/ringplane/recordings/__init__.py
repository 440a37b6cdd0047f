"""Recordings of what the storage of a disk was given: a file of writes, flushes, discards and marks, with their data.

`entries` is what a recording consists of, `recording_format` how it is stored (docs/recordings.md), `reader` and
`writer` are for all who use recordings. The I/O threads record by themselves (block/layers).
"""
