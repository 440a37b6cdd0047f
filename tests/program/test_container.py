"""share/Containerfile: its steps are run without a container engine, in a copy-on-write root of this machine.

The base image is a virtual environment of this Python in a folder that every user can read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ringplane.driver.driver import Driver

from .counting import compiled, counting

REPOSITORY = Path(__file__).resolve().parents[2]
MEMORY_SIZE = 1 << 20
PATH = "/base/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="only root can make a root file system"),
    pytest.mark.timeout(1800),
]


@dataclass
class Recipe:
    """What a Containerfile says."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    user: str = "0:0"
    folder: str = "/"
    entry: list[str] = field(default_factory=list)


def parse(text: str) -> Recipe:
    recipe = Recipe()
    for line in text.replace("\\\n", "").splitlines():
        word, _, rest = line.strip().partition(" ")
        match word:
            case "" | "#" | "FROM" | "VOLUME":
                pass
            case "COPY" | "RUN":
                recipe.steps.append((word, rest))
            case "USER":
                recipe.user = rest
            case "WORKDIR":
                recipe.folder = rest
            case "ENTRYPOINT":
                recipe.entry = json.loads(rest)
            case _:
                raise ValueError(f"unknown instruction: {line}")
    return recipe


def in_shell(step: str, words: str, root: Path) -> str:
    """A step of the build as a line of bash."""
    if step == "RUN":
        return f"chroot {root} /bin/sh -ec '{words}'"
    *sources, target = words.split()
    (one_folder,) = sources if len(sources) == 1 else ("",)
    copied = f"{one_folder}/." if (REPOSITORY / one_folder).is_dir() and one_folder else " ".join(sources)
    return f"mkdir -p {root}{target}; cp -r {copied} {root}{target}"


def script(recipe: Recipe, work: Path, disks: Path) -> str:
    """Make the root, build in it, and serve from it, read-only; all of it disappears with the mount namespace."""
    root = work / "root"
    # This Python may be in the home of root.
    hidden = [folder for folder in Path(os.path.realpath(sys.executable)).parents if folder != Path("/")]
    lines = [
        f"mount -t tmpfs tmpfs {work}",
        f"mkdir {work}/upper {work}/work {root}",
        f"mount -t overlay overlay -o lowerdir=/,upperdir={work}/upper,workdir={work}/work {root}",
        f"mount -t proc proc {root}/proc",
        f"rm -rf {root}/dev; mkdir {root}/dev {root}{recipe.folder}",
        *(f"touch {root}/dev/{name}; mount --bind /dev/{name} {root}/dev/{name}" for name in ("null", "urandom")),
        f"mount -t tmpfs tmpfs {root}/tmp",
        *(f"chmod a+rx {root}{folder}" for folder in hidden),
        f"chroot {root} {os.path.realpath(sys.executable)} -m venv /base",
        f"cd {REPOSITORY}",
        *(in_shell(*step, root) for step in recipe.steps),
        f"umount {root}/tmp",
        f"mount --bind {disks} {root}{recipe.folder}",
        f"mount -o remount,ro {root}",
        f'exec env -i PATH={PATH} "$@" chroot --userspec={recipe.user} {root} env --chdir={recipe.folder} '
        f"{' '.join(recipe.entry)} --blk-file disk.img --create 1M --socket-path disk.sock",
    ]
    return "\n".join(lines)


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """The volume."""
    folder = tmp_path / "disks"
    folder.mkdir()
    return folder


@pytest.fixture
def container(tmp_path: Path, disks: Path) -> Iterator[list[str]]:
    """The output of the build and of `serve`, when it listens: both as the Containerfile says."""
    recipe = parse((REPOSITORY / "share/Containerfile").read_text())
    uid, gid = map(int, recipe.user.split(":"))
    assert uid != 0
    os.chown(disks, uid, gid)
    work = tmp_path / "work"
    work.mkdir()
    variables = [f"{name}={value}" for name, value in counting(disks, Path(recipe.folder)).items()]
    command = ["unshare", "--mount", "bash", "-euxc", script(recipe, work, disks), "bash", *variables]
    # RUN has the same PATH, and pip the settings of this machine.
    environment = {**os.environ, "PATH": PATH, "HOME": "/root"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        try:
            assert process.stdout
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("listening on "):
                    break
            assert said[-1].startswith("listening on "), "".join(said)
            yield said
            process.terminate()
            said.extend(process.stdout)
            assert process.wait(60) == 0, "".join(said)
        finally:
            process.kill()


def test_the_first_start_of_a_container_compiles_nothing(container: list[str], disks: Path) -> None:
    """As another user, without HOME, everything read-only except the disks."""
    with Driver(disks / "disk.sock", memory_size=MEMORY_SIZE) as driver:
        driver.write(0, b"x" * 4096)
        assert driver.read(0, 4096) == b"x" * 4096
    (built,) = (number for number, line in enumerate(container) if line.startswith("compiled for any "))
    served = "".join(container[built:])
    assert not any(word in served for word in ("compiling", "WARNING", "ERROR")), served
    assert compiled(disks) == []


@pytest.mark.parametrize("text", ["ADD a b", "HEALTHCHECK x"])
def test_an_instruction_that_the_test_does_not_know_is_not_skipped(text: str) -> None:
    with pytest.raises(ValueError, match="unknown instruction"):
        parse(text)
