"""The driver and its load generator, with ringplane and with qemu-storage-daemon as the back end."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from ringplane.driver.content import Model, first_word, mix, origin, word_at
from ringplane.driver.driver import Driver, Unsupported
from ringplane.driver.frontend import FrontEnd, Refused, RingBroken, SharedMemory
from ringplane.driver.load import Load, check, fill, run_load
from ringplane.driver.process import cpu_ns
from ringplane.virtio.blk import VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC

from .rig import listens

IMAGE_SIZE = 64 << 20
DAEMON = shutil.which("qemu-storage-daemon")


RINGPLANE, QSD = "ringplane", "qemu-storage-daemon"


def command(kind, socket, image, writable):
    if kind == RINGPLANE:
        return [
            *(sys.executable, "-m", "ringplane", "serve", "--blk-file", image, "--socket-path", socket),
            *(
                "--num-queues",
                "4",
                "--io-threads",
                "2",
                "--serial",
                "vhost_user_blk",
                *([] if writable else ["--read-only"]),
            ),
        ]
    if DAEMON is None:
        if os.environ.get("CI") == "true":
            pytest.fail("qemu-storage-daemon is not installed, and continuous integration must not skip these tests")
        pytest.skip("qemu-storage-daemon is not installed (Debian: qemu-system-common or qemu-utils)")
    return [
        DAEMON,
        *("--blockdev", f"driver=file,node-name=f,filename={image},read-only={'off' if writable else 'on'}"),
        *("--blockdev", f"driver=raw,node-name=d,file=f,read-only={'off' if writable else 'on'}"),
        "--export",
        "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,"
        f"addr.path={socket},writable={'on' if writable else 'off'},num-queues=4",
    ]


@contextlib.contextmanager
def backend(kind, folder, image, writable=True):
    """Start a back end process that serves `image` with four queues; yields its socket and process."""
    socket = folder / "s"
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(command(kind, socket, image, writable), stdout=subprocess.DEVNULL)
    try:
        # A cold start of ringplane compiles.
        deadline = time.monotonic() + 60
        while not listens(socket):
            assert process.poll() is None, f"{kind} ended"
            assert time.monotonic() < deadline, f"{kind} made no socket"
            time.sleep(0.01)
        yield str(socket), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=[RINGPLANE, QSD])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def image(tmp_path_factory, kind):
    path = tmp_path_factory.mktemp("image") / "disk"
    path.write_bytes(bytes(IMAGE_SIZE))
    return path


@pytest.fixture(scope="module")
def socket(tmp_path_factory, kind, image):
    with backend(kind, tmp_path_factory.mktemp("backend"), image) as (path, _):
        yield path


@pytest.fixture(params=["event_idx-indirect", "event_idx", "indirect", "plain"])
def disk(request, socket):
    with Driver(socket, event_idx="event_idx" in request.param, indirect="indirect" in request.param) as disk:
        assert bool(disk.features & VIRTIO_F_EVENT_IDX) == ("event_idx" in request.param)
        assert bool(disk.features & VIRTIO_F_INDIRECT_DESC) == ("indirect" in request.param)
        yield disk


@pytest.fixture
def four(socket):
    with Driver(socket, queues=4) as disk:
        yield disk


def some_bytes(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


# Blocks


def test_written_data_is_read_back(disk, image):
    assert disk.capacity == IMAGE_SIZE
    # More pieces than can be in flight, and a shorter last one.
    data = some_bytes((3 << 20) + 512)
    disk.write(4096, data)
    disk.flush()
    assert disk.read(4096, len(data)) == data
    assert disk.read(4096 + 512, 512) == data[512:1024]
    assert disk.read(0, 0) == b""
    with image.open("rb") as file:
        file.seek(4096)
        assert file.read(len(data)) == data
    assert all(vring.ring.in_flight == 0 for vring in disk.queues)


def test_serial(disk):
    assert disk.serial() == "vhost_user_blk"


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (IMAGE_SIZE, 512), (-512, 512)])
def test_ranges_that_are_not_whole_blocks_are_rejected(four, offset, length):
    with pytest.raises(ValueError, match="are not"):
        four.read(offset, length)


def test_each_queue_serves_the_same_disk(four):
    for queue in range(4):
        four.write(8192 * queue, some_bytes(8192, queue), queue)
    assert four.read(0, 32768, queue=3) == b"".join(some_bytes(8192, queue) for queue in range(4))


def test_errors_have_their_exceptions(four):
    # Past the end, which `read` itself would reject.
    assert four.request(VIRTIO_BLK_T_IN, IMAGE_SIZE // 512, read=512).status == 1
    assert four.request(77, 0).status == 2


def test_unsupported_and_failed_requests_raise(kind, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with backend(kind, tmp_path, image, writable=False) as (path, _), Driver(path) as disk:
        with pytest.raises(OSError, match="writing 512 bytes at 1024"):
            disk.write(1024, bytes(512))
        disk.read(0, 512)
        disk.request = lambda *args, **kwargs: Driver.request(disk, 77, 0)
        with pytest.raises(Unsupported, match="flush"):
            disk.flush()


# Framing


@pytest.mark.parametrize(
    "framing",
    [
        {},
        {"readable": [8, 8, 512, 512]},
        {"readable": [4, 4, 4, 4, 1024]},
        {"readable": [1] * 16 + [1024]},
        {"readable": [16 + 1024]},
        {"readable": [15, 1 + 1023, 1]},
        {"misalign": 1},
        {"misalign": 7, "readable": [16, 1000, 24]},
    ],
    ids=str,
)
def test_framing_of_writes(disk, framing):
    data = some_bytes(1024, hash(str(framing)) & 0xFFFF)
    answer = disk.request(VIRTIO_BLK_T_OUT, 10, data, **framing)
    assert (answer.status, answer.used) == (0, 1)
    assert disk.read(5120, 1024) == data


@pytest.mark.parametrize(
    "framing",
    [
        {"readable": [8, 8]},
        {"writable": [1024 + 1]},
        {"writable": [512, 512 + 1]},
        {"writable": [1, 1023, 1]},
        {"writable": [100] * 10 + [24, 1]},
        {"misalign": 3, "writable": [513, 512]},
    ],
    ids=str,
)
@pytest.mark.parametrize("indirect", [False, True])
def test_framing_of_reads(four, framing, indirect):
    data = some_bytes(1024, 5)
    four.write(5120, data)
    answer = four.request(VIRTIO_BLK_T_IN, 10, read=1024, indirect=indirect, **framing)
    assert answer == type(answer)(0, 1025, data)


def test_framing_of_get_id(four):
    assert four.request(VIRTIO_BLK_T_GET_ID, 0, read=20, writable=[10, 11]).data.startswith(b"vhost_user_blk\0")


def test_descriptors_that_do_not_add_up(four):
    with pytest.raises(ValueError, match="descriptors of 17 bytes for 16"):
        four.request(VIRTIO_BLK_T_IN, 0, read=512, readable=[17])


def test_a_chain_that_does_not_fit(socket):
    with Driver(socket, queue_size=16) as disk:
        with pytest.raises(BufferError, match="too few free descriptors"):
            disk.request(VIRTIO_BLK_T_IN, 0, read=32, writable=[1] * 33, indirect=False)
        assert disk.read(0, 1 << 20)


# Life of a connection


def test_stop_start_and_reconnect(socket):
    with Driver(socket, queues=2) as disk:
        disk.write(0, some_bytes(4096))
        bases = disk.stop()
        assert bases[1] == 0 < bases[0]
        disk.start(bases)
        assert disk.read(0, 4096) == some_bytes(4096)
        disk.reconnect()
        assert disk.read(0, 4096, queue=1) == some_bytes(4096)
        assert disk.stop() == [0, 1]


def test_indices_wrap(four):
    result = run_load(four, Load(requests=70_000, depth=64, block_size=512))
    assert (result.requests, result.errors) == (70_000, 0)
    assert four.stop()[0] == 70_000 - 65_536


def test_only_requested_features_are_accepted(socket):
    with Driver(socket, feature_bits=1 << 32) as disk:
        assert not disk.features & VIRTIO_BLK_F_FLUSH


def test_more_queues_than_the_back_end_has(socket):
    with pytest.raises(ValueError, match="the back end has 4 queues, not 5"):
        Driver(socket, queues=5)


def test_nobody_listens(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot connect to the back end"):
        Driver(tmp_path / "nothing")


def test_a_dead_back_end_is_an_error_and_not_a_hang(kind, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with backend(kind, tmp_path, image) as (path, process), Driver(path) as disk:
        process.kill()
        process.wait()
        with pytest.raises(ConnectionError, match="closed the connection"):
            disk.read(0, 512)
        for busy_poll in (False, True):
            with pytest.raises(ConnectionError, match="closed the connection"):
                run_load(disk, Load(seconds=5, busy_poll=busy_poll))


def test_a_back_end_that_does_not_answer_is_a_time_out(four):
    four.front_end.set_vring_enable(0, False)
    four.front_end.get_vring_base(0)
    with pytest.raises(TimeoutError, match=r"a request on ring 0 was not completed in 0\.2 s"):
        four.request(VIRTIO_BLK_T_IN, 0, read=512, timeout=0.2)
    with pytest.raises(TimeoutError, match=r"completed nothing on ring 0 for 0\.3 s with 2 requests"):
        run_load(four, Load(seconds=5, depth=2, timeout=0.3))
    four.reconnect()
    assert len(four.read(0, 512)) == 512


def test_the_error_eventfd_raises_an_exception(four):
    # qemu-storage-daemon never signals it, so we do.
    os.eventfd_write(four.queues[0].err_fd, 1)
    with pytest.raises(RingBroken, match="found an error in ring 0"):
        four.queues[0].wait(1)
    with pytest.raises(RingBroken, match="found an error in ring 0"):
        run_load(four, Load(seconds=5))


def test_a_refused_message_raises_an_exception(monkeypatch, socket):
    front_end = FrontEnd(socket)
    try:
        front_end.negotiate(1 << 32)
        assert len(front_end.get_config(0, 8)) == 8
        from ringplane.vhost_user.payloads import U64

        monkeypatch.setattr(front_end, "_call", lambda *args, **kwargs: U64(1))
        with pytest.raises(Refused, match="refused SET_OWNER"):
            front_end.set_owner()
    finally:
        front_end.close()


# Shared memory


def test_allocations_do_not_overlap_and_are_reused():
    memory = SharedMemory(1 << 20)
    blocks = [(memory.allocate(size), size) for size in (1, 64, 65, 4096, 4097, 100)]
    ordered = sorted(blocks)
    for (address, size), (following, _) in itertools.pairwise(ordered):
        assert address + size <= following
    assert memory.guest(ordered[0][0]) > 0
    memory.free(blocks[3][0])
    assert memory.allocate(4096) == blocks[3][0]
    with pytest.raises(MemoryError, match="raise memory_size"):
        memory.allocate(1 << 20)
    memory.close()


# Load


def test_a_verified_load_with_all_options(four):
    sizes = [512 << power for power in range(12)]
    seen = []
    result = run_load(
        four,
        Load(block_size=sizes, depth=64, queues=4, read_percent=50, flush_every=100, seconds=3, verify=True),
        seen.append,
    )
    assert (result.errors, result.mismatches, result.wrong_lengths) == (0, 0, 0), result
    assert result.requests > 500
    assert result.sectors_checked > 10_000
    assert seen
    assert [each.requests for each in seen] == sorted(each.requests for each in seen)


@pytest.mark.parametrize("busy_poll", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_load_in_every_mode(socket, busy_poll, event_idx, indirect):
    with Driver(socket, queues=2, event_idx=event_idx, indirect=indirect) as disk:
        load = Load(depth=16, queues=2, read_percent=70, requests=20_001, busy_poll=busy_poll, verify=True)
        result = run_load(disk, load)
        assert (result.requests, result.errors, result.mismatches) == (20_001, 0, 0)
        assert result.bytes == 20_001 * 4096
        assert int(result.histogram.sum()) == 20_001
        assert 0 < result.p50_us <= result.p99_us <= result.p999_us
        assert result.p50_us / 3 < result.mean_us
        assert result.backend_cpu_per_io_us > 0
        assert result.driver_cpu_per_io_us > 0
        assert run_load(disk, Load(depth=1, seconds=0.2)).requests > 0


def test_random_requests_cover_the_disk(four):
    model = Model((0, IMAGE_SIZE))
    run_load(four, Load(depth=32, queues=2, requests=4 * IMAGE_SIZE // 4096, read_percent=0, verify=True, model=model))
    written = model.generations.reshape(-1, 8)
    assert (written == written[:, :1]).all(), "requests of 4096 bytes begin at multiples of it"
    counts = written[:, 0]
    # Four writes per block on average; a Poisson distribution leaves out 1.8 % of the blocks.
    assert 0.01 < (counts == 0).mean() < 0.03
    assert counts.max() < 30
    assert abs(counts[: len(counts) // 2].mean() - 4) < 0.3


def test_verification_detects_a_corrupted_image(four, image):
    model, written = fill(four, seed=3, queues=2)
    assert written.bytes == IMAGE_SIZE
    clean = check(four, model, queues=4)
    assert (clean.mismatches, clean.sectors_checked) == (0, IMAGE_SIZE // 512)
    with image.open("r+b") as file:
        file.seek(1000 * 512)
        misplaced = file.read(512)
        file.seek(77_777 * 512)
        file.write(misplaced)
    found = check(four, model)
    assert found.mismatches == 1
    assert "sector 77777, byte 0" in found.first_mismatch
    assert "data of sector 1000, generation 1" in found.first_mismatch
    with image.open("r+b") as file:
        file.seek(100_000 * 512 + 8 * 5)
        file.write(bytes(8))
    assert check(four, model).mismatches == 2  # either may be seen first: requests complete in any order
    random = run_load(four, Load(block_size=1 << 20, requests=2000, depth=4, verify=True, model=model))
    assert random.mismatches > 0
    four.write(77_777 * 512, bytes(512))
    assert "found 0x0000000000000000 (zeros)" in check(four, model).first_mismatch


def test_a_stale_sector_is_a_mismatch(four, image):
    """A lost write: the sector contains the previous data."""
    model, _ = fill(four, seed=3)
    before = image.read_bytes()
    run_load(four, Load(requests=20_000, depth=16, block_size=8192, read_percent=0, verify=True, model=model))
    assert check(four, model).mismatches == 0
    sector = int(np.argmax(model.generations > 1))
    four.write(sector * 512, before[sector * 512 : (sector + 1) * 512])
    found = check(four, model)
    assert found.mismatches == 1
    assert f"data of sector {sector}, generation 1" in found.first_mismatch


def test_a_sequential_load_covers_the_whole_region(four):
    region = (512 * 3, 512 * 10_007)
    model, written = fill(four, region=region, block_size=4096 * 3, depth=5, queues=3)
    assert written.bytes == region[1]
    assert (model.generations == 1).all()


def test_errors_are_counted(kind, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with backend(kind, tmp_path, image, writable=False) as (path, _), Driver(path) as disk:
        model = Model((0, disk.capacity))
        load = Load(requests=100, read_percent=0, verify=True, model=model, depth=4)
        result = run_load(disk, load)
        assert result.errors == 100
        assert result.first_error.startswith("writing sector")
        assert result.first_error.endswith("status 1")
        assert (model.generations == 0).all(), "the data after a failed write is unknown"
        with pytest.raises(OSError, match="a write failed: writing sector"):
            fill(disk)


def test_nothing_is_written_after_a_failed_write(kind, tmp_path):
    """On no queue."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with backend(kind, tmp_path, image, writable=False) as (path, _), Driver(path, queues=2) as disk:
        load = Load(pattern="sequential", passes=1, read_percent=0, depth=4, queues=2, stop_at_error=True)
        assert 1 <= run_load(disk, load).errors <= 2 * 4
        with pytest.raises(OSError, match="a write failed: writing sector"):
            fill(disk, block_size=4096, depth=4)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"block_size": 100}, "not a multiple"),
        ({"block_size": []}, "a load needs a block size"),
        ({"depth": 0}, "a depth"),
        ({"read_percent": 101}, "0 to 100"),
        ({"queues": 5}, "5 queues, but the driver has 4"),
        ({"depth": 257}, "needs 257 descriptors, but the ring has 256"),
        ({"passes": 1}, "sequential"),
        ({"seconds": None}, "needs a limit"),
        ({"block_size": IMAGE_SIZE, "queues": 2}, "is too small"),
        ({"region": (100, 8192)}, "not whole blocks"),
        ({"region": (0, IMAGE_SIZE + 4096)}, "not inside the disk"),
        ({"region": (0, 8192), "model": Model((8192, 8192))}, "does not cover"),
        ({"model": Model((8192, 8192))}, "does not cover"),
    ],
    # Without the addresses of objects: all processes of a test run need the same names.
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_invalid_loads(four, load, message):
    with pytest.raises(ValueError, match=message):
        run_load(four, Load(**{"seconds": 1, **load}))


def test_an_interrupted_progress_callback_ends_the_load(four):
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_load(four, Load(seconds=60, depth=8), interrupt)
    assert len(four.read(0, 512)) == 512


# Content and CPU time


def test_each_word_identifies_its_position_and_version():
    for sector, generation in ((0, 1), (5, 3), (2**35, 2**19)):
        word = int(word_at(int(first_word(9, sector, generation)), 13))
        assert origin(word, 13, 9) == f"data of sector {sector}, generation {generation}"
    assert origin(12345, 0, 9).startswith("not written")


def test_the_mix_is_splitmix64():
    # The first numbers of SplitMix64 from seed 0: the finaliser of multiples of its golden ratio.
    golden = 0x9E3779B97F4A7C15
    values = [int(mix(np.int64(np.uint64(golden * step % 2**64).view(np.int64)))) % 2**64 for step in (1, 2, 3)]
    assert values == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_cpu_time_of_ended_threads_is_counted():
    program = (
        "import threading,time,sys\n"
        "def burn():\n"
        "    end=time.thread_time()+0.2\n"
        "    while time.thread_time()<end: pass\n"
        "t=threading.Thread(target=burn); t.start(); t.join(); print('done',flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"done\n"
        spent = cpu_ns(process.pid)
        process.stdin.close()
        process.wait()
    assert 200_000_000 <= spent < 2_000_000_000
    with pytest.raises(ProcessLookupError):
        cpu_ns(process.pid)
