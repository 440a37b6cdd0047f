"""Readable values, and the command line's suggestions for mistyped names."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from ringplane.cli.commands import COMMANDS, main
from ringplane.options.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (4096, "4 KiB"),
        (64 << 20, "64 MiB"),
        (3 << 29, "1.5 GiB"),
        ((10 << 30) + 512, "10 GiB"),
        ((1 << 30) - 1, "1 GiB"),
        ((1 << 20) + (1 << 19) + (1 << 17), "1.62 MiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert format_size(size) == text


def test_a_size_that_is_shown_can_be_typed() -> None:
    for size in (512, 64 << 20, 3 << 29, 10 << 40):
        assert parse_size(format_size(size).removesuffix("bytes").replace(" ", "")) == size


@pytest.mark.parametrize(("word", "meant"), [("serv", "serve"), ("bnech", "bench"), ("dmeo", "demo")])
def test_a_mistyped_command_is_answered_with_the_right_one(word: str, meant: str) -> None:
    done = CliRunner().invoke(main, [word])
    assert done.exit_code == 2
    assert f"Did you mean '{meant}'?" in done.output


def test_a_mistyped_option_is_answered_with_the_right_one() -> None:
    done = CliRunner().invoke(main, ["serve", "--blk-fil", "disk.img"])
    assert done.exit_code == 2
    assert "'--blk-file'" in done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run_by_their_names(name: str) -> None:
    done = CliRunner().invoke(main, [name, "--help"])
    assert (done.exit_code, done.output.startswith(f"Usage: main {name} ")) == (0, True)
