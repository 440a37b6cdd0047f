"""The machine of a bench, for the report: figures are valid for one machine only."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


def describe() -> dict[str, object]:
    """The machine and the relevant versions, as values for JSON."""
    import ringplane

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["ringplane", *sys.argv[1:]]),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "virtual": _first_line(["systemd-detect-virt"]) or _hypervisor(),
        "kernel": platform.release(),
        "system": _system(),
        "python": platform.python_version(),
        "numba": metadata.version("numba"),
        "ringplane": ringplane.__version__,
        "git": _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--tags"]),
        "qemu-storage-daemon": _first_line(["qemu-storage-daemon", "--version"]).rpartition("version ")[2],
        "fio": _first_line(["fio", "--version"]).removeprefix("fio-"),
    }


def _first_line(command: list[str]) -> str:
    """The first line that a program prints; empty if it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def _cpuinfo(name: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == name:
                return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def _hypervisor() -> str:
    return "vm" if "hypervisor" in _cpuinfo("flags").split() else ""


def _system() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return platform.system()


def sentence(machine: dict[str, object]) -> str:
    """The machine in one line."""
    parts = [f"{machine['cores']} x {machine['cpu']}{' (virtual machine)' if machine['virtual'] else ''}"]
    parts += [f"{machine['memory_gib']} GiB", f"Linux {machine['kernel']}", str(machine["system"])]
    for name in ("Python", "Numba", "ringplane", "qemu-storage-daemon", "fio"):
        if machine.get(name.lower()):
            parts.append(f"{name} {machine[name.lower()]}")
    if machine.get("git"):
        parts.append(f"git {machine['git']}")
    return ", ".join(parts) + f"; {str(machine['date'])[:10]}"
