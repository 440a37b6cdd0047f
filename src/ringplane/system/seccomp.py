"""seccomp(2): a filter of system calls: a program that the kernel runs for each system call of the process.

The program reads a struct seccomp_data (number of the call, architecture, arguments) and returns an action.
Facts that this file depends on:
- Since Linux 5.11 the kernel determines once which calls the program always allows without reading arguments, and does
  not run it for these: so their order does not matter. Older kernels run it for each call.
- A jump goes forward, over at most 255 instructions. The instructions for each call are adjacent, so no jump is long.
- The kernel uses only 32 bits of the arguments that are filtered here, so their lower half is enough.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Collection, Iterable, Mapping

from ringplane.system.libc import system_call
from ringplane.system.syscall_numbers import FIRST_COMMON, MACHINE, NUMBERS

# include/uapi/linux/seccomp.h
SECCOMP_SET_MODE_FILTER, SECCOMP_GET_ACTION_AVAIL = 1, 2
SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1, 4
SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000

# include/uapi/linux/audit.h
AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}[MACHINE]

# Offsets in struct seccomp_data; on both architectures the lower half of an argument comes first.
NUMBER, ARCH, ARGUMENTS = 0, 4, 16

# struct sock_filter: operation, jump offsets if true and if false, operand (include/uapi/linux/bpf_common.h)
INSTRUCTION = struct.Struct("=HBBI")
# struct sock_fprog: the number of instructions, and their address
FPROG = struct.Struct("=H6xQ")
LOAD, AND, RETURN, IF_EQUAL, IF_NOT_LESS = 0x20, 0x54, 0x06, 0x15, 0x35
Instruction = tuple[int, int, int, int]

REFUSE = SECCOMP_RET_ERRNO | errno.EPERM
UNKNOWN = SECCOMP_RET_ERRNO | errno.ENOSYS


# Calls that no process of ours makes after its start: a caller is an attacker, and the process ends before the call has
# an effect.
DEADLY = (
    *("execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev"),
    *("mount", "setns", "unshare", "bpf", "init_module", "finit_module"),
)


class Only:
    """A call is allowed if argument number `argument`, masked with `mask`, is one of `values`."""

    # Not a dataclass: that would take 2 MB of the small process that opens files (opener/).
    __slots__ = ("argument", "mask", "values")

    def __init__(self, argument: int, values: Collection[int], mask: int = 0xFFFF_FFFF) -> None:
        self.argument, self.values, self.mask = argument, values, mask


def available() -> bool:
    """Whether this kernel supports such filters, and permits seccomp(2)."""
    try:
        system_call(NUMBERS["seccomp"], SECCOMP_GET_ACTION_AVAIL, 0, struct.pack("I", SECCOMP_RET_KILL_PROCESS))
    except OSError:
        return False
    return True


def program(
    allowed: Iterable[str], limited: Mapping[str, Only], deadly: Iterable[str], otherwise: int = REFUSE
) -> list[Instruction]:
    """Allow some calls, some only with certain arguments; `deadly` ones end the process; others return `otherwise`.

    Calls that are newer than Linux 5.1 fail with ENOSYS: programs that try them have a fallback for older kernels.
    """
    return [
        (LOAD, 0, 0, ARCH),
        (IF_EQUAL, 1, 0, AUDIT_ARCH),
        (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        *(step for name in allowed for step in _if_number(name, [(RETURN, 0, 0, SECCOMP_RET_ALLOW)])),
        *(step for name, only in limited.items() for step in _if_number(name, _limit(only, otherwise))),
        *(step for name in deadly for step in _if_number(name, [(RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS)])),
        # This includes calls of the x32 ABI, whose numbers have a high bit set.
        (IF_NOT_LESS, 0, 1, FIRST_COMMON),
        (RETURN, 0, 0, UNKNOWN),
        (RETURN, 0, 0, otherwise),
    ]


def _if_number(name: str, steps: list[Instruction]) -> list[Instruction]:
    """Instructions for the call of this name, which end the program; none on an architecture without it."""
    return [(IF_EQUAL, 0, len(steps), NUMBERS[name]), *steps] if name in NUMBERS else []


def _limit(only: Only, otherwise: int) -> list[Instruction]:
    count = len(only.values)
    return [
        (LOAD, 0, 0, ARGUMENTS + 8 * only.argument),
        (AND, 0, 0, only.mask),
        *((IF_EQUAL, count - index, 0, value) for index, value in enumerate(only.values)),
        (RETURN, 0, 0, otherwise),
        (RETURN, 0, 0, SECCOMP_RET_ALLOW),
    ]


def install(instructions: list[Instruction]) -> None:
    """Filter the calls of all threads of the process permanently; raises OSError. Call `forbid_new_rights` before.

    No untrusted code runs in this process, so the mitigation of speculative store bypass, which costs time, is not
    needed (SPEC_ALLOW; default before Linux 5.16).
    """
    code = ctypes.create_string_buffer(b"".join(INSTRUCTION.pack(*instruction) for instruction in instructions))
    flags = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW
    fprog = FPROG.pack(len(instructions), ctypes.addressof(code))
    thread = system_call(NUMBERS["seccomp"], SECCOMP_SET_MODE_FILTER, flags, fprog)
    if thread:
        raise OSError(errno.EBUSY, f"thread {thread} already has a different filter")
