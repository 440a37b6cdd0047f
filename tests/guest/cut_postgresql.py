"""PostgreSQL as a subject of the laboratory: a bank that several clients use, and its recovery as a check."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

from .cut_guests import EXT4, MIB, Subject
from .kernels import need

# A wrapper for all versions is in the PATH, which needs more than a guest has.
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/lib/postgresql/15/bin"))
# What the server reads from its share folder when it starts.
SETTINGS = Path("/usr/share/postgresql", PROGRAMS.parent.name, "timezonesets/Default")

# PostgreSQL refuses root.
AS_USER = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []

# Small segments of the log, few buffers: checkpoints are frequent, and pages are written between them.
CONFIGURATION = """
timezone = 'GMT'
log_timezone = 'GMT'
listen_addresses = ''
unix_socket_directories = '/tmp'
shared_buffers = 1MB
min_wal_size = 2MB
max_wal_size = 4MB
jit = off
"""

TABLES = """\
CREATE EXTENSION amcheck;
CREATE TABLE account (id integer PRIMARY KEY, money integer NOT NULL);
INSERT INTO account SELECT id, 100 FROM generate_series(1, 2000) AS id;
CREATE TABLE moved (giver integer, taker integer, amount integer);
CREATE INDEX ON moved (giver, amount);
CREATE TABLE promised (number integer PRIMARY KEY);
"""

# Several clients move money. Beside them numbers are inserted, one by one; the mark promises that it is committed.
WORK = """\
bin=PROGRAMS
mkdir -p $bin/../lib
chmod 1777 /tmp
user=$(stat -c %u /mnt/data) group=$(stat -c %g /mnt/data)
echo 100 > /proc/sys/vm/dirty_expire_centisecs
echo 50 > /proc/sys/vm/dirty_writeback_centisecs
cat > /tmp/move.sql <<END
\\set giver random(1, 2000)
\\set taker :giver % 2000 + 1
\\set amount random(1, 100)
BEGIN;
UPDATE account SET money = money - :amount WHERE id = :giver;
UPDATE account SET money = money + :amount WHERE id = :taker;
INSERT INTO moved VALUES (:giver, :taker, :amount);
COMMIT;
END
# Busybox has another setpriv.
/usr/bin/setpriv --reuid $user --regid $group --clear-groups $bin/postgres -D /mnt/data -c fsync=SWITCH \\
    > /tmp/log 2>&1 &
server=$!
sql() { $bin/psql -h /tmp -U postgres -d postgres -qAtX -v ON_ERROR_STOP=1 -c "$1"; }
until sql 'SELECT 1' > /tmp/psql.txt 2>&1; do
    kill -0 $server || { cat /tmp/log /tmp/psql.txt; give_up "PostgreSQL does not start"; }
    usleep 100000
done
$bin/pgbench -h /tmp -U postgres -n -f /tmp/move.sql -c 3 -R 10 -T 3600 postgres > /tmp/pgbench.txt 2>&1 &
sync
mark 0
for number in $(seq $rounds); do
    sql "INSERT INTO promised VALUES ($number)"
    mark $number
    [ $number != $((rounds / 2)) ] || sql CHECKPOINT
done
"""

# As a machine does that has lost its power: recovery by another user, all pages and indexes, what was committed.
CHECK = (
    f"PATH={PROGRAMS}:$PATH:/usr/sbin:/sbin; e2fsck -p {{image}} > /dev/null; "
    "debugfs -R 'rdump /data {folder}' {image} > /dev/null 2>&1; chmod 755 {folder}; cd {folder}; "
    f"as='{' '.join(AS_USER)}'; "
    'at="-h $PWD/data -U postgres -d postgres"; rm -f data/postmaster.pid; '
    '$as pg_ctl start -s -w -D data -l data/log -o "-F -k $PWD/data" || { cat data/log; exit 1; }; '
    "set -- $(psql $at -qAtX -v ON_ERROR_STOP=1 -c 'SELECT sum(money) FROM account' "
    "-c 'SELECT count(*) FROM (SELECT id, money FROM account EXCEPT SELECT id, 100 - coalesce(given, 0) + "
    "coalesce(taken, 0) FROM account LEFT JOIN (SELECT giver AS id, sum(amount) AS given FROM moved GROUP BY 1) AS a "
    "USING (id) LEFT JOIN (SELECT taker AS id, sum(amount) AS taken FROM moved GROUP BY 1) AS b USING (id)) AS wrong' "
    "-c 'SELECT coalesce(max(number), 0) FROM promised'); "
    'echo "$@"; test "$1 $2" = "200000 0" && test "$3" -ge {mark} && '
    "pg_amcheck $at --heapallindexed --parent-check && $as pg_ctl stop -s -w -D data -m fast && "
    "$as pg_checksums --check -D data"
)


def fill(folder: Path) -> None:
    """Make a cluster in folder/data."""
    need(PROGRAMS if PROGRAMS.exists() else None, "PostgreSQL is wanted: install the Debian package postgresql")
    data = folder / "data"
    data.mkdir()
    if AS_USER:
        shutil.chown(data, "postgres", "postgres")
    folder.chmod(0o755)
    initdb = [PROGRAMS / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--locale=C", "-E", "UTF8", "-k", "-N"]
    run(*initdb, "--wal-segsize=1")
    with (data / "postgresql.conf").open("a") as settings:
        settings.write(CONFIGURATION)
    run(PROGRAMS / "postgres", "--single", "-F", "-D", data, "postgres", text=TABLES)


def run(*command: str | Path, text: str = "") -> None:
    subprocess.run([*AS_USER, *command], input=text, text=True, check=True, stdout=subprocess.PIPE, cwd="/")


def subject(fsync: str, *, planted: bool) -> Subject:
    return Subject(
        WORK.replace("PROGRAMS", str(PROGRAMS)).replace("SWITCH", fsync),
        CHECK,
        planted,
        file_system=dataclasses.replace(EXT4, size=95 * MIB),
        fill=fill,
        programs=(*(str(PROGRAMS / name) for name in ("postgres", "psql", "pgbench")), "setpriv"),
        files=(str(SETTINGS),),
        first_mark="0",
        rounds=4,
        states=30,
    )
