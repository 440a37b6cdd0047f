"""Reads of the configuration space."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import ringplane
from ringplane.vhost_user.messages import HEADER, VERSION, Request
from ringplane.vhost_user.payloads import Config, Empty
from ringplane.virtio.blk import CONFIG

from .protocol_rig import IMAGE_SIZE, QUEUES, SECTOR, negotiated

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.mark.parametrize("size", [8, 16, 52, 57, 60, 96, 255, 256])
def test_config_reply_has_exactly_the_requested_size(export: ringplane.Export, size: int) -> None:
    with negotiated(export) as peer:
        config = peer.get_config(0, size)
    assert len(config) == size
    assert int.from_bytes(config[:8], "little") == IMAGE_SIZE // SECTOR


def test_config_from_an_offset_is_a_part_of_the_whole(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        whole = peer.get_config(0, 256)
        assert [peer.get_config(offset, 4) for offset in (0, 20, 252)] == [whole[:4], whole[20:24], whole[252:]]
    space = np.frombuffer(whole[: CONFIG.itemsize], CONFIG)[0]
    assert (space["num_queues"], space["blk_size"]) == (QUEUES, SECTOR)
    assert space["seg_max"] > 0


@pytest.mark.parametrize(("offset", "size"), [(1, 256), (256, 1), (249, 8), ((1 << 32) - 1, 8)])
def test_config_beyond_the_space_is_refused_with_an_empty_payload(
    export: ringplane.Export, offset: int, size: int
) -> None:
    with negotiated(export) as peer:
        answer = peer.transport.call(Request.GET_CONFIG, Config.asking_for(offset, size))
        assert answer is not None
        assert answer.payload == Empty()
        assert peer.get_config(0, 8)


def test_config_request_longer_than_the_space_ends_the_connection(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        peer.sock.sendall(HEADER.pack(Request.GET_CONFIG, VERSION, 12 + 257) + struct.pack("=III", 0, 257, 0))
        assert peer.ended()
