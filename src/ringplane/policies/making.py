"""What a child of the process that compiles policies does (opener/compiling_process.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ringplane.compiler.bad_code import BadCode
from ringplane.compiler.linker import ALIGNMENT, NotLinkable, linked
from ringplane.policies.loading import LoadedPolicy, PolicyError, choose_policy, find_file, read_text
from ringplane.policies.policy_json import described


def make(
    path: str, text: bytes | None, name: str, address: int, functions: Mapping[str, int]
) -> tuple[bool, bytes, str]:
    """Whether a policy of a file with this text was compiled; its code for this address; and what it is.

    Without a text it is the one of this name that ships. `functions`: see compiler/linker.py. If it was not compiled,
    the text says why.
    """
    try:
        loaded = _chosen(Path(path), text, name)
        code, entries = _code_of(loaded, address, functions)
    except (PolicyError, BadCode) as error:
        return False, b"", str(error)
    except NotLinkable as error:
        return False, b"", f"{path or name}: {error}"
    except MemoryError:
        return False, b"", f"{path or name}: it needs too much memory to be compiled"
    about = {"path": str(loaded.path), "needs_time": loaded.needs_time, "entries": entries, **described(loaded.program)}
    return True, code, json.dumps(about)


def _chosen(path: Path, text: bytes | None, name: str) -> LoadedPolicy:
    """Checked: nothing else has checked it. Raises PolicyError."""
    if text is None:
        path, name = find_file(name)
        return choose_policy(path, read_text(path), name, check=True)
    try:
        return choose_policy(path, text.decode(), name, check=True)
    except UnicodeDecodeError:
        raise PolicyError(f"{path} is not UTF-8") from None


def _code_of(loaded: LoadedPolicy, address: int, functions: Mapping[str, int]) -> tuple[bytes, list[int]]:
    """The code of its functions, and where each begins. Raises BadCode, NotLinkable."""
    code, entries = b"", []
    for unit in loaded.units:
        code += bytes(-len(code) % ALIGNMENT)
        part, entry = linked(unit.object_code(), address + len(code), functions)
        entries.append(len(code) + entry)
        code += part
    return code, entries
