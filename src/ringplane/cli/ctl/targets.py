"""The process that a command asks: its API's socket, and the errors of asking."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ringplane.cli.types import FILE

if TYPE_CHECKING:
    from ringplane.client.client import Client

VARIABLE = "RINGPLANE_API_SOCKET"

# Seconds that a completion waits for the API.
COMPLETION_PATIENCE = 1.0

# Of commands that ask the API; docs/ctl.md.
EXIT_STATUS = (
    "The exit status is 0 if it was done, 1 if the API refused it, 2 for wrong options, and 3 if nobody answers."
)

api_socket = click.option(
    "--api-socket",
    type=FILE,
    metavar="PATH",
    envvar=VARIABLE,
    show_envvar=True,
    help="The socket of the API: what `ringplane serve --api-socket` has.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the answer of the API, as JSON.")


class NotConnected(click.ClickException):
    """Nobody answers."""

    exit_code = 3


@contextlib.contextmanager
def api_errors() -> Iterator[None]:
    """Turn errors of the API into a ClickException."""
    from ringplane.client.api_errors import ApiError, NoConnection

    try:
        yield
    except NoConnection as error:
        raise NotConnected(str(error)) from None
    except ApiError as error:
        raise click.ClickException(str(error)) from None


def asking(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: the command gets a Client as its first argument, and may raise what the client raises.

    Its help says what its exit status means; man pages have no epilog.
    """

    @functools.wraps(function)
    @click.pass_context
    def call(context: click.Context, /, *arguments: Any, **options: Any) -> Any:
        with api_errors():
            return function(client_of(context), *arguments, **options)

    call.__doc__ = f"{function.__doc__}\n\n    {EXIT_STATUS}"
    return call


def client_of(context: click.Context) -> Client:
    """A client of the process that the command line names. Raises UsageError."""
    from ringplane.client.client import Client

    return Client(api_socket_of(context))


def api_socket_of(context: click.Context) -> Path:
    """The option may belong to the command or to its group."""
    found: click.Context | None = context
    while found is not None:
        if (path := found.params.get("api_socket")) is not None:
            return Path(path)
        found = found.parent
    raise click.UsageError(f"give the socket of the API with --api-socket PATH, or in {VARIABLE}")


def complete_disks(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: the names of the disks; none if nobody answers."""
    return complete(context, incomplete, "/v1/disks", lambda answer: [each["name"] for each in answer["disks"]])


def complete_io_threads(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: the names of the I/O threads; none if nobody answers."""
    return complete(
        context, incomplete, "/v1/io-threads", lambda answer: [each["name"] for each in answer["io_threads"]]
    )


def complete(
    context: click.Context, incomplete: str, target: str, words: Callable[[dict[str, Any]], list[str]]
) -> list[CompletionItem]:
    """For the shell: those of the words in an answer that begin so; none if nobody answers."""
    from ringplane.client.api_errors import ApiError
    from ringplane.client.client import Client

    try:
        names = words(Client(api_socket_of(context), COMPLETION_PATIENCE).read(target, dict[str, Any]))
    except (ApiError, click.UsageError):
        names = []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


disk_name = click.argument("name", shell_complete=complete_disks)
