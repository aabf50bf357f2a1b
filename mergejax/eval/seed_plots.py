"""The pictures of a suite. Each function returns a Matplotlib figure; nothing is shown or saved."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker

from mergejax.eval import plots
from mergejax.eval.tables import label

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
MARKERS = "osD^vPX"
WIDTH = 4.8  # inches, so that the text can be read on a phone
BEST = 3  # merges that are drawn beside base, average and upper marks
Row = Mapping[str, Any]


def draw(
    summary: Mapping[str, Any], found: Mapping[int, Mapping[str, Any]]
) -> dict[str, tuple[str, figure.Figure]]:
    """All pictures for which there are numbers: by file name a title and the figure.

    Args:
        summary: what `seeds.summarise` returned.
        found: by seed what `experiment.run` returned; sweeps are those of the first.
    """
    merges = [row for row in summary["models"] if row["kind"] == "merge"]
    drawn: dict[str, tuple[str, figure.Figure]] = {}
    if merges:
        drawn["bars.png"] = ("Mean accuracy of every merge", bars(summary))
        drawn["pareto.png"] = ("Accuracy against the time of a merge", pareto(merges))
    if len(summary["tasks"]) > 2:
        drawn["radar.png"] = ("Accuracy by task, as a share of the expert's", radar(summary))
    if summary["scaling"]:
        drawn["scaling.png"] = ("From few experts to many", scaling(summary["scaling"]))
    seed, first = next(iter(found.items()))
    for name, table in first["sweeps"].items():
        title = f"{name.replace('_', ' ')} on validation examples, seed {seed}"
        drawn[f"{name}_sweep.png"] = (title, plots.sweep(name, table))
    drawn["conflict.png"] = ("Where the experts disagree", conflict(summary["conflict"]))
    return drawn


def _canvas(width: float, height: float) -> tuple[figure.Figure, Any]:
    canvas = figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = canvas.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)
    return canvas, axes


def bars(summary: Mapping[str, Any]) -> figure.Figure:
    """Mean accuracy of every merge with its deviation over seeds, beside lower and upper marks."""
    merges = [row for row in summary["models"] if row["kind"] == "merge"]
    merges.sort(key=lambda row: row["mean"]["mean"])
    canvas, axes = _canvas(WIDTH, 1.6 + 0.21 * len(merges))
    values = [100 * row["mean"]["mean"] for row in merges]
    errors = [100 * row["mean"]["deviation"] for row in merges]
    axes.barh(range(len(merges)), values, xerr=errors, height=0.7, color=plots.BLUE,
              error_kw={"elinewidth": 1, "ecolor": plots.DARK})  # fmt: skip
    axes.set_yticks(range(len(merges)), [label(row) for row in merges])
    axes.tick_params(axis="y", length=0)
    styles = {"base": ":", "own": "-", "ensemble": "-.", "multi_task": "--"}
    names = {"own": "experts on their own tasks", "multi_task": "multi-task training"}
    marks = [row for row in summary["models"] if row["kind"] in styles]
    for row in marks:
        value = 100 * row["mean"]["mean"]
        text = f"{names.get(row['kind'], row['kind'])}, {value:.1f}"
        axes.axvline(
            value, color=plots.DARK, linewidth=1, linestyle=styles[row["kind"]], label=text
        )
    axes.set_ylim(-0.6, len(merges) - 0.4)
    axes.set_xlabel("mean test accuracy over tasks in %", fontsize=9)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    canvas.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return canvas


def _chosen(summary: Mapping[str, Any]) -> list[Row]:
    """Base, plain average, the best merges by validation, and multi-task training."""
    rows = {row["name"]: row for row in summary["models"]}
    merges = [row for row in summary["models"] if row["kind"] == "merge"]
    picked = [rows["base"], *(rows[name] for name in ("average",) if name in rows)]
    picked += [row for row in merges if row["name"] != "average"][:BEST]
    return [*picked, rows["multi_task"]]


def radar(summary: Mapping[str, Any]) -> figure.Figure:
    """Accuracy on every task as a share of that of the task's own expert."""
    tasks = list(summary["tasks"])
    own = next(row for row in summary["models"] if row["kind"] == "own")
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    canvas = figure.Figure(figsize=(WIDTH, 5.0), dpi=150, layout="constrained")
    axes: Any = canvas.subplots(subplot_kw={"projection": "polar"})
    for i, row in enumerate(_chosen(summary)):
        shares = [
            row["accuracy"][task]["mean"] / max(own["accuracy"][task]["mean"], 1e-9)
            for task in tasks
        ]
        closed = np.append(angles, angles[0])
        axes.plot(closed, 100 * np.array([*shares, shares[0]]), color=COLOURS[i], linewidth=1.6,
                  label=label(row), marker=MARKERS[i], markersize=4)  # fmt: skip
    axes.plot(np.linspace(0, 2 * np.pi, 200), np.full(200, 100.0), color=plots.DARK, linewidth=0.8,
              linestyle=":", label="expert")  # fmt: skip
    axes.set_xticks(angles, [task.replace("_", "\n") for task in tasks], fontsize=8)
    axes.set_rlabel_position(180 / len(tasks))
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(bottom=0)
    axes.spines["polar"].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    canvas.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return canvas


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """The places that no other one beats in both respects, cheapest first.

    Example:
        >>> front([1.0, 2.0, 3.0], [0.5, 0.4, 0.9])
        [0, 2]
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i]))
    found: list[int] = []
    for i in order:
        if not found or gains[i] > gains[found[-1]]:
            found.append(i)
    return found


def pareto(merges: Sequence[Row]) -> figure.Figure:
    """Mean accuracy over the seconds of one merge; the line joins what nothing beats in both."""
    canvas, axes = _canvas(WIDTH, 3.8)
    seconds = [max(row["seconds"]["mean"], 1e-4) for row in merges]
    means = [100 * row["mean"]["mean"] for row in merges]
    best = front(seconds, means)
    axes.scatter(seconds, means, s=22, color="#9fb8c8", zorder=2)
    axes.plot([seconds[i] for i in best], [means[i] for i in best], "o-", color=plots.ORANGE,
              markersize=6, linewidth=1.2, zorder=3)  # fmt: skip
    for i in best:
        axes.annotate(label(merges[i]), (seconds[i], means[i]), (7, -9), fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(x=0.15, y=0.12)
    axes.set_xlabel("seconds of one merge, compiled before", fontsize=9)
    axes.set_ylabel("mean test accuracy in %", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    return canvas


def scaling(table: Mapping[str, Mapping[str, Any]]) -> figure.Figure:
    """Normalised accuracy over the number of experts, with the deviation over seeds as a band."""
    canvas, axes = _canvas(WIDTH, 3.4)
    for i, method in enumerate(next(iter(table.values()))):
        counts = [int(count) for count in table if table[count][method]]
        means = 100 * np.array([table[str(n)][method]["mean"] for n in counts])
        widths = 100 * np.array([table[str(n)][method]["deviation"] for n in counts])
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(counts, means, marker=MARKERS[i % len(MARKERS)], color=colour, linewidth=1.6,
                  label=method.replace("_", " "))  # fmt: skip
        axes.fill_between(counts, means - widths, means + widths, color=colour, alpha=0.12)
    axes.set_xticks([int(count) for count in table])
    axes.set_xlabel("number of experts", fontsize=9)
    axes.set_ylabel("normalised accuracy in %", fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    canvas.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return canvas


def conflict(rows: Sequence[Row]) -> figure.Figure:
    """Sign conflict, cosine and change of the experts' deltas, block by block."""
    canvas = figure.Figure(figsize=(WIDTH, 4.8), dpi=150, layout="constrained")
    panels = (
        ("conflict", "elements with\nconflicting signs, %", 100),
        ("cosine", "cosine between\nexperts", 1),
        ("change", "change as a share\nof the norm, %", 100),
    )
    names = [row["group"] for row in rows]
    for axes, (key, text, scale) in zip(canvas.subplots(3, sharex=True), panels, strict=True):
        known = [(i, row[key]) for i, row in enumerate(rows) if row[key]]
        axes.bar([i for i, _ in known], [scale * value["mean"] for _, value in known], width=0.7,
                 yerr=[scale * value["deviation"] for _, value in known], color=plots.BLUE,
                 error_kw={"elinewidth": 1})  # fmt: skip
        axes.set_ylabel(text, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(range(len(names)), names)
    return canvas
