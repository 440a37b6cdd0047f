"""`ringplane policy`, and the counters of policies in metrics and statistics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import ringplane
from ringplane.api.disk_metrics import disk_metrics
from ringplane.cli import policy as command
from ringplane.cli.policy import policy
from ringplane.driver import Driver
from ringplane.options.policy_options import PolicyUse
from ringplane.policies.loading import shipped

from .policy_texts import own_policy
from .test_policies import SAMPLES


def run(*arguments: str) -> tuple[int, list[str]]:
    done = CliRunner().invoke(policy, arguments)
    return done.exit_code, done.output.splitlines()


def test_list_has_all_that_ship() -> None:
    status, lines = run("list")
    assert status == 0
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == list(shipped())


def test_list_describes_those_of_a_file() -> None:
    status, lines = run("list", f"{SAMPLES}/sample_error.py")
    assert (status, lines[0]) == (0, "error: Requests fail: some operation, some of them, in some range.")
    assert f"    {'operation=any':24} the operation that fails" in lines
    assert "    counts failed: requests that were failed" in lines
    assert run("list", "eror") == (1, ['Error: no policy eror ships; did you mean "error"?'])


def test_descriptions_continue_below_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "65")
    command.list_policies.main(["error"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    place = lines.index(f"    {'errno=5':24} the error, a number of errno(3);")
    assert lines[place + 1] == f"{'':29}guests see an I/O error"


def test_check_shows_what_is_not_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy("return my.number"))
    status, lines = run("check", str(path), "number=-5")
    assert status == 0
    assert lines[0].endswith("-5, which is not an answer: the request fails")


def test_check_shows_the_answers(tmp_path: Path) -> None:
    status, lines = run("check", f"{SAMPLES}/sample_error.py", "operation=write", "range=1M-")
    assert status == 0
    assert [line.partition(": ")[2] for line in lines if " ms " in line] == [
        *("pass", "pass", "pass", "fail(5)", "fail(5)", "pass", "pass", "fail(5)", "pass", "pass", "pass", "pass")
    ]
    assert lines[-1] == "ok: requests=12, failed=3"
    path = tmp_path / "own.py"
    path.write_text(
        own_policy(
            "if io.operation == WRITE:\n    store8(io, 5, 1)\nreturn after(100, redirect(4096))",
            "if io.operation == READ:\n    store8(io, 5, 1)\nreturn DROP",
            data=True,
        )
    )
    status, lines = run("check", str(path))
    redirected = "after(100us, redirect(4096))"
    assert f"   0 ms  read of 4096 bytes at 0: {redirected}; its result: drop, data changed" in lines
    assert f"   1 ms  write of 4096 bytes at 0: {redirected}, data changed; its result: drop" in lines


@pytest.mark.parametrize(
    ("body", "arguments", "words"),
    [
        ("io.length = 1\nreturn PASS", [], "own.py:18: io.length cannot be changed"),
        ("return PASS", ["number=x"], 'number: "x" is not a whole number'),
        ("return PASS", ["number"], "'number' is not KEY=VALUE"),
    ],
)
def test_check_reports_mistakes(tmp_path: Path, body: str, arguments: list[str], words: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy(body))
    done = CliRunner().invoke(policy, ["check", str(path), *arguments])
    assert done.exit_code == 1
    assert words in done.output
    assert len(done.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("none.py", "Error: none.py cannot be read: "), ("eror", "Error: no policy eror ships (one of your own")],
)
def test_check_says_what_is_not_there(name: str, words: str) -> None:
    status, lines = run("check", name)
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith(words)


def test_a_policy_that_never_returns_ends_the_check(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy("while io.length:\n    my.seen += 1\nreturn PASS"))
    program = (
        f"from ringplane.cli import policy as command; command.PATIENCE = 0.5; command.policy(['check', {str(path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"Error: {path}: the policy has not answered after 0.5 seconds\n"


def test_counters_are_in_metrics(tmp_path: Path) -> None:
    uses = [PolicyUse(f"{SAMPLES}/sample_error.py", {"operation": "flush"}, "flushes")]
    with (
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", create=1 << 20, name="data", policy=uses) as export,
        Driver(tmp_path / "socket") as driver,
    ):
        driver.read(0, 512)
        with pytest.raises(OSError, match="flush"):
            driver.flush()
        lines = "".join(disk_metrics([export])).splitlines()
        assert 'ringplane_disk_policy_counted_total{disk="data",policy="flushes",counter="requests"} 2' in lines
        assert 'ringplane_disk_policy_counted_total{disk="data",policy="flushes",counter="failed"} 1' in lines
        assert 'ringplane_disk_policy_enabled{disk="data",policy="flushes"} 1' in lines
        export.set_policies([])
        assert "ringplane_disk_policy_counted_total{" not in "".join(disk_metrics([export]))
