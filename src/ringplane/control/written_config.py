"""The configuration file that would make what runs."""

from __future__ import annotations

import dataclasses

from ringplane.control.server import Server
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import RemoteImage
from ringplane.options.toml_text import table, toml


def written_config(server: Server) -> str:
    """TOML. Disks that a file cannot describe are comments."""
    tables = [f"state = {toml(str(server.state.path))}\n"] if server.state is not None else []
    tables += [table("[api]", server.interface.options)] if server.interface is not None else []
    tables += [table("[metrics]", server.metrics.options)] if server.metrics is not None else []
    tables += [table("[[io-thread]]", thread) for thread in server.threads.io_threads]
    for export in server.exports:
        if export.config.socket_path is None:
            tables.append(f"# The disk {export.name} has an inherited socket, which a file cannot describe.\n")
        else:
            # An image may have grown since it was created.
            config, size = export.config, export.disk.size
            config = dataclasses.replace(config, create=size) if config.create is not None else config
            config = dataclasses.replace(config, limits=export.limits, policy=export.policies)
            tables.append(written_disk(config))
    return "\n".join(tables)


def written_disk(config: DiskConfig) -> str:
    """Its table, in which nothing is secret."""
    image = config.image
    if not isinstance(image, RemoteImage) or image.without_secrets == image:
        return table("[[disk]]", config)
    note = "# The key of the next disk is secret, so it is left out here; name a file that has it: keyfile=PATH.\n"
    return note + table("[[disk]]", dataclasses.replace(config, image=image.without_secrets))
