"""What guests do for the laboratory, and how each state is checked: file systems, SQLite, PostgreSQL, a toy program."""

from __future__ import annotations

from . import cut_postgresql
from .cut_guests import XFS, Subject

PATHS = "PATH=$PATH:/usr/sbin:/sbin"

# Files are written, synced, renamed and removed; each mark promises the files of its round.
FILES = """\
for round in $(seq $rounds); do
    mkdir /mnt/$round
    for number in 1 2 3 4 5 6 7 8; do
        head -c $((number * 3000)) /dev/urandom > /mnt/$round/new
        mv /mnt/$round/new /mnt/$round/file$number
    done
    (cd /mnt/$round && sha256sum file* > sums)
    [ $round -lt 3 ] || rm -r /mnt/$((round - 2))
    sync
    mark $round
done
"""

# The files of the last round that was synced are in {folder}/{mark}.
SAME_FILES = "(cd {folder}/{mark} && sha256sum -c --quiet sums)"
EXT4 = (
    f"{PATHS}; e2fsck -p {{image}}; e2fsck -fn {{image}} || exit; test {{mark}} = mounted || "
    f"{{ debugfs -R 'rdump /{{mark}} {{folder}}' {{image}} && {SAME_FILES}; }}"
)

# The log is replayed when it is mounted. Two checks at the same time have file systems with the same UUID.
XFS_CHECK = (
    f"{PATHS}; mount -t xfs -o loop,nouuid {{image}} {{folder}} || exit; "
    f"test {{mark}} = mounted || {SAME_FILES} || exit; umount {{folder}} && xfs_repair -n {{image}}"
)
# Metadata is written to its place a second after it was logged, and not after half a minute.
XFS_FILES = "echo 100 > /proc/sys/fs/xfs/xfssyncd_centisecs\n" + FILES.replace(
    "mark $round", "mark $round\n    sleep 1"
)

# A bank: each transaction moves money between two accounts, and the mark promises that it is there.
BANK = """\
sqlite() { sqlite3 /mnt/bank.db "PRAGMA synchronous=SYNCHRONOUS;" "$@"; }
sqlite "CREATE TABLE account (id INTEGER PRIMARY KEY, money INTEGER)" \\
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)
        INSERT INTO account SELECT i, 100 FROM n" \\
    "CREATE TABLE moved (id INTEGER PRIMARY KEY)" > /dev/null
sync
mark 0
for number in $(seq $((rounds * 4))); do
    sqlite "BEGIN; UPDATE account SET money = money - 1 WHERE id % 25 = $number % 25; \\
        UPDATE account SET money = money + 1 WHERE id % 25 = ($number + 7) % 25; \\
        INSERT INTO moved VALUES ($number); COMMIT" > /dev/null
    mark $number
done
"""


def bank(synchronous: str, check: str, *, planted: bool) -> Subject:
    work = BANK.replace("SYNCHRONOUS", synchronous)
    return Subject(work, check, planted, programs=("sqlite3",), first_mark="0")


# The journal of the file system is replayed, the database is copied out of it, and recovers by itself.
CONSISTENT = (
    f"set -f; {PATHS}; e2fsck -p {{image}} > /dev/null; debugfs -R 'rdump / {{folder}}' {{image}} > /dev/null 2>&1; "
    "set -- $(sqlite3 {folder}/bank.db 'PRAGMA integrity_check' 'SELECT sum(money) FROM account' "
    "'SELECT coalesce(max(id), 0) FROM moved' | tr '\\n' ' '); echo \"$@\"; "
    'test "$1" = ok && test "$2" = 20000'
)
# What was committed is there.
DURABLE = CONSISTENT + ' && test "$3" -ge {mark}'

# A toy program that replaces a file in the usual way, beside others that sync what is theirs.
REPLACE = """\
write() { { yes "version $1" | head -n 500; echo end; } 2> /dev/null > /tmp/content; dd if=/tmp/content of=$2 SYNC; }
set +o pipefail
write 0 /mnt/config 2> /tmp/dd.txt
sync
mark 0
for number in $(seq $rounds); do
    write $number /mnt/new 2> /tmp/dd.txt
    mv /mnt/new /mnt/config
    dd if=/dev/urandom of=/mnt/other bs=4096 count=1 conv=fsync 2> /tmp/dd.txt
    mark $number
done
"""
# Old or new, but whole.
REPLACED = f"{PATHS}; e2fsck -p {{image}} > /dev/null; debugfs -R 'cat config' {{image}} | tail -n 1 | grep -qx end"


def replacing(how: str, *, planted: bool) -> Subject:
    # By default ext4 itself writes the content of a file that replaces another.
    return Subject(REPLACE.replace("SYNC", how), REPLACED, planted, mount="-o noauto_da_alloc", first_mark="0")


SUBJECTS = {
    "ext4": Subject(FILES, EXT4, planted=False),
    "ext4-barrier=0": Subject(FILES, EXT4, planted=True, mount="-o barrier=0"),
    "ext4-lying-flush": Subject(FILES, EXT4, planted=True, options=("--policy", "lying_flush")),
    "xfs": Subject(XFS_FILES, XFS_CHECK, planted=False, file_system=XFS),
    "xfs-lying-flush": Subject(XFS_FILES, XFS_CHECK, True, file_system=XFS, options=("--policy", "lying_flush")),
    "rename": replacing("", planted=True),
    "rename-fsync": replacing("conv=fsync", planted=False),
    # FULL does not sync the folder when the journal is removed, so the last transaction may be rolled back; EXTRA does.
    "sqlite-FULL": bank("FULL", CONSISTENT, planted=False),
    "sqlite-EXTRA": bank("EXTRA", DURABLE, planted=False),
    "sqlite-OFF": bank("OFF", DURABLE, planted=True),
    "postgresql": cut_postgresql.subject("on", planted=False),
    "postgresql-fsync=off": cut_postgresql.subject("off", planted=True),
}
