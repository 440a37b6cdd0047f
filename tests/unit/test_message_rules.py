"""The rules for messages: each request has one, and they fit together."""

from __future__ import annotations

from ringplane.vhost_user.message_rules import BACKEND_RULES, RULES
from ringplane.vhost_user.messages import MAX_FDS, BackendRequest, ProtocolFeature, Request


def test_every_request_has_a_rule_and_its_number() -> None:
    assert list(Request) == list(RULES)
    assert sorted(Request) == list(range(1, 44))
    assert list(BackendRequest) == list(BACKEND_RULES)
    assert sorted(BackendRequest) == list(range(1, 9))


def test_rules_are_consistent() -> None:
    for rule in [*RULES.values(), *BACKEND_RULES.values()]:
        assert 0 <= rule.min_fds <= rule.max_fds <= MAX_FDS
        assert rule.max_reply_fds == 0 or rule.reply is not None
        assert not rule.may_reply_empty or rule.reply is not None


def test_protocol_features_have_the_specifications_bits() -> None:
    assert [feature.value for feature in ProtocolFeature] == [1 << bit for bit in range(21)]
    assert ProtocolFeature.CONFIG == 1 << 9
    assert ProtocolFeature.CONFIGURE_MEM_SLOTS == 1 << 15
