"""The pictures of a run. Each function returns a Matplotlib figure; nothing is shown or saved."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure

from mergejax.eval import sweeps
from mergejax.eval.tables import label

DARK, LIGHT = "#1a1a1a", "#ffffff"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8a8a"  # Okabe and Ito's, safe for the colour-blind
SHADES = "cividis"
DIVERGING = "RdBu_r"


def _short(text: str, limit: int = 34) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _task(name: str) -> str:
    return name.replace("_", "\n")


def _cells(axes: Any, table: np.ndarray, image: Any, form: str, size: float = 8) -> None:
    """Writes every value into its cell, in the colour that is legible there."""
    for (row, column), value in np.ndenumerate(table):
        red, green, blue, _ = image.cmap(image.norm(value))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(
            column,
            row,
            format(value, form),
            ha="center",
            va="center",
            fontsize=size,
            color=DARK if bright else LIGHT,
        )


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def accuracies(results: Mapping[str, Any]) -> figure.Figure:
    """Accuracy of every model on every task, and the mean: a heat map with the numbers in it.

    Args:
        results: what `report.summarise` returned.
    """
    tasks, rows = list(results["tasks"]), results["models"]
    table = np.array([[100 * row["accuracy"][task]["value"] for task in tasks] for row in rows])
    means = np.array([[100 * row["mean"]["value"]] for row in rows])
    kinds = [row["kind"] for row in rows]
    width, height = 3.4 + 0.86 * (len(tasks) + 1), 1.5 + 0.29 * len(rows)
    canvas = figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
    left, right = canvas.subplots(
        1, 2, sharey=True, gridspec_kw={"width_ratios": [len(tasks), 1], "wspace": 0.02}
    )
    limits = {"vmin": np.floor(table.min() / 10) * 10, "vmax": 100}
    for axes, values in ((left, table), (right, means)):
        image = axes.imshow(values, cmap=SHADES, aspect="auto", **limits)
        _cells(axes, values, image, ".1f")
        _bare(axes)
        for i in range(1, len(rows)):
            if kinds[i] != kinds[i - 1]:
                axes.axhline(i - 0.5, color=LIGHT, linewidth=3)
        axes.xaxis.tick_top()
    left.set_xticks(range(len(tasks)), [_task(name) for name in tasks], fontsize=8)
    left.set_yticks(range(len(rows)), [_short(label(row)) for row in rows], fontsize=8)
    right.set_xticks([0], ["mean"], fontsize=8)
    best = (results["verdict"] or {}).get("best")
    for tick, row in zip(left.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row["name"] == best else "normal")
    bar = canvas.colorbar(image, ax=[left, right], fraction=0.04, pad=0.02)
    bar.set_label("test accuracy in %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return canvas


def means(results: Mapping[str, Any]) -> figure.Figure:
    """Mean accuracy of every merge with its 95 % interval, beside the lower and upper marks.

    Args:
        results: what `report.summarise` returned.
    """
    merges = [row for row in results["models"] if row["kind"] in ("merge", "procedure")]
    merges.sort(key=lambda row: row["mean"]["value"])
    canvas = figure.Figure(figsize=(7, 1.6 + 0.3 * len(merges)), dpi=150, layout="constrained")
    axes = canvas.subplots()
    best = (results["verdict"] or {}).get("best")
    for i, row in enumerate(merges):
        value, low, high = (100 * row["mean"][key] for key in ("value", "low", "high"))
        colour = ORANGE if row["name"] == best else BLUE
        axes.plot([low, high], [i, i], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(value, i, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(merges)), [_short(label(row)) for row in merges], fontsize=9)
    for tick, row in zip(axes.get_yticklabels(), merges, strict=True):
        tick.set_fontweight("bold" if row["name"] == best else "normal")
    styles = {"base": ":", "own": "-", "ensemble": "-.", "multi_task": "--"}
    names = {"own": "experts on their own tasks", "multi_task": "multi-task training"}
    for row in results["models"]:
        if row["kind"] in styles:
            value = 100 * row["mean"]["value"]
            named = f"{names.get(row['kind'], row['kind'])}, {value:.1f}"
            axes.axvline(value, color=GREY, linestyle=styles[row["kind"]], label=named, zorder=0)
    axes.set_xlabel("mean test accuracy over tasks in %, with 95 % interval", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylim(-0.6, len(merges) - 0.4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    canvas.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return canvas


def similarity(deltas: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines between deltas, and the share of elements whose signs agree.

    Args:
        deltas: one flat float32 array per expert, all of one length.

    Returns:
        Two matrices [experts, experts]; the cosine with a zero delta is 0, signs are compared
        where both deltas are other than zero.

    Example:
        >>> cosines, signs = similarity([np.array([1.0, 1.0]), np.array([1.0, -3.0])])
        >>> cosines.round(3).tolist(), signs.tolist()
        ([[1.0, -0.447], [-0.447, 1.0]], [[1.0, 0.5], [0.5, 1.0]])
    """
    stacked = np.stack(deltas).astype(np.float64)
    norms = np.linalg.norm(stacked, axis=1, keepdims=True)
    units = stacked / np.where(norms > 0, norms, 1.0)
    signs = np.sign(stacked)
    both = np.abs(signs) @ np.abs(signs).T
    agree = (signs @ signs.T + both) / 2
    return units @ units.T, agree / np.where(both > 0, both, 1.0)


def deltas(names: Sequence[str], cosines: np.ndarray, signs: np.ndarray) -> figure.Figure:
    """How alike the experts' deltas are: two heat maps.

    Args:
        names: of the experts.
        cosines: [experts, experts], see `similarity`.
        signs: the same shape.
    """
    side = 1.6 + 0.72 * len(names)
    canvas = figure.Figure(figsize=(2 * side, 0.87 * side), dpi=150, layout="constrained")
    apart = ~np.eye(len(names), dtype=bool)
    largest = max(0.05, float(np.abs(cosines[apart]).max(initial=0.0)))
    spread = max(0.05, float(np.abs(signs[apart] - 0.5).max(initial=0.0)))
    panels = (
        ("cosine of the deltas", cosines, -largest, largest, ".2f", 1),
        ("signs that agree, %", 100 * signs, 50 - 100 * spread, 50 + 100 * spread, ".1f", 100),
    )
    for axes, (title, table, low, high, form, itself) in zip(
        canvas.subplots(1, 2), panels, strict=True
    ):
        # The diagonal says nothing; without it the colours show what differs.
        shown = np.where(apart, table, np.nan)
        image = axes.imshow(shown, cmap=DIVERGING, vmin=low, vmax=high)
        _cells(axes, np.where(apart, table, (low + high) / 2), image, form)
        for i in range(len(names)):
            axes.texts[i * len(names) + i].set_text(format(itself, "d"))
            axes.texts[i * len(names) + i].set_color(GREY)
        _bare(axes)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(
            range(len(names)), [name.replace("_", " ") for name in names], rotation=35,
            ha="right", rotation_mode="anchor", fontsize=8,
        )  # fmt: skip
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
        bar = canvas.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    return canvas


def sweep(method: str, found: Mapping[str, Any]) -> figure.Figure:
    """Mean validation accuracy of a method over two of its numbers, all from one program.

    Args:
        method: its name.
        found: its table of `sweeps.tables`.
    """
    table = 100 * np.array(found["validation"])
    rows, columns = table.shape
    size = (max(5.0, 2.2 + 0.62 * columns), max(2.8, 1.9 + 0.42 * rows))
    canvas = figure.Figure(figsize=size, dpi=150, layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(table, cmap=SHADES, aspect="auto", origin="lower")
    _cells(axes, table, image, ".1f")
    _bare(axes)
    row, column = np.unravel_index(int(np.argmax(table)), table.shape)
    axes.plot(
        column, row, "s", markersize=24, markerfacecolor="none", markeredgecolor=ORANGE,
        markeredgewidth=2.2,
    )  # fmt: skip
    axes.set_xticks(range(columns), [f"{x:g}" for x in found["columns"][1]], fontsize=8)
    axes.set_yticks(range(rows), [f"{x:g}" for x in found["rows"][1]], fontsize=8)
    axes.set_xlabel(found["columns"][0], fontsize=9)
    axes.set_ylabel(found["rows"][0], fontsize=9)
    axes.set_title(
        f"{method.replace('_', ' ')}, {table.size} settings\n{sweeps.cost(found)}", fontsize=9
    )
    bar = canvas.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
    bar.set_label("mean validation accuracy in %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return canvas
