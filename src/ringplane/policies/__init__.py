"""Policies: what a disk does with each request, as a small function in Python that is compiled into the loop.

    from errno import EIO
    from ringplane.policies import ANY, OPERATION, PASS, Policy, chance, counter, fail, is_a, parameter, policy

    class Error(Policy):
        \"\"\"Requests fail, some or all of them.\"\"\"

        operation: int = parameter(ANY, "which operation fails", kind=OPERATION)
        probability: float = parameter(1.0, "how many of them", 0.0, 1.0)
        failed: int = counter("requests that were failed")

    @policy(Error)
    def error(io, my):
        if is_a(io, my.operation) and chance(io, my.probability):
            my.failed += 1
            return fail(EIO)
        return PASS

docs/policies.md is the page for their authors. A file of policies imports only from here. The names in `__all__` are
all that it can use: `declaring.py` and `parameter_kinds.py` have what a policy is declared with, `answers.py` what it
returns, `io_view.py` what it can ask about an I/O. `loading.py` makes a policy of a file, with the rules of
`file_rules.py`; the layer of a disk that calls it is block/layers/policy_layer.py. The policies that ship are in
`shipped`.
"""

from ringplane.compiler.jit import compiled
from ringplane.engines.common import DISCARD, FLUSH, READ, SECURE_ERASE, WRITE, ZERO
from ringplane.policies.answers import DROP, HANG, PASS, after, delay, fail, redirect, tear
from ringplane.policies.choosing import is_turn
from ringplane.policies.declaring import Policy, counter, parameter, policy, state
from ringplane.policies.distributions import DISTRIBUTION, FIXED, random_time
from ringplane.policies.fixed_point import log2, square_root
from ringplane.policies.io_view import (
    ANY,
    below,
    chance,
    exponential,
    is_a,
    load8,
    normal,
    random,
    store8,
    touches,
    uniform,
)
from ringplane.policies.parameter_kinds import DURATION, FILE, OPERATION, RANGE, SIZE, one_of

__all__ = [
    "ANY",
    "DISCARD",
    "DISTRIBUTION",
    "DROP",
    "DURATION",
    "FILE",
    "FIXED",
    "FLUSH",
    "HANG",
    "OPERATION",
    "PASS",
    "RANGE",
    "READ",
    "SECURE_ERASE",
    "SIZE",
    "WRITE",
    "ZERO",
    "Policy",
    "after",
    "below",
    "chance",
    "compiled",
    "counter",
    "delay",
    "exponential",
    "fail",
    "is_a",
    "is_turn",
    "load8",
    "log2",
    "normal",
    "one_of",
    "parameter",
    "policy",
    "random",
    "random_time",
    "redirect",
    "square_root",
    "state",
    "store8",
    "tear",
    "touches",
    "uniform",
]
