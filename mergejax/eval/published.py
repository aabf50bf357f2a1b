"""A suite's numbers beside published ones: the cells of a config, and the table of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergejax import errors
from mergejax.eval import seeds
from mergejax.eval.sections import Section

CELL = ("model", "published", "source")


def check(cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses cells that do not say everything.

    Args:
        cells: `config.cells`; by name `model` (a row of the suite's table: a method or chain as
            `config.methods` has it, or 'base', 'own', 'ensemble', 'multi_task'), `published` (mean
            accuracy in %) and `source`.

    Raises:
        MergeError: names each of them.

    Example:
        >>> check({"ties": {"model": "ties()", "published": 72.2}})
        Traceback (most recent call last):
        mergejax.errors.MergeError: config.cells.ties: it has no 'source'; a cell has the model of \
the table that it is of, the published accuracy in %, and where that was published
    """
    problems = []
    for name, cell in cells.items():
        missing = [key for key in CELL if cell.get(key) in (None, "")]
        if missing:
            problems.append(
                f"config.cells.{name}: it has no {errors.some(missing)}; a cell has the model of "
                "the table that it is of, the published accuracy in %, and where that was published"
            )
        elif not isinstance(cell["published"], int | float) or not 0 <= cell["published"] <= 100:
            problems.append(
                f"config.cells.{name}: published must be an accuracy in %, from 0 to 100, "
                f"not {cell['published']!r}"
            )
    errors.raise_all(problems)


def compare(
    rows: Sequence[Mapping[str, Any]], cells: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The cells whose model was run, each with what was measured.

    Args:
        rows: `models` of `seeds.summarise`.
        cells: as for `check`.

    Returns:
        By cell `name`, `published` and `source` as they are, `mean` of ours, and `difference`, ours
        minus theirs in points.
    """
    known = {row["kind"] if row["kind"] in seeds.MARKS else row["name"]: row for row in rows}
    found = []
    for name, cell in cells.items():
        if cell["model"] in known:
            mean = known[cell["model"]]["mean"]
            difference = round(100 * mean["mean"] - cell["published"], 1)
            found.append({"name": name, **cell, "mean": mean, "difference": difference})
    return found


def section(compared: Sequence[Mapping[str, Any]]) -> Section:
    """The table of a report."""
    rows = [
        [
            *(cell["name"].replace("_", " "), cell["model"], f"{cell['published']:.1f}"),
            *(seeds.shown(cell["mean"]), f"{cell['difference']:+.1f}", cell["source"]),
        ]
        for cell in compared
    ]
    return Section(
        "Beside published numbers",
        ["cell", "model", "published", "here", "difference", "source"],
        rows,
        "Mean accuracy over the tasks in %; the difference is ours minus theirs, in points.",
    )
