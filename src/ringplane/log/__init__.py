"""The log: one queue and thread per stream, formats, repeated lines."""
