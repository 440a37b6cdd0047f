"""The changes (changes.py) of a running process."""

from __future__ import annotations

import dataclasses

from ringplane.control.changes import Changes, Table
from ringplane.control.planned import place
from ringplane.control.server import Server
from ringplane.options.disk_config import DiskConfig
from ringplane.options.policy_options import POLICIES
from ringplane.options.toml_text import absolute, keys


def changes_of(server: Server) -> Changes:
    """Those of a running process, for the next start."""
    served, unserved = changes_of_served(server), server.unserved
    return dataclasses.replace(
        served, added=[*served.added, *unserved.added], paused=[*served.paused, *unserved.paused]
    )


def changes_of_served(server: Server) -> Changes:
    """Without the disks that were added and are not served now."""
    described = {place(export.config): export.name for export in server.exports if not export.added}
    return Changes(
        added=[table_of(export.config) for export in server.exports if export.added],
        removed=sorted(server.described - described.keys()),
        limits={place(export.config): export.limits for export in server.exports if export.limits_changed},
        names=described,
        paused=[place(export.config) for export in server.exports if export.paused],
        policies={
            place(export.config): POLICIES.to_toml(POLICIES.with_paths(absolute, export.policies))
            for export in server.exports
            if export.disk.policies_changed
        },
    )


def table_of(config: DiskConfig) -> Table:
    """Of an added disk. Without `create`: if its image is gone, an empty one in its place would be wrong."""
    return keys(dataclasses.replace(config, create=None))
