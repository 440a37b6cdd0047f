"""Arithmetic with a defined result for all numbers, for code whose authors must not be able to make a mistake with it.

Numba promises LLVM that `+ - *` of int64 do not overflow (`nsw`), that shifts are shorter than 64 bits, and that a
float which becomes an integer fits. If that is not true, LLVM may do anything: it removes a check like `position < 0`
of the sum of two positive numbers, and what is behind it then reads any address. The data plane keeps these promises.
A policy (policies/) is anybody's code, and its arithmetic gives what the CPU gives: `+ - *` wrap, a shift is by its
lowest 6 bits, and a float that does not fit becomes the nearest integer (0 for NaN).
"""

from __future__ import annotations

import re

# In LLVM's language.
VALUE = r"""(?:%"[^"]*"|[^\s,"]+)"""
FLAGS = re.compile(r"\b(add|sub|mul|shl|neg) (?:(?:nuw|nsw) )+")
SHIFT = re.compile(rf"^( *)({VALUE}) = (shl|ashr|lshr) (?:exact )?i64 ({VALUE}), ({VALUE})", re.MULTILINE)
CONVERSION = re.compile(rf"\bfpto([su])i double ({VALUE}) to i64")
# The name of a value that only this module makes, from that of the shift.
COUNT = "count of "


def with_defined_results(text: str) -> str:
    """The text of a module of LLVM, before it is optimised, in which no arithmetic has an undefined result."""
    text = CONVERSION.sub(r"call i64 @llvm.fpto\1i.sat.i64.f64(double \2)", SHIFT.sub(_masked, FLAGS.sub(r"\1 ", text)))
    used = [sign for sign in "su" if f"@llvm.fpto{sign}i.sat.i64.f64(" in text]
    return "\n".join([text, *(f"declare i64 @llvm.fpto{sign}i.sat.i64.f64(double)" for sign in used), ""])


def _masked(shift: re.Match[str]) -> str:
    indent, result, operation, value, count = shift.groups()
    name = f'%"{COUNT}{result.lstrip("%").strip(chr(34))}"'
    return f"{indent}{name} = and i64 {count}, 63\n{indent}{result} = {operation} i64 {value}, {name}"
