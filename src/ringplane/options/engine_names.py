"""The names of the engines, without an import of NumPy; `engines/choose_engine.py` makes the engines."""

AUTO, IO_URING, AIO, MEMORY, NULL = "auto", "io_uring", "aio", "memory", "null"

# Those of an I/O thread, and those of a disk.
THREAD_ENGINES = (AUTO, IO_URING, AIO)
ENGINES = (*THREAD_ENGINES, MEMORY, NULL)
