"""What Linux sees of each policy that ships: faults, and models of slow disks, changed over the API of its disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringplane.options.policy_options import parse_policy
from ringplane.policies.loading import shipped
from ringplane.recordings import entries
from ringplane.recordings.reader import open_recording

from .back_end_processes import STAND_IN, BackendFactory
from .guest_api import ProgrammedDisk
from .machines import UmlGuest

pytestmark = pytest.mark.skipif(STAND_IN, reason="only for ringplane")

# Requests that fail, or do not end.
FAILING = (
    "read_only_after,errors=0,name=worn,enabled=no",
    "error,operation=read,where=16M-17M",
    "bad_blocks,where=32M-32772K",
    "no_space,space=5M",
    "hang,operation=write,where=128M-129M,name=stuck",
)
# Data that is wrong; each in a MiB of its own.
WRONG = (
    "corrupt,operation=read,where=16M-17M,bits=1,times=1,name=flipped",
    "corrupt,operation=write,where=17M-18M,kind=zeros,times=1,name=cleared",
    "corrupt,where=18M-19M,kind=stuck,bit=3,stuck_at=1,name=stuck",
    "old_data,where=19M-20M",
    "lost_writes,where=20M-21M,skip=1,times=1",
    "torn_writes,unit=4096,where=21M-22M,skip=1,times=1",
    "misdirected_writes,distance=1M,where=22M-23M,skip=1,times=1",
    "lying_flush,enabled=no",
)
SLOW = (
    "delay,operation=read,time=300ms,enabled=no",
    "spinning_disk,enabled=no",
    "ssd,chips=2,read=5ms,program=20ms,buffer=64K,collect_every=1M,enabled=no",
    "cloud_volume,iops=1,burst_iops=1000,io_credits=1,enabled=no",
)
IN_FILES = (
    "read_only_after,errors=1,enabled=no",
    "error,operation=write,times=1,enabled=no",
    "lost_writes,enabled=no",
    "corrupt,operation=read,enabled=no",
)

# Places are in MiB.
ACCESS = """\
read_at() { dd if=/dev/vda of=/dev/null bs=4096 count=1 skip=$(($1 * 256)) iflag=direct 2> /tmp/dd.txt; }
write_at() { dd if=/dev/zero of=/dev/vda bs=4096 count=1 seek=$(($1 * 256)) oflag=direct 2> /tmp/dd.txt; }
works() { "$@" || { cat /tmp/dd.txt; give_up "$*"; }; }
fails() {
    if "$@"; then give_up "$* does not fail"; fi
    grep -q "Input/output error" /tmp/dd.txt || give_up "$*: $(cat /tmp/dd.txt)"
}
"""

# Five MiB are written, so there is no space for the sixth.
SEES_FAILURES = """\
say "errors"
works read_at 15
fails read_at 16
works write_at 16
say "a bad block heals"
fails read_at 32
works write_at 32
works read_at 32
say "a write hangs"
write_at 128 &
count stuck hung
until [ $count = 1 ]; do count stuck hung; done
works read_at 15
[ "$(awk '{ print $2 }' /sys/block/vda/inflight)" = 1 ] || give_up "the write does not hang"
disable stuck
wait $! || give_up "what was released has failed"
say "no space"
works write_at 64
works write_at 65
fails write_at 66
works write_at 64
say "read-only"
enable worn
fails write_at 64
fails write_at 16
works read_at 64
say "done"
"""

# 16 KiB of the same letter, in one request.
SEES_WRONG_DATA = """\
size=16384
for letter in a b; do head -c $size /dev/zero | tr '\\0' $letter > /tmp/$letter; done
put() { works dd if=/tmp/$1 of=/dev/vda bs=$size count=1 seek=$(($2 * 64)) oflag=direct 2> /tmp/dd.txt; }
get() { works dd if=/dev/vda of=/tmp/got bs=$size count=1 skip=$(($1 * 64)) iflag=direct 2> /tmp/dd.txt; }
only() { tr -dc "$1" < /tmp/got | wc -c; } # how many of these characters it has
is() { cmp -s /tmp/$1 /tmp/got || give_up "it is not $1, but $(tr -s '\\0-\\377' < /tmp/got | head -c 80)"; }
say "a bit is flipped, on the way to the guest"
put a 16
get 16
[ "$(cmp -l /tmp/a /tmp/got | wc -l)" = 1 ] || give_up "not one byte is wrong"
get 16
is a
say "a sector is zero, and stays so"
put a 17
for _ in 1 2; do
    get 17
    [ "$(only '\\0')" = 512 ] || give_up "$(only '\\0') zeros"
    [ "$(only a)" = $((size - 512)) ] || give_up "$(only a) times a"
done
put a 17
get 17
is a
say "a bit of each sector is stuck: a becomes i, and b becomes j"
put a 18
get 18
[ "$(only i) $(only a)" = "32 $((size - 32))" ] || give_up "$(only i) times i"
put b 18
get 18
[ "$(only j) $(only b)" = "32 $((size - 32))" ] || give_up "$(only j) times j"
say "old data"
put a 19
get 19
is a
put b 19
get 19
is a
say "a write is lost"
put a 20
put b 20
get 20
is a
put b 20
get 20
is b
say "a write is torn"
put a 21
put b 21
get 21
torn=$(only b)
case $torn in 4096 | 8192 | 12288) ;; *) give_up "$torn bytes are written" ;; esac
head -c $torn /tmp/b > /tmp/torn
tail -c $((size - torn)) /tmp/a >> /tmp/torn
is torn
say "a write is misdirected"
put a 22
put b 22
get 22
is a
get 23
is b
say "a flush lies"
synced() { works dd if=/tmp/a of=/dev/vda bs=$size count=1 seek=2000 conv=fsync 2> /tmp/dd.txt; }
enable lying_flush
api POST recording/marks '{"text": "lying"}'
synced
api POST recording/marks '{"text": "honest"}'
disable lying_flush
synced
api POST recording/marks '{"text": "done"}'
say "done"
"""

# /proc/uptime has hundredths of a second.
SEES_SLOW_DISKS = """\
now() { awk '{ print int($1 * 100 + 0.5) }' /proc/uptime; }
begin() { began=$(now); }
took() { # at least so many hundredths of a second
    lasted=$(($(now) - began))
    say "$lasted hundredths of a second"
    [ $lasted -ge $1 ] || give_up "not $1"
}
say "a delay of 300 ms"
enable delay
begin
works read_at 1
took 29
disable delay
say "a head that moves nearly across the disk, which takes 15 ms"
enable spinning_disk
begin
for _ in 1 2 3 4 5 6 7 8 9 10; do
    works read_at 1
    works read_at 500
done
took 27
count spinning_disk seeks
random=$count
[ $random -ge 19 ] || give_up "$random seeks"
dd if=/dev/vda of=/dev/null bs=64k count=64 skip=1600 iflag=direct 2> /tmp/dd.txt
count spinning_disk seeks
[ $((count - random)) = 1 ] || give_up "$((count - random)) seeks of sequential reads"
say "its cache, which a flush empties: ordered writes take 3/8 of that time"
begin
for _ in 1 2 3 4 5 6 7 8 9 10; do
    works write_at 1
    works write_at 500
done
works dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct conv=fsync 2> /tmp/dd.txt
took 10
disable spinning_disk
say "chips that read a page in 5 ms, and program it in 20: 64 pages on two chips"
enable ssd
begin
works dd if=/dev/vda of=/dev/null bs=4096 count=20 iflag=direct 2> /tmp/dd.txt
took 9
begin
works dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct conv=fsync 2> /tmp/dd.txt
took 62
disable ssd
say "a volume of one I/O per second, with one credit"
enable cloud_volume
begin
works dd if=/dev/vda of=/dev/null bs=4096 count=4 iflag=direct 2> /tmp/dd.txt
took 198
disable cloud_volume
say "done"
"""

SEES_IN_FILES = """\
size=65536
for letter in a b; do head -c $size /dev/zero | tr '\\0' $letter > /tmp/$letter; done
mkfs.ext4 -q -F -b 4096 /dev/vda 16384
mount -t ext4 -o noatime /dev/vda /mnt
overwrite() { dd if=/tmp/$1 of=/mnt/file bs=$size conv=notrunc,fsync 2> /tmp/dd.txt; }
works overwrite a
sync
say "a write is lost: fsync succeeds, and the file has its new data until the page cache is dropped"
enable lost_writes
works overwrite b
disable lost_writes
cmp /tmp/b /mnt/file || give_up "the page cache has not what was written"
echo 3 > /proc/sys/vm/drop_caches
cmp /tmp/a /mnt/file || give_up "the file has not its old data"
say "a bit rots: the file is another one, and no error is reported"
enable corrupt
works dd if=/mnt/file of=/tmp/got bs=$size iflag=direct 2> /tmp/dd.txt
disable corrupt
if cmp -s /tmp/a /tmp/got; then give_up "the data is not corrupt"; fi
works dd if=/mnt/file of=/tmp/got bs=$size iflag=direct 2> /tmp/dd.txt
cmp /tmp/a /tmp/got
say "a drive that has worn out: fsync fails once, and then the file system is read-only"
sync
enable read_only_after
enable error
fails overwrite b
until ! touch /mnt/new 2> /tmp/touch.txt; do
    rm -f /mnt/new || true
    sync
done
grep -q "Read-only file system" /tmp/touch.txt || give_up "$(cat /tmp/touch.txt)"
echo 3 > /proc/sys/vm/drop_caches
works dd if=/mnt/file of=/tmp/got bs=$size iflag=direct 2> /tmp/dd.txt
cmp /tmp/a /tmp/got || give_up "the file cannot be read"
say "done"
"""


@pytest.fixture
def disk(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> ProgrammedDisk:
    return ProgrammedDisk(backend, uml, disk_image)


def test_all_of_them_are_seen() -> None:
    seen = {parse_policy(text).policy for text in (*FAILING, *WRONG, *SLOW, *IN_FILES)}
    assert seen == set(shipped())


def test_requests_fail_and_hang(disk: ProgrammedDisk) -> None:
    counted = disk.run(FAILING, ACCESS + SEES_FAILURES)
    assert counted["error"]["failed"] == 1
    assert (counted["bad_blocks"]["failed"], counted["bad_blocks"]["healed"]) == (1, 1)
    assert counted["stuck"]["hung"] == 1
    assert counted["no_space"]["failed"] == 1
    assert counted["worn"]["rejected"] == 2


def test_data_is_wrong(disk: ProgrammedDisk, tmp_path: Path) -> None:
    path = tmp_path / "disk.rec"
    counted = disk.run(WRONG, ACCESS + SEES_WRONG_DATA, extra=["--record", str(path)])
    assert (counted["flipped"]["corrupted"], counted["cleared"]["corrupted"]) == (1, 1)
    assert counted["stuck"]["corrupted"] == counted["stuck"]["matched"] == 4
    assert counted["old_data"]["read"] == 1
    assert (counted["lost_writes"]["lost"], counted["lost_writes"]["matched"]) == (1, 3)
    assert (counted["torn_writes"]["torn"], counted["misdirected_writes"]["misdirected"]) == (1, 1)
    assert counted["lying_flush"]["ignored"] == counted["lying_flush"]["flushes"] >= 1
    # What storage was given.
    kinds = [entry.text if entry.kind == entries.MARK else entry.kind for entry in open_recording(path)]
    lying, honest, done = map(kinds.index, ("lying", "honest", "done"))
    assert entries.WRITE in kinds[lying:honest]
    assert entries.FLUSH not in kinds[lying:honest]
    assert entries.FLUSH in kinds[honest:done]


def test_disks_are_slow(disk: ProgrammedDisk) -> None:
    counted = disk.run(SLOW, ACCESS + SEES_SLOW_DISKS)
    assert (counted["delay"]["delayed"], counted["delay"]["delays"]) == (1, 300_000)
    assert counted["ssd"]["collections"] == 1
    assert counted["cloud_volume"]["without_io_credits"] >= 1


def test_a_file_system_meets_them(disk: ProgrammedDisk) -> None:
    counted = disk.run(IN_FILES, ACCESS + SEES_IN_FILES, ("mkfs.ext4",))
    assert counted["lost_writes"]["lost"] >= 1
    assert counted["corrupt"]["corrupted"] >= 1
    assert counted["error"]["failed"] == 1
    assert counted["read_only_after"]["failures"] == 1
    assert counted["read_only_after"]["rejected"] >= 1
