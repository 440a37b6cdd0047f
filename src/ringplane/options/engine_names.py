"""The names of the engines: `engines/choose.py` has what they are. Here they can be had without importing NumPy."""

AUTO, IO_URING, AIO, MEMORY, NULL = "auto", "io_uring", "aio", "memory", "null"

# Those of an I/O thread, and those of a disk.
THREAD_ENGINES = (AUTO, IO_URING, AIO)
ENGINES = (*THREAD_ENGINES, MEMORY, NULL)
