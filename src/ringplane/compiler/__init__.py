"""How functions become machine code: the `compiled` decorator, Numba's pipeline, the cache of compiled code."""
