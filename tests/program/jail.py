"""Runs a command in which system calls fail: `python jail.py CALL=ERRNO[,CALL=ERRNO]... COMMAND...`.

`fcntl:37=ENOLCK` applies only to calls whose second argument is 37.
"""

from __future__ import annotations

import errno
import os
import sys

from ringplane.system import libc, seccomp
from ringplane.system.syscall_numbers import NUMBERS

LOAD_NUMBER = (seccomp.LOAD, 0, 0, seccomp.NUMBER)


def failing(call: str, code: str) -> list[seccomp.Instruction]:
    """The filter's instructions for one call; the call's number is loaded at their start and end."""
    name, _, argument = call.partition(":")
    fail = (seccomp.RETURN, 0, 0, seccomp.SECCOMP_RET_ERRNO | getattr(errno, code))
    if not argument:
        return [(seccomp.IF_EQUAL, 0, 1, NUMBERS[name]), fail]
    load_argument = (seccomp.LOAD, 0, 0, seccomp.ARGUMENTS + 8)
    return [
        (seccomp.IF_EQUAL, 0, 4, NUMBERS[name]),
        load_argument,
        (seccomp.IF_EQUAL, 0, 1, int(argument)),
        fail,
        LOAD_NUMBER,
    ]


def main(calls: str, *command: str) -> None:
    steps = [step for each in calls.split(",") for step in failing(*each.split("="))]
    libc.forbid_new_rights()
    seccomp.install([LOAD_NUMBER, *steps, (seccomp.RETURN, 0, 0, seccomp.SECCOMP_RET_ALLOW)])
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
