"""The content of verified sectors (words computed from a seed, the sector and its generation), and a disk's model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.native.access import view, wrapping_add, wrapping_mul
from ringplane.virtio.blk import SECTOR

# Content. A 64-bit word of a sector is first_word + position * WORD_STEP; first_word is a one-to-one mix of seed,
# generation and sector, so the origin of a word can be computed. Constants of Steele et al., SplitMix64, as int64.
WORDS = SECTOR // 8
WORD_STEP = -0x61C8864680B583EB
MIX_1 = -0x40A7B892E31B1A47
MIX_2 = -0x6B2FB644ECCEEE15
GENERATION_BITS = 24
GENERATION_MASK = (1 << GENERATION_BITS) - 1
SECTOR_CONTENT = np.dtype([("words", "<i8", (WORDS,))])

# Entries of the model: the generation of the sector, 0 if its content is unknown, and whether a request on it is in
# flight.
BUSY = 1 << 31


@compiled
def mix(value):
    """The finaliser of SplitMix64: one-to-one on 64 bits. (Shifts of int64 are arithmetic, so they are masked.)"""
    value = wrapping_mul(value ^ ((value >> 30) & 0x3FFFFFFFF), MIX_1)
    value = wrapping_mul(value ^ ((value >> 27) & 0x1FFFFFFFFF), MIX_2)
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


@compiled
def first_word(seed, sector, generation):
    """The first word of a sector's content."""
    return mix(mix(seed) ^ ((sector << GENERATION_BITS) | generation))


@compiled
def word_at(word, position):
    """The word at `position` of the content that begins with `word`."""
    return wrapping_add(word, wrapping_mul(position, WORD_STEP))


@compiled
def write_content(address, word):
    """Fill the sector at `address` with the content that begins with `word`."""
    words = view(address, SECTOR_CONTENT).words
    for position in range(WORDS):
        words[position] = word_at(word, position)


@compiled
def content_differs(address, word):
    """0 if the sector at `address` has the content that begins with `word`."""
    words = view(address, SECTOR_CONTENT).words
    difference = 0
    for position in range(WORDS):
        difference |= words[position] ^ word_at(word, position)
    return difference


def origin(word: int, position: int, seed: int) -> str:
    """A description of where the word found at `position` of a sector comes from, by the inverse of `first_word`."""
    if word == 0:
        return "zeros"
    packed = _unmix(word - position * WORD_STEP) ^ int(mix(seed)) % (1 << 64)
    sector, generation = packed >> GENERATION_BITS, packed & GENERATION_MASK
    # Any word decodes to some sector and generation; only small numbers are plausible.
    if sector < 1 << 36 and 0 < generation < 1 << 20:
        return f"data of sector {sector}, generation {generation}"
    return "not written with this seed"


def _unmix(value: int) -> int:
    """The inverse of `mix`, on unsigned numbers."""
    wrap = (1 << 64) - 1
    value &= wrap
    value ^= (value >> 31) ^ (value >> 62)
    value = value * pow(MIX_2, -1, 1 << 64) & wrap
    value ^= (value >> 27) ^ (value >> 54)
    value = value * pow(MIX_1, -1, 1 << 64) & wrap
    return value ^ (value >> 30) ^ (value >> 60)


class Model:
    """The expected content of each sector of a region of a disk; it can be kept from one run to the next.

    Four bytes per sector of `region` (offset and length in bytes); only pages that were used take memory.
    """

    def __init__(self, region: tuple[int, int], seed: int = 1) -> None:
        self.first, self.sectors = region[0] // SECTOR, region[1] // SECTOR
        self.seed = seed
        self.generations: npt.NDArray[np.int32] = np.zeros(self.sectors, np.int32)

    @property
    def address_of_sector_0(self) -> int:
        """The address that the entry of the disk's sector 0 would have."""
        return int(self.generations.ctypes.data) - 4 * self.first

    def forget_requests(self) -> None:
        """Nothing is in flight any more; the sectors of unfinished requests become unknown."""
        self.generations[self.generations < 0] = 0

    def covers(self, region: tuple[int, int]) -> bool:
        """Whether the model has all sectors of a region."""
        first, end = region[0] // SECTOR, (region[0] + region[1]) // SECTOR
        return self.first <= first and end <= self.first + self.sectors
