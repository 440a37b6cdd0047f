"""Policies in a disk: what each answer does to a request, what policies see, and that they follow each other."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.block.layers.policy_layer import PolicyLayer, PolicyList, PolicyPart
from ringplane.compiler import pipeline
from ringplane.compiler.arithmetic import with_defined_results
from ringplane.driver import Driver
from ringplane.driver.driver import segments
from ringplane.engines.common import FLUSH as FLUSH_OPERATION
from ringplane.engines.common import WRITE
from ringplane.guest_memory.regions import Mapping
from ringplane.inflight import tracking
from ringplane.inflight.area import InflightRegion
from ringplane.options.policy_options import PolicyUse
from ringplane.policies.io_view import MOST_COPIED, MUTEX
from ringplane.policies.loading import find_policy
from ringplane.policies.running import RunningPolicy, WrongParameter
from ringplane.policies.trial import Trial
from ringplane.system import libc
from ringplane.virtio.blk import VIRTIO_BLK_T_DISCARD

from .policy_texts import own_policy
from .rig import (
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    PATIENCE,
    Answer,
    Line,
    Pending,
    RigFactory,
    Ring,
    eventually,
    pattern,
    rig_factory,
)

WritePolicy = Callable[..., RunningPolicy]

SAMPLES = Path(__file__).parent / "sample_policies"
SIZE = 1 << 20
DISK = pattern(SIZE)
BLOCK = 4096


def sample(name: str, **parameters: object) -> RunningPolicy:
    """A policy of tests/unit/sample_policies."""
    return RunningPolicy(name, find_policy(f"{SAMPLES}/sample_{name}.py"), parameters)


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


@pytest.fixture
def write_policy(tmp_path: Path) -> WritePolicy:
    """Makes a policy whose function has this body, with the counters `seen` and `found` and the state `table`."""

    def write(body: str, after: str = "", *, data: bool = False, **parameters: object) -> RunningPolicy:
        path = tmp_path / "own.py"
        path.write_text(own_policy(body, after, data=data))
        return RunningPolicy("own", find_policy(str(path)), parameters)

    return write


def line_with(make_rig: RigFactory, *policies: RunningPolicy) -> tuple[Line, PolicyPart]:
    """A line of a disk with these policies, one after the other."""
    layer = PolicyLayer(SIZE, 512, policies)
    part = layer.part(0, 64)
    return make_rig(layers=[part]).line().start(), part


def test_a_sample_policy_fails_what_it_is_for(make_rig: RigFactory) -> None:
    policy = sample("error", operation="write", range="64K-128K")
    line, _ = line_with(make_rig, policy)
    assert line.do(OUT, 0, pattern(512, 1)) == Answer(OK, 1, b"")
    assert line.do(OUT, 128, pattern(512, 2)) == Answer(IOERR, 1, b"")
    assert line.do(OUT, 127, pattern(1024, 3)) == Answer(IOERR, 1, b"")
    assert line.do(OUT, 256, pattern(512, 4)) == Answer(OK, 1, b"")
    assert line.do(IN, 128, room=512) == Answer(OK, 513, DISK[65536:66048])
    assert line.do(FLUSH) == Answer(OK, 1, b"")
    assert policy.counters == {"requests": 6, "failed": 2}
    content = line.rig.content()
    assert content[65536:131072] == DISK[65536:131072]


# Each is true for a CPU, and LLVM would take it for false, or for anything, as Numba compiles it.
ARITHMETIC = (
    "first + second < first",
    "first + 1 < first",
    "first * 4 < first",
    "first * 2 // 2 != first",
    "-first - 3 > 0",
    "abs(-first - 1) < 0",
    "1 << first == -first - 1",
    "first >> first == 0",
    "1 << first - first + 65 == 2",
    "int(1e300) == first",
    "int(-1e300 * my.share) == -first - 1",
    "load8(io, first + second) == 0",
)


@pytest.mark.parametrize("condition", ARITHMETIC)
def test_arithmetic_gives_what_a_cpu_does(write_policy: WritePolicy, condition: str) -> None:
    policy = write_policy(
        f"first = my.number & 0x7fffffffffffffff\nsecond = my.number & 0x7ffffffffffffffe\n"
        f"if {condition}:\n    my.found += 1\nreturn PASS",
        data=True,
        number=(1 << 63) - 1,
    )
    assert len(list(Trial(policy).run())) == policy.counters["found"] == policy.counters["requests"]


def test_a_check_of_an_index_is_not_optimised_away(write_policy: WritePolicy) -> None:
    """LLVM knows that the sum of two positive numbers is positive, unless it may be that it is not."""
    policy = write_policy(
        "first = my.number & 0x7fffffffffffffff\nmy.table[3] = 7\nmy.last = 0x7ffffffffffffffe\n"
        "second = my.last & 0x7fffffffffffffff\nposition = first + second\n"
        "while position > 5:\n    position -= 1\n"
        "my.seen = my.table[position]\nmy.found += load8(io, position + 1)\nstore8(io, position, 1)\nreturn PASS",
        data=True,
        number=(1 << 63) - 7,
    )
    lines = list(Trial(policy).run())
    assert (policy.counters["seen"], policy.counters["found"]) == (7, 0)
    assert not any("changed" in line for line in lines)


def test_what_llvm_optimises_has_no_undefined_arithmetic(
    write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = write_policy(
        "position = my.number + my.last * 3 - io.offset << my.seen >> io.queue\nmy.found += int(my.share * 5.0)\n"
        "for index in range(my.last):\n    my.table[index + 1] += position\n"
        "store8(io, random(io) + random(io), 1)\nreturn delay(my.share * 1e30)",
        data=True,
    )
    texts: list[str] = []

    def note(text: str) -> str:
        texts.extend((text, with_defined_results(text)))
        return texts[1]

    monkeypatch.setattr(pipeline, "with_defined_results", note)
    policy.loaded.down.object_code()
    before, after = texts
    for undefined in (" nsw ", " fptosi ", " shl ", " ashr "):
        assert undefined in before
    assert not re.search(r" (nsw|nuw|exact|fptosi|fptoui) ", after)
    shifts = re.findall(r"^.* = (?:shl|ashr|lshr) i64 .*$", after, re.MULTILINE)
    assert len(shifts) == len(re.findall(r" = (?:shl|ashr|lshr) ", before))
    assert all(re.search(r', %"count of [^"]*"$', line) for line in shifts)


@pytest.mark.parametrize("number", [-5, 7, 2])
def test_what_is_not_an_answer_fails_the_request(make_rig: RigFactory, write_policy: WritePolicy, number: int) -> None:
    """A negative number, an unknown kind, and an errno of 0."""
    line, _ = line_with(make_rig, write_policy("return my.number", number=number))
    assert line.do(OUT, 0, pattern(512, 1)) == Answer(IOERR, 1, b"")


@pytest.mark.parametrize("where", ["written", "read"])
def test_a_sample_policy_flips_one_bit(make_rig: RigFactory, where: str) -> None:
    """Never in the buffers of a driver that writes."""
    policy = sample("corrupt", where=where)
    line, _ = line_with(make_rig, policy)
    data = pattern(BLOCK, 5)
    write = line.put(OUT, 16, data, readable=[16, 100, 3000, BLOCK - 3100])
    line.kick()
    line.wait()
    assert (
        b"".join(line.rig.guest.read(each.offset, each.size) for each in write.pieces if not each.writable)[16:] == data
    )
    stored = line.rig.content()[8192:][:BLOCK]
    read = line.do(IN, 16, room=BLOCK, writable=[7, BLOCK - 7, 1])
    assert wrong_bits(stored, data) == (where == "written")
    assert wrong_bits(read.data, stored) == (where == "read")
    assert policy.counters["corrupted"] == 1


def wrong_bits(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).bit_count()


def test_what_a_policy_sees(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    policy = write_policy(
        "my.seen += io.sequence == my.last\n"
        "my.last += 1\n"
        "if io.operation == READ and io.offset == 1024 and io.length == 2048 and io.queue == 0 and not io.fua:\n"
        "    my.found += 1\n"
        "if io.operation == WRITE and io.fua and io.time > 0 and io.disk_size == 1 << 20:\n"
        "    my.found += 10\n"
        "return PASS",
        "if io.result == 0:\n    my.found += 100\nreturn PASS",
    )
    layer = PolicyLayer(SIZE, 512, [policy])
    line = make_rig(layers=[layer.part(0, 64)]).line().start(write_through=True)
    line.do(IN, 2, room=2048)
    line.do(OUT, 8, pattern(512))
    assert policy.counters == {"requests": 2, "seen": 2, "found": 211}


def test_what_is_dropped_was_never_written(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    line, _ = line_with(make_rig, write_policy("return DROP if io.operation != READ else PASS"))
    assert line.do(OUT, 8, pattern(BLOCK, 1)) == Answer(OK, 1, b"")
    assert line.do(FLUSH) == Answer(OK, 1, b"")
    assert line.do(IN, 8, room=512) == Answer(OK, 513, DISK[BLOCK:][:512])
    assert line.rig.content() == DISK


@pytest.mark.parametrize(("cut", "written"), [(0, 0), (511, 0), (512, 512), (1500, 1024), (4096, BLOCK), (9999, BLOCK)])
def test_a_torn_write(make_rig: RigFactory, write_policy: WritePolicy, cut: int, written: int) -> None:
    line, _ = line_with(make_rig, write_policy("return tear(my.number)", number=cut))
    data = pattern(BLOCK, 1)
    assert line.do(OUT, 8, data, readable=[16, 700, BLOCK - 700]) == Answer(OK, 1, b"")
    assert line.rig.content() == DISK[:BLOCK] + data[:written] + DISK[BLOCK + written :]
    assert line.do(IN, 8, room=BLOCK) == Answer(OK, BLOCK + 1, (data[:written] + DISK[BLOCK + written :])[:BLOCK])


@pytest.mark.parametrize(
    ("place", "found"), [(65536, 65536), (65600, 65536), (SIZE, SIZE - BLOCK), (1 << 48, SIZE - BLOCK)]
)
def test_a_redirected_request(make_rig: RigFactory, write_policy: WritePolicy, place: int, found: int) -> None:
    """Inside the disk, in whole blocks. The guest does not notice where its data is from."""
    line, _ = line_with(
        make_rig, write_policy("return redirect(my.number) if io.offset == 4096 else PASS", number=place)
    )
    assert line.do(IN, 8, room=BLOCK) == Answer(OK, BLOCK + 1, DISK[found:][:BLOCK])
    data = pattern(BLOCK, 1)
    assert line.do(OUT, 8, data) == Answer(OK, 1, b"")
    assert line.rig.content() == DISK[:found] + data + DISK[found + BLOCK :]


def test_delays_of_several_policies_add_up(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    slow = write_policy("return delay(10_000)", "return delay(5_000)")
    late_error = write_policy("return after(15_000, fail(ENOSPC)) if io.operation == WRITE else PASS")
    line, _ = line_with(make_rig, slow, late_error)
    for kind, least, status in ((OUT, 30, IOERR), (FLUSH, 15, OK)):
        start = time.monotonic_ns()
        assert line.do(kind, 8, pattern(512) if kind == OUT else b"").status == status
        assert time.monotonic_ns() - start >= least * 1_000_000


def test_the_first_that_ends_a_request_is_the_last_that_is_asked(
    make_rig: RigFactory, write_policy: WritePolicy
) -> None:
    count = "my.found += io.result == 0\nmy.seen += io.result != 0\nreturn PASS"
    above = write_policy("return PASS", count)
    ends = write_policy("return fail(EIO) if io.operation == WRITE else PASS", "return PASS")
    below = write_policy("return PASS", count + "  # below")
    line, _ = line_with(make_rig, above, ends, below)
    line.do(OUT, 0, pattern(512))
    line.do(IN, 0, room=512)
    assert above.counters == {"requests": 2, "seen": 1, "found": 1}
    assert below.counters == {"requests": 1, "seen": 0, "found": 1}


def test_a_result_can_be_changed(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    """Both ways: a failed request succeeds, and one that succeeded fails."""
    fails = write_policy("return fail(EIO) if io.operation == WRITE else PASS")
    line, _ = line_with(make_rig, write_policy("return PASS", "return DROP if io.result == -EIO else fail(EIO)"), fails)
    assert line.do(OUT, 0, pattern(512)).status == OK
    assert line.do(IN, 0, room=512).status == IOERR


def test_an_index_of_an_array_is_never_outside(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    line, part = line_with(
        make_rig,
        write_policy(
            "my.table[io.sequence - 100] += len(my.table)\n"
            "my.table[1 << 40] += 0\n"
            "my.seen = my.table[0] + my.table[-3] + my.table[6] + my.table[1003]\n"
            "my.found = my.area[1]\n"
            "return PASS",
            area="0-8K",
        ),
    )
    for _ in range(8):
        line.do(FLUSH)
    policy = part.policies.policies[0]
    assert policy.counters == {"requests": 8, "seen": 32, "found": 8192}


def test_a_policy_that_is_off_is_not_asked(make_rig: RigFactory) -> None:
    policy = sample("error")
    policy.enabled = False
    line, _ = line_with(make_rig, policy)
    assert line.do(FLUSH).status == OK
    assert policy.counters["requests"] == 0


def test_a_policy_that_is_off_can_be_switched_on_by_a_process_that_may_not_load_code(write_policy: WritePolicy) -> None:
    policy = write_policy("my.seen += 9009\nreturn PASS", "return PASS")
    policy.enabled = False
    assert not PolicyList([policy], shared=False).entries["down"].any()
    assert all(unit.is_loaded for unit in policy.loaded.units)


def test_parameters_change_while_it_runs(make_rig: RigFactory) -> None:
    policy = sample("error", operation="write")
    line, part = line_with(make_rig, policy)
    assert line.do(FLUSH).status == OK
    with pytest.raises(WrongParameter, match=r"^probability: 2 is not from 0 to 1$"):
        policy.change({"operation": "flush", "probability": 2})
    assert line.do(FLUSH).status == OK
    policy.change({"operation": "flush", "probability": "1"})
    # Not before its I/O thread puts all of them in force.
    assert line.do(FLUSH).status == OK
    line.worker.call(lambda: part.use(part.policies)).result(PATIENCE)
    assert line.do(FLUSH).status == IOERR
    assert policy.shown()["operation"] == "flush"


def test_parameters_do_not_change_while_an_io_thread_is_in_the_policy() -> None:
    policy = sample("error", operation="write")
    PolicyLayer(SIZE, 512, [policy]).part(0, 1)
    mutex = policy.address + MUTEX
    libc.lock_mutex(mutex)
    policy.change({"operation": "flush", "probability": 0.5})
    storing = threading.Thread(target=policy.put_in_force)
    try:
        storing.start()
        storing.join(0.2)
        assert (int(policy._my["operation"]), float(policy._my["probability"])) == (WRITE, 1.0)
    finally:
        libc.unlock_mutex(mutex)
    storing.join(PATIENCE)
    assert (int(policy._my["operation"]), float(policy._my["probability"])) == (FLUSH_OPERATION, 0.5)


def test_what_hangs_is_released(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    """By the policy that lets it hang, whatever else hangs; other requests are served meanwhile."""
    writes = write_policy("return HANG if io.operation == WRITE else PASS")
    flushes = write_policy("return HANG if io.operation == FLUSH else PASS")
    line, part = line_with(make_rig, writes, flushes)
    data = pattern(512, 1)
    write, flush = line.put(OUT, 8, data), line.put(FLUSH)
    line.kick()
    assert line_is_alive(line)
    channel = line.worker.state.channel.address
    assert line.queue.in_flight == 2
    line.worker.call(lambda: part.release(channel, writes)).result(PATIENCE)
    done = []
    assert eventually(lambda: bool(done.extend(line.ring.collect()) or done))
    assert done == [write]
    assert line.rig.content()[BLOCK:][:512] == data
    line.turn_is_over()
    assert line.queue.in_flight == 1
    line.worker.call(lambda: part.release(channel)).result(PATIENCE)
    line.wait()
    assert line.answer(flush) == Answer(OK, 1, b"")


def line_is_alive(line: Line) -> bool:
    """A read is completed, although something else of the ring is not."""
    read = line.put(IN, 0, room=512)
    line.kick()
    done = []
    assert eventually(lambda: bool(done.extend(line.ring.collect()) or done))
    line.turn_is_over()
    return done == [read] and line.answer(read) == Answer(OK, 513, DISK[:512])


def test_the_list_is_swapped_while_something_hangs(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    hang = write_policy("return HANG if io.operation == WRITE else PASS")
    line, part = line_with(make_rig, hang)
    write = line.put(OUT, 8, pattern(512, 1))
    line.kick()
    assert line_is_alive(line)
    error = sample("error", operation="flush")
    line.worker.call(lambda: part.use(PolicyList([error], shared=False))).result(PATIENCE)
    channel = line.worker.state.channel.address
    line.worker.call(lambda: part.release(channel, hang)).result(PATIENCE)
    line.wait()
    assert line.answer(write).status == OK
    assert line.do(FLUSH).status == IOERR
    assert line.do(OUT, 8, pattern(512)).status == OK


def test_random_faults_follow_from_the_seed(make_rig: RigFactory) -> None:
    def faults(seed: int) -> list[int]:
        policy = sample("error", probability=0.5, seed=seed)
        line, _ = line_with(make_rig, policy)
        statuses = [line.do(FLUSH).status for _ in range(64)]
        assert statuses.count(IOERR) == policy.counters["failed"]
        return statuses

    assert faults(1) == faults(1) != faults(2)


def test_random_numbers_have_their_distributions(tmp_path: Path, write_policy: WritePolicy) -> None:
    policy = write_policy(
        "for _ in range(20000):\n"
        "    my.seen += int(exponential(io, 1000.0))\n"
        "    my.found += int(normal(io, 1000.0, 100.0))\n"
        "    my.table[below(io, 4)] += 1\n"
        "    my.last += uniform(io, 0.0, 10.0) < 5.0\n"
        "return PASS"
    )
    from ringplane.block.io import BLOCK_IO, CHANNEL
    from ringplane.native.structs import new

    part = PolicyLayer(SIZE, 512, [policy]).part(0, 1)
    part.use(PolicyList([policy], shared=True))
    io, channel = new(BLOCK_IO), new(CHANNEL)
    from ringplane.block.layers.policy_walk import down

    assert down(part.state, int(channel.ctypes.data), int(io.ctypes.data)) == 0
    assert 19_000_000 < policy.counters["seen"] < 21_000_000
    assert 19_900_000 < policy.counters["found"] < 20_100_000
    assert all(4600 < count < 5400 for count in policy._arrays["table"][1:])
    assert 9500 < int(policy._my["last"]) < 10500


def test_policies_of_two_threads_share_their_counters(tmp_path: Path) -> None:
    """Whether they need a mutex is known; test_no_two_threads_are_in_a_policy needs it."""
    policy = sample("error", operation="flush")
    options: dict[str, Any] = {"create": SIZE, "num_queues": 2, "io_threads": 2}
    path = f"{SAMPLES}/sample_error.py"
    with (
        ringplane.serve(
            tmp_path / "disk.img", tmp_path / "socket", policy=[PolicyUse(path, {"operation": "flush"})], **options
        ) as export,
        Driver(tmp_path / "socket") as driver,
    ):
        driver.write(0, pattern(BLOCK))
        assert driver.read(0, BLOCK) == pattern(BLOCK)
        with pytest.raises(Exception, match="flush"):
            driver.flush()
        layer = export.disk.layers[-1]
        assert isinstance(layer, PolicyLayer)
        assert layer.listed().entries["shared"].all()
        assert layer.policies[0].counters == {"requests": 3, "failed": 1}
    assert policy.counters["requests"] == 0


def test_no_two_threads_are_in_a_policy(tmp_path: Path) -> None:
    """Two queues with a thread each: no number of what they count is lost, and none of the random numbers."""
    path, requests, steps = tmp_path / "own.py", 150, 20_000
    # Another element each time, so that it is stored each time.
    path.write_text(own_policy(f"for _ in range({steps}):\n    my.table[below(io, 4)] += 1\nreturn PASS"))
    options: dict[str, Any] = {"create": SIZE, "num_queues": 2, "io_threads": 2}

    with (
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", policy=[PolicyUse(str(path))], **options) as export,
        Driver(tmp_path / "socket", queues=2) as driver,
    ):
        threads = [
            threading.Thread(target=lambda queue=queue: [driver.read(0, 512, queue) for _ in range(requests)])  # type: ignore[misc]
            for queue in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        (policy,) = export.disk.running_policies
        assert policy.counters["requests"] == 2 * requests
        assert sum(policy._arrays["table"][1:]) == 2 * requests * steps


def test_a_disk_grows_with_a_policy(tmp_path: Path, write_policy: WritePolicy) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy("return redirect(2 * 1024 * 1024) if io.operation == READ else PASS"))
    (tmp_path / "disk.img").write_bytes(pattern(SIZE))
    with (
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", policy=[PolicyUse(f"{path}:own")]) as export,
        Driver(tmp_path / "socket") as driver,
    ):
        assert driver.read(0, 512) == pattern(SIZE)[-512:]
        export.resize(4 * SIZE)
        assert driver.read(0, 512) == bytes(512)


def test_a_large_write_is_copied_whole(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    line, part = line_with(
        make_rig,
        write_policy(
            "if io.operation == WRITE:\n"
            "    store8(io, io.length - 1, 7)\n"
            "    store8(io, io.length, 9)\n"
            "    store8(io, -1, 9)\n"
            "    my.found = load8(io, io.length - 1) + 1000 * load8(io, io.length)\n"
            "return PASS",
            data=True,
        ),
    )
    data = pattern(SIZE // 2, 3)
    assert line.do(OUT, 0, data).status == OK
    assert line.rig.content() == data[:-1] + b"\x07" + DISK[SIZE // 2 :]
    assert part.policies.policies[0].counters["found"] == 7


@pytest.mark.parametrize(
    "body",
    ["store8(io, 0, 7)\nreturn PASS", "return tear(512)", "store8(io, 0, 7)\nreturn tear(4096)"],
    ids=["changed", "torn", "changed and whole"],
)
def test_copies_of_an_io_thread_are_limited(make_rig: RigFactory, write_policy: WritePolicy, body: str) -> None:
    """A write that finds no room fails; what the others have used is free again."""
    line, part = line_with(make_rig, write_policy(body, data=True))
    before = part._seen["room"][0]
    assert [line.do(OUT, 8, pattern(4096, 1)).status for _ in range(4)] == [OK] * 4
    assert part._seen["room"][0] == before == MOST_COPIED
    part._seen["room"] = 4095
    assert line.do(OUT, 8, pattern(4096, 1)).status == IOERR
    assert line.do(IN, 0, room=512).status == OK
    part._seen["room"] = 4096
    assert [line.do(OUT, 8, pattern(4096, 1)).status for _ in range(4)] == [OK] * 4
    assert part._seen["room"][0] == 4096


def test_a_write_that_cannot_be_changed_does_not_hang(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    """Released, it would write what the policy has not changed."""
    line, part = line_with(
        make_rig, write_policy("store8(io, 0, 7)\nreturn HANG if io.operation == WRITE else PASS", data=True)
    )
    part._seen["room"] = 512
    assert line.do(OUT, 8, pattern(4096, 1)).status == IOERR
    assert line.rig.content() == DISK


def test_a_policy_learns_of_several_ranges(tmp_path: Path) -> None:
    path, found = tmp_path / "own.py", []
    path.write_text(own_policy("my.found += io.ranges\nreturn PASS"))
    with (
        ringplane.serve(
            tmp_path / "disk.img", tmp_path / "socket", create=SIZE, policy=[PolicyUse(str(path))]
        ) as export,
        Driver(tmp_path / "socket") as driver,
    ):
        for kind, data in (
            (OUT, pattern(512)),
            (VIRTIO_BLK_T_DISCARD, segments((0, 8, 0), (64, 16, 0))),
            (OUT, pattern(512)),
            (VIRTIO_BLK_T_DISCARD, segments((0, 8, 0))),
        ):
            assert driver.request(kind, 0, data).status == OK
            found.append(export.disk.running_policies[0].counters["found"])
    assert found == [1, 3, 4, 5]


def test_io_of_another_operation_has_no_data(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    line, part = line_with(
        make_rig,
        write_policy(
            "store8(io, 0, 1)\nmy.found += load8(io, 0)\nreturn PASS", "my.seen += load8(io, 0)\nreturn PASS", data=True
        ),
    )
    line.do(FLUSH)
    read = line.do(IN, 0, room=512)
    assert read.data == DISK[:512]
    assert part.policies.policies[0].counters == {"requests": 2, "found": 0, "seen": DISK[0]}


MIXED = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


@pytest.mark.parametrize("name", MIXED)
def test_guests_see_an_error_whatever_its_number(make_rig: RigFactory, write_policy: WritePolicy, name: str) -> None:
    line, _ = line_with(make_rig, write_policy(f"return fail({name})"))
    assert line.do(OUT, 0, pattern(512)).status == IOERR
    assert os.strerror(MIXED[name])


def abandon(line: Line) -> None:
    """Stop the ring of a front end that has gone."""
    drained = line.worker.stop_queue(line.queue)
    assert eventually(
        lambda: line.worker.call(lambda: line.worker.rings.abandon_kept(line.queue)).result(PATIENCE) or drained.done()
    )
    drained.result(PATIENCE)
    assert line.queue.in_flight == 0


@pytest.mark.parametrize("in_order", [False, True])
def test_what_hangs_is_done_again_for_the_next_front_end(
    make_rig: RigFactory, write_policy: WritePolicy, in_order: bool
) -> None:
    """From the in-flight region, with all that has to be used after it."""
    hang = write_policy("return HANG if io.operation == WRITE else PASS")
    part = PolicyLayer(SIZE, 512, [hang]).part(0, 64)
    part.use(PolicyList([hang], shared=False))
    line = make_rig(layers=[part]).line()
    line.ring = Ring(line.rig.guest, 128, in_order=in_order)
    length = tracking.region_bytes(128, packed=False)
    fd = os.memfd_create("region")
    os.ftruncate(fd, length)
    mapping = Mapping(fd, length, 0)
    line.ring.inflight = InflightRegion(mapping.address, mapping)
    line.resume()
    data = pattern(512, 1)
    flush, write, read = line.put(FLUSH), line.put(OUT, 8, data), line.put(IN, 16, room=512)
    line.kick()
    done: list[Pending] = []
    wanted = [flush] if in_order else [flush, read]
    assert eventually(lambda: bool(done.extend(line.ring.collect()) or len(done) == len(wanted)))
    line.turn_is_over()
    assert eventually(lambda: part.kept(line.worker.state.channel.ios) != [])
    abandon(line)
    assert sorted(each.head for each in done) == sorted(each.head for each in wanted)
    assert line.ring.collect() == []
    assert line.rig.content() == DISK
    part.use(PolicyList([], shared=False))
    line.queue.reset()
    line.resume()
    line.kick()
    line.wait()
    assert line.answer(write) == Answer(OK, 1, b"")
    assert line.answer(read) == Answer(OK, 513, DISK[8192:][:512])
    assert line.rig.content()[4096:][:512] == data
    assert line.do(FLUSH) == Answer(OK, 1, b"")
    os.close(fd)


def test_slots_of_abandoned_requests_are_used_again(make_rig: RigFactory, write_policy: WritePolicy) -> None:
    """Also those with a copy of their data."""
    hang = write_policy("store8(io, 0, 1)\nreturn HANG if io.operation == WRITE else PASS", data=True)
    line, part = line_with(make_rig, hang)
    for _ in range(3):
        for number in range(30):
            line.put(OUT, number, pattern(512))
        line.kick()
        assert eventually(lambda: line.queue.in_flight == 30)
        line.turn_is_over()
        abandon(line)
        line.start()
    assert part.kept(line.worker.state.channel.ios) == []
    assert line.do(IN, 0, room=512) == Answer(OK, 513, DISK[:512])
