"""Workloads: the shell scripts that run in a guest on its disk /dev/vda, and the programs that they need."""

from dataclasses import dataclass

# Each line of progress tells the guest's clock, so that the console of a guest that hangs shows where and since when.
PRELUDE = """\
set -eo pipefail
say() { read -r up _ < /proc/uptime; echo "guest: $up s: $*"; }
give_up() { say "FAILED: $*"; dmesg | tail -n 20; exit 1; }
[ -b /dev/vda ] || give_up "there is no /dev/vda"
"""

# A driver retries and a file system may go on after a failed request; the kernel's log does not forget it.
CLEAN_LOG = """\
if dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|blk_update_request|vda.*error|BUG:|Call Trace'; then
    give_up "the kernel's log tells of errors"
fi
say "done"
"""


@dataclass(frozen=True)
class Workload:
    """A script, and the programs beside busybox that its guest must have."""

    script: str
    programs: tuple[str, ...] = ()


def script(body: str) -> str:
    return PRELUDE + body


def filesystem() -> Workload:
    """Thousands of files that must be the same after the file system was mounted again, and a clean e2fsck.

    "split" makes many files in one process: a process for each would cost most of the time of an emulated machine.
    The list of checksums is left on the disk as well, so that the host can compare what it finds in the image.
    """
    body = """\
say "mkfs"
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
fill() { # size of a file, number of files
    say "$2 files of $1 bytes"
    mkdir -p "/mnt/files/of-$1"
    head -c $(($1 * $2)) /dev/urandom | (cd "/mnt/files/of-$1" && split -a 4 -b "$1" - file-)
}
fill 100 600
fill 512 600
fill 3001 600
fill 4096 600
fill 10007 500
fill 65536 150
fill 1048577 20
fill 9000001 1
say "a sparse file, renamed, removed and overwritten ones"
echo end | dd of=/mnt/files/sparse bs=1 seek=50000000 conv=notrunc 2> /tmp/dd.txt
mv /mnt/files/of-512 /mnt/files/renamed
rm -r /mnt/files/of-100
head -c 200000 /dev/urandom | dd of=/mnt/files/of-9000001/file-aaaa bs=1000 seek=77 conv=notrunc 2> /tmp/dd.txt
say "checksums"
(cd /mnt && find files -type f | sort | xargs sha256sum) > /tmp/sums
[ "$(wc -l < /tmp/sums)" -ge 2400 ] || give_up "too few files"
cp /tmp/sums /mnt/sums
sync
if [ "$(cat /sys/block/vda/queue/discard_max_bytes)" -gt 0 ]; then
    say "trim"
    fstrim -v /mnt
fi
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
say "mounting again"
mount -t ext4 /dev/vda /mnt
(cd /mnt && sha256sum -c /tmp/sums > /tmp/checked) || { grep -v OK /tmp/checked; give_up "files differ"; }
cmp /tmp/sums /mnt/sums
umount /mnt
say "e2fsck"
e2fsck -fn /dev/vda
"""
    return Workload(script(body + CLEAN_LOG), ("mkfs.ext4", "e2fsck", "split"))


def fio_verify(num_queues: int, cpus: int, scale: int = 1) -> Workload:
    """Data written at many block sizes and depths, read back and checked by fio, in two areas at a time."""
    pinned = f"--cpus_allowed=0-{cpus - 1} --cpus_allowed_policy=split" if cpus > 1 else ""
    body = f"""\
[ "$(ls /sys/block/vda/mq | wc -l)" = {num_queues} ] || give_up "the disk does not have {num_queues} queues"
verify() {{ # name, MiB for each job, options
    name=$1
    size=$(($2 * {scale}))
    shift 2
    say "fio $name"
    fio --name="$name" --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --numjobs=2 --thread {pinned} \\
        --size=${{size}}M --offset_increment=200M --verify=crc32c --verify_fatal=1 "$@" > /tmp/fio.txt 2>&1 ||
        {{ cat /tmp/fio.txt; give_up "fio $name"; }}
    grep -E 'err=|IOPS=' /tmp/fio.txt
    [ "$(grep -c 'err= 0' /tmp/fio.txt)" = 2 ] || {{ cat /tmp/fio.txt; give_up "fio $name told of an error"; }}
    grep -q 'read: IOPS' /tmp/fio.txt || give_up "fio $name verified nothing"
}}
verify 512-randwrite 2 --rw=randwrite --bs=512
verify 512-randrw 2 --rw=randrw --bs=512
verify 4k-randwrite 12 --rw=randwrite --bs=4k --verify_backlog=256 --fsync=64
verify 4k-randrw 12 --rw=randrw --bs=4k --iodepth=64
verify 64k-randwrite 48 --rw=randwrite --bs=64k
verify 64k-randrw 48 --rw=randrw --bs=64k
verify 1M-randwrite 64 --rw=randwrite --bs=1M
verify 1M-randrw 64 --rw=randrw --bs=1M
verify mixed-randrw 64 --rw=randrw --bssplit=512/20:2560/20:4k/20:60k/20:1M/20
verify mixed-write 64 --rw=write --bsrange=512-1M
"""
    # A machine with one processor gives its disk one queue, which cannot go unused.
    used = each_queue_interrupts(num_queues) if cpus > 1 else ""
    return Workload(script(body + used + CLEAN_LOG), ("fio",))


def each_queue_interrupts(num_queues: int) -> str:
    """Shell lines that fail unless every queue has completed requests, as /proc/interrupts of a PC tells."""
    return f"""\
for queue in $(seq 0 {num_queues - 1}); do
    line=$(grep -E "virtio[0-9]+-req\\.$queue\\$" /proc/interrupts) || give_up "queue $queue has no interrupt"
    echo "$line"
    echo "$line" | awk '{{ exit !($2 + $3 > 0) }}' || give_up "queue $queue was never used"
done
"""


def probe() -> Workload:
    """What the guest sees of its disk."""
    body = """\
echo "size=$(($(cat /sys/block/vda/size) * 512))"
echo "ro=$(cat /sys/block/vda/ro)"
echo "logical_block_size=$(cat /sys/block/vda/queue/logical_block_size)"
echo "queues=$(ls /sys/block/vda/mq | wc -l)"
echo "write_cache=$(cat /sys/block/vda/queue/write_cache)"
echo "serial=$(cat /sys/block/vda/serial)"
"""
    return Workload(script(body + CLEAN_LOG))


def write_pattern(mib: int) -> Workload:
    """Random data over the start of the disk; its checksum is told before it goes to the disk."""
    body = f"""\
dd if=/dev/urandom of=/tmp/data bs=1M count={mib}
sum=$(sha256sum < /tmp/data)
echo "sha256=$sum"
dd if=/tmp/data of=/dev/vda bs=64k conv=fsync
"""
    return Workload(script(body + CLEAN_LOG))


def start_of_disk(mib: int) -> str:
    # An assignment of its own: a command that fails inside the arguments of echo would go unnoticed.
    return f"""\
sum=$(dd if=/dev/vda bs=1M count={mib} | sha256sum)
echo "sha256=$sum"
"""


def read_pattern(mib: int) -> Workload:
    """The checksum of the start of the disk."""
    return Workload(script(start_of_disk(mib) + CLEAN_LOG))


def read_only(mib: int) -> Workload:
    """A disk that can be read, and that refuses to be opened for writing or to be formatted."""
    body = """\
[ "$(cat /sys/block/vda/ro)" = 1 ] || give_up "the disk is writable"
if dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync,notrunc; then give_up "a write succeeded"; fi
if mkfs.ext4 -q -F /dev/vda; then give_up "mkfs succeeded"; fi
say "done"
"""
    return Workload(script(start_of_disk(mib) + body), ("mkfs.ext4",))
