"""What several threads use, and one of them ends."""

from __future__ import annotations

import threading

import pytest

from ringplane.system.use_counts import Users

from .waiting import PATIENCE


def test_it_ends_after_its_last_user() -> None:
    users, ended = Users(), threading.Event()

    def end() -> None:
        users.end()
        ended.set()

    with users.one(), users.one():
        threading.Thread(target=end, daemon=True).start()
        while _begins(users):
            assert not ended.is_set()
    assert ended.wait(PATIENCE)
    assert not _begins(users)
    users.end()


def _begins(users: Users) -> bool:
    try:
        with users.one():
            return True
    except OSError:
        return False


def test_an_error_of_a_user() -> None:
    users = Users()
    with pytest.raises(ZeroDivisionError), users.one():
        _ = 1 // 0
    users.end()
