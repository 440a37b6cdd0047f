"""The huge pages that hugetlbfs takes from (the kernel's Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from pathlib import Path

SYSFS = Path("/sys/kernel/mm/hugepages")


def most(size: int) -> int | None:
    """How many pages of `size` bytes there are at most: free ones, and those by which the pool may grow.

    Some of them may be reserved for files that are mapped already. None if /sys does not show it.
    """
    pool = SYSFS / f"hugepages-{size >> 10}kB"
    try:
        free, limit, grown = (
            int((pool / name).read_text())
            for name in ("free_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")
        )
    except (OSError, ValueError):
        return None
    return free + max(0, limit - grown)
