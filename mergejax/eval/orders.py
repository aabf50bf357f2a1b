"""Which published orders of methods hold in a suite, with the interval of each difference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from mergejax.eval import metrics
from mergejax.eval.sections import Section


class Claim(NamedTuple):
    """That one method is above another, in mean accuracy over tasks, and who says so."""

    above: str
    below: str
    source: str


CLAIMS = (
    Claim("task_arithmetic", "average", "Ilharco et al. 2023, arXiv:2212.04089"),
    Claim("ties", "task_arithmetic", "Yadav et al. 2023, arXiv:2306.01708"),
    Claim("tsv_merge", "ties", "Gargiulo et al. 2025, arXiv:2412.00081"),
    Claim("iso_c", "ties", "Marczak et al. 2025, arXiv:2502.04959"),
    Claim("iso_cts", "ties", "Marczak et al. 2025, arXiv:2502.04959"),
    Claim("fisher", "average", "Matena and Raffel 2022, arXiv:2111.09832"),
    Claim("regmean", "fisher", "Jin et al. 2023, arXiv:2212.09849"),
    Claim("regmean", "ties", "Tang et al. 2024, arXiv:2406.03280"),
    Claim("lines", "task_arithmetic", "Wang et al. 2024, arXiv:2410.17146"),
    Claim("dare", "task_arithmetic", "Yu et al. 2024, arXiv:2311.03099"),
    Claim("consensus", "task_arithmetic", "Wang et al. 2024, arXiv:2405.07813"),
)


def leads(right: Mapping[str, Sequence[np.ndarray]], shared: bool) -> list[dict[str, Any]]:
    """The lead of the method that is said to be above, for every claim whose methods were run.

    Args:
        right: by name of the model, per task right or wrong for each test example. A chain counts
            for the method that it starts with, if no other does.
        shared: as for `metrics.mean_over_tasks`.

    Returns:
        By claim `above`, `below` and the `lead` with its 95 % interval, over test examples.

    Example:
        >>> right = {"average": [np.array([1, 0])], "task_arithmetic()": [np.array([1, 1])]}
        >>> [(x["above"], x["lead"]["value"]) for x in leads(right, shared=False)]
        [('task_arithmetic', 0.5)]
    """
    called: dict[str, list[str]] = {}
    for name in right:
        if "|" not in name:
            called.setdefault(name.partition("(")[0], []).append(name)
    known = {method: names[0] for method, names in called.items() if len(names) == 1}
    return [
        {
            "above": claim.above,
            "below": claim.below,
            "lead": metrics.difference(
                right[known[claim.above]], right[known[claim.below]], shared
            )._asdict(),
        }
        for claim in CLAIMS
        if claim.above in known and claim.below in known
    ]


def summarise(several: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    r"""Puts the leads of several seeds together.

    With n seeds the interval is Student's, :math:`\bar d \pm t_{n-1} s / \sqrt n`, since base and
    experts differ between seeds more than test examples do; with one it is that over test examples.

    Args:
        several: what `leads` gave, for each seed.

    Returns:
        By claim that all seeds have: `above`, `below`, `source`, `value`, `low`, `high`, `seeds`.

    Example:
        >>> def seed(value):
        ...     lead = {"value": value, "low": value - 0.1, "high": value + 0.1}
        ...     return [{"above": "ties", "below": "task_arithmetic", "lead": lead}]
        >>> (found,) = summarise([seed(0.01), seed(0.02), seed(0.03)])
        >>> round(found["value"], 3), round(found["low"], 3), round(found["high"], 3)
        (0.02, -0.005, 0.045)
    """
    found = []
    for claim in CLAIMS:
        mine = [
            one["lead"]
            for seed in several
            for one in seed
            if (one["above"], one["below"]) == (claim.above, claim.below)
        ]
        if len(mine) == len(several) > 0:
            found.append({**claim._asdict(), **_together(mine), "seeds": len(mine)})
    return found


def _together(estimates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if len(estimates) == 1:
        return dict(estimates[0])
    values = np.array([estimate["value"] for estimate in estimates])
    n, mean = len(values), float(values.mean())
    half = float(special.stdtrit(n - 1, 0.975) * values.std(ddof=1)) / math.sqrt(n)
    return {"value": mean, "low": mean - half, "high": mean + half}


def verdict(order: Mapping[str, Any]) -> str:
    """Whether an order holds, as far as its interval can tell.

    Example:
        >>> verdict({"low": 0.01, "high": 0.03}), verdict({"low": -0.01, "high": 0.03})
        ('holds', 'not decided')
    """
    if order["low"] > 0:
        return "holds"
    return "does not hold" if order["high"] < 0 else "not decided"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # 0.0 added, so that nothing is shown as -0.0


def section(orders: Sequence[Mapping[str, Any]]) -> Section:
    """The table of a report."""
    rows = [
        [
            f"{order['above']} > {order['below']}".replace("_", " "),
            _points(order["value"]),
            f"[{_points(order['low'])}, {_points(order['high'])}]",
            verdict(order),
            order["source"],
        ]
        for order in orders
    ]
    seeds = orders[0]["seeds"]
    over = f"{seeds} seeds (Student's t)" if seeds > 1 else "test examples, of one seed"
    return Section(
        "Published orders checked",
        ["said to be", "points", "95 % interval", "here", "source"],
        rows,
        "Difference in mean accuracy over the tasks on test examples, each method with the values "
        f"chosen on validation examples; intervals over {over}. An interval that contains 0 "
        "decides nothing.",
    )
