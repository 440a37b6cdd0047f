"""One declaration of an option is enough for the command line, the file, Python, a hand-over and the documentation."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import ringplane
from ringplane.cli.parameters import parameters
from ringplane.cli.serve import serve as serve_command
from ringplane.control import config, handover
from ringplane.control.config import ConfigError, read_config
from ringplane.control.handover import HandoverError, options_of
from ringplane.control.taking_over import check_options
from ringplane.options import tables
from ringplane.options.declare import Options, WrongOptions, declared, option
from ringplane.options.delay_options import Delay
from ringplane.options.disk_config import DiskConfig, OneDisk
from ringplane.options.kinds import FLAG, NAME, PATH, Whole
from ringplane.options.zone_options import ZoneModel

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTATION = REPOSITORY / "docs" / "config.md"
CPU = min(os.sched_getaffinity(0))
MIB = 1 << 20
ZONES = ZoneModel(1 << 20, 1 << 20)


class MadeUp(Options):
    """A group as a layer brings it."""

    made_up: int = option(Whole(1, 9), default=3, fixed=True, help="A made-up number.", doc="a made-up number")
    made_of: Path | None = option(PATH, default=None, help="A made-up file.", doc="a made-up file")
    silent: bool = option(FLAG, default=False)

    def check(self) -> None:
        if self.made_up == 7 and self.made_of:
            raise WrongOptions("{made_up} is {number}, which excludes {made_of}", number=self.made_up)


class MadeUpDisk(DiskConfig, MadeUp):
    """Beside all other options."""


@pytest.fixture
def command() -> click.Command:
    @click.command()
    @parameters(MadeUp)
    def command(**given: Any) -> None:
        print(MadeUp(**given))

    return command


def disk(**options: Any) -> MadeUpDisk:
    return MadeUpDisk(Path("image"), ["io0"], socket_path=Path("socket"), **options)


# One declaration


def test_the_command_line_has_a_declared_option(command: click.Command) -> None:
    run = CliRunner().invoke
    assert run(command, ["--made-up", "4", "--made-of", "a"]).output == f"{MadeUp(made_up=4, made_of=Path('a'))}\n"
    assert run(command, []).output == f"{MadeUp()}\n"
    shown = run(command, ["--help"]).output
    assert "A made-up number. [default: 3; 1<=x<=9]" in " ".join(shown.split())
    assert "--silent" not in shown
    assert run(command, ["--made-up", "10"]).exit_code == 2


def read(folder: Path, more: str) -> DiskConfig:
    path = folder / "disks.toml"
    path.write_text(f'[[disk]]\nimage = "image"\nsocket-path = "socket"\n{more}')
    return read_config(path).disks[0]


def test_the_file_has_a_declared_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DiskConfig", MadeUpDisk)
    found = read(tmp_path, 'made-up = 4\nmade-of = "a"')
    assert isinstance(found, MadeUpDisk)
    assert (found.made_up, found.made_of) == (4, tmp_path / "a")
    for more, words in (
        ("made-up = 10", "[[disk]] 1 (image): made-up: 10 is not a whole number from 1 to 9"),
        ("made-upp = 4", 'unknown key "made-upp"; did you mean "made-up"?'),
        ("silent = true", 'unknown key "silent"'),
        ('made-up = 7\nmade-of = "a"', "[[disk]] 1 (image): made-up is 7, which excludes made-of"),
    ):
        with pytest.raises(ConfigError) as error:
            read(tmp_path, more)
        assert words in str(error.value)


def test_python_has_a_declared_option() -> None:
    assert disk(made_up=4).made_up == 4
    with pytest.raises(WrongOptions, match=r"^made_up: 10 is not a whole number from 1 to 9$"):
        disk(made_up=10)
    with pytest.raises(WrongOptions, match=r"^made_up is 7, which excludes made_of$"):
        disk(made_up=7, made_of=Path("a"))


def test_the_documentation_has_a_declared_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TABLES", {"io-thread": MadeUp, "disk": MadeUpDisk})
    text = tables.renew(DOCUMENTATION.read_text())
    assert text.count("| `made-up` | a made-up number | 3 |\n| `made-of` | a made-up file | |\n") == 2
    assert "silent" not in text


def test_a_hand_over_compares_a_declared_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "DiskOptions", MadeUpDisk)
    changed = options_of(disk(made_up=4))
    assert (changed["made_up"], "made_of" in changed) == (4, False)
    with pytest.raises(HandoverError, match=r"^socket: made-up is 4 in the running process and 3 here; an upgrade "):
        check_options("socket", disk(), changed)
    check_options("socket", disk(made_up=4), changed)


def test_an_older_release_works_like_the_default_of_an_option_that_it_does_not_have() -> None:
    offered = options_of(disk())
    del offered["share_rw"], offered["features"]
    check_options("socket", disk(), offered)
    with pytest.raises(HandoverError, match="share-rw is False in the running process and True here"):
        check_options("socket", disk(share_rw=True), offered)


def test_tables_of_the_documentation_are_current() -> None:
    text = DOCUMENTATION.read_text()
    assert tables.renew(text) == text, "run: python -m ringplane.options.tables docs/config.md"


def test_tables_without_their_place_are_reported() -> None:
    with pytest.raises(SystemExit, match="the table of state needs these two lines around it"):
        tables.renew("")


def test_serve_takes_what_the_command_line_takes() -> None:
    keywords = inspect.signature(ringplane.serve).parameters
    parameters = {parameter.name: parameter for parameter in serve_command.params}
    for name, each in declared(OneDisk).items():
        assert name in keywords
        assert isinstance(parameters[name], click.Option)
        assert parameters[name].help == each.help
    assert [name for name, each in keywords.items() if each.kind is not each.KEYWORD_ONLY] == [
        "image_path",
        "socket_path",
    ]


def test_type_checkers_know_the_keywords(tmp_path: Path) -> None:
    lines = {
        'serve("a", "b", read_only=True, cpus=[{0}], poll_us=None, zoned=None)': "",
        'serve("a", "b", read_only="yes")': 'Argument "read_only" to "serve" has incompatible type "str"',
        'serve("a", "b", reed_only=True)': 'Unexpected keyword argument "reed_only" for "serve"',
        'DiskConfig(Path("a"), ["io0"], create="1M")': 'Argument "create" to "DiskConfig" has incompatible type "str"',
        'DiskConfig(Path("a"), ["io0"]).lock.upper()': "",
    }
    program = tmp_path / "program.py"
    program.write_text("\n".join(["from pathlib import Path; from ringplane import DiskConfig, serve", *lines]))
    command = [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml"), str(program)]
    # In this folder it has the cache of the run that checks all sources.
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    for number, words in enumerate(lines.values(), 2):
        errors = [line for line in found.splitlines() if f"program.py:{number}: error: " in line]
        assert len(errors) == (words != ""), found
        assert all(words in line for line in errors)


def test_options_need_no_numpy() -> None:
    """Nor does reading a configuration file."""
    program = (
        "import sys, ringplane.cli.serve, ringplane.control.config, ringplane.options.tables; "
        "sys.exit(', '.join({'numpy', 'numba', 'rich'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


# Rules: the same sentence everywhere


@pytest.mark.parametrize(
    ("given", "arguments", "file", "sentence"),
    [
        (
            {"zoned": ZONES, "share_rw": True},
            ["--zoned", "1M", "--share-rw"],
            'zoned = "1M"\nshare-rw = true',
            "{zoned} and {share-rw} exclude each other: each process has write pointers of its own",
        ),
        (
            {"block_size": 4096, "physical_block_size": 512},
            ["--block-size", "4096", "--physical-block-size", "512"],
            "block-size = 4096\nphysical-block-size = 512",
            "{physical-block-size}: a physical block size of 512: it must not be less than the block size, 4096",
        ),
        (
            {"physical_block_size": 1000},
            ["--physical-block-size", "1000"],
            "physical-block-size = 1000",
            "{physical-block-size}: a physical block size of 1000: it must be a power of two from 512 to 65536",
        ),
    ],
    ids=["zoned and shared", "small physical block", "odd physical block"],
)
def test_rules(tmp_path: Path, given: dict[str, Any], arguments: Sequence[str], file: str, sentence: str) -> None:
    assert refused(*arguments) == sentence.replace("{", "--").replace("}", "")
    plain = sentence.replace("{", "").replace("}", "")
    with pytest.raises(ConfigError) as wrong_file:
        read(tmp_path, file)
    assert str(wrong_file.value) == f"{tmp_path / 'disks.toml'}: [[disk]] 1 (image): {plain}"
    with pytest.raises(WrongOptions) as wrong:
        ringplane.serve("image", "socket", **given)
    assert str(wrong.value).replace("_", "-") == plain


def refused(*arguments: str, where: Sequence[str] = ("--socket-path", "socket")) -> str:
    done = CliRunner().invoke(serve_command, ["--blk-file", "image", *where, *arguments])
    assert done.exit_code == 2
    return done.output.splitlines()[-1].removeprefix("Error: ")


@pytest.mark.parametrize(
    ("given", "arguments", "sentence"),
    [
        ({}, [], "give either {socket_path} or {fd}"),
        (
            {"fd": 77, "socket_group": 0},
            ["--fd", "77", "--socket-group", "0"],
            "{socket_mode} and {socket_group} are for the socket of {socket_path}, not for {fd}",
        ),
        (
            {"fd": 77, "upgrade": True},
            ["--fd", "77", "--upgrade"],
            "{upgrade} needs {socket_path}, by which the running process is found",
        ),
    ],
    ids=["no socket", "mode of an inherited one", "upgrade"],
)
def test_rules_of_sockets(given: dict[str, Any], arguments: Sequence[str], sentence: str) -> None:
    with pytest.raises(WrongOptions) as wrong:
        ringplane.serve("image", **given)
    assert str(wrong.value) == sentence.replace("{", "").replace("}", "")
    if "fd" not in given:
        assert refused(*arguments, where=()) == wrong.value.spelled(lambda name: f"--{name.replace('_', '-')}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_queues": 0}, "num_queues: 0 is not a whole number from 1 to 64"),
        ({"num_queues": True}, "num_queues: true is not a whole number from 1 to 64"),
        ({"lock": "perhaps"}, 'lock: "perhaps" is not one of "auto", "on", "off"'),
        ({"engine": "steam"}, 'engine: "steam" is not one of "auto", "io_uring", "aio", "memory", "null"'),
        ({"block_size": 1024}, "block_size: 1024 is not one of 512, 4096"),
        ({"create": 0}, "create: 0 is not a positive size"),
        ({"serial": "x" * 21}, "serial: 'xxxxxxxxxxxxxxxxxxxxx' has 21 bytes; a serial number has at most 20"),
        ({"features": {"pack": True}}, "features: 'pack' is not a feature that can be switched; did you mean packed?"),
        ({"poll_us": -1}, "poll_us: '-1' is neither a number of microseconds from 0 to 1000000 nor always"),
        (
            {"io_threads": 2, "cpus": [{CPU}] * 3},
            "cpus is given 3 times; give it once, or once for each of 2 I/O threads",
        ),
        ({"cpus": [set()]}, "cpus: no CPU is named; this process may use "),
        ({"read_only": "false"}, 'read_only: "false" is neither true nor false'),
        ({"zoned": "64M"}, "zoned: '64M' is not a ZoneModel"),
        ({"zoned": ZoneModel(100000, 4096)}, "zoned: a zone size of 100000 bytes is not a power of two from 64K to 1T"),
        ({"zoned": ZoneModel(MIB, 2 * MIB)}, "zoned: a zone capacity of 2097152 bytes is not a multiple of 4096 up to"),
        ({"zoned": ZoneModel(MIB, 0)}, "zoned: a zone capacity of 0 bytes is not a multiple of 4096 up to"),
        ({"zoned": ZoneModel(MIB, MIB, -1)}, "zoned: conventional, max-open and max-active cannot be negative"),
        ({"delay": 5}, "delay: 5 is not a Delay"),
        ({"delay": Delay(write=-1)}, "delay: '-1' is not a number of milliseconds from 0 to 3600000"),
        ({"delay": Delay(flush=math.nan)}, "delay: 'nan' is not a number of milliseconds from 0 to 3600000"),
        ({"socket_mode": 0o1777}, "socket_mode: 0o1777 is not a file mode, which is a number from 0 to 0o777"),
        ({"socket_mode": "0660"}, 'socket_mode: "0660" is not a file mode, which is a number from 0 to 0o777'),
        ({"socket_group": -1}, "socket_group: -1 is not the number of a group"),
        ({"serial": 5}, "serial: 5 is not a text"),
        ({"features": ["packed"]}, 'features: ["packed"] is not a table of features; example: { packed = false }'),
        ({"cpus": {CPU}}, f'cpus: "{{{CPU}}}" is not a list of sets of CPUs; an example: [{{2, 3}}]'),
        ({"cpus": [CPU]}, f"cpus: {CPU} is not a set of CPUs; an example: {{2, 3}}"),
        ({"poll_us": "5"}, 'poll_us: "5" is neither a number of microseconds nor None'),
        ({"fd": "5"}, 'fd: "5" is not the number of a file descriptor'),
        ({"zoned": ZoneModel("64M", MIB)}, "zoned: ZoneModel(size='64M', capacity=1048576, "),
        ({"delay": Delay(read="5")}, "delay: '5' is not a number of milliseconds"),
    ],
)
def test_wrong_values_from_python(given: dict[str, Any], words: str) -> None:
    with pytest.raises(WrongOptions) as wrong:
        ringplane.serve("image", "socket", **given)
    assert str(wrong.value).startswith(words)


@pytest.mark.parametrize("name", declared(OneDisk))
@pytest.mark.parametrize("value", [object(), None, True, 5, 0.5, "x", b"x", [object()], {5: 5}, {"x": object()}, set()])
def test_no_type_of_a_value_from_python_ends_in_another_exception(name: str, value: object) -> None:
    options: dict[str, Any] = {"image_path": "image", "socket_path": "socket", name: value}
    with contextlib.suppress(WrongOptions):
        OneDisk(**options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, "socket"), "image_path: 5 is neither a path nor the address of an image"),
        (("image", b"socket"), "socket_path: \"b'socket'\" is not a path"),
        ((None, "socket"), "image_path: null is neither a path nor the address of an image"),
    ],
)
def test_wrong_paths_from_python(arguments: Sequence[Any], words: str) -> None:
    with pytest.raises(WrongOptions) as wrong:
        ringplane.serve(*arguments)
    assert str(wrong.value) == words


def test_names_of_threads_are_a_list() -> None:
    with pytest.raises(WrongOptions, match=r'^io_threads: "io0" is not a list of names$'):
        DiskConfig(Path("image"), "io0", socket_path=Path("socket"))


def test_braces_in_a_value_are_not_options() -> None:
    assert WrongOptions("{name}: {error}", error=ValueError("{x} {name}")).spelled(str.upper) == "NAME: {x} {name}"
    assert NAME.from_toml("{x}") == "{x}"
