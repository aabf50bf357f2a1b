"""Accuracy over cost: the table and the picture of studies that merge at several widths."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.alignment_studies import tables

Record = Mapping[str, Any]


def table(records: Sequence[Record]) -> str:
    """Accuracy and cost of every method and budget, mean ± spread over seeds, in Markdown.

    Args:
        records: of `pair` (a pair of columns each), `method`, `cost`, `accuracy` and, for methods
            that have several widths, `budget`.

    Example:
        >>> print(table([{"pair": "twins", "method": "mean", "cost": 1.0, "accuracy": 0.5}]))
        | method | twins | cost |
        |---|---:|---:|
        | mean | 50.0 | 1.00 |
    """
    pairs = list(dict.fromkeys(r["pair"] for r in records))
    rows = []
    for method, budget in dict.fromkeys((r["method"], r.get("budget")) for r in records):
        mine = [r for r in records if (r["method"], r.get("budget")) == (method, budget)]
        several = [[r for r in mine if r["pair"] == pair] for pair in pairs]
        cells = [tables.spread([r["accuracy"] for r in some]) for some in several]
        costs = [tables.spread([r["cost"] for r in some], 1, 2) for some in several]
        name = f"{method}, budget {budget}" if budget else method
        rows.append([name, *(x for both in zip(cells, costs, strict=True) for x in both)])
    return tables.markdown(
        ["method", *(x for pair in pairs for x in (pair.replace("_", " "), "cost"))], rows
    )


def picture(records: Sequence[Record], curves: Mapping[str, str], marks: Sequence[str]) -> Any:
    """Accuracy over multiplications, mean and spread over seeds, one panel for each pair.

    Args:
        records: as for `table`.
        curves: methods with several budgets, and what the legend calls them.
        marks: methods with one width.
    """
    from matplotlib import figure

    from mergejax.eval.plots import BLUE, GREY, ORANGE

    pairs = list(dict.fromkeys(r["pair"] for r in records))
    canvas = figure.Figure(figsize=(4.6 * len(pairs), 4.0), dpi=150, layout="constrained")
    for axes, pair in zip(canvas.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        mine = [r for r in records if r["pair"] == pair]
        for (method, label), colour in zip(curves.items(), (BLUE, GREY, "#009e73"), strict=False):
            x, y, width = _points([r for r in mine if r["method"] == method])
            axes.errorbar(x, y, width, fmt="o-", color=colour, markersize=4, capsize=2, label=label)
        for method, mark in zip(marks, "vsD^*Px<>h", strict=False):
            x, y, width = _points([r for r in mine if r["method"] == method])
            axes.errorbar(x, y, width, fmt=mark, color=ORANGE, fillstyle="none", markersize=6,
                          capsize=2, label=method)  # fmt: skip
        axes.set_title(pair.replace("_", " "), fontsize=10, loc="left")
        axes.set_xlabel("multiplications, one network = 1", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.axes[0].set_ylabel("test accuracy in %", fontsize=9)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return canvas


def _points(found: Sequence[Record]) -> np.ndarray:
    """Cost, accuracy in per cent and its spread, [3, budgets]."""
    rows = []
    for budget in dict.fromkeys(r.get("budget") for r in found):
        some = [r for r in found if r.get("budget") == budget]
        accuracy = [100 * r["accuracy"] for r in some]
        rows.append([np.mean([r["cost"] for r in some]), np.mean(accuracy), np.std(accuracy)])
    return np.array(rows).reshape(-1, 3).T
