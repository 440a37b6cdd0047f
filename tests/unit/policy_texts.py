"""Texts of policies for tests."""

from __future__ import annotations


def own_policy(body: str, after: str = "", *, data: bool = False) -> str:
    """The text of a file with a policy `own`."""
    lines = [
        "from errno import EIO, ENOSPC",
        "import math",
        "from ringplane.policies import ANY, DISCARD, DROP, DURATION, FLUSH, HANG, OPERATION, PASS, RANGE, READ, SIZE",
        "from ringplane.policies import WRITE, ZERO, Policy, after, below, chance, compiled, counter, delay",
        "from ringplane.policies import exponential, fail, is_a, load8, normal, one_of, parameter, policy, random",
        "from ringplane.policies import redirect, state, store8, tear, touches, uniform",
        "class Own(Policy):",
        '    """A policy of a test."""',
        "    number: int = parameter(0, 'a number')",
        "    share: float = parameter(0.5, 'a share', 0.0, 1.0)",
        "    area: int = parameter('all', 'a range', kind=RANGE)",
        "    seen: int = counter('what was seen')",
        "    found: int = counter('what was found')",
        "    table: int = state(4)",
        "    last: int = state()",
        f"@policy(Own, data={data})",
        "def own(io, my):",
        *(f"    {line}" for line in body.splitlines()),
    ]
    if after:
        lines += ["@own.result", "def own_result(io, my):", *(f"    {line}" for line in after.splitlines())]
    return "\n".join(lines) + "\n"
