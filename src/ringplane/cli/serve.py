"""`ringplane serve`: serves disks in the foreground, following QEMU's back-end program conventions."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringplane.cli.described import describe
from ringplane.cli.foreground import serve_until_signal
from ringplane.cli.parameters import blk_file, parameters
from ringplane.cli.types import FILE, USER
from ringplane.log.logs import FORMATS, Logs
from ringplane.options.api_options import ApiOptions
from ringplane.options.disk_config import OneDisk
from ringplane.options.image_address import RemoteImage, find_places, not_found
from ringplane.options.metrics_options import MetricsOptions
from ringplane.options.state_options import StateOptions
from ringplane.options.users import User
from ringplane.system import open_files
from ringplane.system.notes import doing
from ringplane.system.signals import CaughtSignals, Signals
from ringplane.system.standard_fds import move_socket

if TYPE_CHECKING:
    from ringplane.control.interface import Endpoint, Interface
    from ringplane.control.server import Server
    from ringplane.control.start_steps import GiveUp
    from ringplane.control.state_file import StateFile
    from ringplane.opener.host_names import Found
    from ringplane.opener.remote_opener import RemoteOpener
    from ringplane.opener.server_places import Place

LOG_LEVELS = ("debug", "info", "warning", "error")

log = logging.getLogger(__name__)

# QEMU's docs/interop/vhost-user.json, VHostUserBackendCapabilities
CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}


def print_capabilities(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """An eager option: it works without the options that serving needs."""
    if wanted and not context.resilient_parsing:
        click.echo(json.dumps(CAPABILITIES))
        context.exit()


def inherited_socket(context: click.Context, _: click.Parameter, fd: int | None) -> int | None:
    """An eager option: a front end's socket may be standard output; nothing printed from now on reaches it."""
    return fd if fd is None or context.resilient_parsing else move_socket(fd)


@click.command(short_help="Serve disks.", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=FILE, metavar="FILE", help="Serve the disks of this TOML file (docs/config.md).")
@blk_file
@parameters(OneDisk, fd={"is_eager": True, "callback": inherited_socket})
@parameters(ApiOptions, "api_", socket={"metavar": "PATH"}, allow_folders={"metavar": "PATH"})
@parameters(MetricsOptions, "metrics_")
@parameters(StateOptions)
@click.option(
    "--sandbox/--no-sandbox",
    default=None,
    help="Give up all rights that serving does not need: files, network, programs [default: as far as possible].",
)
@click.option("--user", type=USER, metavar="NAME[:GROUP]", help="Change to this user after opening everything.")
@click.option(
    "--upgrade",
    is_flag=True,
    help="Take over these disks from the running ringplane, without an interruption for its guests.",
)
@click.option(
    "--detach",
    is_flag=True,
    help="With --upgrade: return when the disks are taken over, and serve in the background, for systemctl reload.",
)
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True, help="Least level of log lines."
)
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="Format of log lines on standard error; json: an object per line.",
)
@click.option("--trace", is_flag=True, help="Print the fetch and completion of each request on standard error.")
@click.option(
    "--print-capabilities", is_flag=True, is_eager=True, expose_value=False, callback=print_capabilities,
    help="Print the capabilities of this back end as JSON, and exit.",
)  # fmt: skip
@click.pass_context
def serve(
    context: click.Context,
    /,
    config: Path | None,
    upgrade: bool,
    detach: bool,
    sandbox: bool | None,
    user: User | None,
    log_level: str,
    log_format: str,
    trace: bool,
    **options: Any,
) -> None:
    """Serve raw images, block devices or images elsewhere as vhost-user-blk disks until SIGTERM or SIGINT.

    The options describe one disk, a configuration file any number; with --api-socket there need not be one. SIGHUP
    re-reads the sizes of the images. SIGUSR1 detaches a front end from its disk if another one waits for it.

    The exit status is 0 after SIGTERM or SIGINT, 1 if something failed, 2 for wrong options.
    """
    described = describe(context, config, options)

    def start(signals: CaughtSignals) -> Server:
        opener = started(described.api, user, signals, compiling=sandbox is not False)
        from ringplane.compiler.apart import ahead
        from ringplane.compiler.cache import DATA_PLANE

        with ahead(DATA_PLANE):
            from ringplane.control.start import serve_all

            open_files.raise_limit()
            return serve_all(
                described.disks,
                described.io_threads,
                upgradable=True,
                upgrade=upgrade,
                give_up=rights(sandbox, user, logs),
                signals=signals,
                interface=made(described.api),
                metrics=made_endpoint(described.metrics),
                opener=opener,
                traced=trace,
                state=made_state(described.state, sandbox, user),
                trusted=sandbox is False and user is None,
            )

    begun = detached(upgrade) if detach else None
    with Logs(log_level, log_format) as logs:
        # If the caller is not one of our entry points, signals are not caught yet.
        serve_until_signal(
            context.obj or CaughtSignals(),
            start,
            config or described.image or "the API",
            logs,
            trace,
            begun,
        )


def detached(upgrade: bool) -> Callable[[], None]:
    """See cli/detach.py. Raises UsageError without --upgrade."""
    if not upgrade:
        raise click.UsageError("--detach is for --upgrade; a service manager runs the first process in the foreground")
    from ringplane.cli.detach import detach

    return detach()


def made(api: ApiOptions | None) -> Interface | None:
    """What serves the API. It is imported only for that."""
    if api is None:
        return None
    from ringplane.api.http import HttpApi

    return HttpApi(api)


def made_endpoint(metrics: MetricsOptions | None) -> Endpoint | None:
    """What serves metrics over TCP. It is imported only for that."""
    if metrics is None:
        return None
    from ringplane.api.metrics_endpoint import MetricsEndpoint

    return MetricsEndpoint(metrics)


def made_state(path: Path | None, sandbox: bool | None, user: User | None) -> StateFile | None:
    """The file that keeps changes."""
    if path is None:
        return None
    from ringplane.control.state_file import StateFile

    return StateFile(path, trusted=sandbox is False and user is None)


def started(
    api: ApiOptions | None, user: User | None, signals: Signals, *, compiling: bool = False
) -> RemoteOpener | None:
    """The process that opens files of disks that are added, and connects to their servers. It starts beside imports.

    `compiling`: also the one that compiles policies. Raises OpenerError, Interrupted.
    """
    if api is None or not api.allow_folders:
        return None
    from ringplane.opener.remote_opener import RemoteOpener

    ids = (user.uid, user.gid) if user is not None else None
    return RemoteOpener(api.allow_folders, ids, places_of(api, signals), compiling=compiling)


def places_of(api: ApiOptions, signals: Signals) -> dict[Hashable, Sequence[Place]]:
    """Where its servers are now, because a confined process cannot look them up. Raises Interrupted."""
    # The process that connects is in another folder.
    servers = [server.with_paths(Path.absolute) for server in api.allow_servers]
    found = zip(servers, find_places(servers, signals), strict=True)
    return {server.server: known_places(server, places) for server, places in found}


def known_places(server: RemoteImage, found: Found) -> Sequence[Place]:
    """None if it is not found: that must not stop other disks."""
    if isinstance(found, OSError):
        log.warning("%s; to add disks there, restart ringplane when it can be found", not_found(server, found))
        return ()
    return found


def rights(sandbox: bool | None, user: User | None, logs: Logs) -> GiveUp:
    """A function that gives up rights as these options require; raises SandboxError if --sandbox is impossible."""
    from ringplane.compiler.interpreted import INTERPRETED
    from ringplane.control import sandbox as box

    if INTERPRETED and sandbox is None:
        # A debugger opens files.
        sandbox = False
    missing = box.missing() if sandbox is not False else []
    if sandbox and missing:
        raise box.SandboxError(f"--sandbox needs {' and '.join(missing)}, which this system does not have")
    if missing:
        log.warning("the sandbox is incomplete: this system does not have %s", " and ".join(missing))

    def give_up(folders: Collection[Path], exchanging_in: Path | None = None) -> None:
        if user is not None:
            box.change_user(user)
        if sandbox is not False:
            with doing("confine the process (--no-sandbox serves without)"):
                box.confine(folders, exchanging_in)
        logs.start()

    return give_up
