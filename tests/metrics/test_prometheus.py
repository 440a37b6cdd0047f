"""A real Prometheus scrapes a process with I/O; the dashboard's queries have values, and the alert rules are right."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from program.served import DISK, SOON, ServedMetrics, starter
from ringplane.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_T_IN
from storage.nbd_processes import NbdServer, qemu_nbd
from unit.waiting import eventually, wait_until

SHARE = Path(__file__).parents[2] / "share"
DASHBOARD = SHARE / "grafana/ringplane.json"
RULES = SHARE / "prometheus/ringplane.rules.yml"
RULE_TESTS = Path(__file__).parent / "ringplane.rules.test.yml"

SIZE = 16 << 20

# Often, so that rates are known soon.
CONFIGURATION = """
global:
  scrape_interval: 500ms
  evaluation_interval: 500ms
rule_files: [{rules}]
scrape_configs:
  - job_name: ringplane
    static_configs:
      - targets: [{targets}]
"""


def program(name: str) -> str:
    """Its path."""
    path = shutil.which(name)
    if path is None:
        assert os.environ.get("CI") != "true", f"{name} is not installed, and CI must not skip these tests"
        pytest.skip(f"{name} is not installed (Debian: prometheus)")
    return path


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    """What it prints; it must find nothing wrong."""
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Prometheus:
    """A process that scrapes the metrics at these URLs."""

    def __init__(self, folder: Path, *urls: str) -> None:
        self._targets = len(urls)
        config = folder / "prometheus.yml"
        targets = ", ".join(f'"{urllib.parse.urlsplit(url).netloc}"' for url in urls)
        config.write_text(CONFIGURATION.format(targets=targets, rules=RULES))
        self.log = folder / "prometheus.log"
        command = [program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log)

    def listens(self) -> bool:
        """Whether it does; then `url` is where."""
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(r'msg="Listening on" address=(\S+)', self.log.read_text())
        self.url = f"http://{found[1]}" if found else ""
        return found is not None

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer of its API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=SOON) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and values of an expression now."""
        found = self.get("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def ready(self) -> bool:
        """Whether it has scraped all of them."""
        with contextlib.suppress(OSError):
            return len(self.query("up == 1")) == self._targets
        return False

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(SOON)


def do_io(path: Path, ended: threading.Event, *, faulty: bool) -> None:
    """A guest that does all kinds of requests, for seconds: so without using a whole CPU. `faulty`: some fail."""
    with Driver(path, timeout=SOON) as driver:
        while not ended.wait(0.05):
            run_load(driver, Load(read_percent=50, depth=4, requests=500))
            driver.flush()
            driver.discard(0, 4096)
            driver.write_zeroes(0, 4096)
            if faulty:
                # Beyond the end.
                driver.request(VIRTIO_BLK_T_IN, driver.capacity // SECTOR, read=512)


@contextlib.contextmanager
def serving(folder: Path, *disk: str, faulty: bool = False) -> Iterator[ServedMetrics]:
    """A process with a disk and such a guest."""
    ended = threading.Event()
    with contextlib.contextmanager(starter)(ServedMetrics, folder) as start, ThreadPoolExecutor(1) as pool:
        served = start(*disk, "--metrics", "0")
        guest = pool.submit(do_io, folder / "a.sock", ended, faulty=faulty)
        try:
            yield served
        finally:
            ended.set()
        guest.result(SOON)
        served.end()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMetrics]:
    with serving(tmp_path_factory.mktemp("served"), *DISK, faulty=True) as served:
        yield served


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMetrics]:
    """Its disk is on an NBD server."""
    folder = tmp_path_factory.mktemp("remote")
    with (folder / "disk.img").open("wb") as image:
        image.truncate(SIZE)
    server = NbdServer(qemu_nbd, folder / "disk.img")
    try:
        with serving(folder, "--image", server.uri, "--name", "remote", "--socket-path", "a.sock") as served:
            yield served
    finally:
        server.stop()


@pytest.fixture(scope="module")
def prometheus(
    served: ServedMetrics, remote: ServedMetrics, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), served.url, remote.url)
    try:
        wait_until(prometheus.listens)
        wait_until(prometheus.ready)
        yield prometheus
    finally:
        prometheus.end()


def test_promtool_finds_nothing_wrong_with_a_scrape(served: ServedMetrics, remote: ServedMetrics) -> None:
    for each in (served, remote):
        assert promtool("check", "metrics", text=each.scrape()) == ""


def panels() -> dict[str, list[str]]:
    """The expressions of the dashboard's panels, by their titles."""
    dashboard = json.loads(DASHBOARD.read_text())
    return {
        f"{panel['id']} {panel['title']}": [target["expr"] for target in panel["targets"]]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }


def filled_in(expression: str) -> str:
    """With values for Grafana's variables."""
    expression = expression.replace("$__rate_interval", "10s")
    expression = re.sub(r"\$(instance|disk)\b", ".*", expression)
    assert "$" not in expression
    return expression


@pytest.mark.parametrize("panel", panels())
def test_each_panel_has_values(prometheus: Prometheus, panel: str) -> None:
    for expression in map(filled_in, panels()[panel]):
        assert eventually(lambda: has_numbers(prometheus.query(expression))), expression  # noqa: B023


def has_numbers(found: list[tuple[dict[str, str], float]]) -> bool:
    return any(math.isfinite(value) for _, value in found)


def test_the_dashboard_s_variables_have_values(prometheus: Prometheus) -> None:
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert found
            labels = [labels for labels, _ in prometheus.query(filled_in(found[1]))]
            assert labels
            assert all(found[2] in each for each in labels)


def test_rates_are_those_of_the_guest(prometheus: Prometheus) -> None:
    """Reads and writes at the same time, in equal parts."""
    both = "rate(ringplane_disk_writes_completed_total[10s]) / rate(ringplane_disk_reads_completed_total[10s])"

    wait_until(lambda: any(0.8 < value < 1.25 for _, value in prometheus.query(both)))
    assert prometheus.query("ringplane_disk_errors_total{operation='write'}")[0][1] == 0
    assert prometheus.query("ringplane_disk_attached")[0][1] == 1


def test_the_times_of_a_thread_add_up(prometheus: Prometheus) -> None:
    """To a second for each second."""
    times = "+".join(f"rate(ringplane_io_thread_{what}_seconds_total[10s])" for what in ("busy", "polling", "asleep"))
    wait_until(lambda: any(0.95 < value < 1.05 for _, value in prometheus.query(times)))


def test_an_alert_fires(prometheus: Prometheus) -> None:
    """The guest's faulty requests are errors; nothing else is wrong."""
    wait_until(lambda: bool(prometheus.query('ALERTS{alertstate="firing"}')))
    fired = [labels for labels, _ in prometheus.query('ALERTS{alertstate="firing"}')]
    assert [(each["alertname"], each["disk"], each["operation"]) for each in fired] == [
        ("RingplaneErrors", "a", "read")
    ]


def test_the_rules_are_right(prometheus: Prometheus) -> None:
    """Prometheus has no error with them either."""
    assert "SUCCESS" in promtool("check", "rules", RULES)
    assert "SUCCESS" in promtool("test", "rules", RULE_TESTS)
    wait_until(lambda: all(rule["health"] == "ok" for rule in rules(prometheus)))


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]


def test_every_rule_is_tested() -> None:
    names = re.findall(r"alert: (\w+)", RULES.read_text())
    assert len(names) > 5
    assert set(names) == set(re.findall(r'alertname="(\w+)"', RULE_TESTS.read_text()))
