"""Policies over the API: each operation on a disk that a guest uses, and what it must not wait for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringplane.api.http import HttpApi
from ringplane.control.config import read_config
from ringplane.control.start import serve_all
from ringplane.driver.driver import Driver
from ringplane.options.api_options import ApiOptions
from ringplane.options.thread_options import IoThread

from .policy_texts import own_policy
from .rig import eventually
from .test_api import SOON, Served, config
from .test_policies import SAMPLES

ERROR = f"{SAMPLES}/sample_error.py"
POLICIES = "/v1/disks/a/policies"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    threads = [IoThread("io0"), IoThread("io1")]
    interface = HttpApi(ApiOptions(tmp_path / "api.sock"))
    disk = replace(config(tmp_path, "a"), io_threads=("io0", "io1"))
    with serve_all([disk], threads, interface=interface) as server:
        yield Served(tmp_path, server)


@pytest.fixture
def driver(served: Served) -> Iterator[Driver]:
    with served.attach("a") as driver:
        yield driver


def names(served: Served) -> list[str]:
    return [each["name"] for each in served.api.get(POLICIES)["policies"]]


def test_a_policy_from_the_beginning_to_the_end(served: Served, driver: Driver, tmp_path: Path) -> None:
    """Each answer comes when it is in force."""
    api, stream = served.api, served.api.events()
    assert names(served) == []
    body = {"policy": ERROR, "name": "faults", "parameters": {"operation": "write", "probability": 1}}
    added = api.post(POLICIES, body, status=201)
    assert (added["name"], added["policy"], added["enabled"]) == ("faults", ERROR, True)
    assert added["about"] == "Requests fail: some operation, some of them, in some range."
    assert (added["parameters"]["operation"], added["parameters"]["range"]) == ("write", "all")
    with pytest.raises(OSError, match="writing"):
        driver.write(0, bytes(512))
    assert api.get(f"{POLICIES}/faults")["counters"] == {"requests": 1, "failed": 1}
    changed = api.patch(f"{POLICIES}/faults", {"parameters": {"operation": "flush"}})
    assert (changed["parameters"]["operation"], changed["counters"]["failed"]) == ("flush", 1)
    driver.write(0, bytes(512))
    with pytest.raises(OSError, match="flush"):
        driver.flush()
    assert not api.patch(f"{POLICIES}/faults", {"enabled": False})["enabled"]
    driver.flush()
    assert api.patch(f"{POLICIES}/faults", {"enabled": True})["counters"] == {"requests": 3, "failed": 2}
    assert api.post(POLICIES, {"policy": ERROR, "position": 0, "enabled": False}, status=201)["name"] == "sample_error"
    assert names(served) == ["sample_error", "faults"]
    written = tmp_path / "written.toml"
    written.write_bytes(api.request("GET", "/v1/config").data)
    assert [(use.name, use.parameters, use.enabled) for use in read_config(written).disks[0].policy] == [
        ("sample_error", {}, False),
        ("faults", {"operation": "flush"}, True),
    ]
    api.delete(f"{POLICIES}/sample_error")
    api.delete(f"{POLICIES}/faults")
    driver.flush()
    assert names(served) == []
    events = [data["fields"]["policies"] for _, kind, data in itertools.islice(stream, 8) if kind == "policies-changed"]
    assert events[:4] == [["faults"], ["faults"], ["faults (off)"], ["faults"]]
    assert events[4] == ["sample_error (off)", "faults"]


def test_a_new_text_of_the_file_is_used_from_put_on(served: Served, driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy("my.found += 1\nreturn PASS"))
    served.api.post(POLICIES, {"policy": str(path)}, status=201)
    served.api.post(POLICIES, {"policy": ERROR, "enabled": False}, status=201)
    driver.flush()
    path.write_text(own_policy("my.found += 1\nreturn fail(EIO)"))
    served.api.patch(f"{POLICIES}/sample_error", {"parameters": {"operation": "read"}})
    driver.flush()
    answer = served.api.request("PUT", f"{POLICIES}/own", {"policy": str(path)})
    assert (answer.status, answer.json["counters"]["found"]) == (200, 2)
    assert names(served) == ["own", "sample_error"]
    with pytest.raises(OSError, match="flush"):
        driver.flush()


def test_the_same_seed_begins_the_same_numbers_again(served: Served, driver: Driver) -> None:
    body = {"policy": ERROR, "parameters": {"operation": "flush", "probability": 0.5, "seed": 7}}
    served.api.post(POLICIES, body, status=201)

    def results() -> list[bool]:
        found = []
        for _ in range(40):
            try:
                driver.flush()
                found.append(True)
            except OSError:
                found.append(False)
        return found

    first = results()
    for seed in (8, 7):
        served.api.patch(f"{POLICIES}/sample_error", {"parameters": {"seed": seed}})
        assert (results() == first) == (seed == 7)


@pytest.mark.parametrize("how", ["release", "disable", "remove"])
def test_the_end_of_what_hangs_waits_for_no_operation(served: Served, driver: Driver, tmp_path: Path, how: str) -> None:
    """A pause waits for the request that hangs; the end of that must not wait for the pause."""
    path = tmp_path / "own.py"
    path.write_text(own_policy("return HANG if io.operation == WRITE else PASS"))
    served.api.post(POLICIES, {"policy": str(path)}, status=201)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(driver.write, 0, b"a" * 512)
        assert eventually(lambda: served.api.get(f"{POLICIES}/own")["counters"]["requests"] == 1)
        pausing = pool.submit(served.api.post, "/v1/disks/a/pause")
        assert eventually(lambda: served.api.disk("a")["paused"])
        assert not pausing.done()
        if how == "release":
            assert served.api.post(f"{POLICIES}/own/release")["enabled"]
        elif how == "disable":
            served.api.patch(f"{POLICIES}/own", {"enabled": False})
        else:
            served.api.delete(f"{POLICIES}/own")
        assert pausing.result(SOON)["in_flight"] == 0
        writing.result(SOON)
    served.api.post("/v1/disks/a/resume")
    assert driver.read(0, 512) == b"a" * 512


def test_policies_that_cannot_be_added(served: Served) -> None:
    served.api.post(POLICIES, {"policy": ERROR, "name": "there"}, status=201)
    cases: list[tuple[dict[str, Any], int, str, str]] = [
        (
            {"policy": "eror"},
            400,
            "policy",
            'no policy eror ships (one of your own is FILE.py:NAME); did you mean "error"?',
        ),
        ({"policy": "own.py:own"}, 400, "policy", "'own.py:own' is not an absolute path"),
        ({"policy": "/none/own.py"}, 400, "policy", "/none/own.py cannot be read: No such file"),
        ({"policy": ERROR, "name": "there"}, 409, "there", "the disk has a policy of this name already"),
        ({"policy": ERROR, "name": "a/b"}, 400, "name", 'name: "a/b" is not up to 64 letters'),
        ({"policy": ERROR, "parameters": {"eror": 1}}, 400, "parameters", "unknown parameter eror"),
        ({"policy": ERROR, "parameters": {"probability": 2}}, 400, "parameters", "probability: 2 is not from 0 to 1"),
        ({"policy": ERROR, "parameters": {"operation": [1]}}, 400, "parameters[...]", "Expected `"),
        ({"policy": ERROR, "position": -1}, 400, "position", "Expected `int` >= 0"),
        ({"policy": ERROR, "colour": 1}, 400, "", "Object contains unknown field `colour`"),
        ({}, 400, "", "Object missing required field `policy`"),
    ]
    for body, status, where, what in cases:
        answer = served.api.request("POST", POLICIES, body)
        found = answer.status, answer.error["where"], answer.error["what"][: len(what)]
        assert found == (status, where, what), answer.data
        assert "\n" not in answer.error["what"]
    assert names(served) == ["there"]


def test_changes_that_are_not_right_change_nothing(served: Served) -> None:
    served.api.post(POLICIES, {"policy": ERROR, "name": "there"}, status=201)
    before = served.api.get(f"{POLICIES}/there")
    for method, path, body, status, what in (
        ("PATCH", "there", {"parameters": {"operation": "read", "probability": 5}}, 400, "probability: 5 is not"),
        ("PATCH", "there", {"enabled": "no"}, 400, "Expected `bool | null`, got `str`"),
        ("PATCH", "none", {"enabled": True}, 404, "no policy of the disk has this name"),
        ("PUT", "none", {"policy": ERROR}, 404, "no policy of the disk has this name"),
        ("PUT", "there", {"policy": ERROR, "name": "other"}, 400, "'other' is not the name in the path"),
        ("PUT", "there", {"policy": ERROR, "position": 1}, 400, "a policy that replaces another one has its place"),
        ("PUT", "there", {"policy": "eror"}, 400, "no policy eror ships"),
        ("DELETE", "none", None, 404, "no policy of the disk has this name"),
        ("GET", "none", None, 404, "no policy of the disk has this name"),
        ("POST", "none/release", None, 404, "no policy of the disk has this name"),
    ):
        answer = served.api.request(method, f"{POLICIES}/{path}", body)
        assert (answer.status, answer.error["what"][: len(what)]) == (status, what), answer.data
    assert served.api.get(POLICIES)["policies"] == [before]
