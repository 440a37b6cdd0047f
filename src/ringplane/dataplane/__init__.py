"""The data plane: compiled Python that takes requests off the rings, has them done, and answers.

Read the files in the order of a request's life: `state` (the structs), `fetch` (ring to request), `execute` (request
to engine), `complete` (engine to ring), `loop` (the event loop over all of it), `worker` (the thread around the loop).
"""
