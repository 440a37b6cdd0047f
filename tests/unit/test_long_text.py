"""Answers that are made while they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.api import long_text
from ringplane.api.long_text import PORTION, LongText, portions


@given(st.lists(st.integers(0, 2 * PORTION), max_size=10))
def test_portions_are_the_text(lengths: list[int]) -> None:
    found = list(portions("x" * length for length in lengths))
    assert sum(map(len, found)) == sum(lengths)
    assert all(len(portion) >= PORTION for portion in found[:-1])


def test_nothing_is_sent_if_it_cannot_begin() -> None:
    def pieces() -> Iterator[str]:
        raise ValueError("no text")
        yield ""

    with pytest.raises(ValueError, match="no text"):
        LongText(pieces(), "text/plain")


def test_the_text_is_made_while_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "PORTION", 1)
    happened: list[str] = []

    def pieces() -> Iterator[str]:
        for piece in "abc":
            happened.append(f"make {piece}")
            yield piece

    async def send(message: Any) -> None:
        if body := message.get("body"):
            happened.append(f"send {body.decode()}")

    answer: Any = LongText(pieces(), "text/plain")
    asyncio.run(answer({}, None, send))
    assert happened == ["make a", "send a", "make b", "send b", "make c", "send c"]
    assert "content-length" not in answer.headers
