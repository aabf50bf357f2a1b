"""Hyper-parameters: numbers that travel as data, rules that differ from leaf to leaf, checks.

A factory's signature says everything: a parameter annotated `Annotated[Number, Interval(...)]`
(the aliases below) is data, so another value never recompiles and may be traced; any other
parameter (a string choice, a rank, a switch) is static.
"""

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.errors import MergeError, did_you_mean, raise_all


class Interval(NamedTuple):
    """The values that a numeric hyper-parameter may take."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        number = float(typing.cast(float, value))
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return math.isfinite(number) and above and below

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.open_high or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@jax.tree_util.register_pytree_node_class
class ByName:
    """Values chosen by regular expressions on the leaf's name; the first match wins."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)

    def at(self, name: str, depth: float) -> Any:
        for pattern, value in self.values.items():
            if re.search(pattern, name):
                return resolve(value, name, depth)
        raise MergeError(
            f"leaf '{name}' is matched by no pattern of by_name({list(self.values)}); "
            "add a last pattern '.*' that holds the value for all other leaves"
        )

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """The patterns that match none of the names."""
        return [p for p in self.values if not any(re.search(p, name) for name in names)]

    def __repr__(self) -> str:
        return f"by_name({self.values})"

    def tree_flatten(self):
        return list(self.values.values()), tuple(self.values)

    @classmethod
    def tree_unflatten(cls, patterns, values):
        return cls(dict(zip(patterns, values, strict=True)))


@jax.tree_util.register_pytree_node_class
class ByDepth:
    """Values spread evenly over the depth [0, 1], linear in between."""

    def __init__(self, values: Sequence[Any]):
        self.values = list(values)

    def at(self, name: str, depth: float) -> Any:
        del name
        position = min(max(float(depth), 0.0), 1.0) * (len(self.values) - 1)
        low = min(int(position), max(len(self.values) - 2, 0))
        share = position - low
        if share == 0.0:
            return self.values[low]
        before, after = self.values[low], self.values[low + 1]
        if isinstance(before, list | tuple):  # one number per expert
            return [(1 - share) * a + share * b for a, b in zip(before, after, strict=True)]
        return (1 - share) * before + share * after

    def __repr__(self) -> str:
        return f"by_depth({self.values})"

    def tree_flatten(self):
        return list(self.values), None

    @classmethod
    def tree_unflatten(cls, _, values):
        return cls(values)


def by_name(values: Mapping[str, Any]) -> ByName:
    """A hyper-parameter that depends on the leaf's name.

    Args:
        values: regular expressions (`re.search` on the leaf's name) and the value of each: a
            number, a list with one number per expert, or a `by_depth`. The first match wins.

    Returns:
        A rule to pass in place of a number.

    Raises:
        MergeError: no pattern is given; when merging: a pattern matches no leaf, or a leaf no
            pattern.

    Example:
        >>> by_name({'attention': 0.5, '.*': 0.3}).at('block_0/attention/kernel', 0.0)
        0.5
    """
    if not values:
        raise MergeError("by_name() needs at least one pattern, for instance {'.*': 0.3}")
    for pattern in values:
        try:
            re.compile(pattern)
        except re.error as error:
            raise MergeError(
                f"by_name: '{pattern}' is not a regular expression ({error})"
            ) from None
    return ByName(values)


def by_depth(values: Sequence[Any]) -> ByDepth:
    """A hyper-parameter that is piecewise linear over the depth of the network.

    Args:
        values: numbers, or lists with one number per expert, at equal distances from the first
            block (depth 0) to the last (depth 1).
            Leaves before the blocks take the first value, leaves behind them the last.

    Returns:
        A rule to pass in place of a number.

    Raises:
        MergeError: no value is given.

    Example:
        >>> by_depth([0.0, 1.0, 0.5]).at('block_3/kernel', 0.75)
        0.75
    """
    if not len(values):
        raise MergeError("by_depth() needs at least one value, for instance [0.1, 0.9]")
    return ByDepth(values)


Rule = ByName | ByDepth
# A number, a list with one number per expert, or a rule; inside a factory always an array or float.
Number = Any
Scaling = Annotated[Number, Interval()]
Weights = Annotated[Number, Interval()]
Density = Annotated[Number, Interval(0, 1, open_low=True)]
Fraction = Annotated[Number, Interval(0, 1)]
Positive = Annotated[Number, Interval(0, math.inf, open_low=True)]
NonNegative = Annotated[Number, Interval(0, math.inf)]


def interval_of(annotation: Any) -> Interval | None:
    """The interval of a data parameter; None for a static one."""
    if typing.get_origin(annotation) is Annotated:
        return next((m for m in annotation.__metadata__ if isinstance(m, Interval)), None)
    return None


def resolve(value: Any, name: str, depth: float) -> Any:
    """Replaces a rule by its value for one leaf."""
    return value.at(name, depth) if isinstance(value, Rule) else value


def is_traced(value: Any) -> bool:
    """Whether any leaf of a pytree is being traced, so that its value is not known."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def check_sum(caller: str, weights: Any, advice: str) -> None:
    """Refuses weights that sum to zero where a mean is taken; rules and traced ones are not known.

    Raises:
        MergeError: what is wrong, and the advice.
    """
    known = not isinstance(weights, Rule) and not is_traced(weights)
    if known and abs(float(np.sum(np.asarray(weights, np.float64)))) < 1e-12:
        raise MergeError(
            f"{caller}(weights={weights}) sums to zero and cannot be normalised; {advice}"
        )


def as_data(value: Any) -> Any:
    """A number or a list with one number per expert, as float32."""
    if isinstance(value, (list, tuple)):
        value = jnp.stack([jnp.asarray(v, jnp.float32) for v in value])
    return jnp.asarray(value, jnp.float32) if is_traced(value) else np.asarray(value, np.float32)


def bind(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Binds arguments to a factory's signature and checks names, choices and ranges.

    Returns:
        Every parameter of the factory with its value, defaults included.

    Raises:
        MergeError: with all problems that were found.
    """
    signature = inspect.signature(function)
    label = function.__name__
    unknown = [name for name in kwargs if name not in signature.parameters]
    problems = [
        f"{label}() has no parameter '{name}', "
        + (
            did_you_mean(name, signature.parameters)
            if signature.parameters
            else "it takes no parameters"
        )
        for name in unknown
    ]
    if problems:
        raise MergeError("\n".join(problems))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        usage = f"{label}({', '.join(signature.parameters)})"
        raise MergeError(f"{usage} is called wrongly: {error}") from None
    bound.apply_defaults()
    hints = typing.get_type_hints(function, include_extras=True)
    for name, value in bound.arguments.items():
        problems += _problems(f"{label}({name}=...)", hints.get(name), value)
    if problems:
        raise MergeError("\n".join(problems))
    return dict(bound.arguments)


def refuse_lists(label: str, **numbers: Any) -> None:
    """Refuses lists for numbers that hold for all experts together.

    Raises:
        MergeError: one sentence for each list.

    Example:
        >>> refuse_lists('swudi', time=300.0)
    """
    raise_all(
        [
            f"{label}({name}={list(value)}) holds for all experts together; give one number"
            for name, value in numbers.items()
            if isinstance(value, list | tuple)
        ]
    )


def _problems(label: str, annotation: Any, value: Any) -> list[str]:
    interval = interval_of(annotation)
    if interval is not None:
        return [p for v in _numbers(value) for p in _range_problem(label, interval, v)]
    if typing.get_origin(annotation) is Literal and value not in typing.get_args(annotation):
        choices = [str(choice) for choice in typing.get_args(annotation)]
        return [f"{label}: {value!r} is not a choice, {did_you_mean(str(value), choices)}"]
    if annotation in (int, bool, str) and not _is_exactly(value, annotation):
        return [f"{label} must be of type {annotation.__name__}, not {value!r}"]
    return []


def _is_exactly(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, Rule):
        nested = value.values.values() if isinstance(value, ByName) else value.values
        return [number for item in nested for number in _numbers(item)]
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)] or ["an empty list"]
    if isinstance(value, np.ndarray | jax.Array) and not is_traced(value):
        return list(np.asarray(value).ravel())
    return [value]


def _range_problem(label: str, interval: Interval, value: Any) -> list[str]:
    # Whatever stands for an array while JAX takes a tree apart or traces it has no value to check.
    if is_traced(value) or isinstance(value, jax.ShapeDtypeStruct) or type(value) is object:
        return []
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        return [f"{label} must be a number in {interval}, not {value!r}"]
    if value not in interval:
        return [f"{label} must be in {interval}, not {value:g}"]
    return []
