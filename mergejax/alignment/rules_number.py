"""Operations that contract, reduce, look up and order."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergejax.alignment.dims import Product, fixed, free, pin, reshape, unify
from mergejax.alignment.rules import State, Value, rule, shapes_of, unknown, used_as_numbers


@rule("dot_general")
def _dot(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    left, right = inputs
    (contract_l, contract_r), (batch_l, batch_r) = equation.params["dimension_numbers"]
    for a, b in zip((*contract_l, *batch_l), (*contract_r, *batch_r), strict=True):
        unify(left.axes[a], right.axes[b])
    free_l = tuple(x for i, x in enumerate(left.axes) if i not in (*contract_l, *batch_l))
    free_r = tuple(x for i, x in enumerate(right.axes) if i not in (*contract_r, *batch_r))
    for i in contract_l:
        state.unpaired.append((left.axes[i], free_l, free_r))
    for value in inputs:
        used_as_numbers(value, "its positions are used as numbers")
    return [Value((*(left.axes[i] for i in batch_l), *free_l, *free_r))]


@rule("conv_general_dilated")
def _convolution(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    numbers = equation.params["dimension_numbers"]
    if equation.params["batch_group_count"] != 1:
        return unknown(state, equation, inputs)
    data, kernel = inputs
    batch, feature, *places = (data.axes[i] for i in numbers.lhs_spec)
    out, into, *window = (kernel.axes[i] for i in numbers.rhs_spec)
    for axis in (*places, *window):
        pin(axis, "it is an axis of the image, or of the window, of a convolution")
    groups = equation.params["feature_group_count"]
    reason = "it is split into the groups of a convolution"
    if groups == 1:
        unify(feature, into)
    else:
        group, within = reshape([feature], [groups, feature.size // groups], reason)
        group_out, _ = reshape([out], [groups, out.size // groups], reason)
        unify(group, group_out)
        unify(within, into)
    shape = shapes_of(equation)[0]
    axes = [fixed(n, "it is an axis of the image of a convolution") for n in shape]
    axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = batch, out
    return [Value(tuple(axes))]


@rule("tile")
def _tile(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    several = zip(inputs[0].axes, equation.params["reps"], strict=True)
    axes = tuple(Product((free(reps), axis)) for axis, reps in several)
    return [Value(axes, inputs[0].index)]


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window")
def _pool(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    reason = "it is an axis of the image of a pooling"
    params, axes = equation.params, []
    for i, (axis, size) in enumerate(zip(inputs[0].axes, shapes_of(equation)[0], strict=True)):
        single = params["window_dimensions"][i] == params["window_strides"][i] == 1
        if single and axis.size == size and not any(params["padding"][i]):
            axes.append(axis)
        else:
            pin(axis, reason)
            axes.append(fixed(size, reason))
    return [Value(tuple(axes))] * len(equation.outvars)


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
def _reduce(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    gone = equation.params["axes"]
    state.reduced += [inputs[0].axes[i] for i in gone]
    used_as_numbers(inputs[0], "its positions are used as numbers")
    return [Value(tuple(axis for i, axis in enumerate(inputs[0].axes) if i not in gone))]


@rule("argmax", "argmin")
def _argument(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    gone = equation.params["axes"]
    state.reduced += [inputs[0].axes[i] for i in gone]
    used_as_numbers(inputs[0], "its positions are used as numbers")
    axes = tuple(axis for i, axis in enumerate(inputs[0].axes) if i not in gone)
    return [Value(axes, inputs[0].axes[gone[0]])]


@rule("top_k")
def _top(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    *others, last = inputs[0].axes
    state.reduced.append(last)
    used_as_numbers(inputs[0], "its positions are used as numbers")
    axes = (*others, fixed(equation.params["k"], "it is sorted by 'top_k'"))
    return [Value(axes), Value(axes, last)]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort")
def _ordered(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    name = equation.primitive.name
    key = {"rev": "dimensions", "sort": "dimension"}.get(name, "axis")
    for value in inputs:
        for place in np.atleast_1d(equation.params[key]).tolist():
            pin(value.axes[place], f"its order matters to '{name}'")
        used_as_numbers(value, "its positions are used as numbers")
    return [Value(value.axes) for value in inputs]


@rule("iota")
def _iota(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    axes = [free(n) for n in equation.params["shape"]]
    return [Value(tuple(axes), axes[equation.params["dimension"]])]


@rule("dynamic_slice")
def _dynamic_slice(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    axes = []
    reason = "a part of it is taken at a place that is computed"
    for axis, size in zip(inputs[0].axes, equation.params["slice_sizes"], strict=True):
        if size != axis.size:
            pin(axis, reason)
        axes.append(axis if size == axis.size else fixed(size, reason))
    return [Value(tuple(axes))]


@rule("gather")
def _gather(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    operand, indices = inputs
    numbers = equation.params["dimension_numbers"]
    sizes = equation.params["slice_sizes"]
    *rows, _ = indices.axes
    for place, row in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        unify(operand.axes[place], rows[row])
    named = numbers.start_index_map
    for place in named:
        if len(named) == 1 and indices.index is not None and sizes[place] == 1:
            unify(operand.axes[place], indices.index)
        else:
            pin(operand.axes[place], "rows of it are looked up by number")
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = []
    for i, (axis, size) in enumerate(zip(operand.axes, sizes, strict=True)):
        if i not in gone:
            whole = size == axis.size
            if not whole:
                pin(axis, "a part of it is taken at a place that is computed")
            windows.append(axis if whole else fixed(size, "it is taken at a computed place"))
    kept, batch = iter(windows), iter(rows)
    shape = shapes_of(equation)[0]
    axes = [next(kept if i in numbers.offset_dims else batch) for i in range(len(shape))]
    return [Value(tuple(axes))]
