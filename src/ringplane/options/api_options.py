"""The options of the API: the table `api` of the configuration file, and `--api-...` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ringplane.options.declare import Options, WrongOptions, option
from ringplane.options.image_address import SERVERS, RemoteImage
from ringplane.options.kinds import PATH, PATHS
from ringplane.options.users import GROUP, MODE

# Of its socket: whoever may connect can do with the disks whatever their owner can.
API_MODE = 0o600


class ApiOptions(Options):
    """Where the API is served."""

    socket: Path = option(
        PATH,
        kw_only=False,
        help="Serve the HTTP API (docs/api.md) on this UNIX socket.",
        doc="the UNIX socket of the API; a relative path starts at the folder of the configuration file",
        doc_default="required in this table",
    )
    socket_mode: int | None = option(
        MODE,
        default=None,
        help="Mode of the API's socket [default: 0600, or 0660 with a group].",
        doc='its mode in octal, `"0660"`',
        doc_default='`"0600"`, or `"0660"` with a `socket-group`',
    )
    socket_group: int | None = option(
        GROUP,
        default=None,
        help="Group of the API's socket; its members can do everything with the disks.",
        doc='its group, `"ringplane"` or a number; its members can do everything with the disks',
        doc_default="the group of the process",
    )

    allow_folders: Sequence[Path] = option(
        PATHS,
        default=(),
        several=tuple,
        flags=("--allow-folder",),
        help="Disks can be added, and policies loaded, under the sandbox if their images, sockets and files are below "
        "this folder; repeatable.",
        doc='folders, `["/srv/images"]`: disks can be added, and policies loaded, under the sandbox if their images, '
        "sockets and files are below one of these ([security.md](security.md#files-of-disks-that-are-added))",
        doc_default="none",
    )

    allow_servers: Sequence[RemoteImage] = option(
        SERVERS,
        default=(),
        several=tuple,
        flags=("--allow-server",),
        help="Disks on this server can be added under the sandbox too: nbd://HOST[:PORT], rbd::id=USER; repeatable.",
        doc='servers, `["nbd://storage1", "rbd::id=vms"]`: disks whose images are there can be added under the sandbox '
        "too ([remote.md](remote.md#disks-that-are-added))",
        doc_default="none",
    )

    def check(self) -> None:
        if self.allow_servers and not self.allow_folders:
            raise WrongOptions(
                "{allow_servers} needs {allow_folders}, because the sockets of added disks are below one"
            )

    @property
    def mode(self) -> int | None:
        """The mode of the socket; None: that of a group's socket."""
        return API_MODE if self.socket_mode is None and self.socket_group is None else self.socket_mode
