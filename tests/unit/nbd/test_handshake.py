"""Addresses of NBD exports, and the handshake with good and hostile servers."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from ringplane.block.image import ImageError, NoAnswer
from ringplane.block.sources.choose_source import open_source, rehearse_source
from ringplane.block.sources.nbd import connecting
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd.connecting import connect, find_places
from ringplane.block.sources.nbd.handshake import Export, HandshakeError, Silent, negotiate
from ringplane.control.config import ConfigError, read_config
from ringplane.opener import host_names
from ringplane.opener.opener import LocalOpener, OpenerEnded
from ringplane.opener.server_places import Place
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import parse_image
from ringplane.options.nbd_uri import NbdUri, parse
from ringplane.system.signals import Interrupted, Signals

from ..nbd_server import EVERYTHING, NbdServer, option_reply
from ..rig import PATIENCE

GREETING = struct.pack(">8sQH", nbd.MAGIC, nbd.OPTION_MAGIC, nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://server/disk", NbdUri("disk", "server")),
        ("nbd://server", NbdUri("", "server")),
        ("nbd://server:10810//a%20b", NbdUri("/a b", "server", 10810)),
        ("nbd://[::1]:1/x", NbdUri("x", "::1", 1)),
        ("nbd+unix:///disk?socket=/run/nbd.sock", NbdUri("disk", socket=Path("/run/nbd.sock"))),
        ("nbd+unix:///?socket=a%3Fb", NbdUri("", socket=Path("a?b"))),
        ("nbd+unix:///%C3%A4?socket=a+b", NbdUri("ä", socket=Path("a+b"))),
    ],
)
def test_an_address(text: str, uri: NbdUri) -> None:
    assert parse_image(text) == uri
    assert parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nbds://server/x", "NBD over TLS is not supported"),
        ("nbds+unix:///x?socket=y", "NBD over TLS is not supported"),
        ("nbd:server:10809", "is not an NBD address; examples"),
        ("nbd:///x", "the host is missing"),
        ("nbd://user@server/x", "a user is for NBD over TLS"),
        ("nbd://server:0/x", "from 1 to 65535"),
        ("nbd://server:70000/x", "[Pp]ort"),
        ("nbd://server/x?socket=y", "it has no parameters"),
        ("nbd://server/x#y", "no part that begins with #"),
        ("nbd://server/%00", "cannot be printed"),
        ("nbd://server/%ff", "is not UTF-8"),
        ("nbd://server/" + "x" * 4097, "at most 4096 bytes"),
        ("nbd+unix://server/x?socket=y", "three slashes"),
        ("nbd+unix:///x", "its only parameter is socket"),
        ("nbd+unix:///x?socket=y&tls=z", "its only parameter is socket"),
        ("nbd+unix:///x?socket=", "1 to 107 bytes"),
        ("nbd+unix:///x?socket=" + "y" * 108, "1 to 107 bytes"),
    ],
)
def test_a_wrong_address(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as wrong:
        parse_image(text)
    assert "\n" not in str(wrong.value)


@given(some.text(max_size=50).map("nbd://server/".__add__) | some.text(max_size=50).map("nbd+unix:".__add__))
def test_any_address(text: str) -> None:
    try:
        uri = parse(text)
    except ValueError:
        return
    assert parse(str(uri)) == uri


def test_names_and_paths() -> None:
    uri = parse("nbd+unix:///vms/a.img?socket=run/x.sock")
    assert uri.stem == "a"
    assert uri.with_paths(Path("/top").joinpath).socket == Path("/top/run/x.sock")
    assert parse("nbd+unix:///?socket=run/x.sock").stem == "x"
    assert parse("nbd://HOST/a").identity == parse("nbd://host:10809/a").identity


TABLES = {
    'server = { host = "storage1" }': NbdUri("", "storage1"),
    'server = { type = "inet", host = "::1", port = "10810" }\nexport = "a b"': NbdUri("a b", "::1", 10810),
    'server = { host = "storage1", port = 10810 }': NbdUri("", "storage1", 10810),
    'server = { type = "unix", path = "/run/nbd.sock" }\nexport = "disk"': NbdUri("disk", socket=Path("/run/nbd.sock")),
}


@pytest.mark.parametrize("keys", TABLES)
def test_a_table_of_a_configuration_file(keys: str, tmp_path: Path) -> None:
    (tmp_path / "disks.toml").write_text(f'[[disk]]\nsocket-path = "vm1.sock"\n[disk.nbd]\n{keys}\n')
    (disk,) = read_config(tmp_path / "disks.toml").disks
    assert disk.image == TABLES[keys]
    assert disk.image == parse(str(disk.image))


def test_a_relative_path_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "disks.toml").write_text('[[disk]]\nsocket-path = "a"\nnbd = { server = { path = "nbd.sock" } }\n')
    (disk,) = read_config(tmp_path / "disks.toml").disks
    assert disk.image == NbdUri("", socket=tmp_path / "nbd.sock")


WRONG_TABLES = {
    "nbd = 1": "is not a table; write it as [disk.nbd]",
    'nbd = { export = "x" }': "nbd: server is missing; examples",
    'nbd = { server = "storage1" }': 'server: "storage1" is not a table; examples',
    'nbd = { server = { path = "/x", host = "y" } }': "is not an address; examples",
    'nbd = { server = { type = "inet", path = "/x" } }': "is not an address; examples",
    'nbd = { server = { type = "vsock", host = "x" } }': "is not an address; examples",
    "nbd = { server = {} }": "is not an address; examples",
    'nbd = { server = { host = "x", port = "http" } }': '"http" is not a port',
    'nbd = { server = { host = "x", port = 65536 } }': "a port is a number from 1 to 65535",
    "nbd = { server = { host = 1 } }": "server: 1 is not a printable text",
    f'nbd = {{ server = {{ path = "{"x" * 108}" }} }}': "server: the path of a socket has 1 to 107 bytes",
    'nbd = { server = { host = "x" }, export = 1 }': "export: 1 is not a printable text",
    f'nbd = {{ server = {{ host = "x" }}, export = "{"x" * 4097}" }}': "export: the name of an export has at most 4096",
    'nbd = { server = { host = "x" }, exprot = "y" }': 'unknown key "exprot"; did you mean "export"?',
    'nbd = { server = { host = "x" }, tls-creds = "y" }': "tls-creds: NBD over TLS is not supported; use nbd://",
    'nbd = { server = { host = "x" }, reconnect-delay = 5 }': "write nbd-reconnect-delay in [[disk]]",
    'image = "x"\nnbd = { server = { host = "x" } }': "image and [disk.nbd] are both the image",
    'nbd = { server = { host = "x" } }\nrbd = { pool = "p", image = "i" }': "[disk.nbd] and [disk.rbd] are both",
    'image = "nbds://server/x"': "NBD over TLS is not supported; use nbd://",
}


@pytest.mark.parametrize("keys", WRONG_TABLES)
def test_a_wrong_table_is_one_line(keys: str, tmp_path: Path) -> None:
    (tmp_path / "disks.toml").write_text(f'[[disk]]\nsocket-path = "vm1.sock"\n{keys}\n')
    with pytest.raises(ConfigError) as wrong:
        read_config(tmp_path / "disks.toml")
    (line,) = [line for line in str(wrong.value).splitlines() if "is missing; each disk" not in line]
    assert WRONG_TABLES[keys] in line


# Handshakes.


class Canned:
    """A server that sends these bytes, whatever it is sent, and then hangs up."""

    def __init__(self, data: bytes) -> None:
        self._data, self.written = data, b""

    def read(self, size: int) -> bytes:
        assert size <= 8192
        data, self._data = self._data[:size], self._data[size:]
        if len(data) < size:
            raise HandshakeError("closed the connection during the handshake")
        return data

    def write(self, data: bytes) -> None:
        self.written += data


def information(size: int = 1 << 20, flags: int = EVERYTHING) -> bytes:
    return option_reply(nbd.OPT_GO, nbd.REP_INFO, struct.pack(">HQH", nbd.INFO_EXPORT, size, flags))


def sizes(smallest: int, preferred: int, largest: int) -> bytes:
    data = struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, smallest, preferred, largest)
    return option_reply(nbd.OPT_GO, nbd.REP_INFO, data)


STRUCTURED = option_reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK)
NOT_STRUCTURED = option_reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERR_UNSUP)
DONE = option_reply(nbd.OPT_GO, nbd.REP_ACK)


def test_a_handshake() -> None:
    stream = Canned(GREETING + STRUCTURED + information() + sizes(512, 4096, 1 << 20) + DONE)
    assert negotiate(stream, "disk") == Export(1 << 20, EVERYTHING, 512, 4096, 1 << 20, True)
    assert stream.written == (
        struct.pack(">I", 3)
        + struct.pack(">QII", nbd.OPTION_MAGIC, nbd.OPT_STRUCTURED_REPLY, 0)
        + struct.pack(">QIII", nbd.OPTION_MAGIC, nbd.OPT_GO, 12, 4)
        + b"disk"
        + struct.pack(">HH", 1, nbd.INFO_BLOCK_SIZE)
    )


def test_without_sizes_and_with_what_it_does_not_know() -> None:
    unknown = option_reply(nbd.OPT_GO, nbd.REP_INFO, struct.pack(">H", 77) + b"x")
    stream = Canned(GREETING + NOT_STRUCTURED + unknown + information() + DONE)
    assert negotiate(stream, "") == Export(1 << 20, EVERYTHING, 1, 4096, 32 << 20, False)


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_server_without_go(zeroes: bool) -> None:
    flags = nbd.FLAG_FIXED_NEWSTYLE | (0 if zeroes else nbd.FLAG_NO_ZEROES)
    greeting = struct.pack(">8sQH", nbd.MAGIC, nbd.OPTION_MAGIC, flags)
    refused = option_reply(nbd.OPT_GO, nbd.REP_ERR_UNSUP)
    stream = Canned(greeting + NOT_STRUCTURED + refused + struct.pack(">QH", 4096, 1) + bytes(124 if zeroes else 0))
    assert negotiate(stream, "x") == Export(4096, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "is not an NBD server"),
        (nbd.MAGIC + bytes(10), "is not an NBD server"),
        (struct.pack(">8sQH", nbd.MAGIC, nbd.OLD_MAGIC, 0), "speaks an old version"),
        (struct.pack(">8sQH", nbd.MAGIC, nbd.OPTION_MAGIC, 0), "speaks an old version"),
        (GREETING + bytes(20), "sent garbage"),
        (GREETING + option_reply(nbd.OPT_GO, nbd.REP_ACK), "sent garbage"),
        (GREETING + STRUCTURED[:-4] + b"\xff\xff\xff\xff", "sent a reply of 4294967295 bytes"),
        (
            GREETING + STRUCTURED + option_reply(nbd.OPT_GO, nbd.REP_ERR_UNKNOWN),
            "^has no such export; `qemu-nbd --list` shows",
        ),
        (
            GREETING + STRUCTURED + option_reply(nbd.OPT_GO, nbd.REP_ERR_POLICY, b"not\n you\0"),
            r"^refuses this client; its configuration or its log says why \(it says: not you\)$",
        ),
        (GREETING + STRUCTURED + option_reply(nbd.OPT_GO, nbd.REP_ERR_TLS_REQD), "requires TLS"),
        (GREETING + STRUCTURED + option_reply(nbd.OPT_GO, nbd.REP_FLAG_ERROR + 99), r"\(error 99\)"),
        (GREETING + STRUCTURED + option_reply(nbd.OPT_GO, 77), "sent garbage"),
        (GREETING + STRUCTURED + DONE, "did not send the size"),
        (GREETING + STRUCTURED + information(0) + DONE, "an export of 0 bytes"),
        (GREETING + STRUCTURED + information((1 << 64) - 1) + DONE, "an export of 18446744073709551615 bytes"),
        (GREETING + STRUCTURED + information() + sizes(3, 4096, 1 << 20) + DONE, "impossible block sizes"),
        (GREETING + STRUCTURED + information() + sizes(1 << 17, 1 << 17, 1 << 20) + DONE, "impossible block sizes"),
        (GREETING + STRUCTURED + information() + sizes(512, 4096, 1024) + DONE, "impossible block sizes"),
        (GREETING + STRUCTURED + information() + sizes(512, 0, 1024) + DONE, "impossible block sizes"),
        (GREETING + STRUCTURED + option_reply(nbd.OPT_GO, nbd.REP_INFO, b"\0"), "wrong length"),
        (GREETING + STRUCTURED + option_reply(nbd.OPT_GO, nbd.REP_INFO, bytes(5)), "wrong length"),
        (GREETING + STRUCTURED + information() * 100, "does not end its information"),
        (GREETING + STRUCTURED + information(), "closed the connection"),
    ],
)
def test_a_server_that_cannot_be_used(data: bytes, words: str) -> None:
    with pytest.raises(HandshakeError, match=words):
        negotiate(Canned(data), "disk")


@given(some.binary(max_size=400), some.integers(0, 200))
def test_any_bytes(data: bytes, place: int) -> None:
    good = GREETING + STRUCTURED + information() + sizes(512, 4096, 1 << 20) + DONE
    for sent in (data, good[:place] + data, good[:place] + data + good[place + len(data) :]):
        try:
            export = negotiate(Canned(sent), "disk")
        except HandshakeError:
            continue
        assert 0 < export.size < 1 << 63


# Over sockets.


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "nbd"))
        made.listen(1)
        yield made


def config(tmp_path: Path) -> DiskConfig:
    return DiskConfig(NbdUri("x", socket=tmp_path / "nbd"), ["io0"], socket_path=tmp_path / "socket")


@pytest.mark.parametrize("opening", [open_source, rehearse_source])
def test_nobody_listens(tmp_path: Path, opening: Callable[[DiskConfig], object]) -> None:
    with pytest.raises(ImageError, match=r"^nbd\+unix:///x\?socket=.*/nbd: the server cannot be reached: No such file"):
        opening(config(tmp_path))


class FirstLate(Signals):
    """The first wait ends without an answer, at once; for how long each one may last is noted."""

    def __init__(self) -> None:
        self.timeouts: list[float] = []

    def wait(self, fd: int, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.timeouts.append(timeout)
        return len(self.timeouts) > 1 and super().wait(fd, timeout)


def test_a_server_that_says_nothing(listener: socket.socket, tmp_path: Path) -> None:
    places = find_places(NbdUri("x", socket=tmp_path / "nbd"))
    with pytest.raises(HandshakeError, match="does not answer: no handshake"):
        connect(places, "x", FirstLate(), PATIENCE)
    # Connections that wait in the queue of the socket.
    waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)]
    while not waiting[-1].connect_ex(str(tmp_path / "nbd")):
        waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
    with pytest.raises(HandshakeError, match="does not answer: no connection"):
        connect(places, "x", patience=0.05)
    for sock in waiting:
        sock.close()


def test_a_server_that_sends_one_byte_after_the_other(listener: socket.socket, tmp_path: Path) -> None:
    ended = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as sock:
            for byte in GREETING + STRUCTURED + information() * 60:
                sock.sendall(bytes([byte]))
                if ended.wait(0.02):
                    break

    dripping = threading.Thread(target=drip)
    dripping.start()
    # On a busy machine that time may be over before the handshake begins.
    with pytest.raises(HandshakeError, match="does not answer"):
        connect(find_places(NbdUri("x", socket=tmp_path / "nbd")), "x", patience=0.3)
    ended.set()
    listener.shutdown(socket.SHUT_RDWR)
    dripping.join()


def test_an_address_that_does_not_answer_leaves_time_for_the_next_one(listener: socket.socket, tmp_path: Path) -> None:
    server, signals = NbdServer(tmp_path / "other", bytearray(4096)), FirstLate()
    places = [*find_places(NbdUri("x", socket=tmp_path / "nbd")), *find_places(parse(server.uri))]
    sock, export = connect(places, "disk", signals, PATIENCE)
    sock.close()
    server.stop()
    assert export.size == 4096
    assert signals.timeouts[0] <= PATIENCE / 2 < signals.timeouts[1]


class Hanging(LocalOpener):
    """It connects to these places, but opens a file whose storage does not answer; it notes how long it may take."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self.asked: list[float] = []

    def places(self, server: Hashable) -> Sequence[Place]:
        return self._places

    def connect(self, place: Place, patience: float) -> socket.socket:
        self.asked.append(patience)
        raise OpenerEnded("another file is being opened, and its storage does not answer")


class Ended(Signals):
    """The disk is closed."""

    def check(self) -> None:
        raise HandshakeError("is not needed any more")


def test_an_opener_that_hangs(tmp_path: Path) -> None:
    """That is no fault of the server, and no other address of it helps."""
    places = 2 * [*find_places(NbdUri("x", socket=tmp_path / "nbd"))]
    opener = Hanging(places)
    with pytest.raises(OpenerEnded, match=r"^another file is being opened"):
        open_source(config(tmp_path), opener=opener)
    [patience] = opener.asked
    assert 0 < patience <= connecting.PATIENCE / 2
    # Nor is it asked for what nobody needs.
    with pytest.raises(HandshakeError, match="is not needed any more"):
        connect(places, "x", Ended(), opener=opener)
    assert len(opener.asked) == 1


def test_it_can_be_interrupted(listener: socket.socket, tmp_path: Path) -> None:
    class Once(Signals):
        def wait(self, fd: int, timeout: float | None = None) -> bool:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        open_source(config(tmp_path), Once())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), HandshakeError),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), Silent),
        (TimeoutError(errno.ETIMEDOUT, "no name server has answered"), Silent),
    ],
)
def test_a_name_that_is_not_found(monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[Exception]) -> None:
    monkeypatch.setattr(host_names, "look_up", lambda hosts, _: dict.fromkeys(hosts, error))
    with pytest.raises(HandshakeError, match=f"cannot be found: {error.strerror}; check the name") as raised:
        find_places(NbdUri("x", "host.invalid"))
    assert raised.type is kind


class Unfound(LocalOpener):
    """Connects to a server whose name was not found at the start."""

    def reaches(self, server: object) -> bool:
        return True


def test_a_name_that_was_not_found_is_not_looked_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_names, "look_up", None)
    disk = replace(config(tmp_path), image=NbdUri("x", "host.invalid"))
    with pytest.raises(NoAnswer, match="could not be found at the start; restart ringplane when it can be found"):
        open_source(disk, opener=Unfound())


def test_tcp() -> None:
    """A port where somebody hangs up, and where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hanging_up = threading.Thread(target=lambda: server.accept()[0].close())
        hanging_up.start()
        with pytest.raises(HandshakeError, match="the connection during the handshake"):
            connect(find_places(NbdUri("x", "localhost", port)), "x", patience=PATIENCE)
        hanging_up.join()
    with pytest.raises(HandshakeError, match="cannot be reached: Connection refused"):
        connect([(socket.AF_INET, ("127.0.0.1", port))], "x")


def test_the_options_of_a_connection(tmp_path: Path) -> None:
    server = NbdServer(tmp_path / "nbd", bytearray(4096), port=0)
    uri = parse(server.uri)
    sock, export = connect(find_places(uri), uri.export)
    with sock:
        assert export.size == 4096
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == connecting.KEEPALIVE[socket.TCP_KEEPIDLE]
    server.stop()


def test_a_unix_socket_has_room_for_large_writes(tmp_path: Path) -> None:
    """As far as the system allows: the kernel doubles what is asked for (socket(7))."""
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    server = NbdServer(tmp_path / "nbd", bytearray(4096))
    uri = parse(server.uri)
    sock, _ = connect(find_places(uri), uri.export)
    with sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * min(connecting.ROOM_TO_SEND, most)
    server.stop()
