"""Carries dimensions through a jaxpr and the programs inside it: jit, remat, custom rules, scan."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from mergejax.alignment import rules_number, rules_shape
from mergejax.alignment.dims import Expression, fixed, free, pin, unify
from mergejax.alignment.rules import RULES, State, Value, pin_value, shapes_of, unknown

_ = rules_number, rules_shape  # they register their rules
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def follow(state: State, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """The values of a jaxpr's outputs, given those of its inputs.

    Args:
        state: gathers what is seen on the way.
        jaxpr: the program.
        consts: arrays that it closes over.
        inputs: one value per input.

    Returns:
        One value per output.
    """
    values: dict[Any, Value] = {}

    def read(var: Any) -> Value:
        if isinstance(var, core.Literal):
            return _constant(var.val)
        return values[var]

    values.update(zip(jaxpr.constvars, map(_constant, consts), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        found = _apply(state, equation, [read(var) for var in equation.invars])
        for var, value in zip(equation.outvars, found, strict=True):
            values[var] = state.note(value)
    return [read(var) for var in jaxpr.outvars]


def _constant(array: Any) -> Value:
    """An array of numbers: an axis along which they differ is pinned."""
    if not hasattr(array, "shape") or not array.shape:
        number = None if isinstance(array, jax.core.Tracer) else array
        return Value((), literal=number)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        return Value(tuple(fixed(n, "it is an axis of a random key") for n in array.shape))
    numbers = np.asarray(array)
    reason = "it meets a constant array (a mask or a table of positions) whose entries differ"
    axes = []
    for i, n in enumerate(numbers.shape):
        uniform = bool((numbers == np.take(numbers, [0], axis=i)).all())
        axes.append(free(n) if uniform else fixed(n, reason))
    return Value(tuple(axes))


def _apply(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    name = equation.primitive.name
    if name == "scan":
        return _scan(state, equation, inputs)
    if name == "cond":
        return _branches(state, equation, inputs)
    inner = inner_program(equation)
    if inner is not None:
        return follow(state, *inner, inputs)
    return RULES.get(name, unknown)(state, equation, inputs)


def inner_program(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that an operation calls with its own inputs, and constants; None without one."""
    inner = [equation.params[key] for key in _INNER if key in equation.params]
    if not inner or equation.primitive.name == "while":
        return None
    jaxpr, consts = _open(inner[0])
    return (jaxpr, consts) if len(jaxpr.invars) == len(equation.invars) else None


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _branches(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    pin_value(inputs[0], "it chooses a branch")
    several = [follow(state, *_open(b), inputs[1:]) for b in equation.params["branches"]]
    for other in several[1:]:
        for a, b in zip(several[0], other, strict=True):
            _tie(a, b)
    return [Value(value.axes) for value in several[0]]


def _tie(a: Value, b: Value) -> None:
    for x, y in zip(a.axes, b.axes, strict=True):
        unify(x, y)
    for value in (a, b):
        if value.index is not None:
            pin(value.index, "its positions are carried as numbers")


def _scan(state: State, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """The body once: what is carried is the same in every step, what is stacked is its own."""
    params = equation.params
    jaxpr, consts = _open(params["jaxpr"])
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    loop: Expression = fixed(params["length"], "it is an axis of layers, or steps, in a scan")
    for value in inputs[second:]:
        unify(loop, value.axes[0])
    state.loops.append(loop)
    slices = [state.note(Value(value.axes[1:])) for value in inputs[second:]]
    found = follow(state, jaxpr, consts, [*inputs[:second], *slices])
    state.loops.pop()
    for before, after in zip(inputs[first:second], found, strict=False):
        _tie(before, after)
    count = params["num_carry"]
    carried = [Value(value.axes) for value in inputs[first:second]]
    stacked = [Value((loop, *value.axes)) for value in found[count:]]
    assert len(carried) + len(stacked) == len(shapes_of(equation))
    return carried + stacked
