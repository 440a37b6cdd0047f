"""The guests of a day of operation: verified loads until the host says that it is enough, and what their disks do."""

from .workloads import CLEAN_LOG, Workload, fio_command, script

# Where the host writes that it is enough: in the part of a disk that may appear when it is resized.
MARK, MARK_AT = b"enough", 1000 << 20
SMALL, LARGE = 512 << 20, 1 << 30
# The file system leaves that part free.
FILE_SYSTEM_MIB = 896

FUNCTIONS = f"""\
now() {{ cut -d ' ' -f 1 /proc/uptime; }}
completed() {{ awk '{{ print $1 + $5 }}' /sys/block/vda/stat; }}
size() {{ echo $(($(cat /sys/block/vda/size) * 512)); }}
enough() {{
    # Where the disk is shorter, dd would read all of it.
    [ "$(size)" -gt {MARK_AT} ] &&
        dd if=/dev/vda bs=4096 skip={MARK_AT // 4096} count=1 iflag=direct 2> /tmp/dd.txt | grep -q {MARK.decode()}
}}
begin() {{
    "$@" > /tmp/fio.txt 2>&1 &
    load=$!
}}
observe() {{ # two seconds of the load
    # The time that is taken between clock and counter makes the rate lower, never higher.
    before="$(now) $(completed)"
    sleep 2
    kill -0 $load 2> /tmp/kill.txt || {{ cat /tmp/fio.txt; give_up "the load has ended"; }}
    say "$(echo "$before $(completed) $(now)" | awk '{{ printf "%d requests per second", ($3 - $2) / ($4 - $1) }}')"
}}
end() {{
    kill $load
    wait $load || true
    [ "$(grep -c 'err= 0' /tmp/fio.txt)" = 2 ] || {{ cat /tmp/fio.txt; give_up "fio reported an error"; }}
    say "no errors: $(awk '{{ printf "%d MiB read, %d MiB written", $3 / 2048, $7 / 2048 }}' /sys/block/vda/stat)"
}}
say "the disk has $(size) bytes"
"""

# fio is told to end before that.
HOURS = 10 * 3600


def web_server() -> Workload:
    """A load on the raw disk; at the end, `sha256=` is the checksum of its first 32 MiB."""
    body = f"""\
begin {fio_command(HOURS)}
until enough; do observe; done
end
sum=$(dd if=/dev/vda bs=1M count=32 iflag=direct 2> /tmp/dd.txt | sha256sum)
echo "sha256=$sum"
"""
    return Workload(script(FUNCTIONS + body + CLEAN_LOG), ("fio",))


def database() -> Workload:
    """Files that stay, with their checksums, and a load on another one. The file system grows with the disk."""
    body = f"""\
known=$(size)
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
mkdir -p /mnt/kept/files
head -c 4000000 /dev/urandom | (cd /mnt/kept/files && split -a 4 -b 10007 - file-)
(cd /mnt/kept && find files -type f | sort | xargs sha256sum) > /tmp/sums
cp /tmp/sums /mnt/kept/sums
dd if=/dev/zero of=/mnt/load bs=1M count=32 2> /tmp/dd.txt
sync
say "$(wc -l < /tmp/sums) files are stored"
begin {fio_command(HOURS, "/mnt/load")} --size=16M --offset_increment=16M --iodepth=4
until enough; do
    observe
    if [ "$(size)" != "$known" ]; then
        known=$(size)
        say "the disk has $known bytes"
        resize2fs /dev/vda {FILE_SYSTEM_MIB}M > /tmp/resize.txt 2>&1 || {{ cat /tmp/resize.txt; give_up "resize2fs"; }}
        say "the file system has $(df -m /mnt | awk 'END {{ print $2 }}') MiB"
    fi
done
end
(cd /mnt/kept && sha256sum -c -s sums) || give_up "a file has changed"
umount /mnt
e2fsck -fn /dev/vda
"""
    return Workload(script(FUNCTIONS + body + CLEAN_LOG), ("fio", "mkfs.ext4", "e2fsck", "resize2fs", "split"))
