"""Guests: a QEMU machine or a user-mode Linux that runs one workload on a vhost-user disk and reports the result."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from .back_end_processes import Backend
from .initramfs import with_script
from .kernels import program
from .workloads import Workload

# The whole line including its end: a console that is cut off inside the status has no result.
RESULT = re.compile(r"^RINGPLANE-GUEST-RESULT: (\d+)\r?\n", re.MULTILINE)
# A guest that takes longer hangs. The slowest ones take a minute if a CPU is free for each.
DEADLINE = 400.0
POWER_OFF_DEADLINE = 60.0
TAIL_LINES = 60


class GuestError(AssertionError):
    """A guest that reported no result or the wrong one, or did not end."""


@dataclass(frozen=True)
class Result:
    """The console output of a guest, and the exit status of its script."""

    status: int
    console: str

    def value(self, name: str) -> str:
        """The value of a line "name=value" that the script printed."""
        found = re.search(rf"^{re.escape(name)}=(.*?)\r?$", self.console, re.MULTILINE)
        if found is None:
            raise GuestError(f"the guest printed no {name}=\n{tail(self.console)}")
        return found[1]


def tail(console: str) -> str:
    return "\n".join(["the console ends with:", *console.splitlines()[-TAIL_LINES:]])


def result_in(console: str) -> Result | None:
    found = RESULT.search(console)
    return Result(int(found[1]), console) if found else None


@dataclass
class Guest:
    """A type of machine; each run boots a new one, runs a workload and powers it off."""

    # The disk has one queue per processor by default.
    cpus: ClassVar[int]

    folder: Path
    initramfs: Callable[[Workload], bytes]
    kernel: Path
    runs: int = field(default=0, init=False)

    def command(self, sockets: Sequence[Path], initrd: Path, memory_mib: int, num_queues: int) -> list[str]:
        """The command line of a machine with a disk for each socket: /dev/vda, /dev/vdb and so on."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return os.environ

    def run(
        self,
        disk: Backend,
        workload: Workload,
        *,
        memory_mib: int = 512,
        num_queues: int | None = None,
        deadline: float = DEADLINE,
        status: int = 0,
    ) -> Result:
        """Run a workload and return its result, which must have the expected exit status.

        The disk has `num_queues` queues; by default one per processor; 0 means QEMU's default.
        """
        self.runs += 1
        initrd = self.folder / f"initrd-{self.runs}"
        initrd.write_bytes(with_script(self.initramfs(workload), workload.script))
        command = self.command([disk.socket], initrd, memory_mib, self.cpus if num_queues is None else num_queues)
        result = self.run_command(command, self.folder / f"console-{self.runs}.txt", deadline, disk.check_alive)
        initrd.unlink()
        if result.status != status:
            raise GuestError(f"the script ended with status {result.status}, not {status}; {tail(result.console)}")
        return result

    def run_command(
        self, command: list[str], console: Path, deadline: float, check: Callable[[], None] = lambda: None
    ) -> Result:
        """Run a machine until it has reported a result and ended; "check" is called repeatedly and may raise."""
        with console.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
        try:
            result = wait_for_result(process, console, deadline, check)
            wait_for_end(process, result)
        finally:
            status = end_group(process)
        if status != 0:
            raise GuestError(f"{command[0]} ended with status {status}; {tail(read(console))}")
        return result


@dataclass
class QemuGuest(Guest):
    """A PC without KVM: its kernel drives the disk through virtio-pci, after SeaBIOS has."""

    cpus = 2

    # Without a source of random numbers the guest's first use of them takes seconds. On a busy host the emulated timer
    # can be too slow for the kernel's check of it, which would be a panic.
    kernel_options: ClassVar[str] = "console=ttyS0 panic=-1 quiet random.trust_cpu=on no_timer_check"
    # More properties of each disk's device, as "packed=on"
    properties: str = ""
    # More options of each disk's character device, as "reconnect=1"
    chardev: str = ""
    # The kernel is on the disk: SeaBIOS and the boot loader read it from there.
    boots_from_disk: bool = False

    def command(self, sockets: Sequence[Path], initrd: Path, memory_mib: int, num_queues: int) -> list[str]:
        # In a migration, QEMU before 9.0 loses pages that an emulated processor has written, if the size of the memory
        # is a multiple of 256 KiB (docs/security.md, "Live migration").
        memory = f"{memory_mib << 10 | 8}K"
        more = f",num-queues={num_queues}" if num_queues else ""
        more += f",{self.properties}" if self.properties else ""
        kernel = ["-kernel", str(self.kernel), "-initrd", str(initrd), "-append", self.kernel_options]
        disks: list[str] = []
        for number, socket in enumerate(sockets):
            disks += ["-chardev", f"socket,id=disk{number},path={socket}{self.chardev and ','}{self.chardev}"]
            disks += ["-device", f"vhost-user-blk-pci,chardev=disk{number}{more}"]
        return [
            *("qemu-system-x86_64", "-machine", "q35,memory-backend=mem", "-accel", "tcg,thread=multi"),
            *("-cpu", "qemu64,+rdrand", "-smp", str(self.cpus)),
            *("-object", f"memory-backend-memfd,id=mem,size={memory},share=on", "-m", memory),
            *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *([] if self.boots_from_disk else kernel),
            *disks,
        ]


class UmlGuest(Guest):
    """User-mode Linux: one processor, one queue, and a front end whose call descriptor is a pipe."""

    cpus = 1

    def command(self, sockets: Sequence[Path], initrd: Path, memory_mib: int, num_queues: int) -> list[str]:
        if num_queues != 1:
            raise ValueError("virtio_blk in user-mode Linux, with its one processor, uses one queue")
        # The 2 is the virtio identifier of a block device, not a number of queues.
        return [
            *(str(self.kernel), f"mem={memory_mib}M", f"initrd={initrd}"),
            *(f"virtio_uml.device={socket}:2" for socket in sockets),
            *("root=/dev/ram0", "con0=null,fd:1", "con=null", "ssl=null", "panic=-1", "quiet"),
            f"uml_dir={self.folder}/",
        ]

    def environment(self) -> Mapping[str, str]:
        # The guest's memory is a file in TMPDIR, preferably on a tmpfs. In a container that may be very small, which
        # would end the guest with SIGBUS.
        free = shutil.disk_usage("/dev/shm").free
        memory = {"TMPDIR": "/dev/shm"} if free > 1 << 30 else {}
        return {**os.environ, **memory, **self.preload()}

    def preload(self) -> Mapping[str, str]:
        """A library for guests on hosts with larger registers than they support, see uml_xstate.c."""
        if "amx_tile" not in Path("/proc/cpuinfo").read_text():
            return {}
        library = self.folder / "uml_xstate.so"
        compiler = program("gcc", "gcc")
        source = Path(__file__).with_name("uml_xstate.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
        return {"LD_PRELOAD": str(library)}


def read(console: Path) -> str:
    return console.read_text(errors="replace")


def when(console: Path, text: str, what: Callable[[], None]) -> None:
    """Do it beside the test, when the guest has written this text."""

    def wait() -> None:
        while not console.exists() or text not in read(console):
            time.sleep(0.1)
        what()

    threading.Thread(target=wait, daemon=True).start()


def wait_for_result(
    process: subprocess.Popen[bytes], console: Path, deadline: float, check: Callable[[], None]
) -> Result:
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        # Checked before the console is read, so that the last output of the guest is not missed.
        over = ended(process)
        result = result_in(read(console))
        if result is not None:
            return result
        try:
            check()
        except AssertionError as problem:
            raise GuestError(f"{problem}\n{tail(read(console))}") from None
        if over:
            raise GuestError(f"the guest ended without a result; {tail(read(console))}")
        time.sleep(0.05)
    raise GuestError(f"no result from the guest in {deadline:.0f} s; {tail(read(console))}")


def wait_for_end(process: subprocess.Popen[bytes], result: Result) -> None:
    """This detects a back end that does not release its rings: the front end waits for it while it powers off."""
    end = time.monotonic() + POWER_OFF_DEADLINE
    while not ended(process):
        if time.monotonic() > end:
            raise GuestError(f"the guest did not power off in {POWER_OFF_DEADLINE:.0f} s; {tail(result.console)}")
        time.sleep(0.02)


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended. It is not reaped, so that the id of its process group is not reused."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_group(process: subprocess.Popen[bytes]) -> int:
    """Kill the remaining processes of a guest, and return the exit status of the first one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
