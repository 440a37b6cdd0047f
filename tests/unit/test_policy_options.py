"""How policies of a disk are written: on the command line, in a configuration file, and in Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ringplane.control.config import ConfigError, read_config
from ringplane.options.disk_config import DiskConfig
from ringplane.options.policy_options import POLICIES, PolicyUse, named_policies, parse_policy

from .policy_texts import own_policy
from .test_policies import SAMPLES


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("error", PolicyUse("error")),
        ("f.py:slow,rate=5", PolicyUse("f.py:slow", {"rate": "5"})),
        ("error,name=e1, enabled=no,max-size=4K", PolicyUse("error", {"max_size": "4K"}, "e1", False)),
    ],
)
def test_the_command_line(text: str, use: PolicyUse) -> None:
    assert parse_policy(text) == use


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("error,5", "'5' is not KEY=VALUE; an example: error,operation=write,probability=0.1"),
        ("error,a=1,a=2", "a is given twice"),
        ("error,enabled=maybe", "enabled: 'maybe' is neither yes nor no"),
        ("error,name=a b", 'name: "a b" is not up to 64 letters, digits, dots, - and _'),
        ("", '"" is not FILE.py:NAME or the name of a policy'),
    ],
)
def test_wrong_command_lines(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_policy(text)


def read(folder: Path, more: str) -> DiskConfig:
    path = folder / "disks.toml"
    path.write_text(f'[[disk]]\nimage = "image"\nsocket-path = "socket"\n{more}')
    return read_config(path).disks[0]


def test_a_file(tmp_path: Path) -> None:
    """A relative path begins at its folder."""
    config = read(
        tmp_path,
        '[[disk.policy]]\npolicy = "mine.py:slow"\nname = "a"\nenabled = false\n'
        "parameters = { rate = 5, max-size = '4K', share = 0.5, on = true }\n"
        '[[disk.policy]]\npolicy = "error"\n',
    )
    parameters = {"rate": 5, "max_size": "4K", "share": 0.5, "on": True}
    assert config.policy == (PolicyUse(f"{tmp_path}/mine.py:slow", parameters, "a", False), PolicyUse("error"))
    assert POLICIES.from_toml(POLICIES.to_toml(config.policy)) == config.policy


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('[[disk.policy]]\nname = "a"', "policy: policy is missing; it is FILE.py:NAME"),
        ('[[disk.policy]]\npolicy = "error"\nnmae = "a"', 'policy: unknown key "nmae"; did you mean "name"?'),
        ('policy = "error"', 'policy: "error" is not a list of tables; example: [[disk.policy]] with policy = "error"'),
        (
            '[[disk.policy]]\npolicy = "a"\nname = "x"\n[[disk.policy]]\npolicy = "b"\nname = "x"',
            'policy: two policies have the name "x"',
        ),
        ('[[disk.policy]]\npolicy = "a"\nparameters = { b = [] }', "policy: b: [] is neither a number nor a text"),
    ],
)
def test_wrong_files(tmp_path: Path, more: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, more)
    assert words in str(error.value)


def test_each_policy_has_a_name() -> None:
    uses = [PolicyUse("error"), PolicyUse("a/error.py"), PolicyUse("x.py:slow"), PolicyUse("slow", {}, "error-2")]
    assert [use.name for use in named_policies(uses)] == ["error", "error-3", "slow", "error-2"]


def serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ringplane", "serve", "--image", "disk.img", "--create", "1M"]
    return subprocess.run(
        [*command, "--socket-path", "disk.sock", *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("own.py", "Error: own.py:18: io.offset cannot be changed; what a policy returns changes the I/O"),
        ("missing.py:own", "missing.py cannot be read: No such file or directory"),
        (f"{SAMPLES}/sample_error.py,probability=2", "probability: 2 is not from 0 to 1"),
        (f"{SAMPLES}/sample_error.py,probabilty=1", 'unknown parameter probabilty; did you mean "probability"?'),
    ],
)
def test_a_start_with_a_wrong_policy_fails_in_one_line(tmp_path: Path, policy: str, words: str) -> None:
    """And leaves nothing."""
    (tmp_path / "own.py").write_text(own_policy("io.offset = 1\nreturn PASS"))
    done = serve(tmp_path, "--policy", policy)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.py"]
