"""Addresses of RBD images: QEMU's form with its escapes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import ringplane
from ringplane.block.sources.rbd_cluster import Access
from ringplane.cli.ctl import ctl
from ringplane.cli.ctl.disk_adding import read_disks
from ringplane.cli.serve import serve
from ringplane.control.config import ConfigError, read_config, read_disk
from ringplane.control.written_config import written_disk
from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.process_rules import check_process
from ringplane.options.rbd_address import RbdImage, parse
from ringplane.options.thread_options import IoThread
from ringplane.options.toml_text import keys

GOOD = {
    "rbd:rbd/vm1": RbdImage(pool="rbd", image="vm1"),
    "rbd:rbd/tenant/vm1": RbdImage(pool="rbd", namespace="tenant", image="vm1"),
    "rbd:rbd/vm1@before": RbdImage(pool="rbd", image="vm1", snapshot="before"),
    "rbd:a/b/c@d/e": RbdImage(pool="a", namespace="b", image="c", snapshot="d/e"),
    "rbd:p@q/vm1": RbdImage(pool="p@q", image="vm1"),
    "rbd:rbd/vm1:id=libvirt:conf=/etc/ceph/other.conf": RbdImage(
        pool="rbd", image="vm1", user="libvirt", conf=Path("/etc/ceph/other.conf")
    ),
    r"rbd:rbd/vm1:mon_host=10.0.0.1\:3300,10.0.0.2:rados_osd_op_timeout=30": RbdImage(
        pool="rbd",
        image="vm1",
        settings=(("mon_host", "10.0.0.1:3300,10.0.0.2"), ("rados_osd_op_timeout", "30")),
    ),
    r"rbd:po\/ol/im\@age\\:key=abc==": RbdImage(pool="po/ol", image="im@age\\", settings=(("key", "abc=="),)),
    "rbd:rbd/vm1:keyfile=/k:encrypt-format=luks2:encrypt-key-file=/p": RbdImage(
        pool="rbd", image="vm1", key_file=Path("/k"), encrypt_format="luks2", encrypt_key_file=Path("/p")
    ),
}

WRONG = {
    "rbd:": "pool is missing",
    "rbd:vm1": "image is missing",
    "rbd:/vm1": "pool is missing",
    "rbd:rbd/": "image is missing",
    "rbd:rbd//vm1": "namespace is missing",
    "rbd:rbd/vm1@": "snapshot is missing",
    "rbd:rbd/vm1:id": "rbd:rbd/vm1: option 1 is not KEY=VALUE",
    "rbd:rbd/vm1:id=": "option 1 is not KEY=VALUE",
    "rbd:rbd/vm1:id=a:=x": "option 2 is not KEY=VALUE",
    "rbd:rbd/vm1:": "option 1 is not KEY=VALUE",
    "rbd:rbd/vm1:AQC=x": "option 1 is not KEY=VALUE with an option of Ceph's",
    "rbd:rbd/vm1:id=a:id=b": "id is given twice",
    "rbd:rbd/vm1:debug_rbd=1:debug_rbd=2": "debug_rbd is given twice",
    "rbd:rbd/vm1\\": "ends with a backslash",
    "rbd:rbd/vm1\n": "cannot be printed",
    "rbd:rbd/vm1:encrypt-format=luks:encrypt-key-file=/p": 'unknown; did you mean "luks',
    "rbd:rbd/vm1:encrypt-format=luks2": "need each other",
    "rbd:rbd/vm1:encrypt-key-file=/p": "need each other",
}


@pytest.mark.parametrize("text", GOOD)
def test_an_address(text: str) -> None:
    assert parse(text) == GOOD[text]


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_address_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as wrong:
        parse(text)
    assert WRONG[text] in str(wrong.value)


WORDS = st.text(min_size=1, max_size=12).filter(str.isprintable)
SPECIAL = st.text("\\:/@=ab", min_size=1, max_size=8)
NAMES = WORDS | SPECIAL
EMPTY = st.just("")
PATHS = NAMES.map(Path)
ENCRYPTION = st.just(("", None)) | st.tuples(st.sampled_from(["luks1", "luks2"]), PATHS)
OURS = {"id", "conf", "keyfile"}
OPTIONS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda key: key not in OURS)
SETTINGS = st.dictionaries(OPTIONS, NAMES, max_size=3)

ADDRESSES = st.builds(
    lambda encryption, settings, **fields: RbdImage(
        encrypt_format=encryption[0], encrypt_key_file=encryption[1], settings=tuple(settings.items()), **fields
    ),
    encryption=ENCRYPTION,
    settings=SETTINGS,
    pool=NAMES,
    image=NAMES,
    namespace=EMPTY | NAMES,
    snapshot=EMPTY | NAMES,
    user=EMPTY | NAMES,
    conf=st.none() | PATHS,
    key_file=st.none() | PATHS,
)


@given(ADDRESSES)
def test_each_address_is_read_as_it_is_written(address: RbdImage) -> None:
    assert parse(address.address) == address


@given(st.text("\\:/@=ab", max_size=20))
def test_any_text_is_an_address_or_wrong(text: str) -> None:
    try:
        address = parse(f"rbd:{text}")
    except ValueError:
        return
    assert parse(address.address) == address


def test_what_others_see_of_it() -> None:
    address = parse("rbd:rbd/tenant/vm1@before:id=libvirt:key=SECRET")
    assert address.title == "rbd:rbd/tenant/vm1@before"
    assert address.stem == "vm1-before"
    assert address.identity == parse("rbd:rbd/tenant/vm1@before:rados_osd_op_timeout=3").identity
    assert address.identity != parse("rbd:rbd/tenant/vm1").identity


# What an address with a key can have beside it that is wrong.
WRONG_ADDRESSES = (
    "rbd:rbd:key=AQCsecret==",
    "rbd:rbd/vm1:key=AQCsecret==:id",
    "rbd:rbd/vm1:key=AQCsecret==:key=AQCsecret==",
    "rbd:rbd/vm1:key=AQCsecret==:encrypt-format=luks2",
    "rbd:rbd/vm1:key=AQCsecret==:encrypt-format=luks3:encrypt-key-file=/p",
    "rbd:rbd/vm1:key=AQCsecret==\\",
    "rbd:rbd/vm1:key=AQCsecret==\t",
    "rbd:rbd/vm1:AQCsecret==",
    "rbd:rbd/vm1:AQCsecret",
)


@pytest.mark.parametrize("address", WRONG_ADDRESSES)
def test_what_is_wrong_is_said_without_the_key(address: str, tmp_path: Path) -> None:
    text = json.dumps(address)
    (tmp_path / "disks.toml").write_text(f'[[disk]]\nsocket-path = "vm1.sock"\nimage = {text}\n')
    with pytest.raises(ConfigError, match=r"\[\[disk\]\] 1 \(rbd:rbd") as in_file:
        read_config(tmp_path / "disks.toml")
    with pytest.raises(ConfigError) as added:
        read_disk({"image": address, "socket-path": "/vm1.sock"}, ["io0"])
    with pytest.raises(ValueError, match=r"image_path|image: ") as given:
        ringplane.serve(address, tmp_path / "vm1.sock")
    messages = [*in_file.value.problems, *added.value.problems, str(given.value)]
    for command in (serve, ctl):
        words = ["add", "--api-socket", "api"] if command is ctl else []
        done = CliRunner().invoke(command, [*words, "--image", address, "--socket-path", "s"])
        assert done.exit_code == 2
        messages.append(done.output)
    assert not [line for line in messages if "secret" in line]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('{ AQCsecret = "x" }', "options: a name in it is not one of Ceph's options"),
        ('{ key = "AQCsecret\\t" }', "options: the value of key is not a printable text"),
        ('"AQCsecret"', "is not a table of Ceph's options"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_without_the_key(options: str, words: str, tmp_path: Path) -> None:
    table = f'[disk.rbd]\npool = "rbd"\nimage = "vm1"\noptions = {options}\n'
    (tmp_path / "disks.toml").write_text(f'[[disk]]\nsocket-path = "vm1.sock"\n{table}')
    with pytest.raises(ConfigError, match=words) as wrong:
        read_config(tmp_path / "disks.toml")
    assert "secret" not in str(wrong.value)


def test_who_sees_the_key() -> None:
    """Only those who connect with it, and the state."""
    address = parse("rbd:rbd/vm1:id=a:key=AQCsecret==:debug_rbd=1")
    assert "secret" not in f"{address} {address!r} {Access.of(address, cache=False)!r}"
    assert address.without_secrets == parse("rbd:rbd/vm1:id=a:debug_rbd=1")
    config = DiskConfig(address, ["io0"], socket_path=Path("/vm1.sock"))
    assert keys(config)["image"] == address.address == "rbd:rbd/vm1:id=a:key=AQCsecret==:debug_rbd=1"
    with pytest.raises(WrongOptions, match=r"^rbd:rbd/vm1: .* is also the socket of rbd:rbd/vm1; ") as wrong:
        check_process([config, config], [IoThread("io0")])
    assert "secret" not in str(wrong.value)
    text = written_disk(config)
    assert tomllib.loads(text)["disk"] == [{**keys(config), "image": "rbd:rbd/vm1:id=a:debug_rbd=1"}]
    assert text.startswith("# The key of the next disk is secret")


HIDING = """
import sys, pathlib
from ringplane.cli.types import IMAGE_TYPE
IMAGE_TYPE.convert(sys.argv[1].removeprefix("--image="), None, None)
print(pathlib.Path("/proc/self/cmdline").read_bytes().split(b"\\0")[3].decode())
"""


@pytest.mark.parametrize("option", ["", "--image="])
def test_other_users_do_not_see_the_key(option: str) -> None:
    command = [sys.executable, "-c", HIDING, f"{option}rbd:rbd/vm1:key=AQCsecret==:id=a"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{option}rbd:rbd/vm1{'x' * len(':key=AQCsecret==:id=a')}\n"


def test_relative_paths() -> None:
    address = parse("rbd:rbd/vm1:conf=ceph.conf:keyfile=/k:encrypt-format=luks1:encrypt-key-file=p")
    changed = address.with_paths(lambda path: Path("/etc") / path)
    expected = {"conf": "/etc/ceph.conf", "key_file": "/k", "encrypt_key_file": "/etc/p"}
    assert {name: str(getattr(changed, name)) for name in expected} == expected
    assert dataclasses.replace(changed, conf=None) == dataclasses.replace(
        address, conf=None, encrypt_key_file=Path("/etc/p")
    )


TABLE = """
[[disk]]
socket-path = "vm1.sock"
[disk.rbd]
pool = "rbd"
namespace = "tenant"
image = "vm1"
conf = "ceph.conf"
user = "libvirt"
key-file = "/k"
server = [{ host = "10.0.0.1", port = "3300" }, "10.0.0.2"]
encrypt-format = "luks2"
encrypt-key-file = "p"
options = { rados_osd_op_timeout = "30" }
"""


def test_a_table_of_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "disks.toml").write_text(TABLE)
    (disk,) = read_config(tmp_path / "disks.toml").disks
    settings = ":mon_host=10.0.0.1\\:3300,10.0.0.2:rados_osd_op_timeout=30"
    expected = f"rbd:rbd/tenant/vm1:id=libvirt:conf={tmp_path}/ceph.conf:keyfile=/k:encrypt-format=luks2"
    assert isinstance(disk.image, RbdImage)
    assert disk.image.address == f"{expected}:encrypt-key-file={tmp_path}/p{settings}"
    assert disk.image == parse(disk.image.address)
    # `ringplane ctl add --file` sends the same image.
    [added] = read_disks(tmp_path / "disks.toml")
    assert (added["image"], "rbd" in added) == (disk.image.address, False)


WRONG_TABLES = {
    'rbd = { image = "vm1" }': "rbd: pool is missing",
    'rbd = { pool = "rbd" }': "rbd: image is missing",
    'rbd = "rbd/vm1"': "is not a table; write it as [disk.rbd]",
    'rbd = { pool = "rbd", image = "vm1", snap = "s" }': 'unknown key "snap"; did you mean "snapshot"?',
    'rbd = { pool = 1, image = "vm1" }': "pool: 1 is not a printable text",
    'rbd = { pool = "rbd", image = "vm1", server = "10.0.0.1" }': "is not a list of monitors",
    'rbd = { pool = "rbd", image = "vm1", options = 1 }': "is not a table of Ceph's options",
    'rbd = { pool = "rbd", image = "vm1", encrypt-format = "luks2" }': "need each other",
    'image = "x"\nrbd = { pool = "rbd", image = "vm1" }': "image and [disk.rbd] are both the image",
}


@pytest.mark.parametrize("keys", WRONG_TABLES)
def test_a_wrong_table_is_one_line(keys: str, tmp_path: Path) -> None:
    (tmp_path / "disks.toml").write_text(f'[[disk]]\nsocket-path = "vm1.sock"\n{keys}\n')
    with pytest.raises(ConfigError) as wrong:
        read_config(tmp_path / "disks.toml")
    (line,) = str(wrong.value).splitlines()
    assert WRONG_TABLES[keys] in line
