"""landlock(7): the calling thread, and the threads that it starts, give up access to files and to other processes.

Open files stay usable. Each version of the kernel's ABI supports more rights; rights that a kernel does not support
cannot be given up.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping

from ringplane.system.libc import system_call
from ringplane.system.syscall_numbers import NUMBERS

# That of typing, without the memory that importing it takes; the small process that opens files (opener/) has no paths.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from pathlib import Path

# include/uapi/linux/landlock.h
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH, LANDLOCK_RULE_NET_PORT = 1, 2
LANDLOCK_ACCESS_FS_WRITE_FILE, LANDLOCK_ACCESS_FS_READ_FILE, LANDLOCK_ACCESS_FS_READ_DIR = 1 << 1, 1 << 2, 1 << 3
LANDLOCK_ACCESS_FS_REMOVE_FILE = 1 << 5
LANDLOCK_ACCESS_FS_MAKE_REG, LANDLOCK_ACCESS_FS_MAKE_SOCK = 1 << 8, 1 << 9
LANDLOCK_ACCESS_NET_CONNECT_TCP = 1 << 1
LANDLOCK_ACCESS_FS_TRUNCATE, LANDLOCK_ACCESS_FS_IOCTL_DEV = 1 << 14, 1 << 15

# For each ABI version that added rights: all rights up to it, as bits. Rights to files (from executing to making
# symbolic links; moving to another folder; truncating; ioctls of devices), to TCP (bind, connect), and to what is
# outside the Landlock domain (abstract UNIX sockets, signals).
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
TCP_RIGHTS = {4: (1 << 2) - 1}
SCOPES = {6: (1 << 2) - 1}

RULESET_ATTR = struct.Struct("=QQQ")
# Packed.
PATH_BENEATH_ATTR = struct.Struct("=Qi")
NET_PORT_ATTR = struct.Struct("=QQ")


def version() -> int:
    """The version of the kernel's Landlock ABI, 0 if there is no Landlock."""
    try:
        return system_call(NUMBERS["landlock_create_ruleset"], 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0


def give_up_files(
    but_removing_in: Collection[Path], but_exchanging_in: Collection[Path] = (), but_connecting_to: Collection[int] = ()
) -> None:
    """Keep only the rights to remove files in some folders, in others to rename them too, and to connect to TCP ports.

    Raises OSError. Call `forbid_new_rights` before.
    """
    folders: dict[int, int] = {}
    rights = dict.fromkeys(but_removing_in, LANDLOCK_ACCESS_FS_REMOVE_FILE)
    rights |= dict.fromkeys(but_exchanging_in, LANDLOCK_ACCESS_FS_REMOVE_FILE | LANDLOCK_ACCESS_FS_MAKE_REG)
    try:
        for folder, bits in rights.items():
            # A user who may not even look into the folder (`--user`) cannot remove anything there, with a rule or
            # without.
            try:
                folders[os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)] = bits
            except PermissionError:
                continue
        keep_only(folders, but_connecting_to)
    finally:
        for fd in folders:
            os.close(fd)


def keep_only(rights: Mapping[int, int], ports: Collection[int] = ()) -> None:
    """Keep only these rights below the folders of these fds, and to connect to these TCP ports.

    Raises OSError. Call `forbid_new_rights` before.
    """
    known = version()
    attr = RULESET_ATTR.pack(*(_of_version(each, known) for each in (FILE_RIGHTS, TCP_RIGHTS, SCOPES)))
    ruleset = system_call(NUMBERS["landlock_create_ruleset"], attr, len(attr), 0)
    try:
        for folder, bits in rights.items():
            rule = PATH_BENEATH_ATTR.pack(bits & _of_version(FILE_RIGHTS, known), folder)
            system_call(NUMBERS["landlock_add_rule"], ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        for port in ports if _of_version(TCP_RIGHTS, known) else ():
            rule = NET_PORT_ATTR.pack(LANDLOCK_ACCESS_NET_CONNECT_TCP, port)
            system_call(NUMBERS["landlock_add_rule"], ruleset, LANDLOCK_RULE_NET_PORT, rule, 0)
        system_call(NUMBERS["landlock_restrict_self"], ruleset, 0)
    finally:
        os.close(ruleset)


def _of_version(rights: dict[int, int], known: int) -> int:
    return max((bits for since, bits in rights.items() if since <= known), default=0)
