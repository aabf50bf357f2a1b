"""How each operation of JAX carries the dimensions of its inputs to its outputs.

A rule takes the state of the analysis, the equation and the values of its inputs, and returns those
of its outputs. An operation without a rule pins whatever it touches, which is always safe.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mergejax.alignment.dims import (
    Expression,
    fixed,
    pin,
    unify,
)


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of an array.

    Attributes:
        axes: one expression per axis.
        index: the dimension whose positions the array's integers name (`iota`, `argmax`), if any.
        literal: the number, where the array is a scalar constant.
    """

    axes: tuple[Expression, ...]
    index: Expression | None = None
    literal: Any = None


@dataclasses.dataclass
class State:
    """What an analysis gathers.

    Attributes:
        arrays: the axes of every array, with the loop dimensions around it.
        loops: dimensions of the loops that are open: layers stacked by `scan`.
        reduced: axes over which sums, maxima or orders are taken.
        unpaired: (contracted expression, axes of both sides that are not paired) of contractions.
    """

    arrays: list[tuple[Expression, ...]] = dataclasses.field(default_factory=list)
    loops: list[Expression] = dataclasses.field(default_factory=list)
    reduced: list[Expression] = dataclasses.field(default_factory=list)
    unpaired: list[tuple[Expression, tuple[Expression, ...], tuple[Expression, ...]]] = (
        dataclasses.field(default_factory=list)
    )

    def note(self, value: Value) -> Value:
        self.arrays.append((*self.loops, *value.axes))
        return value


Rule = Callable[[State, Any, Sequence[Value]], list[Value]]
RULES: dict[str, Rule] = {}

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1
    floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name
    ne neg nextafter not optimization_barrier or population_count pow pvary real
    reduce_precision rem round rsqrt select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
    tan tanh xor
"""
_COPIES = ("convert_element_type", "copy", "copy_p", "name", "stop_gradient", "select_n")


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def shapes_of(equation: Any) -> list[tuple[int, ...]]:
    return [getattr(var.aval, "shape", ()) for var in equation.outvars]


def unknown(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """Pins everything: what an operation without a rule does."""
    reason = f"it goes through '{equation.primitive.name}', of which no symmetry is known"
    for value in inputs:
        pin_value(value, reason)
    return [Value(tuple(fixed(n, reason) for n in shape)) for shape in shapes_of(equation)]


def pin_value(value: Value, reason: str) -> None:
    for axis in (*value.axes, *([] if value.index is None else [value.index])):
        pin(axis, reason)


def used_as_numbers(value: Value, reason: str) -> None:
    """The numbers of an index are used as numbers, so what it names has an order."""
    if value.index is not None:
        pin(value.index, reason)


@rule(*_ELEMENTWISE.split())
def _elementwise(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    name = equation.primitive.name
    if name == "optimization_barrier":
        return list(inputs)
    axes: list[Expression] = []
    for i, size in enumerate(shapes_of(equation)[0]):  # axes of length one are broadcast
        same = [v.axes[i] for v in inputs if v.axes and v.axes[i].size == size]
        for other in same[1:]:
            unify(same[0], other)
        axes.append(same[0])
    return [Value(tuple(axes), _index_of(name, inputs))]


def _index_of(name: str, inputs: Sequence[Value]) -> Expression | None:
    """What the result names, after pinning what is used as a number."""
    indices = [value.index for value in inputs if value.index is not None]
    if not indices:
        return None
    others = [value.literal for value in inputs if value.index is None]
    size = indices[0].size
    if name in ("eq", "ne") and len(indices) == 2:
        unify(*indices)
        return None
    if name in ("lt", "le", "gt", "ge") and all(_is_outside(n, size) for n in others):
        return None  # a check of bounds that every index passes
    if name in _COPIES or (name in ("add", "clamp", "max", "min") and _keeps(others, size)):
        for other in indices[1:]:
            unify(indices[0], other)
        return indices[0]
    for index in indices:
        pin(index, "its positions are used as numbers (an iota, as in rotary embeddings)")
    return None


def _is_outside(number: Any, size: int) -> bool:
    return number is not None and (number <= 0 or number >= size - 1)


def _keeps(numbers: Sequence[Any], size: int) -> bool:
    """Whether adding or clamping by the numbers only makes negative or clipped indices valid."""
    return bool(numbers) and all(_is_outside(n, size) for n in numbers)
