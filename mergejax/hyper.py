"""Hyper-parameters: numbers that travel as data, what they may be, checks.

A factory's signature says everything: a parameter annotated `Annotated[Number, Interval(...)]`
(the aliases below) is data, so another value never recompiles and may be traced; any other
parameter (a string choice, a rank, a switch) is static.
"""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.varying import Rule, choices, holds_list


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


class Least(NamedTuple):
    """The least value that a whole number may take which is static: a count, a number of steps."""

    value: int


# A number, a list with one number per expert, or a rule; inside a factory always an array or float.
Number = Any
# In a stage that sees all experts together, only what is named in the plural may be a list.
PER_EXPERT = "one number per expert"
Scaling = Annotated[Number, Interval()]
Density = Annotated[Number, Interval(0, 1, open_low=True)]
Fraction = Annotated[Number, Interval(0, 1)]
Positive = Annotated[Number, Interval(0, math.inf, open_low=True)]
NonNegative = Annotated[Number, Interval(0, math.inf)]
Weights = Annotated[Scaling, PER_EXPERT]
Positives = Annotated[Positive, PER_EXPERT]
NonNegatives = Annotated[NonNegative, PER_EXPERT]
Whole = Annotated[int, Least(0)]
Count = Annotated[int, Least(1)]


def interval_of(annotation: Any) -> Interval | None:
    """The interval of a data parameter; None for a static one."""
    if typing.get_origin(annotation) is Annotated:
        return next((m for m in annotation.__metadata__ if isinstance(m, Interval)), None)
    return None


def least_of(annotation: Any) -> int | None:
    """The least value of a static whole number; None for anything else."""
    if typing.get_origin(annotation) is Annotated:
        return next((m.value for m in annotation.__metadata__ if isinstance(m, Least)), None)
    return None


def is_per_expert(annotation: Any) -> bool:
    """Whether a data parameter may be a list where a stage sees all experts together."""
    return PER_EXPERT in annotation.__metadata__


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


def refuse_lists(label: str, numbers: Mapping[str, Any]) -> None:
    """Refuses lists for numbers that hold for all experts together.

    Raises:
        MergeError: one sentence for each list.

    Example:
        >>> refuse_lists('swudi', {'time': 300.0})
    """
    raise_all(
        [
            f"{label}({name}={value}) holds for all experts together; give one number"
            for name, value in numbers.items()
            if holds_list(value)
        ]
    )


def _problems(label: str, annotation: Any, value: Any) -> list[str]:
    interval = interval_of(annotation)
    if interval is not None:
        return [p for v in _numbers(value) for p in _range_problem(label, interval, v)]
    if typing.get_origin(annotation) is Literal and value not in typing.get_args(annotation):
        choices = [str(choice) for choice in typing.get_args(annotation)]
        return [f"{label}: {value!r} is not a choice, {did_you_mean(str(value), choices)}"]
    least = least_of(annotation)
    if least is not None and not (_is_exactly(value, int) and value >= least):
        return [f"{label} must be a whole number of at least {least}, not {value!r}"]
    if annotation in (int, bool, str) and not _is_exactly(value, annotation):
        return [f"{label} must be of type {annotation.__name__}, not {value!r}"]
    return []


def _is_exactly(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, Rule):
        return [number for item in choices(value) for number in _numbers(item)]
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
