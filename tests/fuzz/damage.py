"""Damage to Parquet files: bits that flip, files that are cut off, footers that lie."""

from __future__ import annotations

__all__ = ["cut", "page_bodies", "spoil"]

import random

import pyarrow.parquet as pq

_BINARY, _LIST, _SET, _STRUCT = 8, 9, 10, 12
_COMPRESSED_SIZE = 3  # the page header's field


def cut(draw: random.Random, content: bytes) -> bytes:
    """Returns the beginning of a file."""
    return content[: draw.choice([0, 1, 4, 11, len(content) - 1, len(content) - 4, draw.randrange(len(content))])]


def spoil(draw: random.Random, content: bytes) -> bytes:
    """Returns a file with some of its bytes changed, anywhere or in its footer, taken away or put in."""
    spoilt = bytearray(content)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    first = draw.choice([0, 0, footer, footer, len(content) - 8])
    place = draw.randrange(first, len(content))
    count = draw.choice([1, 1, 2, 5, 20])
    match draw.randrange(6):
        case 0 | 1 | 2:
            flip(draw, spoilt, range(first, len(content)), count)
        case 3:
            spoilt[place : place + count] = bytes([draw.choice([0, 0x7F, 0xFF])]) * len(spoilt[place : place + count])
        case 4:
            del spoilt[place : place + count]
        case _:
            spoilt[place:place] = draw.randbytes(count)
    return bytes(spoilt)


def flip(draw: random.Random, content: bytearray, places: range | list[int], count: int) -> None:
    """Flips bits in place."""
    for _ in range(count):
        content[draw.choice(places)] ^= 1 << draw.randrange(8)


def page_bodies(content: bytes, metadata: pq.FileMetaData) -> list[int]:
    """Returns the places of all bytes that a page's checksum covers: the pages without their headers."""
    places: list[int] = []
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if not column.num_values:
                continue
            starts = [column.data_page_offset]
            if column.has_dictionary_page and column.dictionary_page_offset:
                starts.append(column.dictionary_page_offset)
            place = min(starts)
            end = place + column.total_compressed_size
            while place < end:
                fields, place = _struct(content, place)
                places += range(place, place + fields[_COMPRESSED_SIZE])
                place += fields[_COMPRESSED_SIZE]
    return places


def _struct(content: bytes, place: int) -> tuple[dict[int, int], int]:
    """Reads a struct of Thrift's compact protocol: its whole numbers by field, and where it ends."""
    fields, field = {}, 0
    while content[place]:
        kind, step = content[place] & 15, content[place] >> 4
        place += 1
        if not step:
            step, place = _whole(content, place)
            field = 0
        field += step
        fields[field], place = _value(content, place, kind)
    return fields, place + 1


def _value(content: bytes, place: int, kind: int) -> tuple[int, int]:
    if kind in (1, 2):
        return kind, place
    if kind == 3:
        return content[place], place + 1
    if kind == 7:
        return 0, place + 8
    if kind == _STRUCT:
        return 0, _struct(content, place)[1]
    if kind == _BINARY:
        length, place = _varint(content, place)
        return 0, place + length
    if kind in (_LIST, _SET):
        count, kind = content[place] >> 4, content[place] & 15
        place += 1
        if count == 15:
            count, place = _varint(content, place)
        for _ in range(count):
            _, place = _value(content, place, kind)
        return 0, place
    return _whole(content, place)


def _whole(content: bytes, place: int) -> tuple[int, int]:
    word, place = _varint(content, place)
    return (word >> 1) ^ -(word & 1), place


def _varint(content: bytes, place: int) -> tuple[int, int]:
    word, shift = 0, 0
    while True:
        byte = content[place]
        word |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return word, place
