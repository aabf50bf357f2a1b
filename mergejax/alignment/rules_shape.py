"""Operations that move, cut and join axes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergejax.alignment.dims import (
    ONE,
    Join,
    cut,
    fixed,
    free,
    pin,
    reshape,
    unify,
)
from mergejax.alignment.rules import State, Value, rule, used_as_numbers


@rule("broadcast_in_dim")
def _broadcast(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    shape = equation.params["shape"]
    axes = [free(n) for n in shape]
    for axis, place in zip(inputs[0].axes, equation.params["broadcast_dimensions"], strict=True):
        if axis.size == shape[place]:
            axes[place] = axis
    return [Value(tuple(axes), inputs[0].index, inputs[0].literal)]


@rule("reshape")
def _reshape(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    sizes = equation.params["new_sizes"]
    axes = reshape(inputs[0].axes, sizes, "it is reshaped in a way that splits no whole factors")
    return [Value(tuple(axes), inputs[0].index)]


@rule("squeeze")
def _squeeze(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    gone = equation.params["dimensions"]
    axes = tuple(axis for i, axis in enumerate(inputs[0].axes) if i not in gone)
    return [Value(axes, inputs[0].index)]


@rule("expand_dims")
def _expand(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    axes = list(inputs[0].axes)
    for place in sorted(equation.params["dimensions"]):
        axes.insert(place, ONE)
    return [Value(tuple(axes), inputs[0].index)]


@rule("transpose")
def _transpose(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    axes = tuple(inputs[0].axes[i] for i in equation.params["permutation"])
    return [Value(axes, inputs[0].index)]


@rule("concatenate")
def _concatenate(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    place = equation.params["dimension"]
    for value in inputs[1:]:
        for i, (a, b) in enumerate(zip(inputs[0].axes, value.axes, strict=True)):
            if i != place:
                unify(a, b)
    for value in inputs:
        used_as_numbers(value, "its positions are used as numbers")
    axes = list(inputs[0].axes)
    axes[place] = Join(tuple(value.axes[place] for value in inputs))
    return [Value(tuple(axes))]


@rule("pad")
def _pad(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    axes = []
    for axis, (low, high, inside) in zip(
        inputs[0].axes, equation.params["padding_config"], strict=True
    ):
        if inside or min(low, high) < 0:
            pin(axis, "it is padded inside, or cropped")
            size = axis.size + low + high + inside * (axis.size - 1)
            axes.append(fixed(size, "it is padded inside, or cropped"))
        elif low or high:
            sides = [free(n) if n else Join(()) for n in (low, high)]
            axes.append(Join((sides[0], axis, sides[1])))
        else:
            axes.append(axis)
    return [Value(tuple(axes))]


@rule("slice")
def _slice(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    axes = []
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or [1] * len(starts)
    for axis, start, stop, stride in zip(inputs[0].axes, starts, stops, strides, strict=True):
        reason = "a part of it is taken"
        if stop - start == axis.size:
            if stride == 1:
                axes.append(axis)
                continue
            pin(axis, f"every {stride}. entry of it is taken")
            axes.append(fixed(math.ceil(axis.size / stride), "it is taken in strides"))
        elif stride != 1:
            pin(axis, "it is taken in strides")
            axes.append(fixed(math.ceil((stop - start) / stride), "it is taken in strides"))
        else:
            bounds = sorted({0, start, stop, axis.size})
            axes.append(cut(axis, bounds, reason)[bounds.index(start)])
    return [Value(tuple(axes), inputs[0].index)]


@rule("split")
def _split(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    place = equation.params["axis"]
    bounds = [0, *np.cumsum(equation.params["sizes"]).tolist()]
    pieces = cut(inputs[0].axes[place], bounds, "it is split")
    axes = inputs[0].axes
    return [Value((*axes[:place], piece, *axes[place + 1 :])) for piece in pieces]
