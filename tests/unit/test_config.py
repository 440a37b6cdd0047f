"""The configuration file: its meaning, and one-line errors for everything that is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringplane.control.config import Config, ConfigError, read_config
from ringplane.options.cpus import format_cpus, parse_cpus
from ringplane.options.disk_config import DiskConfig
from ringplane.options.durations import MAX_POLL_US, parse_poll_us
from ringplane.options.engine_names import AUTO, ENGINES, THREAD_ENGINES
from ringplane.options.thread_options import IoThread

REPOSITORY = Path(__file__).resolve().parents[2]
DISK = '[[disk]]\nimage = "a.img"\nsocket-path = "a.sock"\n'
SECOND = '[[disk]]\nimage = "b.img"\nsocket-path = "b.sock"\n'
CPU = min(os.sched_getaffinity(0))
# No machine has this CPU: it is beyond the kernel's largest mask.
NO_CPU = 65535


def read(folder: Path, text: str) -> Config:
    path = folder / "disks.toml"
    path.write_text(text)
    return read_config(path)


def error(folder: Path, text: str) -> str:
    """The error message for a file, without the file's name at its start."""
    with pytest.raises(ConfigError) as raised:
        read(folder, text)
    line = str(raised.value)
    assert line.startswith(f"{folder / 'disks.toml'}: ")
    assert "\n" not in line
    return line.removeprefix(f"{folder / 'disks.toml'}: ")


def spread(config: Config) -> list[list[str]]:
    return [list(disk.io_threads) for disk in config.disks]


# Its meaning


def test_minimal_file(tmp_path: Path) -> None:
    config = read(tmp_path, DISK)
    assert config.io_threads == [IoThread("io0")]
    assert config.disks == [DiskConfig(tmp_path / "a.img", ("io0",), socket_path=tmp_path / "a.sock", num_queues=64)]


def test_file_with_every_key(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        f"""
        [[io-thread]]
        name = "fast"
        cpus = [{CPU}]
        engine = "aio"
        poll-us = 0
        [[io-thread]]
        cpus = "{CPU}"
        poll-us = "always"
        [[disk]]
        image = "/images/a.img"
        socket-path = "sub/a.sock"
        socket-mode = "0666"
        socket-group = 0
        io-threads = ["io1", "fast"]
        create = "3M"
        read-only = true
        direct = false
        share-rw = true
        num-queues = 3
        block-size = 4096
        physical-block-size = "16K"
        serial = "ABC"
        features = {{ packed = false, in-order = true }}
        engine = "null"
        """,
    )
    cpus = frozenset({CPU})
    assert config.io_threads == [IoThread("fast", "aio", cpus, poll_us=0), IoThread("io1", cpus=cpus, poll_us=None)]
    assert config.disks == [
        DiskConfig(
            image=Path("/images/a.img"),
            io_threads=("io1", "fast"),
            socket_path=tmp_path / "sub/a.sock",
            socket_mode=0o666,
            socket_group=0,
            create=3 << 20,
            read_only=True,
            direct=False,
            share_rw=True,
            num_queues=3,
            block_size=4096,
            physical_block_size=16384,
            serial="ABC",
            features={"packed": False, "in-order": True},
            engine="null",
        )
    ]


def test_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    config = read(tmp_path, documented_example())
    assert spread(config) == [["io0", "io1"], ["io0"]]


def documented_example() -> str:
    lines = (REPOSITORY / "docs" / "config.md").read_text().splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def test_reading_creates_nothing(tmp_path: Path) -> None:
    read(tmp_path, DISK + 'create = "1G"')
    assert [path.name for path in tmp_path.iterdir()] == ["disks.toml"]


@pytest.mark.parametrize(("size", "bytes_"), [('"512"', 512), ("4096", 4096), ('"10G"', 10 << 30), ('"1.5M"', 3 << 19)])
def test_size(tmp_path: Path, size: str, bytes_: int) -> None:
    assert read(tmp_path, f"{DISK}create = {size}").disks[0].create == bytes_


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_of_a_disk(tmp_path: Path, engine: str) -> None:
    config = read(tmp_path, f'{DISK}engine = "{engine}"')
    assert config.disks[0].engine == engine
    assert config.io_threads == [IoThread("io0")]


@pytest.mark.parametrize("engine", THREAD_ENGINES)
def test_engine_of_a_thread(tmp_path: Path, engine: str) -> None:
    config = read(tmp_path, f'[[io-thread]]\nengine = "{engine}"\n{DISK}')
    assert config.io_threads == [IoThread("io0", engine)]
    assert config.disks[0].engine == AUTO


@pytest.mark.parametrize(
    ("value", "poll_us"),
    [("0", 0), ("1", 1), (str(MAX_POLL_US), MAX_POLL_US), ('"always"', None), ('"50"', 50), ("0x10", 16)],
)
def test_poll_us(tmp_path: Path, value: str, poll_us: int | None) -> None:
    config = read(tmp_path, f"[[io-thread]]\npoll-us = {value}\n{DISK}")
    assert config.io_threads == [IoThread("io0", poll_us=poll_us)]


def test_disks_without_io_threads_take_the_threads_in_turn(tmp_path: Path) -> None:
    threads = "[[io-thread]]\n" * 3
    disks = "".join(
        f'[[disk]]\nimage = "{number}"\nsocket-path = "{number}.sock"\nnum-queues = {queues}\n{more}\n'
        for number, (queues, more) in enumerate([(1, ""), (2, ""), (2, 'io-threads = ["io2"]'), (4, "")])
    )
    assert spread(read(tmp_path, threads + disks)) == [
        ["io0"],
        ["io1", "io2"],
        ["io2"],
        ["io2", "io0", "io1"],
    ]


def test_first_queues_of_disks_with_the_default_of_queues_are_on_different_threads(tmp_path: Path) -> None:
    """Small guests use queue 0 alone."""
    disks = "".join(f'[[disk]]\nimage = "{number}"\nsocket-path = "{number}.sock"\n' for number in range(4))
    config = read(tmp_path, "[[io-thread]]\n" * 2 + disks)
    assert spread(config) == [["io0", "io1"], ["io1", "io0"]] * 2


def test_as_many_queues_as_named_threads(tmp_path: Path) -> None:
    names = [f"io{number}" for number in range(64)]
    config = read(tmp_path, "[[io-thread]]\n" * 64 + f"{DISK}io-threads = {names}")
    assert config.disks[0].num_queues == 64


@pytest.mark.parametrize("how", ["read-only", "share-rw"])
def test_shared_image(tmp_path: Path, how: str) -> None:
    assert len(read(tmp_path, f"{DISK}{how} = true\n{SECOND.replace('b.img', 'a.img')}{how} = true").disks) == 2


# Errors


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("colour = 1", 'unknown key "colour"; possible are "image"'),
        ("readonly = true", 'unknown key "readonly"; did you mean "read-only"?'),
        ("num_queues = 1", 'did you mean "num-queues"?'),
        ("queues = 1", 'did you mean "num-queues"?'),
        ("num-queues = 0", "num-queues: 0 is not a whole number from 1 to 64"),
        ("num-queues = 65", "num-queues: 65 is not a whole number from 1 to 64"),
        ("num-queues = true", "num-queues: true is not a whole number"),
        ("num-queues = 2.0", "num-queues: 2.0 is not a whole number"),
        ('num-queues = "2"', 'num-queues: "2" is not a whole number'),
        ("read-only = 1", "read-only: 1 is neither true nor false"),
        ('direct = "yes"', 'direct: "yes" is neither true nor false'),
        ("share-rw = []", "share-rw: [] is neither true nor false"),
        ("physical-block-size = 1000", "a physical block size of 1000: it must be a power of two from 512 to 65536"),
        ('physical-block-size = "128K"', "a physical block size of 131072: it must be a power of two"),
        ("physical-block-size = 0", "physical-block-size: 0 is not a positive size"),
        (
            "block-size = 4096\nphysical-block-size = 512",
            "a physical block size of 512: it must not be less than the block size, 4096",
        ),
        ("block-size = 1024", "block-size: 1024 is not one of 512, 4096"),
        ('block-size = "512"', 'block-size: "512" is not one of 512, 4096'),
        ("block-size = true", "block-size: true is not one of 512, 4096"),
        ("socket-mode = 660", 'socket-mode: 660 is not a file mode in quotation marks; an example: "0660"'),
        ('socket-mode = "rw"', "socket-mode: 'rw' is not a file mode; it has three octal digits, for example 0660"),
        ('socket-group = "nosuchgroup"', "socket-group: group 'nosuchgroup' does not exist"),
        ("socket-group = true", "socket-group: true is not"),
        ("create = 0", "create: 0 is not a positive size"),
        ('create = "-1M"', "create: '-1M' is not a positive size"),
        ('create = "1X"', "create: '1X' is not a size"),
        ("create = true", "create: true is not a size"),
        ("create = 1.5", "create: 1.5 is not a size"),
        ('serial = "123456789012345678901"', "has 21 bytes; a serial number has at most 20"),
        ('serial = "a\\tb"', "serial: "),
        ("features = { pack = true }", "features: 'pack' is not a feature that can be switched; did you mean packed?"),
        ("features = { packed = 1 }", "features: packed: 1 is neither true nor false"),
        ('features = ["packed"]', "is not a table of features"),
        ("serial = 7", "serial: 7 is not a printable text"),
        ('io-threads = "io0"', 'io-threads: "io0" is not a list of names'),
        ("io-threads = []", "io-threads: [] is not a list of names"),
        ("io-threads = [0]", "io-threads: 0 is not a printable text"),
        ('io-threads = ["io1"]', 'io-threads: no I/O thread has the name "io1"; did you mean "io0"?'),
        ('io-threads = ["x"]', 'io-threads: no I/O thread has the name "x"; possible are "io0"'),
        ('io-threads = ["io0", "io0"]\nnum-queues = 1', "io-threads: names 2 threads for 1 queue"),
        ('engine = "uring"', 'engine: "uring" is not one of "auto", "io_uring", "aio", "memory", "null"'),
        ("engine = true", "engine: true is not one of"),
        ("poll-us = 50", 'unknown key "poll-us"'),
        ("serial = 1979-05-27", 'serial: "1979-05-27" is not a printable text'),
    ],
)
def test_wrong_keys_of_a_disk(tmp_path: Path, more: str, words: str) -> None:
    line = error(tmp_path, f"{SECOND}{DISK}{more}")
    assert line.startswith("[[disk]] 2 (a.img): ")
    assert words in line


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("cpu = 1", 'unknown key "cpu"; did you mean "cpus"?'),
        ("name = 0", "name: 0 is not a printable text"),
        ('name = ""', 'name: "" is not a printable text'),
        ('name = "io0"', 'name: "io0" is the name of another I/O thread already'),
        ('engine = "uring"', 'engine: "uring" is not one of "auto", "io_uring", "aio"'),
        ('engine = "memory"', 'engine: "memory" is not one of "auto", "io_uring", "aio"'),
        ('engine = "null"', 'engine: "null" is not one of'),
        ("poll-us = -1", "poll-us: '-1' is neither a number of microseconds from 0 to 1000000 nor always"),
        ("poll-us = 1000001", "poll-us: '1000001' is neither a number of microseconds from 0 to 1000000 nor always"),
        ("poll-us = 50.0", 'poll-us: 50.0 is neither a number of microseconds nor "always"'),
        ("poll-us = true", 'poll-us: true is neither a number of microseconds nor "always"'),
        ('poll-us = "never"', "poll-us: 'never' is neither"),
        ('poll-us = ""', "poll-us: '' is neither"),
        ("poll_us = 50", 'unknown key "poll_us"; did you mean "poll-us"?'),
        ("cpus = 1", "cpus: 1 is not a list of CPUs"),
        ("cpus = []", "cpus: no CPU is named; this process may use"),
        ("cpus = [true]", "cpus: [true] is not a list of CPUs"),
        ("cpus = [-1]", "cpus: CPU -1 is not available to this process, which may use"),
        (f"cpus = [{NO_CPU}]", f"cpus: CPU {NO_CPU} is not available to this process, which may use"),
        (f'cpus = "{CPU},{NO_CPU - 1}-{NO_CPU}"', f"cpus: CPU {NO_CPU - 1}-{NO_CPU} is not available"),
        ('cpus = "3-2"', "cpus: '3-2' is not a list of CPUs"),
        ('cpus = "a"', "cpus: 'a' is not a list of CPUs"),
    ],
)
def test_wrong_keys_of_a_thread(tmp_path: Path, keys: str, words: str) -> None:
    line = error(tmp_path, f"{DISK}[[io-thread]]\n[[io-thread]]\n{keys}")
    assert line.startswith("[[io-thread]] 2: ")
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no disk; a line [[disk]] begins each one"),
        ("[[io-thread]]", "has no disk"),
        ("disk = 1", "disk: is not a list of tables"),
        ("[disk]", "disk: is not a list of tables; write its name in double brackets, as in [[disk]]"),
        ("disk = [1]", "disk: is not a list of tables"),
        (f"[io-thread]\n{DISK}", "io-thread: is not a list of tables"),
        (f"[[disks]]\n{DISK}", 'unknown key "disks"; did you mean "disk"?'),
        (f"image = 'a'\n{DISK}", 'unknown key "image"'),
        ('[[disk]]\nsocket-path = "s"', "[[disk]] 1: image is missing"),
        ('[[disk]]\nimage = "a.img"', "[[disk]] 1 (a.img): socket-path is missing"),
        ("[[disk]]\nimage = 1", "[[disk]] 1: image: 1 is not a printable text"),
        ('[[disk]]\nimage = ""', 'image: "" is not a printable text'),
        ('[[disk]]\nimage = "a\\u0000b"', "image: "),
        ("[[disk]", "is not TOML: "),
        ("disk = []", "has no disk; "),
        ("a = 1\na = 2", "is not TOML: "),
        ("[[io-thread]]\n" * 65 + DISK, "[[io-thread]] 65: is one I/O thread too many; the maximum is 64"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    assert words in error(tmp_path, text)


@pytest.mark.parametrize("name", ["a.sock", "./a.sock", "link/a.sock"])
def test_two_disks_with_one_socket(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    line = error(tmp_path, DISK + SECOND.replace("b.sock", name))
    assert line.startswith("[[disk]] 2 (b.img): socket-path: ")
    assert "is also the socket of [[disk]] 1 (a.img)" in line


@pytest.mark.parametrize("name", ["a.img", "./a.img", "link/a.img", "symbolic", "hard"])
def test_two_disks_with_one_image(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "symbolic").symlink_to("a.img")
    if name == "hard":
        (tmp_path / "a.img").touch()
        (tmp_path / "hard").hardlink_to(tmp_path / "a.img")
    for first, second in [("", ""), ("read-only = true\n", ""), ("read-only = true\n", "share-rw = true\n")]:
        line = error(tmp_path, f"{DISK}{first}{SECOND.replace('b.img', name)}{second}")
        assert line.startswith(f"[[disk]] 2 ({name}): image: ")
        assert "is also the image of [[disk]] 1 (a.img); disks can share an image" in line


def test_paths_are_not_checked_by_reading(tmp_path: Path) -> None:
    """They are checked when they are opened."""
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "loop/x", "x" * 300, "none/x"):
        config = read(tmp_path, f'[[disk]]\nimage = "{name}"\nsocket-path = "{name}"\ncreate = "1M"')
        assert config.disks[0].image == tmp_path / name


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"# \xe4")
    for name, words in (("none", "No such file"), (".", "Is a directory"), ("latin", "is not UTF-8")):
        with pytest.raises(ConfigError, match=words):
            read_config(tmp_path / name)


# Lists of CPUs


@pytest.mark.parametrize(("text", "cpus"), [("2", {2}), ("2-4", {2, 3, 4}), (" 0, 2 - 3 ,3", {0, 2, 3}), ("5-5", {5})])
def test_parse_cpus(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus
    assert parse_cpus(format_cpus(cpus)) == cpus


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "1-", "2-1", "a", "1.5", "\u0661", "0x1", "1-2-3", "9" * 6])
def test_invalid_lists_of_cpus(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of CPUs"):
        parse_cpus(text)


def test_format_cpus() -> None:
    assert format_cpus([7, 0, 2, 3, 4]) == "0,2-4,7"


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "+1", "1.5", "1e3", " 50", "50 ", "Always", "never", "\u0665", "\u00b2", "0x10", "1_0", "1000001"],
)
def test_invalid_poll_times(text: str) -> None:
    with pytest.raises(ValueError, match="neither a number of microseconds from 0 to 1000000 nor always"):
        parse_poll_us(text)
