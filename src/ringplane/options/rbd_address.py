"""Addresses of RADOS block device (RBD) images, in QEMU's form:

    rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:id=USER][:conf=PATH][:KEY=VALUE...]

A backslash takes the special meaning from `:`, `/`, `@`, `=` or a backslash that follows it. KEY is an option of Ceph's
configuration. `keyfile` is one; `encrypt-format` and `encrypt-key-file` are ours, because QEMU's form has none.

One of Ceph's options is a secret: the `key` of the user. So no message contains more of an address than the image, and
what is wrong with an option is said without its value.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringplane.options.image_address import RemoteImage, TableKey
from ringplane.options.kinds import shown, suggestion, text_from_toml

FORM = "rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:id=USER][:conf=PATH][:KEY=VALUE...]"
ENCRYPTIONS = ("luks1", "luks2")

SPECIAL, IN_VALUE = re.compile(r"[\\:/@=]"), re.compile(r"[\\:]")
ESCAPED = re.compile(r"\\(.)", re.DOTALL)

# The names of Ceph's options; and what is never shown. A name that is none may be a key.
OPTION = re.compile(r"[a-z][a-z0-9_]*")
SECRETS = ("key",)

# The fields with keys of their own, and the key of each in an address.
KEYS = {"user": "id", "conf": "conf", "key_file": "keyfile"}
ENCRYPTION_KEYS = {"encrypt_format": "encrypt-format", "encrypt_key_file": "encrypt-key-file"}
PATHS = ("conf", "key_file", "encrypt_key_file")

# In a configuration file, with the names of QEMU's `blockdev-add`.
TABLE_KEYS = {
    "pool": TableKey("string", "the pool", required=True),
    "namespace": TableKey("string", "the namespace in it"),
    "image": TableKey("string", "the image", required=True),
    "snapshot": TableKey("string", "the image as it was then, read-only"),
    "conf": TableKey("string", "Ceph's configuration; without it the usual places"),
    "user": TableKey("string", "Ceph's user, without `client.`"),
    "server": TableKey("array", 'the monitors, each as `"HOST:PORT"` or `{"host": "HOST", "port": "PORT"}`'),
    "key-file": TableKey("string", "a file with the key of the user"),
    "encrypt-format": TableKey("string", "`luks1` or `luks2`, if librbd decrypts the image"),
    "encrypt-key-file": TableKey("string", "a file with the passphrase"),
    "options": TableKey("object", "options of Ceph's configuration, by their names"),
}


@dataclass(frozen=True, kw_only=True)
class RbdImage(RemoteImage):
    """An image, or a snapshot of one. Empty or None: not given."""

    source = "rbd"
    buffered_alone = True

    pool: str
    image: str
    namespace: str = ""
    snapshot: str = ""
    user: str = ""
    conf: Path | None = None
    key_file: Path | None = None
    # `luks1` or `luks2`; then the file with the passphrase is given too.
    encrypt_format: str = ""
    encrypt_key_file: Path | None = None
    # Options of Ceph's configuration.
    settings: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def title(self) -> str:
        """The image, without how to reach it."""
        path = "/".join(map(_escaped, filter(None, (self.pool, self.namespace, self.image))))
        return f"rbd:{path}" + (f"@{_escaped(self.snapshot)}" if self.snapshot else "")

    @property
    def stem(self) -> str:
        return f"{self.image}-{self.snapshot}" if self.snapshot else self.image

    @property
    def identity(self) -> Hashable:
        return "rbd", self.conf, self.pool, self.namespace, self.image, self.snapshot

    def with_paths(self, change: Callable[[Path], Path]) -> RbdImage:
        paths: dict[str, Any] = {name: change(path) for name in PATHS if (path := getattr(self, name)) is not None}
        return dataclasses.replace(self, **paths)

    @property
    def server(self) -> Hashable:
        return self.source, _absolute(self.conf), self.user, _absolute(self.key_file), self.settings

    @property
    def of_server(self) -> str:
        key_file = self.key_file or (Path("PATH") if self.without_secrets != self else None)
        return RbdImage(
            pool="", image="", user=self.user, conf=self.conf, key_file=key_file, settings=self.without_secrets.settings
        ).address

    @property
    def without_secrets(self) -> RbdImage:
        return dataclasses.replace(self, settings=tuple(pair for pair in self.settings if pair[0] not in SECRETS))

    @property
    def address(self) -> str:
        return "".join((self.title, *(f":{_escaped(key)}={_escaped(value, IN_VALUE)}" for key, value in self._pairs())))

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for name, key in (KEYS | ENCRYPTION_KEYS).items():
            if value := getattr(self, name):
                yield key, str(value)
        yield from self.settings


def parse(text: str) -> RbdImage:
    """Raises ValueError unless it is such an address."""
    known = shown_part(text)
    if not text.isprintable():
        raise ValueError(f"{shown(known)} has characters that cannot be printed; the form is {FORM}")
    if re.search(r"(?<!\\)(?:\\\\)*\\$", text):
        raise ValueError(f"{known}: ends with a backslash, which nothing follows; a backslash itself is written \\\\")
    place, *pairs = _split(text.partition(":")[2], ":")
    return RbdImage(**_names(known, place), **_options(known, pairs))


def parse_server(text: str) -> RbdImage:
    """`rbd:[:id=USER][:conf=PATH][:KEY=VALUE...]`: a cluster with a user. Raises ValueError."""
    place, *pairs = _split(text.partition(":")[2], ":")
    if place:
        raise ValueError(f"{shown_part(text)}: names an image; the form of a cluster is rbd::id=USER:conf=PATH")
    known = shown_part(text)
    server = RbdImage(pool="", image="", **_options(known, pairs))
    if server.without_secrets != server or server.encrypt_format:
        raise ValueError(
            f"{known}: neither a key nor an encryption can be given here; a file has the key: keyfile=PATH"
        )
    return server


def shown_part(text: str) -> str:
    """Of an address, which may be wrong, what messages may contain: the image, without the options."""
    scheme, colon, rest = text.partition(":")
    return f"{scheme}{colon}{_split(rest, ':', 1)[0]}"


def _names(text: str, place: str) -> dict[str, Any]:
    """The fields of POOL[/NAMESPACE]/IMAGE[@SNAPSHOT]."""
    pool, *rest = _split(place, "/", 1)
    path, *snapshot = _split(rest[0] if rest else "", "@", 1)
    *namespace, image = _split(path, "/", 1)
    found = {"pool": pool, "image": image}
    found |= {"namespace": namespace[0]} if namespace else {}
    found |= {"snapshot": snapshot[0]} if snapshot else {}
    for name, value in found.items():
        if not value:
            raise ValueError(f"{text}: {name} is missing; the form is {FORM}")
    return {name: _plain(value) for name, value in found.items()}


def _options(text: str, pairs: list[str]) -> dict[str, Any]:
    """The fields of the rest."""
    fields = {key: name for name, key in (KEYS | ENCRYPTION_KEYS).items()}
    found: dict[str, Any] = {}
    settings: dict[str, str] = {}
    for number, pair in enumerate(pairs, 1):
        key, *value = (_plain(part) for part in _split(pair, "=", 1))
        if not (key in fields or OPTION.fullmatch(key)) or not value or not value[0]:
            raise ValueError(f"{text}: option {number} is not KEY=VALUE with an option of Ceph's; the form is {FORM}")
        if key in settings or fields.get(key) in found:
            raise ValueError(f"{text}: {key} is given twice")
        if key not in fields:
            settings[key] = value[0]
        else:
            found[fields[key]] = Path(value[0]) if fields[key] in PATHS else value[0]
    check_encryption(text, found)
    return found | {"settings": tuple(settings.items())}


def from_table(table: Mapping[str, Any]) -> RbdImage:
    """The image that a table of a configuration file describes, with the names of QEMU's `blockdev-add`.

    Raises ValueError.
    """
    found: dict[str, Any] = {}
    settings: dict[str, str] = {}
    for key, value in table.items():
        if key not in TABLE_KEYS:
            raise ValueError(f"unknown key {shown(key)}{suggestion(key, TABLE_KEYS)}")
        try:
            if key == "server":
                settings["mon_host"] = ",".join(map(_monitor, _some(value)))
            elif key == "options":
                settings |= dict(map(_option, _table(value).items()))
            else:
                name = key.replace("-", "_")
                found[name] = Path(text_from_toml(value)) if name in PATHS else text_from_toml(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    for key in ("pool", "image"):
        if key not in found:
            raise ValueError(f"{key} is missing; each RBD image has one")
    check_encryption(f"{found['pool']}/{found['image']}", found)
    return RbdImage(**found, settings=tuple(settings.items()))


def _some(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{shown(value)} is not a list of monitors; example: ["10.0.0.1:3300"]')
    return value


def _monitor(value: Any) -> str:
    """As Ceph writes it, of a text or of a table with QEMU's keys."""
    if isinstance(value, Mapping) and value.keys() == {"host", "port"}:
        return f"{text_from_toml(value['host'])}:{text_from_toml(value['port'])}"
    return text_from_toml(value)


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError('is not a table of Ceph\'s options; example: { rados_osd_op_timeout = "30" }')
    return value


def _option(pair: tuple[str, Any]) -> tuple[str, str]:
    name, value = pair
    if not OPTION.fullmatch(name):
        raise ValueError("a name in it is not one of Ceph's options, such as rados_osd_op_timeout")
    try:
        return name, text_from_toml(value)
    except ValueError:
        raise ValueError(f"the value of {name} is not a printable text in quotation marks") from None


def check_encryption(what: str, found: Mapping[str, Any]) -> None:
    """Raises ValueError unless these fields fit together."""
    kind = found.get("encrypt_format", "")
    if kind and kind not in ENCRYPTIONS:
        raise ValueError(f"{what}: encrypt-format {shown(kind)} is unknown{suggestion(kind, ENCRYPTIONS)}")
    if bool(kind) != ("encrypt_key_file" in found):
        raise ValueError(f"{what}: encrypt-format and encrypt-key-file need each other; give both or none")


def _split(text: str, separator: str, most: int = -1) -> list[str]:
    """The parts between separators without a backslash before them; the last one has the rest after `most` of them."""
    parts = [""]
    for piece in re.findall(r"\\.|.", text, re.DOTALL):
        if piece == separator and most != 0:
            parts.append("")
            most -= 1
        else:
            parts[-1] += piece
    return parts


def _plain(text: str) -> str:
    return ESCAPED.sub(r"\1", text)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _escaped(text: str, special: re.Pattern[str] = SPECIAL) -> str:
    return special.sub(r"\\\g<0>", text)
