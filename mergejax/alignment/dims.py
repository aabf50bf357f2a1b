"""Dimensions of arrays under a symmetry analysis: which are one, how they split, which are pinned.

An axis is described by an expression over dimensions: a `Dim`, a `Product` of factors (in C order:
heads times head dimension, a flattened image) or a `Join` of segments (a concatenation). Two axes
that must be permuted alike are unified, which refines dimensions where factors or segments differ.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

_fresh = itertools.count()


@dataclasses.dataclass(eq=False)
class Dim:
    """A dimension: free, pinned with a reason, or defined by an expression of others."""

    size: int
    pinned: str = ""
    meaning: "Expression | None" = None
    order: int = dataclasses.field(default_factory=lambda: next(_fresh))


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Factors of an axis, the last one fastest."""

    parts: tuple["Expression", ...]

    @property
    def size(self) -> int:
        return math.prod(part.size for part in self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Join:
    """Segments of an axis, one after the other."""

    parts: tuple["Expression", ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


Expression = Dim | Product | Join
ONE = Product(())


def resolve(expression: Expression) -> Expression:
    """The expression in terms of dimensions that have no other meaning, nested kinds flattened."""
    if isinstance(expression, Dim):
        return expression if expression.meaning is None else resolve(expression.meaning)
    kind = type(expression)
    parts: list[Expression] = []
    for part in map(resolve, expression.parts):
        if part.size != (1 if kind is Product else 0):
            parts += part.parts if isinstance(part, kind) else [part]
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def atoms(expression: Expression) -> Iterator[Dim]:
    """The dimensions of an expression."""
    expression = resolve(expression)
    if isinstance(expression, Dim):
        yield expression
    else:
        for part in expression.parts:
            yield from atoms(part)


def pin(expression: Expression, reason: str) -> None:
    """No dimension of the expression may be permuted; the first reason is kept."""
    for dim in atoms(expression):
        dim.pinned = dim.pinned or reason


def free(size: int) -> Expression:
    """A new dimension that nothing is known of."""
    return Dim(size) if size != 1 else ONE


def fixed(size: int, reason: str) -> Expression:
    """A new dimension that is pinned."""
    return Dim(size, reason) if size != 1 else ONE


def _define(dim: Dim, meaning: Expression) -> None:
    if dim.pinned:
        pin(meaning, dim.pinned)
    if not any(atom is dim for atom in atoms(meaning)):
        dim.meaning = meaning


def unify(a: Expression, b: Expression) -> None:
    """Makes two axes of one length permute alike; where that cannot be, both are pinned."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if isinstance(a, Dim) and isinstance(b, Dim):
        first, second = sorted((a, b), key=lambda dim: dim.order)
        first.pinned = first.pinned or second.pinned
        second.meaning = first
    elif isinstance(a, Dim):
        _define(a, b)
    elif isinstance(b, Dim):
        _define(b, a)
    elif type(a) is not type(b):
        for side in (a, b):
            pin(side, "it is concatenated in one place and split into factors in another")
    else:
        _unify_parts(a, b)


def _unify_parts(a: Product | Join, b: Product | Join) -> None:
    kind = type(a)
    left, right = list(a.parts), list(b.parts)
    while left and right:
        x, y = resolve(left.pop(0)), resolve(right.pop(0))
        if x.size == y.size:
            unify(x, y)
            continue
        larger, smaller = (x, y) if x.size > y.size else (y, x)
        pieces = _split(larger, smaller.size, kind)
        if pieces is None:
            for part in (x, y, *left, *right):
                pin(part, "it is split in two ways that do not fit")
            return
        (left if larger is x else right).insert(0, pieces[1])
        unify(pieces[0], smaller)


def _split(
    expression: Expression, size: int, kind: type[Product] | type[Join]
) -> tuple[Expression, Expression] | None:
    """The first `size` of an expression, and the rest, as two parts of the kind."""
    expression = resolve(expression)
    if expression.size == size:
        return expression, kind(())
    if isinstance(expression, Dim):
        if kind is Product and expression.size % size:
            return None
        rest = expression.size // size if kind is Product else expression.size - size
        first, second = free(size), free(rest)
        _define(expression, kind((first, second)))
        return first, second
    if isinstance(expression, kind):
        taken: list[Expression] = []
        left = list(expression.parts)
        need = size
        while left and need > (1 if kind is Product else 0):
            part = resolve(left.pop(0))
            fits = need % part.size == 0 if kind is Product else part.size <= need
            if not fits:
                pieces = _split(part, need, kind)
                if pieces is None:
                    return None
                part = pieces[0]
                left.insert(0, pieces[1])
            taken.append(part)
            need = need // part.size if kind is Product else need - part.size
        return kind(tuple(taken)), kind(tuple(left))
    return None


def reshape(axes: Sequence[Expression], sizes: Sequence[int], reason: str) -> list[Expression]:
    """The axes of a reshaped array; what cannot be followed is pinned."""
    rest: Expression = resolve(Product(tuple(axes)))
    made: list[Expression] = []
    for size in sizes:
        pieces = _split(rest, size, Product) if size > 1 else (ONE, rest)
        if pieces is None:
            pin(rest, reason)
            return made + [fixed(n, reason) for n in sizes[len(made) :]]
        made.append(pieces[0])
        rest = pieces[1]
    return made


def cut(axis: Expression, bounds: Sequence[int], reason: str) -> list[Expression]:
    """The segments of an axis between bounds (0 and its size included)."""
    rest: Expression = axis
    made: list[Expression] = []
    for start, stop in itertools.pairwise(bounds):
        rest = resolve(rest)
        pieces: tuple[Expression, Expression] | None
        if stop - start < rest.size and all(dim.pinned for dim in atoms(rest)):
            pieces = fixed(stop - start, reason), fixed(rest.size - stop + start, reason)
        else:
            pieces = _split(rest, stop - start, Join)
        if pieces is None:
            pin(axis, reason)
            sizes = [b - a for a, b in itertools.pairwise(bounds)]
            return made + [fixed(n, reason) for n in sizes[len(made) :]]
        made.append(pieces[0])
        rest = pieces[1]
    return made
