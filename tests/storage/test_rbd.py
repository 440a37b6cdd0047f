"""RBD images of a real Ceph cluster, served by a real process, confined as always."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ceph import CephCluster
from ringplane.api.schemas import Disks, Statistics
from ringplane.client.api_errors import ApiError
from ringplane.client.client import disk_path
from ringplane.driver import Driver
from ringplane.driver.driver import segments
from ringplane.driver.load import Load, run_load
from ringplane.virtio.blk import (
    SECTOR,
    SEGMENT_F_UNMAP,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from unit.rig import LOGGING_AT_ONCE

from .serving import API, PATIENCE, Disk, restart, serving, upgrade, wait_until

MIB = 1 << 20
SIZE = 64 * MIB
# Of librbd's discards, and of an object.
GRANULARITY, OBJECT = 64 << 10, 4 * MIB
OK, IOERR = VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR


@pytest.fixture
def image(cluster: CephCluster) -> str:
    return cluster.new_image()


def objects(cluster: CephCluster, image: str) -> int:
    """How many objects have data."""
    pool, _, name = image.partition("/")
    prefix = cluster.rbd("info", image, "--format", "json").split('"block_name_prefix":"')[1].split('"')[0]
    assert name
    return cluster.rados("-p", pool, "ls").count(prefix)


@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_what_is_written_is_read(cluster: CephCluster, image: str, engine: str) -> None:
    """Buffers of any size at any address, whole objects and single sectors, and more than a piece at a time."""
    chance = random.Random(1)
    with serving(Disk(cluster.address(image)), engine=engine) as served, served.driver() as driver:
        assert driver.capacity == SIZE
        model = bytearray(SIZE)
        for length in (SECTOR, 4096, 3 * SECTOR, MIB + SECTOR, OBJECT, 2 * OBJECT + 8 * SECTOR):
            offset = chance.randrange(0, (SIZE - length) // SECTOR) * SECTOR
            data = model[offset : offset + length] = chance.randbytes(length)
            parts = [16, length // 3, length - length // 3]
            answer = driver.request(VIRTIO_BLK_T_OUT, offset // SECTOR, data, readable=parts, misalign=3)
            assert answer.status == OK
            parts = [length // 5, length - length // 5, 1]
            answer = driver.request(VIRTIO_BLK_T_IN, offset // SECTOR, read=length, writable=parts, misalign=1)
            assert (answer.status, answer.used) == (OK, length + 1)
            assert answer.data == data
        assert driver.read(0, SIZE) == model
        driver.flush()
    assert cluster.rbd("info", image)


def test_it_is_in_the_cluster(cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """Ceph's own program reads what was written and flushed, and writes what is read."""
    data = random.Random(2).randbytes(MIB)
    (tmp_path / "data").write_bytes(data)
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        driver.write(OBJECT - SECTOR, data)
        driver.flush()
        cluster.rbd("export", image, str(tmp_path / "exported"))
        assert (tmp_path / "exported").read_bytes()[OBJECT - SECTOR :][:MIB] == data
    other = f"{image}-imported"
    cluster.rbd("import", str(tmp_path / "data"), other)
    with serving(Disk(cluster.address(other))) as served, served.driver() as driver:
        assert driver.read(0, MIB) == data


def test_one_line_says_that_an_image_looks_like_another_format(cluster: CephCluster, image: str) -> None:
    """After `rbd import` of a file that is not raw. It is served as raw bytes, which a driver writes as it likes."""
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        driver.write(0, b"QFI\xfb\0\0\0\x03".ljust(SECTOR, b"\0"))
        assert "looks like" not in served.logged()
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        assert driver.read(0, SECTOR).startswith(b"QFI\xfb")
        words = (
            f"rbd:{image}: looks like a qcow2 image, and is served as raw bytes: the guest sees the qcow2 image itself"
        )
        assert served.logged().count(words) == 1


@pytest.mark.parametrize(("of_file", "of_address", "count"), [("", "", 1), ("3", "", 3), ("3", "2", 2)])
def test_threads_of_librados(
    cluster: CephCluster, image: str, tmp_path: Path, of_file: str, of_address: str, count: int
) -> None:
    """One does all I/O, which costs the least, unless the configuration or the address says something else.

    Two images have one connection, and its threads.
    """
    conf = tmp_path / "ceph.conf"
    conf.write_text(cluster.conf.read_text() + (f"[client]\nlibrados thread count = {of_file}\n" if of_file else ""))
    more = f":librados_thread_count={of_address}" if of_address else ""
    with serving(*(Disk(f"rbd:{each}:conf={conf}{more}") for each in (image, cluster.new_image()))) as served:
        names = [path.read_text().strip() for path in Path(f"/proc/{served.process.pid}/task").glob("*/comm")]
    assert names.count("io_context_pool") == count


def test_the_time_that_monitors_have(cluster: CephCluster) -> None:
    """librados waits five minutes by default."""
    command = [sys.executable, "-c", CONNECTED, cluster.address("rbd/any")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "20\n", done.stderr


CONNECTED = """
import sys
from ringplane.block.sources.rbd_cluster import Access, Cluster
from ringplane.options.rbd_address import parse
cluster = Cluster.use(Access.of(parse(sys.argv[1]), cache=False))
print(cluster.option("client_mount_timeout"))
cluster.release()
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_a_verified_load(cluster: CephCluster, image: str, threads: int, direct: bool) -> None:
    """Four queues on one or two I/O threads, which share the image."""
    disk = Disk(cluster.address(image), queues=4, direct=direct)
    with serving(disk, threads=threads) as served, served.driver(queues=4) as driver:
        load = Load(
            block_size=(512, 4096, 65536),
            depth=8,
            queues=4,
            read_percent=50,
            flush_every=20,
            requests=2000,
            verify=True,
        )
        result = run_load(driver, load)
        assert (result.errors, result.mismatches) == (0, 0), result


def test_zeroes_are_thin_or_thick(cluster: CephCluster, image: str) -> None:
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        data = random.Random(3).randbytes(3 * OBJECT)
        driver.write(0, data)
        assert objects(cluster, image) == 3
        driver.write_zeroes(OBJECT, OBJECT, unmap=True)
        assert objects(cluster, image) == 2
        driver.write_zeroes(4 * OBJECT, OBJECT)
        assert objects(cluster, image) == 3, "zeros that may not be a hole have no object"
        # Any sectors, on both sides of a border of objects.
        driver.write_zeroes(2 * OBJECT - SECTOR, 2 * SECTOR, unmap=True)
        driver.write_zeroes(3 * SECTOR, SECTOR)
        expected = bytearray(data)
        expected[OBJECT : 2 * OBJECT + SECTOR] = bytes(OBJECT + SECTOR)
        expected[3 * SECTOR : 4 * SECTOR] = bytes(SECTOR)
        assert driver.read(0, 3 * OBJECT) == expected


def test_discards(cluster: CephCluster, image: str) -> None:
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        assert driver.config["discard_sector_alignment"] * SECTOR == GRANULARITY
        assert driver.config["opt_io_size"] * SECTOR == OBJECT
        driver.write(0, b"x" * 2 * OBJECT)
        driver.discard(0, OBJECT)
        assert objects(cluster, image) == 1
        assert driver.read(0, OBJECT) == bytes(OBJECT)


def test_several_ranges_in_one_request(cluster: CephCluster, image: str) -> None:
    """Also empty ones, first, last and alone; the others are done one after the other."""
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        driver.write(0, b"x" * 4 * MIB)
        ranges = [(0, 0, 0), (8, 8, 0), (100, 0, 0), (1000, 24, SEGMENT_F_UNMAP), (4096, 1, 0), (0, 0, 0)]
        assert driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, segments(*ranges)).status == OK
        expected = bytearray(b"x" * 4 * MIB)
        for start, count, _ in ranges:
            expected[start * SECTOR : (start + count) * SECTOR] = bytes(count * SECTOR)
        assert driver.read(0, 4 * MIB) == expected
        assert driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, segments((5, 0, 0))).status == OK
        assert driver.request(VIRTIO_BLK_T_DISCARD, 0, segments((5, 0, 0), (9, 0, 0))).status == OK


def test_write_through(cluster: CephCluster, image: str) -> None:
    """Each request that changes the disk is stable when it ends, also with librbd's cache."""
    with serving(Disk(cluster.address(image), direct=False)) as served, served.driver() as driver:
        driver.set_write_back(False)
        driver.write(0, b"y" * MIB)
        driver.write_zeroes(0, 4096)
        driver.discard(GRANULARITY, GRANULARITY)
        assert driver.read(0, GRANULARITY) == bytes(4096) + b"y" * (GRANULARITY - 4096)


def test_a_snapshot(cluster: CephCluster, image: str) -> None:
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        driver.write(0, b"before" + bytes(506))
        driver.flush()
        cluster.rbd("snap", "create", f"{image}@s1")
        driver.write(0, b"after!" + bytes(506))
        assert driver.read(0, 512).startswith(b"after!")
        serial = driver.serial()
    with serving(Disk(cluster.address(f"{image}@s1"))) as served, served.driver() as driver:
        assert driver.features & VIRTIO_BLK_F_RO
        assert not driver.features & VIRTIO_BLK_F_DISCARD
        assert driver.read(0, 512).startswith(b"before")
        assert driver.request(VIRTIO_BLK_T_OUT, 0, bytes(512)).status == IOERR
        assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == OK
        assert driver.serial() != serial
    with serving(Disk(cluster.address(image), more="read-only = true")) as served, served.driver() as driver:
        assert driver.features & VIRTIO_BLK_F_RO
        assert driver.read(0, 512).startswith(b"after!")
        assert driver.serial() == serial


def test_a_namespace(cluster: CephCluster, image: str) -> None:
    namespace = image.replace("/test", "/ns")
    cluster.rbd("namespace", "create", namespace)
    inside = cluster.new_image("16M", pool=namespace)
    with serving(Disk(cluster.address(inside))) as served, served.driver() as driver:
        assert driver.capacity == 16 * MIB
        driver.write(0, b"z" * 512)
        assert driver.read(0, 512) == b"z" * 512


def test_it_is_created(cluster: CephCluster, image: str) -> None:
    new = f"{image}-new"
    for _ in range(2):
        with serving(Disk(cluster.address(new), more='create = "8M"')) as served, served.driver() as driver:
            assert driver.capacity == 8 * MIB
            if "created" in served.logged():
                driver.write(0, b"1" * 512)
            assert driver.read(0, 512) == b"1" * 512
    assert cluster.rbd("ls").count(new.partition("/")[2]) == 1


def test_another_client_changes_its_size(cluster: CephCluster, image: str) -> None:
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        for size in (128, 32):
            cluster.rbd("resize", image, "--size", f"{size}M", "--allow-shrink", "--no-progress")
            wait_until(lambda expected=size * MIB: _capacity(driver) == expected, served.logged())  # type: ignore[misc]
            driver.write(size * MIB - 512, b"e" * 512)
            assert driver.request(VIRTIO_BLK_T_IN, size * MIB // 512, read=512).status == IOERR


def _capacity(driver: Driver) -> int:
    driver.read_config()
    return driver.capacity


def test_a_size_that_is_not_whole_blocks(cluster: CephCluster, image: str) -> None:
    with serving(Disk(cluster.address(image), block_size=4096)) as served, served.driver() as driver:
        cluster.rbd("resize", image, "--size", f"{2 * SIZE + 512}B", "--no-progress")
        wait_until(lambda: _capacity(driver) == 2 * SIZE, served.logged())


def test_resizes_that_are_refused(cluster: CephCluster, image: str) -> None:
    """Nothing is lost: not of an image that another client has made longer, nor of one that is served read-only."""
    disks = Disk(cluster.address(image), block_size=4096), Disk(cluster.address(image), more="read-only = true")
    with (
        serving(disks[0], process=API, program=NOTICES_NOTHING) as one,
        serving(disks[1], process=API) as two,
    ):
        cluster.rbd("resize", image, "--size", "128M", "--no-progress")
        for served, size, why in (
            (one, 96 * MIB, "has 134217728 bytes already"),
            (one, 256 * MIB + 512, "not a multiple of the block size"),
            (two, 256 * MIB, "is served read-only"),
        ):
            (disk,) = served.client().read("/v1/disks", Disks).disks
            with pytest.raises(ApiError, match=why):
                served.client().ask("POST", disk_path(disk.name, "resize"), {"size": size})
        assert '"size":134217728' in cluster.rbd("info", image, "--format", "json")
        (disk,) = one.client().read("/v1/disks", Disks).disks
        one.client().ask("POST", disk_path(disk.name, "resize"), {"size": 256 * MIB})
        assert '"size":268435456' in cluster.rbd("info", image, "--format", "json")


# A process that does not notice what other clients do.
NOTICES_NOTHING = f"""
from ringplane.block.sources.rbd_image import OpenedImage
OpenedImage.watch = lambda self, changed: None
{LOGGING_AT_ONCE}"""


@pytest.mark.parametrize("profile", ["rbd", "rbd-read-only"])
def test_a_read_only_disk(cluster: CephCluster, image: str, profile: str) -> None:
    """With the right to watch the image it notices a new size."""
    user = f"{profile}-{image.partition('-')[2]}"
    cluster.ceph("auth", "get-or-create", f"client.{user}", "mon", f"profile {profile}", "osd", f"profile {profile}")
    key = cluster.ceph("auth", "print-key", f"client.{user}")
    disk = Disk(cluster.address(image, f":id={user}:key={key}"), more="read-only = true")
    with serving(disk) as served, served.driver() as driver:
        assert driver.features & VIRTIO_BLK_F_RO
        assert driver.read(0, 512) == bytes(512)
        cluster.rbd("resize", image, "--size", "128M", "--no-progress")
        if profile == "rbd":
            wait_until(lambda: _capacity(driver) == 128 * MIB, served.logged())
            assert driver.read(128 * MIB - 512, 512) == bytes(512)
        else:
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "may not watch it" in served.logged(), served.logged())
            assert _capacity(driver) == SIZE


# librbd keeps what is written until somebody flushes it.
WRITE_BACK = (
    ":rbd_cache_policy=writeback:rbd_cache_max_dirty=16777216:rbd_cache_target_dirty=16777216"
    ":rbd_cache_max_dirty_age=3600:rbd_cache_writethrough_until_flush=false"
)


def test_what_the_other_end_of_a_migration_reads(cluster: CephCluster, image: str) -> None:
    """Each one has a cache. When the rings of one have stopped, the other reads what was written, and back again."""
    disk = Disk(cluster.address(image, WRITE_BACK), direct=False)
    with serving(disk) as one, serving(disk) as two, one.driver() as first, two.driver() as second:
        bases = {first: [0], second: second.stop()}
        for number in range(1, 5):
            here, there = (first, second) if number % 2 else (second, first)
            here.write(0, bytes([number]) * MIB)
            assert here.read(0, MIB) == bytes([number]) * MIB
            bases[here] = here.stop()
            there.start(bases[there])
            assert there.read(0, MIB) == bytes([number]) * MIB
        for each in (one, two):
            assert "ERROR" not in each.logged()


def test_what_the_next_process_reads(cluster: CephCluster, image: str) -> None:
    """The running process of an upgrade leaves nothing in its cache; it does not even close the image."""
    disk = Disk(cluster.address(image, WRITE_BACK), direct=False)
    with serving(disk, program=CLOSES_NOTHING) as served, served.driver() as driver:
        driver.write(0, b"w" * MIB)
        upgrade(served)
        assert driver.read(0, MIB) == b"w" * MIB


CLOSES_NOTHING = f"""
from ringplane.block.sources.rbd_image import OpenedImage
OpenedImage.close = lambda self: None
{LOGGING_AT_ONCE}"""


def test_what_is_read_elsewhere_while_it_is_paused(cluster: CephCluster, image: str, tmp_path: Path) -> None:
    disk = Disk(cluster.address(image, WRITE_BACK), direct=False, more='name = "vm1"')
    with serving(disk, process=API) as served, served.driver() as driver:
        driver.write(0, b"p" * MIB)
        served.client().ask("POST", disk_path("vm1", "pause"))
        cluster.rbd("export", image, str(tmp_path / "exported"))
        assert (tmp_path / "exported").read_bytes()[:MIB] == b"p" * MIB
        served.client().ask("POST", disk_path("vm1", "resume"))
        assert driver.read(0, MIB) == b"p" * MIB


def test_a_state(cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """What was changed at run time is there after a restart."""
    disk = Disk(cluster.address(image), more='name = "vm1"')
    with serving(disk, process=f'state = "{tmp_path / "state"}"\n{API}') as served:
        served.client().ask("PATCH", disk_path("vm1"), {"limits": {"total-iops-sec": 1000}})
        served.client().ask("POST", disk_path("vm1", "pause"))
        restart(served)
        (shown,) = served.client().read("/v1/disks", Disks).disks
        assert (shown.limits, shown.paused) == ({"total-iops-sec": 1000}, True), served.logged()
        served.client().ask("POST", disk_path("vm1", "resume"))
        with served.driver() as driver:
            driver.write(0, b"s" * 512)
            assert driver.read(0, 512) == b"s" * 512


def test_limits(cluster: CephCluster, image: str) -> None:
    """Requests over a limit wait, until it is removed."""
    disk = Disk(cluster.address(image), more='name = "vm1"\n[disk.limits]\ntotal-iops-sec = 20')
    with serving(disk, process=API) as served, served.driver() as driver:
        load = Load(depth=8, read_percent=50, requests=30, verify=True, timeout=PATIENCE)
        result = run_load(driver, load)
        assert (result.errors, result.mismatches) == (0, 0), result
        (found,) = served.client().read("/v1/statistics", Statistics).disks
        assert found.throttled_seconds > 0
        served.client().ask("PATCH", disk_path("vm1"), {"limits": {"total-iops-sec": 0}})
        run_load(driver, load)
        (after,) = served.client().read("/v1/statistics", Statistics).disks
        assert after.throttled_seconds == found.throttled_seconds


def test_monitors_and_a_key_in_a_table(cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """QEMU's names for all of it, and no configuration of Ceph; `ringplane check` opens the image."""
    pool, name = image.split("/")
    monitor = re.search(r"v1:([\d.:]+)", cluster.conf.read_text())
    assert monitor
    (tmp_path / "key").write_text(cluster.ceph("auth", "print-key", "client.admin"))
    (tmp_path / "disks.toml").write_text(
        f'[[disk]]\nsocket-path = "vm1.sock"\n[disk.rbd]\npool = "{pool}"\nimage = "{name}"\nuser = "admin"\n'
        f'conf = "/dev/null"\nserver = ["{monitor[1]}"]\nkey-file = "key"\n'
    )
    command = [sys.executable, "-m", "ringplane", "check", str(tmp_path / "disks.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


def test_from_nothing_to_a_guest(cluster: CephCluster, tmp_path: Path) -> None:
    """As docs/remote.md says, literally, with Ceph's files in their usual places: a user and a disk."""
    page = (Path(__file__).parents[2] / "docs/remote.md").read_text().partition("From nothing to a guest")[2]
    make_user, serve = re.findall(r"^    (.*)$", page, re.MULTILINE)[:2]
    (tmp_path / "ceph.conf").write_text(re.sub(r"^keyring = .*", "", cluster.conf.read_text(), flags=re.MULTILINE))
    (tmp_path / "ceph.client.admin.keyring").write_bytes((cluster.folder / "keyring").read_bytes())
    script = f"set -e; mount -t tmpfs none /etc/ceph; cp {tmp_path}/* /etc/ceph; mount -t tmpfs none /run; "
    command = ["unshare", "--mount", "sh", "-c", f"{script}{make_user}; exec {serve}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            while "vhost-user-blk" not in (line := process.stdout.readline()):
                assert line, "it says how QEMU is attached"
            with Driver(Path(f"/proc/{process.pid}/root/run/vm1.sock"), timeout=PATIENCE) as driver:
                assert driver.capacity == 20 << 30
                driver.write(0, b"g" * 512)
                driver.flush()
                assert driver.read(0, 512) == b"g" * 512
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    cluster.rbd("rm", "rbd/vm1", "--no-progress")


# Runs a command where a library ($1) is missing from the folder of libraries ($2); all that ends with the command.
WITHOUT_LIBRARY = """
set -e
mount -t tmpfs none "$3"
mkdir "$3/upper" "$3/work"
mount -t overlay none -o "lowerdir=$2,upperdir=$3/upper,workdir=$3/work" "$2"
rm "$2/$1"*
shift 3
exec "$@"
"""


@pytest.mark.parametrize("library", ["librados.so.2", "librbd.so.1"])
def test_a_missing_library(library: str, tmp_path: Path) -> None:
    places = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    place = next(line for line in places.splitlines() if line.startswith(f"\t{library} ")).partition(" => ")[2]
    hiding = ["unshare", "--mount", "sh", "-c", WITHOUT_LIBRARY, "sh", library, str(Path(place).resolve().parent)]
    package = {"librados.so.2": "librados2", "librbd.so.1": "librbd1"}[library]
    line = refusal("rbd:rbd/vm1", before=[*hiding, str(tmp_path)])
    assert f"{library}: cannot open shared object file" in line
    assert f"install Debian's package {package}" in line


@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_an_encrypted_image(cluster: CephCluster, image: str, tmp_path: Path, kind: str) -> None:
    key, wrong = tmp_path / "key", tmp_path / "wrong"
    key.write_text("a passphrase")
    wrong.write_text("another one")
    cluster.rbd("encryption", "format", image, kind, str(key))
    plain = b"plain text".ljust(512, b".")
    encryption = f":encrypt-format={kind}:encrypt-key-file="
    with serving(Disk(cluster.address(image, encryption + str(key)))) as served, served.driver() as driver:
        # The header of the container takes some of it.
        assert 0 < driver.capacity < SIZE
        driver.write(0, plain)
        driver.flush()
        assert driver.read(0, 512) == plain
    with serving(Disk(cluster.address(image))) as served, served.driver() as driver:
        assert driver.read(0, 512).startswith(b"LUKS")
        assert plain not in driver.read(0, 32 * MIB)
    assert "passphrase" in refusal(cluster.address(image, encryption + str(wrong)))


def refusal(address: str, *arguments: str, before: Sequence[str] = ()) -> str:
    """The one line with which `ringplane serve` ends; `before`: the beginning of the command that runs it."""
    command = [
        *before,
        sys.executable,
        "-m",
        "ringplane",
        "serve",
        "--image",
        address,
        "--socket-path",
        "/dev/shm/refused.sock",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE + 30)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return line


REFUSALS: dict[str, tuple[Callable[[CephCluster], str], str]] = {
    "no image": (lambda cluster: cluster.address("rbd/missing"), "there is no such image"),
    "no snapshot": (lambda cluster: cluster.address("rbd/missing@s"), "no such image or snapshot"),
    "no pool": (lambda cluster: cluster.address("missing/vm"), "the cluster has no pool 'missing'"),
    "no conf": (lambda _: "rbd:rbd/vm:conf=/missing.conf", "/missing.conf cannot be read: No such file"),
    "no monitor known": (lambda _: "rbd:rbd/vm:conf=/dev/null", "no monitor or no key of client.admin is known"),
    "an unknown user": (lambda cluster: cluster.address("rbd/vm", ":id=nobody"), "client.nobody"),
    "an unknown option": (lambda cluster: cluster.address("rbd/vm", ":no_such_thing=1"), "Ceph has no option"),
    "a wrong value": (
        lambda cluster: cluster.address("rbd/vm", ":client_mount_timeout=x"),
        "does not accept the value of its option",
    ),
    "no answer": (
        lambda cluster: cluster.address("rbd/vm", r":mon_host=127.0.0.1\:1:client_mount_timeout=1"),
        "no monitor answers",
    ),
    "no passphrase": (
        lambda cluster: cluster.address(cluster.new_image(), ":encrypt-format=luks2:encrypt-key-file=/missing"),
        "/missing: cannot be read",
    ),
    "not encrypted": (
        lambda cluster: cluster.address(cluster.new_image(), ":encrypt-format=luks2:encrypt-key-file=/etc/hostname"),
        "luks2",
    ),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_cannot_be_opened_is_one_line(cluster: CephCluster, why: str) -> None:
    address, expected = REFUSALS[why]
    assert expected in refusal(address(cluster))


def test_what_is_only_for_files_is_one_line(cluster: CephCluster, image: str) -> None:
    assert "only a file can be served as a zoned disk" in refusal(cluster.address(image), "--zoned", "1M")
    assert "engine memory does not serve RBD images" in refusal(cluster.address(image), "--engine", "memory")


def test_a_check_creates_nothing(cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """`ringplane check` opens images for reading only, and reports those that are missing."""
    disks = {image: "", f"{image}-missing": "", f"{image}-new": 'create = "8M"'}
    tables = (
        f'[[disk]]\nimage = "{cluster.address(name)}"\nsocket-path = "{number}.sock"\n{more}\n'
        for number, (name, more) in enumerate(disks.items())
    )
    (tmp_path / "disks.toml").write_text("".join(tables))
    command = [sys.executable, "-m", "ringplane", "check", str(tmp_path / "disks.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"rbd:{image}-missing: there is no such image" in line
    assert f"{image.partition('/')[2]}-new" not in cluster.rbd("ls").split()


def test_a_created_image_that_cannot_be_served_is_removed(cluster: CephCluster, image: str) -> None:
    new = f"{image}-new"
    line = refusal(cluster.address(new), "--create", "5632", "--block-size", "4096")
    assert "is not a multiple of the block size 4096" in line
    assert new.partition("/")[2] not in cluster.rbd("ls").split()
