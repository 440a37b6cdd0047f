"""Machine code for a given address, linked without LLVM."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator

import pytest

from ringplane.compiler.linker import ALIGNMENT, RELOCATION, NotLinkable, linked
from ringplane.opener.compile_requests import C_FUNCTIONS, MADE
from ringplane.opener.opener import Compiled
from ringplane.opener.remote_compiler import _addresses
from ringplane.policies.loading import find_policy
from ringplane.policies.making import make
from ringplane.policies.running import RunningPolicy
from ringplane.policies.trial import Trial
from ringplane.policies.usable import PlacedUnit, _placed
from ringplane.system.syscall_numbers import MACHINE

from .test_policies import SAMPLES

pytestmark = pytest.mark.skipif(MACHINE != "x86_64", reason="code is linked for x86-64 only")

SIZE = 1 << 20
FUNCTIONS = dict(zip(C_FUNCTIONS, _addresses(), strict=True))


@pytest.fixture
def window() -> Iterator[tuple[mmap.mmap, int]]:
    """Memory that can be written and executed, and its address."""
    memory = mmap.mmap(-1, SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.parametrize("name", ["error", "corrupt", "bad_blocks", "delay", "ssd", "spinning_disk"])
def test_a_policy_answers_as_one_that_llvm_has_linked(window: tuple[mmap.mmap, int], name: str) -> None:
    """At an address that is far from everything."""
    memory, address = window
    made, code, about = make("", None, name, address + ALIGNMENT, FUNCTIONS)
    assert made, about
    memory[ALIGNMENT : ALIGNMENT + len(code)] = code
    placed = _placed(Compiled(MADE, address + ALIGNMENT, len(code), about))
    policies = [RunningPolicy(name, loaded, {"seed": 7}) for loaded in (placed, find_policy(name))]
    assert isinstance(placed.down, PlacedUnit)
    first, second = (list(Trial(each).run()) for each in policies)
    assert first == second
    assert policies[0].counters == policies[1].counters
    assert policies[0].shown() == policies[1].shown()
    assert policies[0].loaded.code == policies[1].loaded.code
    assert placed.program.doc == policies[1].loaded.program.doc


def test_what_cannot_be_linked_is_one_line() -> None:
    unit = find_policy(f"{SAMPLES}/sample_corrupt.py").down
    code = unit.object_code()
    with pytest.raises(NotLinkable, match=r"^it needs aligned_alloc, which a policy cannot call here$"):
        linked(code, 0, {name: 1 for name in FUNCTIONS if name != "aligned_alloc"})
    for length in range(0, len(code), 7):
        with pytest.raises(NotLinkable):
            linked(code[:length], 0, FUNCTIONS)


def test_an_unknown_relocation_is_not_guessed() -> None:
    code = bytearray(find_policy(f"{SAMPLES}/sample_corrupt.py").down.object_code())
    refused = 0
    for place in range(0, len(code) - RELOCATION.size, 8):
        _, symbol_and_kind, _ = RELOCATION.unpack_from(code, place)
        if symbol_and_kind & 0xFFFF_FFFF not in (1, 24) or not symbol_and_kind >> 32:
            continue
        changed = bytearray(code)
        (info,) = struct.unpack_from("<Q", changed, place + 8)
        struct.pack_into("<Q", changed, place + 8, info & ~0xFFFF_FFFF | 37)
        try:
            linked(bytes(changed), 0, FUNCTIONS)
        except NotLinkable as error:
            refused += str(error) == "it has relocations of kind 37"
    assert refused
