"""Policies for a process as it is: which files it may read, and who compiles them.

A process reads and compiles them itself until it is confined. Then the process beside it does (opener/), for policies
that ship and for files below the folders of --allow-folder; without that it has what it has loaded before.
"""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path

from ringplane.compiler.units import Unit
from ringplane.opener.compile_requests import (
    LARGEST_FILE,
    LONGEST_NAME,
    MADE,
    NO_ROOM,
    REFUSED,
    SHIPPED,
    TOO_LARGE,
    UNCHANGED,
)
from ringplane.opener.opener import LOCAL, Compiled, Compiler, Opener
from ringplane.opener.remote_opener import MEANINGS
from ringplane.policies.loading import (
    LoadedPolicy,
    PolicyError,
    find_policy,
    found_before,
    read_text,
    remember,
    split_address,
)
from ringplane.policies.policy_json import program_of
from ringplane.system.confinement import is_confined

WITHOUT = (
    "this process may not read or compile policies any more; start it with --allow-folder FOLDER, which allows those "
    "that ship and files below it, with {address} for one of its disks, which may be switched off (enabled=no), or "
    "with --no-sandbox"
)
# Which is in the name of the module of a policy (loading.py), as hexadecimal digits.
DIGEST_SIZE = 8


class NotReadable(PolicyError):
    """This process may not read or compile the policy, and has not done that before."""


class PlacedUnit(Unit):
    """A function of a policy whose code another process has put into the memory of this one."""

    def __init__(self, name: str, address: int) -> None:
        self._function, self._address, self.name = _elsewhere, address, name


def _elsewhere(my: int, io: int) -> int:
    """Stands for the function of such a unit."""
    raise NotImplementedError


def usable_policy(address: str, opener: Opener = LOCAL) -> LoadedPolicy:
    """As `find_policy`, for a disk whose files this opens. Raises PolicyError, OpenerEnded."""
    path, _name = split_address(address)
    before = found_before(address)
    is_allowed = path is None or opener.allows(path)
    if not is_confined():
        # What was found before is of a disk that is described, whose files may be anywhere.
        itself = path is None or (before is not None and not is_allowed)
        return find_policy(address, read=read_text if itself else partial(_read_with, opener))
    if before is not None and not all(unit.is_loaded for unit in before.units):
        before = None
    if before is not None and (path is None or opener.compiler is None or not is_allowed):
        return before
    if opener.compiler is None:
        raise NotReadable(WITHOUT.format(address=address))
    loaded = _compiled(opener, opener.compiler, address, before)
    remember(address, loaded)
    return loaded


def _read_with(opener: Opener, path: Path) -> str:
    """The text of a file. Raises PolicyError, OpenerEnded."""
    try:
        with os.fdopen(opener.open(path, read_only=True, direct=False), "rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise _not_read(path, error) from None
    if len(text) > LARGEST_FILE:
        raise PolicyError(_reason(TOO_LARGE, str(path)))
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise PolicyError(f"{path} is not UTF-8") from None


def _not_read(path: Path, error: OSError) -> PolicyError:
    kind = NotReadable if error.errno == errno.EXDEV else PolicyError
    return kind(f"{path} cannot be read: {error.strerror}")


def _compiled(opener: Opener, compiler: Compiler, address: str, before: LoadedPolicy | None) -> LoadedPolicy:
    """A policy that the process beside this one compiles, unless its file has not changed since `before`."""
    path, name = split_address(address)
    if len(os.fsencode(name)) > LONGEST_NAME or not name.isprintable():
        raise PolicyError(f"{address}: no policy can have this name")
    try:
        folder, relative = (SHIPPED, b"") if path is None else opener.place(path)
    except OSError as error:
        raise _not_read(Path(address), error) from None
    known = bytes.fromhex(before.code[-2 * DIGEST_SIZE :]) if before is not None else bytes(DIGEST_SIZE)
    answer = compiler.ask(folder, relative, name, known)
    if answer.status == MADE:
        return _placed(answer)
    if answer.status == UNCHANGED and before is not None:
        return before
    raise PolicyError(answer.text if answer.status == REFUSED else _reason(answer.status, str(path or name)))


def _reason(status: int, what: str) -> str:
    """Why it was not compiled."""
    if status > 0:
        return f"{what} cannot be read: {MEANINGS.get(status, os.strerror(status))}"
    if status == TOO_LARGE:
        return f"{what} is larger than {LARGEST_FILE >> 10} KiB"
    if status == NO_ROOM:
        return f"{what}: there is no room for more code; with --upgrade a new process continues, and has room"
    return f"{what}: to compile it takes too long, or too much memory; look for large constants and many functions"


def _placed(answer: Compiled) -> LoadedPolicy:
    """Raises PolicyError for what our end never sends."""
    try:
        about = json.loads(answer.text)
        program = program_of(about)
        entries = [int(entry) for entry in about["entries"]]
        if len(entries) != 1 + (program.after is not None) or not all(0 <= each < answer.size for each in entries):
            raise ValueError(entries)
        down, *up = (PlacedUnit(f"{program.name} {entry}", answer.address + entry) for entry in entries)
        return LoadedPolicy(Path(about["path"]), program, down, up[0] if up else None, bool(about["needs_time"]))
    except (LookupError, TypeError, ValueError) as error:
        raise PolicyError(f"the process that compiles policies has sent what is not a policy: {error}") from None
