"""Engines: how bytes reach storage, and how a worker sleeps.

A worker has one of the two kernel engines, `aio` or `io_uring`. Disks with an image in memory do their I/O without it
(`memory`), as do disks that only measure the data plane (`null`).

An engine is a struct with the int64 fields of `common.ENGINE_FIELDS` at its start. Among them are the addresses of
these units, whose first argument is the address of the struct:

- `prepare_io(engine, slot, operation, file, iov, iov_count, offset, dsync)` queues a read or write; any other
  operation completes with -EINVAL;
- `prepare_flush(engine, slot, file)` queues an fdatasync(2);
- `submit(engine)` submits all that is queued, with one system call if the kernel accepts it all; if it is 0, `wait`
  submits, with the system call that it makes anyway;
- `wait(engine, timeout_ns, wanted)` sleeps until something completes or a watched fd becomes readable (-1: without
  limit), and returns how many tokens of watched fds it put at `engine.tokens`; io_uring sleeps until `wanted` such
  events have happened;
- `has_events(engine)` says without a system call whether `wait` or `collect` may find something;
- `collect(engine)` adds COMPLETION structs at `engine.completions`; if it is 0, `wait` does.

`slot` is a number below the engine's capacity that comes back with the completion; each is used by one operation at a
time. `dispatch` calls the units of the worker's engine. The Python objects that own the structs are used on the
worker's thread: `attach_thread()`, `add_file(fd)` (returns the `file` of the functions above), `remove_file(file)`,
`watch(fd, token)`, `unwatch(fd)`, `pin(mappings)`, and `close()` when the thread has ended; `fine_timeouts` says
whether `wait` can sleep for microseconds.
"""
