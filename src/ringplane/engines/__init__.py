"""How bytes reach storage, and how a worker sleeps: one file for each engine, all behind the same few functions.

An engine is a struct with the int64 fields of `common.ENGINE_FIELDS` at its start, and these compiled functions:

- `prepare_io(engine, slot, operation, fd, iov, iov_count, offset, dsync)` queues a read or write;
- `prepare_flush(engine, slot, fd)` queues an fdatasync(2);
- `submit(engine)` hands all that is queued to the kernel, with one system call where the kernel takes it;
- `wait(engine, timeout_ms)` sleeps until something completes or a watched fd becomes readable (-1: without limit), and
  returns how many tokens of watched fds it put at `engine.tokens`; it submits first where `submits_in_wait` says so;
- `reap(engine)` returns how many COMPLETION structs it put at `engine.completions`.

`slot` is a number below the engine's capacity that comes back with the completion; each is used once at a time.
`dispatch` calls those of the engine that a worker has. The Python objects that own the structs are used on the worker's
thread: `attach_thread()`, `watch(fd, token)`, `unwatch(fd)`, and `close()` when the thread has ended.
"""
