"""Searches over two numbers as tables, from which heat maps are drawn."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax import language
from mergejax.core import Stage

Record = Mapping[str, Any]


def tables(records: Mapping[str, Record]) -> dict[str, dict[str, Any]]:
    """The searches in which two numbers of a method took several values.

    Args:
        records: by name, what is kept about each model; of merges `settings` and `search`.

    Returns:
        By method `rows` and `columns` (name and values of each number), `validation` (mean
        accuracies [rows, columns]), the `chosen` chain, and what the search took.

    Example:
        >>> chains = [f"dare(rate={r}, scaling={s})" for r in (0.5, 0.9) for s in (0.2, 0.4)]
        >>> found = {"validation": [[0.1], [0.2], [0.3], [0.4]], "programs": 1,
        ...          "compile_seconds": 1.0, "seconds": 1.0}
        >>> dare = {"settings": chains, "chain": chains[3], "search": found}
        >>> table = tables({"dare": dare})["dare"]
        >>> table["rows"], table["columns"], table["validation"]
        (['rate', [0.5, 0.9]], ['scaling', [0.2, 0.4]], [[0.1, 0.2], [0.3, 0.4]])
    """
    found = {name: _table(record) for name, record in records.items() if record.get("search")}
    return {name: table for name, table in found.items() if table}


def cost(found: Record) -> str:
    """How the settings of a search were merged and measured, and how long that took.

    Example:
        >>> cost({"programs": 0, "compile_seconds": 1.0, "seconds": 2.0})
        'leaf by leaf (1.0 s to compile, 2.0 s to run)'
    """
    several = {0: "leaf by leaf", 1: "in one program"}
    how = several.get(found["programs"], f"in {found['programs']} programs")
    return f"{how} ({found['compile_seconds']:.1f} s to compile, {found['seconds']:.1f} s to run)"


def _table(record: Record) -> dict[str, Any] | None:
    points = [_numbers(chain) for chain in record["settings"]]
    values = {name: sorted({point[name] for point in points}) for name in points[0]}
    varied = [name for name in values if len(values[name]) > 1]
    if len(varied) != 2:
        return None
    rows, columns = varied
    means = np.mean(record["search"]["validation"], axis=1)
    table = np.full([len(values[rows]), len(values[columns])], np.nan)
    for point, mean in zip(points, means, strict=True):
        table[values[rows].index(point[rows]), values[columns].index(point[columns])] = mean
    return {
        "rows": [rows, values[rows]],
        "columns": [columns, values[columns]],
        "validation": table.tolist(),
        "chosen": record["chain"],
        **{key: record["search"][key] for key in ("programs", "compile_seconds", "seconds")},
    }


def _numbers(chain: str) -> dict[str, float]:
    """The numbers of a chain by their names."""
    return {
        name: value
        for stage in language.parse(chain).items
        if isinstance(stage, Stage)
        for name, value in stage.arguments.items()
        if isinstance(value, int | float)
    }
