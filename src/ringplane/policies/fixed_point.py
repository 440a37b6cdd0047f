"""Roots, logarithms and powers of int64 numbers, the same on each machine. Fractions are counted in 65536ths."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.native.access import count_leading_zeros

ONE = 1 << 16

# 2^x for x from 0 to 1 is about 1 + x (A + x (B + x (C + x D))), in 2^-30ths: exact at both ends, within 5e-6 between.
A, B, C, D = 744_107_297, 259_362_136, 55_559_989, 14_712_402


@compiled
def log2(number):
    """The binary logarithm of a positive number, in 65536ths."""
    whole = 63 - count_leading_zeros(number)
    # From 1 to 2, in 2^-30ths: each square gives one more binary digit.
    part = number >> (whole - 30) if whole > 30 else number << (30 - whole)
    for _ in range(16):
        part = part * part >> 30
        whole *= 2
        if part >> 31:
            part >>= 1
            whole += 1
    return whole


@compiled
def exp2(exponent):
    """2 to the power of `exponent`, which is in 65536ths; the result, too, and at most 2^62."""
    whole, part = exponent >> 16, (exponent & (ONE - 1)) << 14
    power = (1 << 30) + times(part, A + times(part, B + times(part, C + times(part, D))))
    return shifted(power, min(whole, 45) - 14)


@compiled
def times(a, b):
    """The product of two numbers in 2^-30ths."""
    return a * b >> 30


@compiled
def shifted(number, by):
    return number << min(by, 62) if by >= 0 else number >> min(-by, 62)


@compiled
def square_root(number):
    """The whole part of the square root of a number that is not negative (Newton's method, from above)."""
    if number == 0:
        return 0
    root = 1 << (65 - count_leading_zeros(number)) // 2
    better = (root + number // root) >> 1
    while better < root:
        root = better
        better = (root + number // root) >> 1
    return root
