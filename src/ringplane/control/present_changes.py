"""The changes (changes.py) of a running process."""

from __future__ import annotations

import dataclasses

from ringplane.control.changes import Changes, Table
from ringplane.control.export import Export
from ringplane.control.planned import place
from ringplane.control.server import Server
from ringplane.options.toml_text import keys


def changes_of(server: Server) -> Changes:
    """Those of a running process."""
    described = {place(export.config): export.name for export in server.exports if not export.added}
    return Changes(
        added=[_table(export) for export in server.exports if export.added],
        removed=sorted(server.described - described.keys()),
        limits={place(export.config): export.limits for export in server.exports if export.limits_changed},
        names=described,
        paused=[place(export.config) for export in server.exports if export.paused],
    )


def _table(export: Export) -> Table:
    """Without `create`: if its image is gone, an empty one in its place would be wrong."""
    return keys(dataclasses.replace(export.config, create=None))
