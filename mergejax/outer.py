"""A search for hyper-parameters that differ between groups of leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergejax import varying
from mergejax.errors import MergeError, raise_all

STEP = 0.15  # of a local step, as a share of the range


class Found(NamedTuple):
    """What a search found.

    Attributes:
        best: by parameter the rule with the highest score.
        score: of the best.
        trials: every point that was tried, with its score.
    """

    best: dict[str, varying.ByName]
    score: float
    trials: list[tuple[dict[str, varying.ByName], float]]


def search_groups(
    score: Callable[[dict[str, varying.ByName]], float],
    groups: Sequence[str],
    space: Mapping[str, tuple[float, float, str]],
    *,
    trials: int = 50,
    seed: int = 0,
) -> Found:
    """Searches for one value of each parameter in each group of leaves.

    The first half of the trials is drawn at random, the second takes Gaussian steps of 15 per cent
    of the range from the best point so far. Values are data, so no trial compiles anew.

    Args:
        score: ({parameter: by_name rule}) -> a number, more is better: as a rule the accuracy on
            validation data of `mj.merge(mj.bayesian(**rules), ...)`.
        groups: regular expressions on leaf names, the first that matches counts; end with '.*'.
        space: by parameter its lowest and highest value, and 'log' or 'linear'.
        trials: how many points to score.
        seed: of the draws.

    Returns:
        The best point, its score, and all trials.

    Raises:
        MergeError: no group, no trial, an empty or impossible range.

    Example:
        >>> target = {'attention': 0.1, '.*': 10.0}
        >>> def score(rules):
        ...     return -sum(abs(np.log(v / target[g])) for g, v in rules['ridge'].values.items())
        >>> found = search_groups(score, list(target), {'ridge': (0.001, 100.0, 'log')}, trials=200)
        >>> found.score > -1.0, len(found.trials)
        (True, 200)

    The outer level of Bayesian model merging (Li et al., 2026, arXiv:2605.12843), which optimises
    the prior's precision and the scaling of each group of modules; what their optimiser is, is not
    known.
    """
    check(groups, space, trials)
    names = [(parameter, group) for parameter in space for group in groups]
    logs = np.array([space[parameter][2] == "log" for parameter, _ in names])
    bounds = np.array([space[parameter][:2] for parameter, _ in names], np.float64)
    low, high = np.where(logs[:, None], np.log(np.where(logs[:, None], bounds, 1)), bounds).T
    rng = np.random.default_rng(seed)
    tried: list[tuple[np.ndarray, float]] = []

    def rules(point: np.ndarray) -> dict[str, varying.ByName]:
        values = np.where(logs, np.exp(np.where(logs, point, 0)), point)
        found: dict[str, dict[str, Any]] = {parameter: {} for parameter in space}
        for (parameter, group), value in zip(names, values, strict=True):
            found[parameter][group] = float(value)
        return {parameter: varying.by_name(known) for parameter, known in found.items()}

    for number in range(trials):
        if number < (trials + 1) // 2:
            point = rng.uniform(low, high)
        else:
            center = max(tried, key=lambda item: item[1])[0]
            point = np.clip(rng.normal(center, STEP * (high - low)), low, high)
        tried.append((point, float(score(rules(point)))))
    best, value = max(tried, key=lambda item: item[1])
    return Found(rules(best), value, [(rules(point), each) for point, each in tried])


def check(groups: Sequence[str], space: Mapping[str, Any], trials: int) -> None:
    """Refuses what `search_groups` cannot search.

    Raises:
        MergeError: see there.
    """
    problems = []
    if not groups:
        problems.append("search_groups has no group; name some, and '.*' for all other leaves")
    if trials < 1:
        problems.append(f"search_groups(trials={trials}) must be at least 1")
    for name, (low, high, kind) in space.items():
        lowest = 0 if kind == "log" else -np.inf
        if kind not in ("log", "linear") or not lowest < low < high < np.inf:
            problems.append(
                f"search_groups: the range of '{name}' is ({low}, {high}, '{kind}'), expected two "
                "rising numbers and 'log' (above 0) or 'linear'"
            )
    raise_all(problems)
    if not space:
        raise MergeError(
            "search_groups has no parameter; give a range, {'ridge': (1e-3, 1, 'log')}"
        )


def simplex_points(experts: int, points: int = 51, seed: int = 0) -> list[list[float]]:
    """Weights that sum to 1, to choose from: Fisher merging's search of its coefficients.

    Args:
        experts: how many weights; for two an even grid with both ends, otherwise draws of the
            Dirichlet distribution with all parameters 1.
        points: how many.
        seed: of the draws.

    Returns:
        Lists of weights, such as for `mj.fisher(weights=...)`.

    Raises:
        MergeError: fewer than one expert or two points.

    Example:
        >>> simplex_points(2, points=3)
        [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
        >>> len(simplex_points(4)), round(sum(simplex_points(4)[7]), 6)
        (51, 1.0)

    Merging models with Fisher-weighted averaging (Matena and Raffel, 2022, arXiv:2111.09832).
    """
    if experts < 1 or points < 2:
        raise MergeError(
            f"simplex_points(experts={experts}, points={points}): expected at least one expert "
            "and two points"
        )
    if experts == 2:
        return [[float(x), float(1 - x)] for x in np.linspace(0, 1, points)]
    return np.random.default_rng(seed).dirichlet(np.ones(experts), points).tolist()
