"""The table of a run: on a terminal, as plain text, as Markdown."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

from rich import box, console, table
from rich.text import Text

from mergejax.eval.report import interval

WIDE = 10_000  # columns of plain text: nothing is ever folded there


def label(row: Mapping[str, Any]) -> str:
    """How a table or a picture calls a model; a chain that the user gave is its own name."""
    return row["name"].replace("_", " ") if row["name"].isidentifier() else row["name"]


def cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table, as text.

    Args:
        results: what `report.summarise` returned.

    Returns:
        Names of the columns, and a list of as many cells for each model.
    """
    tasks = list(results["tasks"])
    header = ["model", *tasks, "mean [95 %]", "normalised", "seconds", "settings", "chain"]
    rows = []
    for row in results["models"]:
        shares = [f"{100 * row['accuracy'][task]['value']:.1f}" for task in tasks]
        rows.append(
            [
                "as given" if row["given"] else label(row),
                *shares,
                interval(row["mean"]),
                "" if row["normalised"] is None else f"{100 * row['normalised']:.1f}",
                "" if row["seconds"] is None else f"{row['seconds']:.2f}",
                "" if row["settings"] is None else str(row["settings"]),
                row["chain"] or "",
            ]
        )
    return header, rows


def caption(results: Mapping[str, Any]) -> str:
    """What the numbers of the table are."""
    counts = _numbers(task["test"] for task in results["tasks"].values())
    validation = _numbers(task["validation"] for task in results["tasks"].values())
    examples = {row["calibration"]["examples"] for row in results["models"] if row["calibration"]}
    scans = (
        "all tasks show the same scans, so scans were drawn, not pairs of scan and task"
        if results["scans_shared_by_tasks"]
        else "every task has examples of its own"
    )
    calibrated = (
        f" Statistics come from {_numbers(examples)} training examples of each expert's own task."
        if examples
        else ""
    )
    return (
        f"Accuracy in % on the test examples ({counts} a task). The values in a chain were chosen "
        f"on validation examples ({validation} a task), never on test, from the number of settings "
        "given; merges are listed by their mean on validation. Mean over tasks with its 95 % "
        f"interval ({scans}); normalised: mean share of each expert's accuracy on its own task; "
        f"seconds: the merge alone, compiled before.{calibrated}"
    )


def _numbers(values: Any) -> str:
    return " to ".join(str(x) for x in sorted({min(v), max(v)}) if v) if (v := list(values)) else ""


def show(results: Mapping[str, Any], stream: TextIO) -> None:
    """Prints the table: by rich on a terminal, otherwise as aligned plain text.

    A terminal that is too narrow shows fewer columns and says which; the chains come below then.

    Args:
        results: what `report.summarise` returned.
        stream: where to print.
    """
    terminal = stream.isatty()
    content = io.StringIO()
    writer = console.Console(
        file=stream if terminal else content, width=None if terminal else WIDE, highlight=False
    )
    header, rows = cells(results)
    dropped = _too_much(header, rows, list(results["tasks"]), writer.width)
    shown = table.Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    kept = [i for i, name in enumerate(header) if name not in dropped]
    for i in kept:
        side: Literal["left", "right"] = "left" if header[i] in ("model", "chain") else "right"
        shown.add_column(header[i].replace("_", "\n"), justify=side, no_wrap=True)
    best = (results["verdict"] or {}).get("best")
    for row, texts in zip(results["models"], rows, strict=True):
        style = "bold" if terminal and row["name"] == best else None
        # As Text, because brackets and colons of a chain are no markup.
        shown.add_row(*(Text(texts[i]) for i in kept), style=style)
    writer.print(shown)
    if dropped:
        for texts in rows:
            if texts[-1]:
                writer.print(Text(f"{texts[0]}: {texts[-1]}"))
        writer.print(Text(f"For want of space left out here: {', '.join(dropped)}.\n"))
    writer.print(Text(caption(results)))
    if not terminal:
        stream.writelines(f"{line.rstrip()}\n" for line in content.getvalue().splitlines())


def _too_much(
    header: Sequence[str], rows: Sequence[Sequence[str]], tasks: Sequence[str], width: int
) -> list[str]:
    """The columns to leave out, in the order of their importance, until the others fit."""
    needed = {
        name: 3 + max(*map(len, name.split("_")), *(len(row[i]) for row in rows))
        for i, name in enumerate(header)
    }
    dropped: list[str] = []
    for group in (["chain"], ["settings"], ["seconds"], ["normalised"], list(tasks)):
        if sum(needed.values()) - sum(needed[name] for name in dropped) > width:
            dropped += group
    return dropped


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


def fallbacks(results: Mapping[str, Any]) -> list[str]:
    """Which leaves had none of the statistics that methods read, in Markdown; empty without any.

    Example:
        >>> rows = [{"name": "regmean", "without_statistics": ["norm/scale"]}, {"name": "ties"}]
        >>> fallbacks({"models": rows})[1]
        '- regmean: `norm/scale`'
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for row in results["models"]:
        if row.get("without_statistics"):
            found.setdefault(tuple(row["without_statistics"]), []).append(row["name"])
    lines = [
        f"- {', '.join(methods)}: {', '.join(f'`{leaf}`' for leaf in leaves)}"
        for leaves, methods in found.items()
    ]
    title = "## Leaves without statistics, which these methods merge without"
    return [title, "\n".join(lines)] if lines else []
