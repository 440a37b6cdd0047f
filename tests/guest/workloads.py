"""Workloads: shell scripts that run in a guest on its disk /dev/vda, and the programs that they need."""

from dataclasses import dataclass
from pathlib import Path

# Each progress line has the guest's time, so that the console of a guest that hangs shows where and since when.
PRELUDE = """\
set -eo pipefail
say() { read -r up _ < /proc/uptime; echo "guest: $up s: $*"; }
give_up() { say "FAILED: $*"; dmesg | tail -n 20; exit 1; }
[ -b /dev/vda ] || give_up "there is no /dev/vda"
"""

# Drivers retry failed requests and file systems may continue after them, but the kernel's log keeps them.
CLEAN_LOG = """\
bad='I/O error|EXT4-fs (error|warning)|XFS.*(rror|orrupt)|BTRFS (error|warning|critical)|blk_update_request'
if dmesg | grep -E "$bad|vda.*error|BUG:|Call Trace"; then
    give_up "the kernel's log tells of errors"
fi
say "done"
"""


@dataclass(frozen=True)
class Workload:
    """A script, with the programs (besides busybox), kernel modules and files that its guest needs."""

    script: str
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def script(body: str) -> str:
    return PRELUDE + body


def filesystem() -> Workload:
    """Thousands of files that must be the same after the file system was mounted again, and a clean e2fsck.

    "split" makes many files in one process: one process per file would take too long on an emulated machine.
    The list of checksums is left on the disk as well, so that the host can check the files in the image.
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


def ranges() -> Workload:
    """Discarded and zeroed ranges of the disk; two trimmed file systems, and a third one that must not change."""
    body = """\
host() { # a program of the host's, where busybox has a smaller one of the same name
    for folder in /usr/sbin /sbin /usr/bin; do
        [ -x "$folder/$1" ] && program=$folder/$1 && break
    done
    shift
    "$program" "$@"
}
limit() { cat "/sys/block/vda/queue/$1"; }
[ "$(limit discard_max_bytes)" -gt 0 ] || give_up "the disk cannot be discarded"
[ "$(limit write_zeroes_max_bytes)" -gt 0 ] || give_up "the disk cannot write zeroes"
echo "discard_granularity=$(limit discard_granularity)"
zeros() { cmp -n $((64 << 20)) /dev/vda /dev/zero || give_up "$1: the disk is not full of zeros"; }
fill() { dd if=/dev/urandom of=/dev/vda bs=1M count=64 conv=fsync 2> /tmp/dd.txt; }
say "blkdiscard"
fill
host blkdiscard /dev/vda
zeros blkdiscard
say "blkdiscard -z"
fill
host blkdiscard -z -l $((64 << 20)) /dev/vda
zeros "blkdiscard -z"
say "blkdiscard of a part"
fill
dd if=/dev/vda of=/tmp/before bs=1M count=64 iflag=direct 2> /tmp/dd.txt
host blkdiscard -o 1048576 -l 2097152 /dev/vda
dd if=/dev/zero of=/tmp/before bs=1M seek=1 count=2 conv=notrunc 2> /tmp/dd.txt
dd if=/dev/vda of=/tmp/after bs=1M count=64 iflag=direct 2> /tmp/dd.txt
cmp /tmp/before /tmp/after || give_up "the rest of the disk has changed"
rm /tmp/before /tmp/after
trim() { # file system, its mkfs with options
    say "$*"
    system=$1
    shift
    "$@" /dev/vda > /tmp/mkfs.txt 2>&1 || { cat /tmp/mkfs.txt; give_up "$*"; }
    mount -t "$system" /dev/vda /mnt
    head -c 60000000 /dev/urandom > /mnt/kept
    head -c 60000000 /dev/urandom > /mnt/removed
    kept=$(sha256sum < /mnt/kept)
    sync
    rm /mnt/removed
    sync
    host fstrim -v /mnt
    echo 3 > /proc/sys/vm/drop_caches
    [ "$(sha256sum < /mnt/kept)" = "$kept" ] || give_up "$system: the file that was kept has changed"
    if [ "$system" = btrfs ]; then
        btrfs scrub start -B /mnt | tee /tmp/scrub.txt
        grep -q 'no errors found' /tmp/scrub.txt || give_up "scrub found errors"
    fi
    umount /mnt
}
trim ext4 mkfs.ext4 -q -F
trim xfs mkfs.xfs -q -f
trim btrfs mkfs.btrfs -q -f
"""
    programs = ("blkdiscard", "fstrim", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "btrfs")
    return Workload(script(body + CLEAN_LOG), programs, ("xfs", "btrfs"))


# Shell functions: the size of the disk, and waiting until it is that.
WAIT_FOR_SIZE = """\
size() { echo $(($(cat /sys/block/vda/size) * 512)); }
wait_for() {
    tries=0
    while [ "$(size)" != "$1" ] && [ $tries -lt 300 ]; do usleep 100000; tries=$((tries + 1)); done
    [ "$(size)" = "$1" ] || give_up "the disk has $(size) bytes, not $1"
}
"""


def resized(first: int, second: int) -> Workload:
    """A disk whose size in bytes changes while a guest uses it; requests beyond the new end are errors."""
    body = f"""\
{WAIT_FOR_SIZE}\
say "has $(size) bytes"
echo "RESIZE-ME"
wait_for {first}
dd if=/dev/urandom of=/dev/vda bs=1M seek=$(({first} / 1048576 - 1)) count=1 oflag=direct || give_up "the new end"
echo "RESIZE-AGAIN"
wait_for {second}
dd if=/dev/vda of=/dev/null bs=1M skip=$(({second} / 1048576 - 1)) count=1 iflag=direct || give_up "the end"
"""
    return Workload(script(body + CLEAN_LOG))


def no_room() -> Workload:
    """The image's file system is full until the host makes space; existing data stays, everything else works.

    `kept=` is the checksum of the first 8 MiB, `data=` that of 32 MiB from 100 MiB on.
    """
    body = """\
write() { dd if="$1" of=/dev/vda bs=1M seek="$2" oflag=direct conv=fsync 2> /tmp/dd.txt; }
head -c $((8 << 20)) /dev/urandom > /tmp/kept
head -c $((32 << 20)) /dev/urandom > /tmp/data
write /tmp/kept 0 || give_up "there is no room for the first 8 MiB"
say "more than there is room for"
write /tmp/data 100 && give_up "32 MiB were written without room for them"
dmesg | grep "I/O error, dev vda" || give_up "the kernel saw no errors"
dd if=/dev/vda of=/tmp/read bs=1M count=8 iflag=direct 2> /tmp/dd.txt
cmp /tmp/read /tmp/kept || give_up "what was there has changed"
write /tmp/kept 0 || give_up "what has its room cannot be written"
echo "MAKE-ROOM"
tries=0
until write /tmp/data 100; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || give_up "there is room, and still nothing can be written"
    usleep 100000
done
for part in "kept 0" "data 100"; do
    set -- $part
    size=$(($(wc -c < "/tmp/$1") >> 20))
    dd if=/dev/vda of=/tmp/read bs=1M skip="$2" count=$size iflag=direct 2> /tmp/dd.txt
    cmp /tmp/read "/tmp/$1" || give_up "$1: other data"
    echo "$1=$(sha256sum < "/tmp/$1")"
done
say "done"
"""
    return Workload(script(body))


def fio_verify(num_queues: int, cpus: int, scale: int = 1, ring: str = "split") -> Workload:
    """fio writes with many block sizes and depths, reads back and verifies, in two areas at a time.

    `ring` is the ring format that must be in use.
    """
    # The negotiated feature bits from 0 on; 34 is VIRTIO_F_RING_PACKED.
    packed = "1" if ring == "packed" else "0"
    pinned = f"--cpus_allowed=0-{cpus - 1} --cpus_allowed_policy=split" if cpus > 1 else ""
    body = f"""\
[ "$(ls /sys/block/vda/mq | wc -l)" = {num_queues} ] || give_up "the disk does not have {num_queues} queues"
[ "$(cut -c 35 /sys/block/vda/device/features)" = {packed} ] || give_up "the rings are not {ring}"
verify() {{ # name, MiB for each job, options
    name=$1
    size=$(($2 * {scale}))
    shift 2
    say "fio $name"
    fio --name="$name" --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --numjobs=2 --thread {pinned} \\
        --size=${{size}}M --offset_increment=200M --verify=crc32c --verify_fatal=1 "$@" > /tmp/fio.txt 2>&1 ||
        {{ cat /tmp/fio.txt; give_up "fio $name"; }}
    grep -E 'err=|IOPS=' /tmp/fio.txt
    [ "$(grep -c 'err= 0' /tmp/fio.txt)" = 2 ] || {{ cat /tmp/fio.txt; give_up "fio $name reported an error"; }}
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
    # A machine with one processor gives its disk one queue, which is always used.
    used = each_queue_interrupts(num_queues) if cpus > 1 else ""
    return Workload(script(body + used + CLEAN_LOG), ("fio",))


# Where the host writes this text to end such a load: no load uses this part of the disk.
ENOUGH, ENOUGH_AT = b"enough", 300 << 20


def say_enough(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(ENOUGH_AT)
        file.write(ENOUGH)


def fio_verify_until_enough(ring: str) -> Workload:
    """Random writes that are read back and verified repeatedly, in rounds of some seconds, until `say_enough`."""
    enough = f"""\
enough() {{
    blockdev --flushbufs /dev/vda
    dd if=/dev/vda bs=512 skip={ENOUGH_AT // 512} count=1 2>/dev/null | grep -q {ENOUGH.decode()}
}}
"""
    return verifying(ring, f"{enough}until enough; do\n{fio_verifying(5)}done\n")


def fio_verify_for(seconds: int, ring: str) -> Workload:
    """The same in one round."""
    return verifying(ring, fio_verifying(seconds))


def fio_verify_and_grow(seconds: int, ring: str, size: int) -> Workload:
    """The same on a disk that somebody makes longer meanwhile: then it is written up to its new end."""
    grown = f"""\
{WAIT_FOR_SIZE}\
wait_for {size}
dd if=/dev/urandom of=/dev/vda bs=1M seek=$(({size} / 1048576 - 1)) count=1 oflag=direct || give_up "the new end"
"""
    return verifying(ring, fio_verifying(seconds) + grown)


def fio_command(seconds: int, file: str = "/dev/vda") -> str:
    """Random reads and writes in two areas, whose data is read back and verified."""
    return f"""\
fio --name=verify --filename={file} --direct=1 --ioengine=libaio --iodepth=32 --numjobs=2 --thread --rw=randrw \\
    --bssplit=4k/50:16k/30:64k/20 --size=32M --offset_increment=200M --verify=crc32c --verify_fatal=1 \\
    --verify_backlog=64 --time_based --runtime={seconds} --fsync=32"""


def fio_verifying(seconds: int) -> str:
    return f"""\
{fio_command(seconds)} > /tmp/fio.txt 2>&1 ||
    {{ cat /tmp/fio.txt; give_up "fio"; }}
grep -E 'err=|IOPS=' /tmp/fio.txt
[ "$(grep -c 'err= 0' /tmp/fio.txt)" = 2 ] || {{ cat /tmp/fio.txt; give_up "fio reported an error"; }}
"""


def verifying(ring: str, load: str) -> Workload:
    packed = "1" if ring == "packed" else "0"
    body = f"""\
[ "$(cut -c 35 /sys/block/vda/device/features)" = {packed} ] || give_up "the rings are not {ring}"
say "fio begins"
{load}\
echo "verified_kib=$(awk '{{ print int($3 / 2) }}' /sys/block/vda/stat)"
"""
    return Workload(script(body + CLEAN_LOG), ("fio",))


def each_queue_interrupts(num_queues: int) -> str:
    """Shell lines that fail unless /proc/interrupts of a PC shows completions of every queue."""
    return f"""\
for queue in $(seq 0 {num_queues - 1}); do
    line=$(grep -E "virtio[0-9]+-req\\.$queue\\$" /proc/interrupts) || give_up "queue $queue has no interrupt"
    echo "$line"
    echo "$line" | awk '{{ exit !($2 + $3 > 0) }}' || give_up "queue $queue was never used"
done
"""


def no_disk() -> Workload:
    """A guest that boots without the disk."""
    return Workload("[ ! -b /dev/vda ] || exit 1\n")


def zones(zone_mib: int, count: int, conventional: int) -> Workload:
    """Reports and resets zones, writes and verifies them with fio's zoned mode, and exhausts open zones.

    A write that is not at the write pointer fails; no file system is needed for that.
    """
    body = f"""\
[ "$(cat /sys/block/vda/queue/zoned)" = host-managed ] || give_up "the disk is not zoned"
[ "$(cat /sys/block/vda/queue/chunk_sectors)" = {zone_mib * 2048} ] || give_up "wrong size of zones"
[ "$(cat /sys/block/vda/queue/nr_zones)" = {count} ] || give_up "wrong number of zones"
blkzone report /dev/vda > /tmp/zones.txt || give_up "blkzone report"
[ "$(grep -c CONVENTIONAL /tmp/zones.txt)" = {conventional} ] || give_up "wrong number of conventional zones"
[ "$(grep -c 'zcond: 1(em)' /tmp/zones.txt)" = {count - conventional} ] || give_up "not all zones are empty"
first={conventional * zone_mib * 2048}
dd if=/dev/urandom of=/tmp/data bs=64k count=4
dd if=/tmp/data of=/dev/vda bs=64k oflag=direct seek=$((first / 128)) || give_up "a write at the pointer"
blkzone report -o $first -c 1 /dev/vda | tee /tmp/zone.txt
grep -q 'wptr 0x000200.*zcond: 2(oi)' /tmp/zone.txt || give_up "the pointer did not move"
if dd if=/tmp/data of=/dev/vda bs=64k count=1 oflag=direct seek=$((first / 128)) 2> /tmp/dd.txt; then
    give_up "a write behind the pointer succeeded"
fi
dd if=/dev/vda bs=64k count=4 iflag=direct skip=$((first / 128)) | cmp - /tmp/data || give_up "other data"
for action in open close finish reset; do
    blkzone $action -o $first -c 1 /dev/vda || give_up "blkzone $action"
    blkzone report -o $first -c 1 /dev/vda
done > /tmp/states.txt
echo "states=$(sed 's/.*zcond: *//; s/(.*//' /tmp/states.txt | tr '\n' ' ')"
dmesg -c > /dev/null
verify() {{ # name, options
    name=$1
    shift
    say "fio $name"
    fio --name="$name" --filename=/dev/vda --direct=1 --zonemode=zbd --offset=$((first * 512)) --thread \\
        --verify=crc32c --verify_fatal=1 "$@" > /tmp/fio.txt 2>&1 || {{ cat /tmp/fio.txt; give_up "fio $name"; }}
    grep -E 'err=|IOPS=' /tmp/fio.txt
    grep -q 'err= 0' /tmp/fio.txt || give_up "fio $name reported an error"
    grep -q 'read: IOPS' /tmp/fio.txt || give_up "fio $name verified nothing"
    blkzone reset -o $first /dev/vda || give_up "reset"
}}
verify 4k-write --rw=write --bs=4k --size=32M --ioengine=psync
verify 64k-randwrite --rw=randwrite --bs=64k --size=64M --io_size=96M --max_open_zones=4 --ioengine=libaio --iodepth=8
verify 1M-write --rw=write --bs=1M --size=96M --ioengine=libaio --iodepth=8
blkzone report /dev/vda | grep -v CONVENTIONAL | grep -vc 'zcond: 1(em)' && give_up "a zone was not reset"
"""
    return Workload(script(body + CLEAN_LOG), ("fio", "blkzone"))


def zoned_filesystem() -> Workload:
    """btrfs in its zoned mode, which uses zone append: files, a scrub, and the files again after a remount."""
    body = """\
mkfs.btrfs -q -f -O zoned -d single -m single /dev/vda || give_up "mkfs.btrfs"
mount -t btrfs /dev/vda /mnt || give_up "mount"
for round in 1 2 3; do
    mkdir /mnt/$round
    head -c 24000000 /dev/urandom | (cd /mnt/$round && split -a 4 -b 100007 - file-)
    sync
done
rm -r /mnt/2
(cd /mnt && find . -type f | sort | xargs sha256sum) > /tmp/sums
btrfs scrub start -B /mnt > /tmp/scrub.txt || { cat /tmp/scrub.txt; give_up "scrub"; }
grep -q 'no errors found' /tmp/scrub.txt || { cat /tmp/scrub.txt; give_up "scrub found errors"; }
umount /mnt
mount -t btrfs /dev/vda /mnt || give_up "mount again"
(cd /mnt && sha256sum -c -s /tmp/sums) || give_up "a file is another one now"
echo "files=$(wc -l < /tmp/sums)"
umount /mnt
"""
    return Workload(script(body + CLEAN_LOG), ("mkfs.btrfs", "btrfs", "split"))


def probe() -> Workload:
    """The disk's properties as the guest sees them."""
    body = """\
echo "size=$(($(cat /sys/block/vda/size) * 512))"
echo "ro=$(cat /sys/block/vda/ro)"
echo "logical_block_size=$(cat /sys/block/vda/queue/logical_block_size)"
echo "queues=$(ls /sys/block/vda/mq | wc -l)"
echo "write_cache=$(cat /sys/block/vda/queue/write_cache)"
echo "serial=$(cat /sys/block/vda/serial)"
for limit in physical_block_size minimum_io_size optimal_io_size discard_granularity discard_max_bytes; do
    echo "$limit=$(cat /sys/block/vda/queue/$limit)"
done
"""
    return Workload(script(body + CLEAN_LOG))


def write_pattern(mib: int, start: int = 0) -> Workload:
    """Random data from the MiB `start` of the disk on; the checksum is printed before the data is written."""
    body = f"""\
dd if=/dev/urandom of=/tmp/data bs=1M count={mib}
sum=$(sha256sum < /tmp/data)
echo "sha256=$sum"
dd if=/tmp/data of=/dev/vda bs=64k seek={start * 16} conv=fsync
"""
    return Workload(script(body + CLEAN_LOG))


def start_of_disk(mib: int) -> str:
    # A separate assignment, because a command that fails inside the arguments of echo would go unnoticed.
    return f"""\
sum=$(dd if=/dev/vda bs=1M count={mib} | sha256sum)
echo "sha256=$sum"
"""


def marks(token: str) -> Workload:
    """A file system whose files are named in marks of a recording: in a file, and in a block that nothing else uses."""
    body = f"""\
mkfs.ext4 -q -F /dev/vda 65536
mount -t ext4 /dev/vda /mnt
printf '%s%s' "{token}" "mounted" | dd of=/mnt/mark bs=4096 conv=sync oflag=direct
head -c 300000 /dev/urandom > /mnt/file
sync
printf '%s%s' "{token}" "synced" | dd of=/mnt/mark bs=4096 conv=sync oflag=direct
umount /mnt
printf '%s%s' "{token}" "unmounted" | dd of=/dev/vda bs=512 seek=200000 conv=sync oflag=direct
"""
    return Workload(script(body + CLEAN_LOG), ("mkfs.ext4",))


def read_pattern(mib: int) -> Workload:
    """The checksum of the start of the disk."""
    return Workload(script(start_of_disk(mib) + CLEAN_LOG))


def read_only(mib: int) -> Workload:
    """A disk that can be read, but neither opened for writing nor formatted."""
    body = """\
[ "$(cat /sys/block/vda/ro)" = 1 ] || give_up "the disk is writable"
if dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync,notrunc; then give_up "a write succeeded"; fi
if mkfs.ext4 -q -F /dev/vda; then give_up "mkfs succeeded"; fi
say "done"
"""
    return Workload(script(start_of_disk(mib) + body), ("mkfs.ext4",))
