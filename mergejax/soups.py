"""Greedy soups: an average that takes a model in only if it helps on validation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mergejax.api import merge
from mergejax.errors import MergeError, raise_all

Tree = Any


class Soup(NamedTuple):
    """What `greedy_soup` returns.

    Attributes:
        merged: the average, a tree like the experts.
        chosen: the indices of its experts, in the order in which they were taken.
        score: of the average on validation.
        scores: of each expert alone.
    """

    merged: Tree
    chosen: list[int]
    score: float
    scores: list[float]


def greedy_soup(
    experts: Sequence[Tree],
    score: Callable[[Tree], float],
    *,
    scores: Sequence[float] | None = None,
    method: str = "average",
    base: Tree | None = None,
) -> Soup:
    r"""Averages experts, taking each in only if the score does not fall.

    .. math:: S\leftarrow S\cup\{i\}\quad\text{if}\quad
        score\big(\overline{\theta}_{S\cup\{i\}}\big)\ge score\big(\overline\theta_S\big)

    for the experts in descending order of their own scores, starting with the best.

    Args:
        experts: trees of arrays.
        score: (tree) -> number on validation data, larger is better.
        scores: of each expert alone, if they are known already.
        method: what makes one of several, a chain in the string language; as published 'average'.
        base: for methods that need one.

    Returns:
        A `Soup`: the merged tree, the experts in it, its score.

    Raises:
        MergeError: no experts, a wrong number of scores, or a score that is no number.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray(x)} for x in (1.0, 5.0, 2.5)]
        >>> soup = mj.greedy_soup(experts, lambda tree: -abs(float(tree['w']) - 2.0))
        >>> float(soup.merged['w']), soup.chosen
        (1.75, [2, 0])

    Model soups, greedy (Wortsman et al., 2022, arXiv:2203.05482). Running statistics of BatchNorm
    are averaged; estimate them again before scoring where a model has them.
    """
    if not experts:
        raise MergeError("greedy_soup needs at least one expert")
    if scores is not None and len(scores) != len(experts):
        raise MergeError(f"greedy_soup: {len(scores)} scores for {len(experts)} experts")
    single = [float(score(expert)) for expert in experts] if scores is None else list(scores)
    raise_all(
        [
            f"greedy_soup: the score of expert {i} is not a number; check the score function"
            for i, value in enumerate(single)
            if value != value
        ]
    )
    order = sorted(range(len(experts)), key=lambda i: -single[i])
    chosen, merged, best = order[:1], experts[order[0]], single[order[0]]
    for i in order[1:]:
        tried = merge(method, base, [experts[j] for j in [*chosen, i]])
        found = float(score(tried))
        if found >= best:
            chosen, merged, best = [*chosen, i], tried, found
    return Soup(merged, chosen, best, single)
