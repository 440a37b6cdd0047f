"""CPU time of a process, and the pid of the process at the other end of a socket."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from ringplane.vhost_user.peers import credentials

# include/linux/posix-timers.h: the clock of a whole process is its pid's complement, shifted, and this kind of clock.
CPUCLOCK_SCHED = 2


def cpu_ns(pid: int) -> int:
    """CPU time in nanoseconds, user and system, of all threads that process `pid` has or had; never goes backwards.

    Summing /proc/PID/task/*/schedstat would lose threads that have ended (qemu-storage-daemon starts and ends workers
    all the time), so this reads the process's CPU clock (clock_getcpuclockid(3)), which is exact and includes ended
    threads. If the kernel refuses that, it reads utime + stime of /proc/PID/stat: the same sum in ticks of 10 ms.

    The kernel's io_uring workers (iou-wrk, iou-sqp) are threads of the process and counted. The work of kworkers,
    interrupts and the block layer's own threads for the process is not counted.

    Raises ProcessLookupError when there is no such process.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | CPUCLOCK_SCHED)
    except OSError:
        return _cpu_ns_from_stat(pid)


def _cpu_ns_from_stat(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} does not exist") from None
    # The second field, the program's name in parentheses, may hold anything. utime and stime are the 14th and 15th.
    fields = stat[stat.rindex(")") + 1 :].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def peer_pid(sock: socket.socket) -> int:
    """The pid of the process at the other end of a UNIX socket when it called listen(2) (SO_PEERCRED, unix(7)).

    0 if it is not visible from our pid namespace. A daemon that inherited its listening socket shows its parent's.
    """
    return credentials(sock)[0]
