"""The Pareto front of a merge that a preference between two tasks controls."""

from collections.abc import Sequence

import numpy as np
from matplotlib import figure

from mergejax.eval.plots import BLUE, GREY, ORANGE
from mergejax.representation import front


def draw(
    tasks: Sequence[str],
    preferences: Sequence[float],
    scores: np.ndarray,
    host: Sequence[float],
    experts: Sequence[float],
) -> figure.Figure:
    """Accuracy in one task over accuracy in another, for preferences between them.

    Args:
        tasks: the two names.
        preferences: for the first task, from 0 to 1; the second has the rest.
        scores: [preferences, 2] test accuracies, shares of 1.
        host: of the merge that is corrected, before.
        experts: of each task's own expert.

    Returns:
        A Matplotlib figure: settings that no other beats in both tasks are joined by a line.
    """
    canvas = figure.Figure(figsize=(5.6, 4.6), dpi=150, layout="constrained")
    axes = canvas.subplots()
    points = 100 * np.asarray(scores)
    best = front(points)
    line = points[best][np.argsort(points[best][:, 0])]
    axes.plot(*line.T, color=BLUE, linewidth=1.5, zorder=1, label="Pareto front")
    beaten = points[~best]
    axes.plot(*line.T, "o", color=BLUE, markersize=5)
    axes.plot(*beaten.T, "o", color=BLUE, markersize=5, fillstyle="none",
              label="beaten by another preference")  # fmt: skip
    for place in sorted({0, len(points) // 2, len(points) - 1}):
        text = f"{100 * preferences[place]:.0f} : {100 * (1 - preferences[place]):.0f}"
        axes.annotate(text, points[place], xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.plot(*(100 * np.asarray(host)), "s", color=ORANGE, label="merge without a correction")
    marks = 100 * np.asarray(experts)
    axes.axvline(marks[0], color=GREY, linestyle=":", linewidth=1, label="each task's own expert")
    axes.axhline(marks[1], color=GREY, linestyle=":", linewidth=1)
    first, second = (task.replace("_", " ") for task in tasks)
    axes.set_xlabel(f"test accuracy, {first}, in %", fontsize=9)
    axes.set_ylabel(f"test accuracy, {second}, in %", fontsize=9)
    axes.set_title(f"Preferences {first} : {second}", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return canvas
