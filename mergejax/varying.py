"""Hyper-parameters that vary from leaf to leaf: by its name, by its depth."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mergejax.errors import MergeError


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


def choices(rule: Rule) -> list[Any]:
    """The values that a rule chooses from."""
    return list(rule.values.values() if isinstance(rule, ByName) else rule.values)


def resolve(value: Any, name: str, depth: float) -> Any:
    """Replaces a rule by its value for one leaf."""
    return value.at(name, depth) if isinstance(value, Rule) else value


def holds_list(value: Any) -> bool:
    """Whether a value, or one that a rule chooses from, is a list with one number per expert."""
    if isinstance(value, Rule):
        return any(map(holds_list, choices(value)))
    return isinstance(value, list | tuple)
