"""The walk through the policies of a disk against a model in plain Python: any answers, any order, any I/O."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.block.io import BLOCK_IO, CHANNEL, FLUSH, READ, WRITE
from ringplane.block.layers.policy_layer import PolicyLayer, PolicyList, PolicyPart
from ringplane.block.layers.policy_walk import down, up
from ringplane.block.stack import CONTINUE, KEEP, WAIT
from ringplane.native.structs import new
from ringplane.native.uio import IOVEC
from ringplane.policies.answers import (
    DELAYED,
    DROPPED,
    FAILED,
    HUNG,
    NUMBER_BITS,
    PASSED,
    REDIRECTED,
    TIME_SHIFT,
    TORN,
)
from ringplane.policies.running import RunningPolicy

from .test_policies import sample

SIZE, BLOCK = 1 << 20, 512
# More than 4 policies do nothing that fewer do not.
POLICIES = 4


@dataclass(frozen=True)
class Given:
    """An answer: `time` is in microseconds, below 2^15, so that it is exact."""

    kind: int = PASSED
    number: int = 0
    time: int = 0

    @property
    def encoded(self) -> int:
        if self.kind in (PASSED, DELAYED):
            return DELAYED | self.time << 3 if self.time else PASSED
        return self.kind | self.number << 3 | self.time << TIME_SHIFT


NUMBERS = {FAILED: st.integers(1, 133), TORN: st.integers(0, 9000), REDIRECTED: st.integers(0, SIZE // 512 + 9)}
ANSWERS = st.sampled_from([PASSED, DELAYED, FAILED, HUNG, DROPPED, TORN, REDIRECTED]).flatmap(
    lambda kind: st.builds(Given, st.just(kind), NUMBERS.get(kind, st.just(0)), st.integers(0, (1 << 15) - 1))
)


@dataclass
class Model:
    """What has to become of an I/O."""

    operation: int
    offset: int
    length: int
    wait: int = 0
    result: int = 0
    hangs: bool = False
    ended: bool = False
    # Of each policy: how often it was asked, and the results that it has seen.
    asked: list[int] = field(default_factory=lambda: [0] * POLICIES)
    results: list[list[int]] = field(default_factory=lambda: [[] for _ in range(POLICIES)])

    def go_down(self, answers: list[Given], after: list[Given]) -> None:
        for index, answer in enumerate(answers):
            self.asked[index] += 1
            self.wait += answer.time
            if answer.kind == REDIRECTED and self.operation != FLUSH:
                place = min(answer.number * 512, SIZE - self.length)
                self.offset = place // BLOCK * BLOCK
            elif answer.kind == TORN and self.operation == WRITE and answer.number < self.length:
                cut = answer.number // BLOCK * BLOCK
                if cut == 0:
                    self.end(0, after[:index])
                else:
                    self.length = cut
                return
            elif answer.kind == TORN:
                return
            elif answer.kind == HUNG:
                self.hangs = True
                return
            elif answer.kind in (FAILED, DROPPED):
                self.end(-answer.number, after[:index])
                return

    def end(self, result: int, after: list[Given]) -> None:
        self.ended, self.result = True, result
        self.go_up(after)

    def go_up(self, after: list[Given]) -> None:
        for index, answer in reversed(list(enumerate(after))):
            self.results[index].append(self.result)
            self.wait += answer.time
            if answer.kind == HUNG:
                self.hangs = True
                return
            if answer.kind in (FAILED, DROPPED):
                self.result = -answer.number


@pytest.fixture(scope="module")
def policies() -> list[RunningPolicy]:
    return [sample("scripted") for _ in range(POLICIES)]


@settings(max_examples=300, deadline=None)
@given(
    answers=st.lists(st.tuples(ANSWERS, ANSWERS), max_size=POLICIES),
    operation=st.sampled_from([READ, WRITE, FLUSH]),
    sector=st.integers(0, (SIZE - 8192) // 512),
    blocks=st.integers(1, 16),
    cut=st.integers(1, 8191),
    storage=st.sampled_from([0, 0, -5, -28]),
)
def test_any_answers_to_any_request(
    policies: list[RunningPolicy],
    answers: list[tuple[Given, Given]],
    operation: int,
    sector: int,
    blocks: int,
    cut: int,
    storage: int,
) -> None:
    length = 0 if operation == FLUSH else blocks * 512
    part = PolicyLayer(SIZE, BLOCK).part(0, 1)
    part.use(PolicyList(policies[: len(answers)], shared=False))
    for policy, (answer, after) in zip(policies, answers, strict=False):
        policy._header["entered"] = policy._my["results"] = policy._my["sum_of_results"] = 0
        policy._my["answer"], policy._my["answer_to_result"] = answer.encoded, after.encoded
    data = np.arange(8192, dtype=np.uint8)
    before = data.copy()
    io, channel, vectors = new(BLOCK_IO), new(CHANNEL), np.zeros(2, IOVEC)
    sizes = [min(cut, length), max(length - cut, 0)]
    vectors["base"] = int(data.ctypes.data), int(data.ctypes.data) + sizes[0]
    vectors["len"] = sizes
    channel["ios"] = io.ctypes.data
    io["operation"], io["offset"], io["length"] = operation, sector * 512, length
    io["iov"], io["iov_count"], io["iov_room"] = vectors.ctypes.data, 2, vectors.ctypes.data + 32
    model = Model(operation, sector * 512, length)
    model.go_down([answer for answer, _ in answers], [after for _, after in answers])

    start = time.monotonic_ns()
    verdict = call(down, part, channel, io)
    check(verdict, io, model, start)
    if not model.ended:
        assert (int(io["offset"][0]), int(io["length"][0])) == (model.offset, model.length)
        if operation == WRITE:
            assert content(io) == before.tobytes()[: model.length]
    if not model.ended:
        # Storage, after whatever it waited for.
        io["upward"], io["result"], io["done"] = 1, storage, model.length if storage == 0 else 0
        model.result, model.wait, model.hangs = storage, 0, False
        model.go_up([after for _, after in answers])
        channel["moving_first"] = -1
        start = time.monotonic_ns()
        check(call(up, part, channel, io), io, model, start)
    assert (int(io["offset"][0]), int(io["length"][0])) == (sector * 512, length)
    assert (int(io["iov"][0]), int(io["iov_count"][0])) == (vectors.ctypes.data, 2)
    assert (data == before).all()
    for index in range(len(answers)):
        policy = policies[index]
        assert policy.counters["requests"] == model.asked[index]
        assert policy.counters["results"] == len(model.results[index])
        assert policy.counters["sum_of_results"] == sum(model.results[index])


def call(unit: object, part: PolicyPart, channel: np.ndarray, io: np.ndarray) -> int:
    return int(unit(part.state, int(channel.ctypes.data), int(io.ctypes.data)))  # type: ignore[operator]


def check(verdict: int, io: np.ndarray, model: Model, start: int) -> None:
    if model.hangs:
        assert verdict == KEEP
        return
    assert verdict == (WAIT if model.wait else CONTINUE)
    if model.wait:
        # From the time of the call.
        assert start <= int(io["due"][0]) - model.wait * 1000 <= time.monotonic_ns()
    if int(io["upward"][0]):
        assert int(io["result"][0]) == model.result
        if model.result == 0:
            assert int(io["done"][0]) == int(io["length"][0])


def content(io: np.ndarray) -> bytes:
    """What would be written."""
    import ctypes

    count, first = int(io["iov_count"][0]), int(io["iov"][0])
    parts = np.ctypeslib.as_array((ctypes.c_int64 * (2 * count)).from_address(first)).reshape(count, 2)
    return b"".join(ctypes.string_at(int(base), int(size)) for base, size in parts)


def test_numbers_fit() -> None:
    assert NUMBER_BITS >= 40
