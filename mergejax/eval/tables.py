"""The table of a run: on a terminal, as plain text, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box, console, table

from mergejax.eval.report import interval

WIDE = 10_000  # columns of plain text: nothing is ever folded there
TERMINAL = 150  # columns from which the chains stand in the table and not below it


def label(row: Mapping[str, Any]) -> str:
    """How a table or a picture calls a model; a chain that the user gave is its own name."""
    return row["name"].replace("_", " ") if row["name"].isidentifier() else row["name"]


def cells(results: Mapping[str, Any], chains: bool = True) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table, as text.

    Args:
        results: what `report.summarise` returned.
        chains: whether the last column shows them.

    Returns:
        Names of the columns, and a list of as many cells for each model.
    """
    tasks = list(results["tasks"])
    header = ["model", *tasks, "mean [95 %]", "normalised", "seconds", "settings"]
    rows = []
    for row in results["models"]:
        named = label(row) if not row["given"] or not chains else "as given"
        shares = [f"{100 * row['accuracy'][task]['value']:.1f}" for task in tasks]
        rows.append(
            [
                named,
                *shares,
                interval(row["mean"]),
                "" if row["normalised"] is None else f"{100 * row['normalised']:.1f}",
                "" if row["seconds"] is None else f"{row['seconds']:.2f}",
                "" if row["settings"] is None else str(row["settings"]),
                *([row["chain"] or ""] if chains else []),
            ]
        )
    return [*header, *(["chain"] if chains else [])], rows


def caption(results: Mapping[str, Any]) -> str:
    """What the numbers of the table are."""
    counts = _numbers(task["test"] for task in results["tasks"].values())
    validation = _numbers(task["validation"] for task in results["tasks"].values())
    examples = {row["calibration"]["examples"] for row in results["models"] if row["calibration"]}
    scans = (
        "all tasks show the same scans, so scans were drawn, not pairs of scan and task"
        if results["scans_shared_by_tasks"]
        else "every task has images of its own"
    )
    calibrated = (
        f" Statistics come from {_numbers(examples)} training images of each expert's own task."
        if examples
        else ""
    )
    return (
        f"Accuracy in % on the test images ({counts} a task). The values in a chain were chosen on "
        f"validation images ({validation} a task), never on test, from the number of settings "
        "given; merges are listed by their mean on validation. Mean over tasks with its 95 % "
        f"interval ({scans}); normalised: mean share of each expert's accuracy on its own task; "
        f"seconds: the merge alone, compiled before.{calibrated}"
    )


def _numbers(values: Any) -> str:
    return " to ".join(str(x) for x in sorted({min(v), max(v)}) if v) if (v := list(values)) else ""


def show(results: Mapping[str, Any], stream: TextIO) -> None:
    """Prints the table: by rich on a terminal, otherwise as aligned plain text.

    Args:
        results: what `report.summarise` returned.
        stream: where to print.
    """
    terminal = stream.isatty()
    writer = console.Console(file=stream, width=None if terminal else WIDE, highlight=False)
    chains = not terminal or writer.width >= TERMINAL
    header, rows = cells(results, chains)
    shown = table.Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for i, name in enumerate(header):
        text = i == 0 or name == "chain"
        shown.add_column(
            name.replace("_", "\n"),
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not text,
        )
    best = (results["verdict"] or {}).get("best")
    for row, texts in zip(results["models"], rows, strict=True):
        shown.add_row(*texts, style="bold" if terminal and row["name"] == best else None)
    writer.print(shown, soft_wrap=not terminal)
    if not chains:
        for row in results["models"]:
            if row["chain"] and not row["given"]:
                writer.print(f"{label(row)}: {row['chain']}", markup=False)
    writer.print(caption(results), markup=False, soft_wrap=not terminal)


def markdown(results: Mapping[str, Any]) -> str:
    """The table in Markdown, the chains as code.

    Args:
        results: what `report.summarise` returned.
    """
    header, rows = cells(results)
    chains = [[*row[:-1], f"`{row[-1]}`".replace("|", "\\|") if row[-1] else ""] for row in rows]
    return _table(header, chains)


def intervals(results: Mapping[str, Any]) -> str:
    """Every accuracy with Wilson's 95 % interval, in Markdown.

    Args:
        results: what `report.summarise` returned.
    """
    tasks = list(results["tasks"])
    rows = [
        [label(row).replace("|", "\\|"), *(interval(row["accuracy"][task]) for task in tasks)]
        for row in results["models"]
    ]
    return _table(["model", *tasks], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---" if i == 0 or name == "chain" else "---:" for i, name in enumerate(header)]
    lines = [header, marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
