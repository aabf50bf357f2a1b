"""Accuracies with 95 % intervals, and paired differences between models."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> Estimate:
    r"""Share of successes with Wilson's score interval.

    .. math:: \frac{p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        right: number of successes.
        total: number of trials, n, at least 1.

    Returns:
        The share p and its 95 % interval.

    Example:
        >>> [round(x, 3) for x in wilson(9, 10)]
        [0.9, 0.596, 0.982]

    Source: Wilson 1927, Journal of the American Statistical Association 22.
    """
    p = right / total
    centre = (p + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z * math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2)) / (1 + Z**2 / total)
    low = 0.0 if right == 0 else max(0.0, centre - half)  # exact, where rounding would not be
    return Estimate(p, low, 1.0 if right == total else min(1.0, centre + half))


def mean_over_tasks(values: Sequence[np.ndarray], shared: bool) -> Estimate:
    r"""Mean over tasks of a mean over examples, with the interval that chance in these leaves.

    Where all tasks show the same scans in the same order, the scans are drawn and not the pairs of
    scan and task, so the variance is that of the scans' means over tasks; where every task has
    examples of its own, the variances of the tasks add up:

    .. math:: s^2 = \frac{Var_i\big(\frac1T\sum_t x_{ti}\big)}{n}\quad\text{or}\quad
        s^2 = \frac1{T^2}\sum_t\frac{Var_i(x_{ti})}{n_t}

    and the interval is the mean plus and minus 1.96 s. For a paired comparison pass the differences
    of two models on the same examples; an interval without 0 then exceeds the noise.

    Args:
        values: for each of the T tasks one number per image, [n_t]: right or wrong, or differences.
        shared: whether image i of every task comes from the same scan.

    Returns:
        The mean over tasks with its 95 % interval.

    Example:
        >>> first, second = np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1])
        >>> [round(x, 3) for x in mean_over_tasks([first, second], shared=True)]
        [0.625, 0.156, 1.094]
    """
    each = [np.asarray(task, np.float64) for task in values]
    mean = float(np.mean([task.mean() for task in each]))
    if shared:
        variance = _variance_of_mean(np.mean(np.stack(each), axis=0))
    else:
        variance = sum(_variance_of_mean(task) for task in each) / len(each) ** 2
    half = Z * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half)


def _variance_of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray], shared: bool) -> Estimate:
    """Lead of one model over another, in mean accuracy over tasks, on the same examples.

    Args:
        first: per task, right or wrong for each example, [n_t].
        second: the same of the other model, on the same examples in the same order.
        shared: see `mean_over_tasks`.

    Returns:
        The difference of the means with the 95 % interval of the paired comparison.

    Example:
        >>> difference([np.array([1, 1, 1, 0])], [np.array([1, 1, 1, 0])], shared=False)
        Estimate(value=0.0, low=0.0, high=0.0)
    """
    pairs = zip(first, second, strict=True)
    return mean_over_tasks([np.asarray(a, float) - np.asarray(b, float) for a, b in pairs], shared)


def exceeds_noise(lead: Estimate) -> bool:
    """Whether the interval of a difference leaves 0 out."""
    return lead.low > 0 or lead.high < 0
