"""The ids of a vocabulary as arrays that many processes share: sorted, memory-mapped, and never a dictionary.

Integers are sorted and found by bisection. Strings are found by a 64-bit hash: the hashes are sorted, a table of where
each of their first bits begins leads to a place among them, and the string there is compared byte by byte, so that two
strings of one hash are told apart. A large vocabulary is laid out once for each machine, in the folder of temporary files
under the digest of its content, and mapped from there: its pages are in memory once, however many processes look at them.
"""

from __future__ import annotations

__all__ = ["IntegerIds", "MappedIds", "StringIds", "integers", "is_string", "lay_out", "mapped", "viewed"]

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedshard.data.hashing import WordArray, finalised
from embedshard.errors import StorageError

IntArray = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

_LAYOUT: Final = 1
"""Changes whenever the arrays or the hash do: what an older version laid out is then laid out anew."""
_UNUSED_SECONDS: Final = 7 * 86_400
_BATCH_STRINGS: Final = 2**18
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)


class IntegerIds:
    """Integers in row order.

    Args:
        arrays: `ids` in row order, and `sorted` with `rows`: the same ascending, and the row of each.
        fingerprint: of the ids in their order.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], fingerprint: str) -> None:
        self._ids, self._sorted, self._rows = arrays["ids"], arrays["sorted"], arrays["rows"]
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._ids)

    def rows_of(self, ids: IntArray | WordArray) -> IntArray:
        """Returns each id's row, -1 for an unknown one; ids are int64, or uint64 where some may not fit into that."""
        if not len(self._sorted):
            return np.full(len(ids), -1, dtype=np.int64)
        own = ids.astype(self._sorted.dtype, copy=False)
        place = np.minimum(np.searchsorted(self._sorted, own), len(self._sorted) - 1)
        known = self._sorted[place] == own
        if own.dtype != ids.dtype:  # what one of int64 and uint64 cannot hold has the bits of another number
            known &= ids.astype(np.int64) >= 0
        return np.where(known, self._rows[place], -1).astype(np.int64, copy=False)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the id of each row; None where there is none."""
        return [int(self._ids[row]) if row < len(self._ids) else None for row in rows.tolist()]

    def repeated(self) -> tuple[int, int, int] | None:
        """Returns an id's first row, the first row that repeats an id, and how many rows do; None where none does."""
        again = np.flatnonzero(self._sorted[1:] == self._sorted[:-1]) + 1
        if not len(again):
            return None
        row = int(self._rows[again].min())  # equal ids are in row order
        return int(np.flatnonzero(self._ids == self._ids[row])[0]), row, len(again)


class StringIds:
    """Strings in row order.

    Args:
        arrays: `data` and `offsets` of the strings as Arrow has them, `hashes` ascending, `rows` of these, and `starts`:
            where the hashes with each first bits begin.
        fingerprint: of the strings in their order.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], fingerprint: str) -> None:
        self._hashes, self._rows, self._starts = arrays["hashes"], arrays["rows"], arrays["starts"]
        self._shift = np.uint64(64 - (len(self._starts) - 1).bit_length() + 1)
        self._strings = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(self._hashes), [None, pa.py_buffer(arrays["offsets"]), pa.py_buffer(arrays["data"])]
        )
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._hashes)

    def rows_of(self, ids: pa.Array) -> IntArray:
        """Returns each string's row, -1 for an unknown one; there are no nulls among them."""
        found = np.full(len(ids), -1, dtype=np.int64)
        for first in range(0, len(ids), _BATCH_STRINGS):
            part = _binary(ids.slice(first, _BATCH_STRINGS))
            found[first : first + len(part)] = self._rows_of(part)
        return found

    def _rows_of(self, ids: pa.Array) -> IntArray:
        hashes = _hashes(ids)
        found = np.full(len(ids), -1, dtype=np.int64)
        if not len(self):
            return found
        bits = (hashes >> self._shift).astype(np.int64)
        place, end = self._starts[bits].astype(np.int64), self._starts[bits + 1].astype(np.int64)
        open_ = np.flatnonzero(place < end)
        place, end, wanted = place[open_], end[open_], hashes[open_]
        while len(open_):
            met = self._hashes[place]
            hit = np.flatnonzero(met == wanted)
            if len(hit):
                rows = self._rows[place[hit]].astype(np.int64)
                theirs = ids if len(hit) == len(ids) else ids.take(pa.array(open_[hit]))
                same = pc.equal(self._strings.take(pa.array(rows)), theirs).to_numpy(zero_copy_only=False)
                found[open_[hit[same]]] = rows[same]
                met[hit[same]] = np.uint64(2**64 - 1)  # found: nothing is left to look for
                wanted[hit[same]] = 0
            place += 1
            left = (met <= wanted) & (place < end)
            open_, place, end, wanted = open_[left], place[left], end[left], wanted[left]
        return found

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the string of each row; None where there is none."""
        return [self._strings[row].as_py().decode() if row < len(self._hashes) else None for row in rows.tolist()]

    def repeated(self) -> tuple[int, int, int] | None:
        """Returns a string's first row, the first row that repeats one, and how many rows do; None where none does."""
        is_equal = self._hashes[1:] == self._hashes[:-1]
        if not is_equal.any():
            return None
        places = np.flatnonzero(np.append(is_equal, False) | np.append(False, is_equal))
        first: dict[bytes, int] = {}
        again = []
        for row in np.sort(self._rows[places]).tolist():
            if first.setdefault(self._strings[row].as_py(), row) != row:
                again.append(row)
        return (first[self._strings[again[0]].as_py()], again[0], len(again)) if again else None


MappedIds = IntegerIds | StringIds


def integers(ids: pa.Array) -> IntArray | WordArray:
    """Returns integers of any width, without nulls, as int64, or as uint64 if they are that. It may be Arrow's memory."""
    kind = pa.uint64() if pa.types.is_uint64(ids.type) else pa.int64()
    return viewed(ids if ids.type == kind else ids.cast(kind), np.uint64 if kind == pa.uint64() else np.int64)


def is_string(kind: pa.DataType) -> bool:
    """Returns whether values of a type are strings, as they lie or as a view of them."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def viewed(array: pa.Array, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Returns an array of numbers of this type, without nulls, as numpy sees its memory.

    A fifth of the time that `to_numpy` takes for a short array, and without its import of pandas.
    """
    memory = array.buffers()[1]
    if memory is None or not len(array):
        return np.zeros(0, dtype=dtype)
    size = np.dtype(dtype).itemsize
    return np.frombuffer(memory, dtype=dtype, count=len(array), offset=array.offset * size)


def lay_out(batches: Iterable[pa.Array], kind: pa.DataType, num_rows: int, folder: Path | None = None) -> MappedIds:
    """Sorts the ids of a vocabulary.

    Args:
        batches: of ids in row order, without nulls, all of one type.
        kind: their type: an integer's or a string's.
        num_rows: how many there are.
        folder: where the arrays are written and mapped from; None keeps them in memory.
    """
    make = _integers_laid_out if pa.types.is_integer(kind) else _strings_laid_out
    arrays, fingerprint = make(batches, kind, num_rows, folder)
    if folder is not None:
        for name in list(arrays):
            np.save(folder / f"{name}.npy", arrays.pop(name))
        told = {"fingerprint": fingerprint, "is_integer": pa.types.is_integer(kind)}
        (folder / "ids.json").write_text(json.dumps(told))
        return _opened(folder)
    return (IntegerIds if pa.types.is_integer(kind) else StringIds)(arrays, fingerprint)


def mapped(key: str, make: Callable[[Path], MappedIds]) -> MappedIds:
    """Returns the ids that were laid out under a key on this machine; where there are none, they are laid out first.

    One process of the machine does it, the others wait for it. What was not used for a week is removed.

    Args:
        key: tells vocabularies apart: a digest of their content.
        make: lays them out in an empty folder, as `lay_out` does.

    Raises:
        StorageError: if the folder of temporary files cannot be written.
    """
    root = Path(tempfile.gettempdir()) / f"embedshard-{os.getuid()}"
    folder = root / f"vocabulary-{_LAYOUT}-{key}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        _check_own(root)
        with (root / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "ids.json").exists():
                _remove_unused(root)
                partial = root / f".{uuid.uuid4().hex}.part"
                partial.mkdir()
                try:
                    make(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            os.utime(folder)
            return _opened(folder)
    except OSError as error:
        raise StorageError(
            f"{folder}: a vocabulary cannot be laid out there for all processes of this machine to share: "
            f"{' '.join(str(error).split())}. See that there is space, or set TMPDIR to a folder that has it."
        ) from error


# ----------------------------------------------------------------------------------------------------------- the layout
def _opened(folder: Path) -> MappedIds:
    told = json.loads((folder / "ids.json").read_text())
    arrays: Arrays = {}
    for path in folder.glob("*.npy"):
        array = np.load(path, mmap_mode="r")
        arrays[path.stem] = np.asarray(array)  # the same memory, without a subclass that slows each slice
    if (folder / "data.bin").exists():
        arrays["data"] = np.asarray(np.memmap(folder / "data.bin", dtype=np.uint8, mode="r"))
    return (IntegerIds if told["is_integer"] else StringIds)(arrays, told["fingerprint"])


def _integers_laid_out(
    batches: Iterable[pa.Array], kind: pa.DataType, num_rows: int, folder: Path | None
) -> tuple[Arrays, str]:
    ids = np.empty(num_rows, dtype=np.uint64 if pa.types.is_uint64(kind) else np.int64)
    done = 0
    for batch in batches:
        ids[done : done + len(batch)] = integers(batch)
        done += len(batch)
    order = np.argsort(ids, kind="stable")
    arrays = {"ids": ids, "sorted": ids[order], "rows": order.astype(_place_type(num_rows))}
    return arrays, hashlib.sha256(ids.tobytes()).hexdigest()


def _strings_laid_out(
    batches: Iterable[pa.Array], kind: pa.DataType, num_rows: int, folder: Path | None
) -> tuple[Arrays, str]:
    offsets, hashes = np.zeros(num_rows + 1, dtype=np.int64), np.empty(num_rows, dtype=np.uint64)
    digest, done, pieces = hashlib.sha256(), 0, []
    with contextlib.ExitStack() as stack:
        file = None if folder is None else stack.enter_context((folder / "data.bin").open("wb"))
        for batch in _of_few(batches):
            strings = _binary(batch)
            data, own = _content(strings)
            offsets[done + 1 : done + 1 + len(own) - 1] = own[1:] + offsets[done]
            hashes[done : done + len(strings)] = _hashes(strings)
            if file is None:
                pieces.append(data)
            else:
                file.write(data.data)
            digest.update((b"\0" if done else b"") + _joined(strings))
            done += len(strings)
    order = np.argsort(hashes, kind="stable")
    bits = max(num_rows - 1, 1).bit_length()
    firsts = np.arange(2**bits, dtype=np.uint64) << np.uint64(64 - bits)
    hashes = hashes[order]
    starts = np.append(np.searchsorted(hashes, firsts), num_rows)
    kind_of_place = _place_type(num_rows)
    arrays: Arrays = {"offsets": offsets, "hashes": hashes}
    arrays |= {"rows": order.astype(kind_of_place), "starts": starts.astype(kind_of_place)}
    if folder is None:
        arrays["data"] = np.concatenate([np.zeros(0, dtype=np.uint8), *pieces])
    return arrays, digest.hexdigest()


def _of_few(batches: Iterable[pa.Array]) -> Iterator[pa.Array]:
    for batch in batches:
        for first in range(0, len(batch), _BATCH_STRINGS):
            yield batch.slice(first, _BATCH_STRINGS)


def _binary(strings: pa.Array) -> pa.Array:
    if pa.types.is_large_binary(strings.type):
        return strings
    return strings.cast(pa.large_string()).cast(pa.large_binary())


def _content(strings: pa.Array) -> tuple[npt.NDArray[np.uint8], IntArray]:
    """Returns the bytes of all strings, and where each begins in them, (n + 1,)."""
    _, offsets_buffer, data_buffer = strings.buffers()
    if not len(strings):
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[strings.offset : strings.offset + len(strings) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer is not None else np.zeros(0, dtype=np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def _joined(strings: pa.Array) -> bytes:
    one_list = pa.ListArray.from_arrays(pa.array([0, len(strings)], pa.int32()), strings.cast(pa.binary()))
    joined: bytes = pc.binary_join(one_list, b"\0")[0].as_py()
    return joined


def _hashes(strings: pa.Array) -> WordArray:
    """Returns a 64-bit hash of each string: splitmix64 of (the former one + its next eight bytes), from its length on."""
    data, offsets = _content(strings)
    padded = np.zeros(len(data) // 8 * 8 + 16, dtype=np.uint8)
    padded[: len(data)] = data
    words = padded.view("<u8")
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = finalised(lengths.astype(np.uint64) * _STEP)
    longest = int(lengths.max()) if len(lengths) else 0
    for first in range(0, longest, 8):
        left = lengths - first
        open_ = slice(None) if int(left.min()) > 0 else np.flatnonzero(left > 0)
        place, left = starts[open_] + first, left[open_]
        low = (place & 7).astype(np.uint64) << np.uint64(3)
        place >>= 3
        high = (np.uint64(64) - low) & np.uint64(63)
        word = (words[place] >> low) | np.where(low > 0, words[place + 1] << high, np.uint64(0))
        unused = (np.maximum(8 - left, 0) << 3).astype(np.uint64)
        word = (word << unused) >> unused
        hashes[open_] = finalised(hashes[open_] + word)
    return hashes


def _place_type(num_rows: int) -> type[np.signedinteger[Any]]:
    return np.int32 if num_rows < 2**31 else np.int64


def _check_own(root: Path) -> None:
    """Refuses a folder that somebody else has made: what is mapped from it decides which rows are trained."""
    found = root.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or root.is_symlink():
        raise PermissionError(f"{root} is not this user's alone")


def _remove_unused(root: Path) -> None:
    for folder in root.glob("vocabulary-*"):
        with contextlib.suppress(OSError):
            if folder.is_dir() and time.time() - folder.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(folder)  # what is mapped stays, for those who mapped it
