"""The rules of the virtio specification whose violation breaks a ring, and the log message of each."""

from __future__ import annotations

from ringplane.dataplane.state import MAX_IOVECS

OK = 0
AVAIL_INDEX = 1
TOO_MANY_IN_FLIGHT = 2
HEAD_RANGE = 3
NEXT_RANGE = 4
LOOP = 5
ZERO_LENGTH = 6
ADDRESS = 7
ORDER = 8
TOO_MANY_SEGMENTS = 9
TOO_MANY_BYTES = 10
INDIRECT_NOT_NEGOTIATED = 11
INDIRECT_NESTED = 12
INDIRECT_NEXT = 13
INDIRECT_LENGTH = 14
INDIRECT_ADDRESS = 15
NO_HEADER = 16
NO_STATUS = 17

MESSAGES = {
    AVAIL_INDEX: "the available index jumped by more than the ring's size",
    TOO_MANY_IN_FLIGHT: "more chains are in flight than the ring has descriptors",
    HEAD_RANGE: "the head of a chain is not below the ring's size",
    NEXT_RANGE: "a descriptor's next field points outside its table",
    LOOP: "the descriptors form a loop",
    ZERO_LENGTH: "a descriptor has length zero",
    ADDRESS: "a buffer is not inside the shared memory",
    ORDER: "a device-readable descriptor follows a device-writable one",
    TOO_MANY_SEGMENTS: f"a chain has more than {MAX_IOVECS} segments",
    TOO_MANY_BYTES: "a chain is longer than 2^32 bytes",
    INDIRECT_NOT_NEGOTIATED: "a descriptor is indirect, but VIRTIO_F_INDIRECT_DESC was not negotiated",
    INDIRECT_NESTED: "an indirect table refers to another indirect table",
    INDIRECT_NEXT: "an indirect descriptor has a next descriptor",
    INDIRECT_LENGTH: "the length of an indirect table is zero or not a multiple of 16",
    INDIRECT_ADDRESS: "an indirect table is not inside one region of the shared memory",
    NO_HEADER: "a request has no complete header (fewer than 16 device-readable bytes)",
    NO_STATUS: "a request has no device-writable byte for its status",
}
