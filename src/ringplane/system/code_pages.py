"""The pages of this process that have machine code."""

from __future__ import annotations

import os

from ringplane.system import libc
from ringplane.system.procfs import mappings


def drop_code(library: str) -> None:
    """Release the memory of a loaded library's code; pages that are used again are loaded again.

    Only pages that are mapped executable and were never written: their content is in the file.
    """
    for start, end, rights, path in mappings():
        if rights == "r-xp" and os.path.basename(path) == library:
            libc.release_pages(start, end - start)


def forbid_writable_code() -> None:
    """Make writable memory non-executable. Raises OSError.

    libffi has its callback trampolines there (for Python functions that C calls), if it has no better way.
    """
    for start, end, rights, _ in list(mappings()):
        if "wx" in rights:
            libc.mprotect(start, end - start, libc.PROT_READ | libc.PROT_WRITE)
