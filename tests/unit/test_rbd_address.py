"""Addresses of RBD images: QEMU's form with its escapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.control.config import ConfigError, read_config
from ringplane.options.rbd_address import RbdImage, parse

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
    "rbd:rbd/vm1:id": '"id" is not KEY=VALUE',
    "rbd:rbd/vm1:id=": '"id=" is not KEY=VALUE',
    "rbd:rbd/vm1:=x": '"=x" is not KEY=VALUE',
    "rbd:rbd/vm1:": '"" is not KEY=VALUE',
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
OURS = {"id", "conf", "keyfile", "encrypt-format", "encrypt-key-file"}
SETTINGS = st.dictionaries(NAMES.filter(lambda key: key not in OURS), NAMES, max_size=3)

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
    assert parse(str(address)) == address


@given(st.text("\\:/@=ab", max_size=20))
def test_any_text_is_an_address_or_wrong(text: str) -> None:
    try:
        address = parse(f"rbd:{text}")
    except ValueError:
        return
    assert parse(str(address)) == address


def test_what_others_see_of_it() -> None:
    address = parse("rbd:rbd/tenant/vm1@before:id=libvirt:key=SECRET")
    assert address.title == "rbd:rbd/tenant/vm1@before"
    assert address.stem == "vm1-before"
    assert address.identity == parse("rbd:rbd/tenant/vm1@before:rados_osd_op_timeout=3").identity
    assert address.identity != parse("rbd:rbd/tenant/vm1").identity


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
    assert str(disk.image) == f"{expected}:encrypt-key-file={tmp_path}/p{settings}"
    assert disk.image == parse(str(disk.image))


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
