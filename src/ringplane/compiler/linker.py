"""Machine code for a given address: an object file of LLVM's becomes the bytes that run there.

A process that may not load code any more gets them from another one (system/code_window.py). Numba's code has few kinds
of relocations, because all its addresses have 64 bits. Anything else is an error, and nothing is guessed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ringplane.compiler.loader import SYMBOL

# <elf.h>: ELF for x86-64. The header up to the machine, and from there to the place of the sections; a section; a
# symbol; a relocation.
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL_ENTRY = struct.Struct("<IBBHQQ")
RELOCATION = struct.Struct("<QQq")
IDENT = b"\x7fELF\x02\x01\x01"
EM_X86_64 = 62
SHT_PROGBITS, SHT_SYMTAB, SHT_RELA = 1, 2, 4
# What debuggers and exceptions need.
SHT_X86_64_UNWIND = 0x7000_0001
SHF_WRITE, SHF_ALLOC = 1, 2
SHN_UNDEF = 0
R_X86_64_64, R_X86_64_PC64 = 1, 24

# Of the code as a whole.
ALIGNMENT = 64


class NotLinkable(Exception):
    """The text says what the code has, or needs, that cannot be had at another address."""


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def linked(code: bytes, address: int, functions: Mapping[str, int]) -> tuple[bytes, int]:
    """The bytes of an object file for this address, a multiple of ALIGNMENT, and where in them its function begins.

    `functions`: the addresses of those of C's library that it may call. Raises NotLinkable.
    """
    try:
        return _Linking(code, address, functions).done()
    except (struct.error, IndexError, ValueError, StopIteration):
        raise NotLinkable("its object file is damaged") from None


class _Linking:
    def __init__(self, code: bytes, address: int, functions: Mapping[str, int]) -> None:
        self._code, self._address, self._functions = code, address, functions
        ident, _, machine, *_, size, count, _ = HEADER.unpack_from(code)
        if not ident.startswith(IDENT) or machine != EM_X86_64 or size != SECTION.size:
            raise NotLinkable("its object file is not for this machine")
        (begin,) = struct.unpack_from("<Q", code, 40)
        self._sections = [_Section(*SECTION.unpack_from(code, begin + number * size)) for number in range(count)]
        self._content = bytearray()
        # Of the sections that are part of the content, by their numbers.
        self._places: dict[int, int] = {}

    def done(self) -> tuple[bytes, int]:
        for number, section in enumerate(self._sections):
            if section.flags & SHF_ALLOC and section.size and section.kind != SHT_X86_64_UNWIND:
                self._place(number, section)
        for section in self._sections:
            if section.kind == SHT_RELA and section.info in self._places:
                self._relocate(section)
        return bytes(self._content), self._entry() - self._address

    def _place(self, number: int, section: _Section) -> None:
        if section.kind != SHT_PROGBITS or section.flags & SHF_WRITE or section.alignment > ALIGNMENT:
            raise NotLinkable("it has variables of its own")
        self._content += bytes(-len(self._content) % max(section.alignment, 1))
        self._places[number] = len(self._content)
        self._content += self._part(section)

    def _relocate(self, section: _Section) -> None:
        base = self._places[section.info]
        for offset, info, addend in RELOCATION.iter_unpack(self._part(section)):
            kind, place = info & 0xFFFF_FFFF, base + offset
            if kind not in (R_X86_64_64, R_X86_64_PC64) or offset + 8 > self._sections[section.info].size:
                raise NotLinkable(f"it has relocations of kind {kind}")
            value = self._value(self._sections[section.link], info >> 32) + addend
            if kind == R_X86_64_PC64:
                value -= self._address + place
            self._content[place : place + 8] = (value & (1 << 64) - 1).to_bytes(8, "little")

    def _value(self, table: _Section, number: int) -> int:
        """The address of a symbol."""
        name, _, _, section, value, _ = SYMBOL_ENTRY.unpack_from(self._part(table), number * SYMBOL_ENTRY.size)
        if section in self._places:
            return self._address + self._places[section] + int(value)
        text = self._name(table, name)
        if section != SHN_UNDEF or text not in self._functions:
            raise NotLinkable(f"it needs {text or 'an unknown section'}, which a policy cannot call here")
        return self._functions[text]

    def _entry(self) -> int:
        table = next(section for section in self._sections if section.kind == SHT_SYMTAB)
        return next(self._value(table, number) for number, name in self._names(table) if name == SYMBOL)

    def _names(self, table: _Section) -> Iterator[tuple[int, str]]:
        for number, (name, *_) in enumerate(SYMBOL_ENTRY.iter_unpack(self._part(table))):
            yield number, self._name(table, name)

    def _name(self, table: _Section, offset: int) -> str:
        texts = self._part(self._sections[table.link])
        return texts[offset : texts.index(b"\0", offset)].decode()

    def _part(self, section: _Section) -> bytes:
        return self._code[section.offset : section.offset + section.size]
