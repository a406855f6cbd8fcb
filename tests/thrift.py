"""Just enough of Thrift's compact protocol to find a number in a Parquet file, and to put another in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Types of the compact protocol.
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12


@dataclass(frozen=True)
class Number:
    """A whole number at *start* to before *end*."""

    value: int
    start: int
    end: int


class Reader:
    """Reads structs from *data* at *at*: fields by their numbers, lists as lists, whole numbers as `Number`."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def number(self) -> Number:
        start, raw = self.at, self.varint()
        return Number((raw >> 1) ^ -(raw & 1), start, self.at)

    def value(self, kind: int) -> object:
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind in (I16, I32, I64):
            return self.number()
        if kind == STRUCT:
            return self.struct()
        if kind in (LIST, SET):
            head = self.byte()
            size = self.varint() if head >> 4 == 15 else head >> 4
            return [self.byte() if head & 15 in (TRUE, FALSE) else self.value(head & 15) for _ in range(size)]
        size = {BYTE: 1, DOUBLE: 8}.get(kind) or self.varint()
        self.at += size
        return self.data[self.at - size : self.at]

    def struct(self) -> dict[int, object]:
        fields: dict[int, object] = {}
        last = 0
        while head := self.byte():
            last = last + (head >> 4) if head >> 4 else self.number().value
            fields[last] = self.value(head & 15)
        return fields


def footer(data: bytes) -> dict[int, object]:
    """The file metadata of a Parquet file."""
    return Reader(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little")).struct()


def pages(data: bytes, group: int, column: int) -> list[dict[int, Any]]:
    """The headers of the pages of a column chunk, dictionary first."""
    chunk = footer(data)[4][group][1][column][3]
    start = chunk[11].value if 11 in chunk else chunk[9].value
    found: list[dict[int, Any]] = []
    at = start
    while at < start + chunk[7].value:
        reader = Reader(data, at)
        found.append(reader.struct())
        at = reader.at + found[-1][3].value
    return found


def patched(data: bytes, number: Number, value: int) -> bytes:
    """*data* with another *value* for *number*, which must take as many bytes."""
    raw, packed = (value << 1) ^ (value >> 63), bytearray()
    for i in range(number.end - number.start):
        last = i == number.end - number.start - 1
        packed.append((raw & 127) | (0 if last else 128))
        raw >>= 7
    assert not raw, "the new number is longer"
    return data[: number.start] + bytes(packed) + data[number.end :]
