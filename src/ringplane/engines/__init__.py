"""How bytes reach storage, and how a worker sleeps.

A worker has one of the engines that ask the kernel, `aio` or `io_uring`; a disk whose image is memory is served without
(`memory`), as is one that only measures the data plane (`null`).

An engine is a struct with the int64 fields of `common.ENGINE_FIELDS` at its start, and these compiled functions:

- `prepare_io(engine, slot, operation, file, iov, iov_count, offset, dsync)` queues a read or write;
- `prepare_flush(engine, slot, file)` queues an fdatasync(2);
- `submit(engine)` hands all that is queued to the kernel, with one system call where the kernel takes it;
- `wait(engine, timeout_ns, wanted)` sleeps until something completes or a watched fd becomes readable (-1: without
  limit), and returns how many tokens of watched fds it put at `engine.tokens`; it submits first where `submits_in_wait`
  says so; an engine that can sleeps on until `wanted` such things have happened;
- `has_events(engine)` tells without a system call whether `wait` or `reap` may find something;
- `reap(engine)` returns how many COMPLETION structs it put at `engine.completions`.

`slot` is a number below the engine's capacity that comes back with the completion; each is used once at a time.
`dispatch` calls those of the engine that a worker has. The Python objects that own the structs are used on the worker's
thread: `attach_thread()`, `add_file(fd)` (the `file` of the functions above), `remove_file(file)`, `watch(fd, token)`,
`unwatch(fd)`, `pin(mappings)`, and `close()` when the thread has ended; `fine_timeouts` is whether `wait` can sleep for
microseconds.
"""
