"""`ringplane serve --metrics`: over TCP, under confinement, across a planned restart; and wrong addresses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from ringplane.cli.check import check
from ringplane.control.config import read_config
from ringplane.control.listener import ListenError
from ringplane.control.tcp_listener import bound
from ringplane.driver import Driver
from ringplane.options.addresses import Address, parse_address
from ringplane.options.metrics_options import MetricsOptions

from .served import DISK, SOON, ServedMetrics, needs_all, refused, starter

Serve = Callable[..., ServedMetrics]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    yield from starter(ServedMetrics, tmp_path)


@needs_all
def test_with_a_filter_that_ends_the_process(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, "--metrics", "0", strict=True)
    with Driver(tmp_path / "a.sock", timeout=SOON) as driver:
        driver.write(0, b"a" * 512)
        for _ in range(2):
            assert 'ringplane_disk_writes_completed_total{disk="a"} 1\n' in served.scrape()
    served.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.img", "errors"]


def test_only_metrics_are_served(serve: Serve) -> None:
    served = serve(*DISK, "--metrics", "127.0.0.1:0", "--api-socket", "api.sock")
    for method, path, expected in (
        ("GET", "/v1/disks", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/metrics", 405),
    ):
        status, text = served.request(method, path)
        assert status == expected
        assert json.loads(text)["error"].keys() == {"what", "where", "right"}
    assert served.request("HEAD", "/metrics") == (200, "")
    served.end()


def test_the_process_ends_with_its_last_disk(serve: Serve, tmp_path: Path) -> None:
    """Without an API, metrics do not keep it."""
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-m", "ringplane", "serve", "--blk-file", "a.img", "--create", "4M"]
        command += ["--fd", str(theirs.fileno()), "--metrics", "0"]
        process = subprocess.Popen(command, cwd=tmp_path, pass_fds=[theirs.fileno()], stdout=out, stderr=out)
        theirs.close()
        ours.close()
        try:
            assert process.wait(SOON) == 0, (tmp_path / "out").read_text()
        finally:
            process.kill()
            process.wait()


def test_a_file_with_metrics(serve: Serve, tmp_path: Path) -> None:
    config = tmp_path / "disks.toml"
    config.write_text(
        '[metrics]\nlisten = "0"\n[api]\nsocket = "api.sock"\n[[disk]]\nimage = "a.img"\ncreate = "4M"\n'
        'socket-path = "a.sock"\n'
    )
    served = serve("--config", "disks.toml")
    assert "ringplane_disk_capacity_bytes" in served.scrape()
    assert read_config(config).metrics == MetricsOptions(Address("127.0.0.1", 0))
    served.end()
    assert f"{config} has a table [metrics] already; leave out --metrics" in refused(
        "--config", config, "--metrics", "1"
    )


def test_a_planned_restart_keeps_the_socket(serve: Serve, tmp_path: Path) -> None:
    """The same port, although the address leaves it open, and no scrape fails."""
    arguments = (*DISK, "--metrics", "127.0.0.1:0")
    old = serve(*arguments)
    with Driver(tmp_path / "a.sock", timeout=SOON) as driver:
        with ThreadPoolExecutor(1) as pool, old.scraping(pool) as scrapes:
            new = serve(*arguments, "--upgrade")
            assert new.url == old.url
            assert old.process.wait(SOON) == 0, old.errors.read_text()
        assert scrapes.result(SOON) > 0
        assert 'ringplane_disk_attached{disk="a"} 1\n' in new.scrape()
        driver.write(0, b"a" * 512)
    new.end()


def test_a_planned_restart_with_another_port(serve: Serve) -> None:
    old = serve(*DISK, "--metrics", "0")
    new = serve(*DISK, "--metrics", "[::1]:0", "--upgrade")
    assert old.process.wait(SOON) == 0, old.errors.read_text()
    assert new.url.startswith("http://[::1]:")
    new.scrape()
    new.end()


# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", Address("127.0.0.1", 9464)),
        ("0.0.0.0:80", Address("0.0.0.0", 80)),
        ("[::1]:0", Address("::1", 0)),
        ("[::ffff:1.2.3.4]:65535", Address("::ffff:1.2.3.4", 65535)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", ":9464", "localhost:9464", "1.2.3:9464", "::1:9464", "[::1]", "[1.2.3.4]:1", "1.2.3.4:65536", "x"]
)
def test_texts_that_are_not_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address with a port; examples: 9464, 127"):
        parse_address(text)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = f"127.0.0.1:{port}: another process is listening there; choose another port"
        assert words in refused(
            "--blk-file", tmp_path / "a.img", "--create", "4M", "--metrics", port, "--socket-path", tmp_path / "a.sock"
        )
        assert not (tmp_path / "a.img").exists()
        config = tmp_path / "disks.toml"
        config.write_text(f'[metrics]\nlisten = "{port}"\n[api]\nsocket = "api.sock"\n')
        assert words in CliRunner().invoke(check, [str(config)]).output
    assert CliRunner().invoke(check, [str(config)]).exit_code == 0


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ListenError, match=r"^192\.0\.2\.1:80: this machine does not have this address; choose one"):
        bound(Address("192.0.2.1", 80))


def test_a_value_that_is_not_right(tmp_path: Path) -> None:
    config = tmp_path / "disks.toml"
    for text, words in (
        ("[metrics]\n", "[metrics]: listen is missing; it is where metrics are served"),
        ("[metrics]\nlisten = 9464\n", "[metrics]: listen: 9464 is not a printable text"),
        ('[metrics]\nlisten = "x"\n', '[metrics]: listen: "x" is not an address with a port'),
    ):
        config.write_text(f'[api]\nsocket = "a"\n{text}')
        assert words in refused("--config", config)
    assert '"x" is not an address with a port' in refused(*DISK, "--metrics", "x")
    with pytest.raises(ValueError, match=r"^listen: \"9464\" is not an Address"):
        MetricsOptions("9464")  # type: ignore[arg-type]
