"""Pieces of rows that compiled loops hold in registers: up to 128 numbers, read, added to and multiplied at once.

Numba's own loops over columns take as many numbers at a time as LLVM finds safe: a sum over rows is read and written again
for each of them, and the numbers after the last eight go one by one. Here a sum is read once and written once, and numbers
after the last sixteen are masked. Loops over rows are what is left, and these end where a branch is foreseen wrongly, so a
piece is as long as registers allow.

How many sixteens a piece has is part of its type, so loops are compiled for each number of them: they are given a tuple of
that length.
"""

from __future__ import annotations

__all__ = ["no_numbers", "numbers_at", "pieces", "plus_scaled", "product_with", "put_numbers"]

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

_LANES = 16  # numbers of one vector of LLVM's, which cuts it into as many registers as the machine needs for it
_MOST = 8  # vectors of a piece
_LOOSE = ("contract", "reassoc", "nsz")
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)

_Generated = tuple[Any, Callable[..., Any]]


def pieces(dim: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the first column of each piece of rows of `dim` numbers, and a tuple as long as the piece has sixteens."""
    for first in range(0, dim, _LANES * _MOST):
        yield first, (0,) * min(_MOST, -(-(dim - first) // _LANES))


class _Piece(types.Type):
    """A piece's type in Numba: what numbers they are, and how many sixteens."""

    def __init__(self, number: Any, sixteens: int) -> None:
        self.number, self.sixteens = number, sixteens
        self.bits = 32 if number == types.float32 else 64
        self.vector = ir.VectorType(ir.FloatType() if self.bits == 32 else ir.DoubleType(), _LANES)
        self.whole = ir.ArrayType(self.vector, sixteens)
        super().__init__(name=f"Piece({number}, {sixteens})")

    @property
    def alignment(self) -> Any:
        return ir.Constant(_INT32, self.bits // 8)

    @property
    def suffix(self) -> str:
        return f"v{_LANES}f{self.bits}"


class _PieceModel(PrimitiveModel):
    def __init__(self, manager: Any, piece: _Piece) -> None:
        super().__init__(manager, piece, piece.whole)


register_model(_Piece)(_PieceModel)


def _generated(function: Callable[..., _Generated]) -> Callable[..., Any]:
    """Has Numba ask a function, in which loops call it, for the types of the call and for its code."""
    generated: Callable[..., Any] = intrinsic(function)
    return generated


@_generated
def no_numbers(context: Any, like: Any, sixteens: Any) -> _Generated:
    """Returns a piece of zeros.

    Args:
        context: Numba's; loops do not give it.
        like: a number of the type that it holds.
        sixteens: a tuple as long as it has sixteens.
    """
    piece = _Piece(like, len(sixteens))
    return piece(like, sixteens), lambda context, builder, signature, arguments: ir.Constant(piece.whole, None)


@_generated
def numbers_at(context: Any, rows: Any, row: Any, first: Any, piece: Any) -> _Generated:
    """Returns the piece of a row.

    Args:
        context: Numba's; loops do not give it.
        rows: (n, D).
        row: which; it is not checked.
        first: column; from there on the row has more numbers than the piece without its last sixteen.
        piece: of the same type.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result = ir.Constant(piece.whole, None)
        for at, vector in enumerate(_read(context, builder, signature.args[0], arguments[:3], piece)):
            result = builder.insert_value(result, vector, at)
        return result

    return piece(rows, types.intp, types.intp, piece), code


@_generated
def put_numbers(context: Any, rows: Any, row: Any, first: Any, piece: Any) -> _Generated:
    """Writes a piece of a row; the arguments are those of `numbers_at`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places, mask = _places(context, builder, signature.args[0], arguments[:3], piece)
        for at, place in enumerate(places):
            vector = builder.extract_value(arguments[3], at)
            if at < piece.sixteens - 1:
                builder.store(vector, place, align=piece.bits // 8)
            else:
                _call(builder, f"llvm.masked.store.{piece.suffix}.p0", ir.VoidType(), (vector, place, piece.alignment, mask))
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, piece), code


@_generated
def plus_scaled(context: Any, piece: Any, factor: Any, rows: Any, row: Any, first: Any) -> _Generated:
    """Returns a piece plus a factor times that of a row.

    Args:
        context: Numba's; loops do not give it.
        piece: what is added to.
        factor: a number.
        rows: this and what follows are those of `numbers_at`.
        row: see there.
        first: see there.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, scale = arguments[0], _spread(builder, arguments[1], piece.vector)
        for at, vector in enumerate(_read(context, builder, signature.args[2], arguments[2:], piece)):
            scaled = builder.fmul(scale, vector, flags=_LOOSE)
            result = builder.insert_value(result, builder.fadd(builder.extract_value(result, at), scaled, flags=_LOOSE), at)
        return result

    return piece(piece, piece.number, rows, types.intp, types.intp), code


@_generated
def product_with(context: Any, piece: Any, rows: Any, row: Any, first: Any) -> _Generated:
    """Returns the dot product of a piece with that of a row; the arguments are those of `plus_scaled`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total = ir.Constant(piece.vector, None)
        for at, vector in enumerate(_read(context, builder, signature.args[1], arguments[1:], piece)):
            product = builder.fmul(builder.extract_value(arguments[0], at), vector, flags=_LOOSE)
            total = builder.fadd(total, product, flags=_LOOSE)
        number = piece.vector.element
        return _call(
            builder, f"llvm.vector.reduce.fadd.{piece.suffix}", number, (ir.Constant(number, 0.0), total), fastmath=_LOOSE
        )

    return piece.number(piece, rows, types.intp, types.intp), code


def _read(context: Any, builder: Any, kind: Any, arguments: Any, piece: _Piece) -> Iterator[Any]:
    """Yields the vectors of a row's piece; what is beyond the row's end is zero."""
    places, mask = _places(context, builder, kind, arguments, piece)
    for place in places[:-1]:
        yield builder.load(place, align=piece.bits // 8)
    zeros = ir.Constant(piece.vector, None)
    yield _call(builder, f"llvm.masked.load.{piece.suffix}.p0", piece.vector, (places[-1], piece.alignment, mask, zeros))


def _places(context: Any, builder: Any, kind: Any, arguments: Any, piece: _Piece) -> tuple[list[Any], Any]:
    """Returns where the vectors of a row's piece are, and which numbers of the last one the row has."""
    assert kind.ndim == 2, "rows of a matrix"
    assert kind.layout == "C", "a row's numbers are side by side, as rows are"
    assert kind.dtype == piece.number, "the piece's numbers"
    rows, row, first = arguments
    array = context.make_array(kind)(context, builder, rows)
    dim = cgutils.unpack_tuple(builder, array.shape, 2)[1]
    begin = builder.gep(array.data, [builder.add(builder.mul(row, dim), first)])
    numbers = [builder.gep(begin, [ir.Constant(_INT64, at * _LANES)]) for at in range(piece.sixteens)]
    before_last = ir.Constant(_INT64, (piece.sixteens - 1) * _LANES)
    left = _spread(builder, builder.sub(builder.sub(dim, first), before_last), ir.VectorType(_INT64, _LANES))
    mask = builder.icmp_signed("<", ir.Constant(left.type, list(range(_LANES))), left)
    return [builder.bitcast(number, piece.vector.as_pointer()) for number in numbers], mask


def _spread(builder: Any, number: Any, vector: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT32, _LANES), [0] * _LANES))


def _call(builder: Any, name: str, result: Any, arguments: tuple[Any, ...], fastmath: tuple[str, ...] = ()) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, fastmath=fastmath)
