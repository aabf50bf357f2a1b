"""Several seeds of one job put together: mean and spread of everything, as lines and as tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.eval.tables import label

Results = Mapping[str, Any]
MARKS = ("base", "own", "ensemble", "multi_task")
CORRUPTED = "corrupted"


def spread(values: Sequence[float | None]) -> dict[str, float | int] | None:
    """Mean and standard deviation (n - 1) of the values that there are; None if there is none.

    Example:
        >>> spread([0.5, None, 0.7])
        {'mean': 0.6, 'deviation': 0.1414, 'count': 2}
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return {
        "mean": round(float(np.mean(known)), 6),
        "deviation": round(deviation, 4),
        "count": len(known),
    }


def summarise(name: str, found: Mapping[int, Results]) -> dict[str, Any]:
    """Puts the results of several seeds together.

    Args:
        name: of the suite.
        found: by seed what `experiment.run` returned.

    Returns:
        `name`, `seeds`, `tasks`, `held_out`, `corruptions`, `models` (a row each, with mean and
        deviation over seeds of `mean`, `normalised`, each task, held-out tasks, corrupted examples,
        seconds, bytes; merges in the order of their validation accuracy), `scaling` (by number of
        experts and method) and `conflict` (by block).
    """
    first = next(iter(found.values()))
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for results in found.values():
        for row in results["models"]:
            by_model.setdefault(row["name"], []).append(row)
    rows = [_row(rows, list(first["tasks"])) for rows in by_model.values()]
    merges = [row for row in rows if row["kind"] == "merge"]
    merges.sort(key=lambda row: (-row["validation"]["mean"], row["name"]))
    marks = {row["kind"]: row for row in rows if row["kind"] in MARKS}
    experts = [row for row in rows if row["kind"] == "expert"]
    exams: Mapping[str, Any] = next((row["exams"] for row in first["models"] if row["exams"]), {})
    return {
        "name": name,
        "seeds": list(found),
        "tasks": {name: {**task, "labels": len(task["labels"])}
                  for name, task in first["tasks"].items()},
        "held_out": list(exams.get("held_out", {})),
        "corruptions": [kind for kind in exams if kind != "held_out"],
        "models": [
            *[marks["base"], *experts, marks["own"], *merges],
            *(row for row in rows if row["kind"] in ("procedure", "compressed")),
            *[marks["ensemble"], marks["multi_task"]],
        ],
        "scaling": _scaling([results["scaling"] for results in found.values()]),
        "conflict": _conflict([results["conflict"] for results in found.values()]),
    }  # fmt: skip


def _row(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    exams = [row["exams"] or {} for row in rows]
    held_out = [_mean(each.get("held_out", {}).values()) for each in exams]
    corrupted = [
        _mean(x for kind, part in each.items() if kind != "held_out" for x in part.values())
        for each in exams
    ]
    return {
        "name": rows[0]["name"],
        "kind": rows[0]["kind"],
        "chains": sorted({row["chain"] for row in rows if row["chain"]}),
        "settings": rows[0]["settings"],
        "validation": spread([row["validation"] for row in rows]),
        "mean": spread([row["mean"]["value"] for row in rows]),
        "normalised": spread([row["normalised"] for row in rows]),
        "accuracy": {t: spread([row["accuracy"][t]["value"] for row in rows]) for t in tasks},
        "held_out": spread(held_out),
        CORRUPTED: spread(corrupted),
        "seconds": spread([row["seconds"] for row in rows]),
        "peak_bytes": spread([row["peak_bytes"] for row in rows]),
        "stored_bytes": spread([row["stored_bytes"] for row in rows]),
    }


def _mean(values: Any) -> float | None:
    known = list(values)
    return float(np.mean(known)) if known else None


def _scaling(
    several: Sequence[Mapping[str, Mapping[str, float | None]]],
) -> dict[str, dict[str, Any]]:
    return {
        count: {
            method: spread([one[count][method] for one in several if count in one])
            for method in several[0][count]
        }
        for count in several[0]
    }


def _conflict(several: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    keys = ("change", "cosine", "conflict")
    return [
        {"group": rows[0]["group"], **{key: spread([row[key] for row in rows]) for key in keys}}
        for rows in zip(*several, strict=True)
    ]


def lines(suite: str, found: Mapping[int, Results]) -> Iterator[dict[str, Any]]:
    """Every measured accuracy as a flat record: a suite, a seed, a model, a part and a task each.

    Args:
        suite: its name.
        found: by seed what `experiment.run` returned.

    Yields:
        `part` is 'test', 'held_out' or the name of a corruption.
    """
    for seed, results in found.items():
        for row in results["models"]:
            facts = {
                "suite": suite,
                "seed": seed,
                "model": row["name"],
                "kind": row["kind"],
                "chain": row["chain"],
                "settings": row["settings"],
                "seconds": row["seconds"],
                "peak_bytes": row["peak_bytes"],
                "stored_bytes": row["stored_bytes"],
            }
            for task, estimate in row["accuracy"].items():
                yield {**facts, "part": "test", "task": task, "accuracy": estimate["value"]}
            for part, tasks in (row["exams"] or {}).items():
                for task, accuracy in tasks.items():
                    yield {**facts, "part": part, "task": task, "accuracy": accuracy}


def shown(value: Mapping[str, float] | None, scale: float = 100, digits: int = 1) -> str:
    """Mean ± deviation as text, the deviation only where there are several values.

    Example:
        >>> shown({"mean": 0.5, "deviation": 0.01, "count": 3}), shown(None)
        ('50.0 ± 1.0', '')
    """
    if value is None:
        return ""
    text = f"{scale * value['mean']:.{digits}f}"
    return text if value["count"] < 2 else f"{text} ± {scale * value['deviation']:.{digits}f}"


def cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table, as text; columns without any value are left out."""
    tasks = list(summary["tasks"])
    columns = {
        "model": [label(row) for row in summary["models"]],
        **{task: [shown(row["accuracy"][task]) for row in summary["models"]] for task in tasks},
        "mean": [shown(row["mean"]) for row in summary["models"]],
        "normalised": [shown(row["normalised"]) for row in summary["models"]],
        "held out": [shown(row["held_out"]) for row in summary["models"]],
        CORRUPTED: [shown(row[CORRUPTED]) for row in summary["models"]],
        "seconds": [shown(row["seconds"], 1, 3) for row in summary["models"]],
        "peak MB": [shown(row["peak_bytes"], 1e-6, 0) for row in summary["models"]],
        "stored MB": [shown(row["stored_bytes"], 1e-6, 2) for row in summary["models"]],
        "settings": [str(row["settings"] or "") for row in summary["models"]],
    }
    kept = {name: texts for name, texts in columns.items() if any(texts)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def caption(summary: Mapping[str, Any]) -> str:
    """What the numbers of the table are."""
    count = len(summary["seeds"])
    parts = [
        "Accuracy in % on test examples, "
        + (f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed")
        + " (a seed draws the base, the experts and the order of examples)",
        "merges stand in the order of their accuracy on validation examples, on which their values "
        "were chosen from so many settings, never on test",
        "normalised: mean share of each expert's accuracy on its own task",
    ]
    if summary["held_out"]:
        parts.append(f"held out: mean over {', '.join(summary['held_out'])}, which no expert saw")
    if summary["corruptions"]:
        parts.append(f"corrupted: mean over {', '.join(summary['corruptions'])}")
    parts.append(
        "seconds and peak of additional memory of one merge, compiled before; stored: the bodies"
    )
    return "; ".join(parts) + "."


def markdown(summary: Mapping[str, Any]) -> str:
    """The table in Markdown with its caption, and the chains."""
    header, rows = cells(summary)
    marks = ["---"] + ["---:"] * (len(header) - 1)
    table = [f"| {' | '.join(line)} |" for line in (header, marks, *rows)]
    chosen = [
        f"- {label(row)}: {', '.join(f'`{chain}`' for chain in row['chains'])}"
        for row in summary["models"]
        if row["chains"]
    ]
    parts = [f"# {summary['name']}", "\n".join(table), caption(summary), "## Chosen values"]
    return "\n\n".join([*parts, "\n".join(chosen)]) + "\n"


def latex(summary: Mapping[str, Any]) -> str:
    """The table in LaTeX, for the packages booktabs and graphicx; the best merge in bold."""
    header, rows = cells(summary)
    merges = [row for row in summary["models"] if row["kind"] == "merge"]
    best = merges[0]["name"] if merges else None
    body = []
    for row, texts in zip(summary["models"], rows, strict=True):
        line = [_escaped(text) for text in texts]
        if row["name"] == best:
            line = [f"\\textbf{{{text}}}" if text else "" for text in line]
        body.append(" & ".join(line) + r" \\")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(_escaped(name) for name in header) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            rf"\caption{{{_escaped(caption(summary))}}}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    """Text for LaTeX.

    Example:
        >>> print(_escaped("50 % ± 1 of a_b"))
        50 \\% $\\pm$ 1 of a\\_b
    """
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "|": r"$|$"}
    special |= {letter: f"\\{letter}" for letter in "%_&#${}"}
    return "".join(special.get(letter, letter) for letter in text)
