"""Addresses of images that are not files here, with a made-up scheme; the sources that have one test theirs."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.sources import choose_source, null
from ringplane.block.sources.null import NullPart
from ringplane.block.sources.source import Source
from ringplane.cli.ctl.disk_adding import described, read_disks
from ringplane.cli.parameters import the_image
from ringplane.cli.serve import serve as serve_command
from ringplane.cli.types import IMAGE_TYPE
from ringplane.control.config import ConfigError, read_config
from ringplane.driver import Driver
from ringplane.opener.opener import LocalOpener
from ringplane.options import image_address
from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import DiskConfig, named
from ringplane.options.image_address import RemoteImage, parse_image
from ringplane.options.process_rules import check_process
from ringplane.options.thread_options import IoThread
from ringplane.options.toml_text import keys

from .rig import PATIENCE

SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Made(RemoteImage):
    """`made:FOLDER:NAME`; the folder can be empty."""

    folder: Path | None
    name: str

    source = "made"

    @property
    def address(self) -> str:
        return f"made:{self.folder or ''}:{self.name}"

    @property
    def stem(self) -> str:
        return self.name

    @property
    def server(self) -> str:
        return "made"

    @property
    def of_server(self) -> str:
        return "made::"

    @property
    def identity(self) -> object:
        return "made", self.name

    def with_paths(self, change: Any) -> Made:
        return Made(change(self.folder), self.name) if self.folder else self


def parse_made(text: str) -> Made:
    _, folder, name = text.split(":")
    if not name:
        raise ValueError(f"{text}: has no name")
    return Made(Path(folder) if folder else None, name)


class MadeSource(Source):
    units = (null.submit,)
    size, read_only, serial, flush_failed = SIZE, False, "made-1", False

    def __init__(self, config: DiskConfig) -> None:
        self.title = str(config.image)

    def part(self, slots: int) -> NullPart:
        return NullPart()

    def how(self, engines: str) -> str:
        return "made up"

    def hand_over(self) -> dict[str, Any]:
        return {"made": self.title}


@pytest.fixture(autouse=True)
def scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two lines in registries do for a real one."""
    options, source = ModuleType("ringplane.options.made_up"), ModuleType("made_up_source")
    options.parse = parse_made  # type: ignore[attr-defined]
    source.__dict__.update(
        open_source=lambda config, signals, opener: MadeSource(config),
        take_over_source=lambda config, offer, opener: MadeSource(config),
        is_reached=lambda config, opener: False,
        is_offered=lambda config, offer: offer.get("made") == str(config.image),
        rehearse_source=lambda config: MadeSource(config),
    )
    monkeypatch.setitem(sys.modules, options.__name__, options)
    monkeypatch.setitem(sys.modules, source.__name__, source)
    monkeypatch.setitem(image_address.SCHEMES, "made", "made_up")
    monkeypatch.setitem(choose_source.REMOTE, "made", source.__name__)


def disk(image: Any, **more: Any) -> DiskConfig:
    return DiskConfig(image, ["io0"], socket_path=Path("/nowhere/socket"), **more)


@pytest.mark.parametrize("text", ["./made:x:y", "/made:x", "other:x", "x", "made", "MADE::x", "10:20"])
def test_paths_stay_paths(text: str) -> None:
    assert parse_image(text) == Path(text)


def test_an_address() -> None:
    assert parse_image("made::x") == Made(None, "x")
    assert disk(parse_image("made::x")).image == Made(None, "x")
    with pytest.raises(ValueError, match=r"^made::: has no name$"):
        parse_image("made::")


def test_its_disk_has_a_name_and_is_served_once() -> None:
    first, again, other = disk(Made(None, "x")), disk(Made(Path("/y"), "x")), disk(Made(None, "z"))
    assert [each.name for each in named([first, again, other])] == ["x", "x-2", "z"]
    with pytest.raises(WrongOptions, match="made:/y:x: image: is also the image of made::x"):
        check_process([first, DiskConfig(again.image, ["io0"], socket_path=Path("/nowhere/2"))], [IoThread("io0")])


def test_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[[disk]]\nimage = "made:folder:x"\nsocket-path = "socket"\n')
    [found] = read_config(path).disks
    assert found.image == Made(tmp_path / "folder", "x")
    assert keys(found)["image"] == f"made:{tmp_path}/folder:x"
    [table] = read_disks(path)
    assert (table["image"], table["socket-path"]) == (f"made:{tmp_path}/folder:x", str(tmp_path / "socket"))
    path.write_text('[[disk]]\nimage = "made::"\nsocket-path = "socket"\n')
    with pytest.raises(ConfigError, match=r"\[\[disk\]\] 1 \(made::\): image: made::: has no name"):
        read_config(path)


def test_the_command_line() -> None:
    done = CliRunner().invoke(serve_command, ["--image", "made::", "--socket-path", "socket"], obj=None)
    assert (done.exit_code, done.output.splitlines()[-1]) == (
        2,
        "Error: Invalid value for '--image': made::: has no name",
    )
    done = CliRunner().invoke(serve_command, ["--image", "made::x", "--blk-file", "x", "--socket-path", "socket"])
    assert done.exit_code == 2
    assert "--blk-file and --image are both the image of the disk; give one of them" in done.output
    assert the_image(Path("made::x"), None) == Path("made::x")
    assert the_image(None, Made(None, "x")) == Made(None, "x")
    with pytest.raises(click.UsageError):
        the_image(Path("x"), Path("x"))


def test_what_the_shell_completes() -> None:
    """Paths, and how addresses begin."""
    found = {
        text: [item.value for item in IMAGE_TYPE.shell_complete(None, None, text)] for text in ("", "n", "rbd:", "/a")
    }  # type: ignore[arg-type]
    assert found == {
        "": ["nbd://", "nbd+unix:///", "rbd:", ""],
        "n": ["nbd://", "nbd+unix:///"],
        "rbd:": ["rbd:"],
        "/a": ["/a"],
    }


def test_what_ctl_sends() -> None:
    assert described(Made(Path("folder"), "x"), Path("/socket"), ())["image"] == f"made:{Path.cwd()}/folder:x"


def test_it_is_served_and_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with ringplane.serve("made::x", path, num_queues=1, upgradable=True) as export:
        assert (export.disk.how, export.disk.name, export.disk.source.title) == ("made up", "x", "made::x")
        with Driver(path, timeout=PATIENCE) as driver:
            assert driver.request(0, 0, read=512).status == 0
            with ringplane.serve("made::x", path, num_queues=1, upgrade=True):
                assert export.wait(PATIENCE)
                assert driver.request(0, 0, read=512).status == 0


def test_a_file_instead_of_it_and_it_instead_of_a_file(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    here, elsewhere = disk(image), disk(Made(None, "x"))
    with contextlib.closing(choose_source.open_source(here)) as source:
        assert not choose_source.is_offered(elsewhere, source.hand_over())
    assert not choose_source.is_offered(here, choose_source.open_source(elsewhere).hand_over())


def test_what_a_confined_process_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what helps: naming its server does not if a buffered disk needs a connection of its own."""
    monkeypatch.setattr(choose_source, "is_confined", lambda: True)
    name_it = "start ringplane with --allow-server made::, or with this disk"
    leave_out = "leave out buffered (direct = false), or start ringplane with this disk"
    for alone, direct, right in ((False, False, name_it), (True, True, name_it), (True, False, leave_out)):
        monkeypatch.setattr(Made, "buffered_alone", alone)
        with pytest.raises(choose_source.NotReached) as caught:
            choose_source.open_source(disk(Made(None, "x"), direct=direct))
        assert caught.value.right == right


def test_a_path_given_by_a_program() -> None:
    assert image_address.image_from(Path("made::x")) == Path("made::x")
    assert image_address.image_from("made::x") == Made(None, "x")
    with pytest.raises(ValueError, match="image_path: 5 is neither a path nor the address of an image"):
        ringplane.serve(5, "socket")  # type: ignore[arg-type]


def test_a_confined_process_does_not_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_source, "is_confined", lambda: True)
    words = "made::x: this process may not connect to its server any more; start ringplane with --allow-server made::, "
    for _ in range(2):
        with pytest.raises(ImageError, match=words):
            choose_source.open_source(disk(Made(None, "x")))
        # Nor can it import what would connect.
        monkeypatch.delitem(sys.modules, "made_up_source", raising=False)


class Naming(LocalOpener):
    """All servers were named at the start."""

    def reaches(self, server: object) -> bool:
        return True


def test_a_server_that_was_not_reached_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_source, "is_confined", lambda: True)
    with pytest.raises(ImageError, match="could not be reached at the start; restart ringplane when it answers"):
        choose_source.open_source(disk(Made(None, "x")), opener=Naming())
