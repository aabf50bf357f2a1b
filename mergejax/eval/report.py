"""From what is kept about every model to one result: rows with intervals, and a verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergejax import language
from mergejax.eval import metrics, orders, sweeps

Record = Mapping[str, Any]
OWN = "experts on their own tasks"
ORDER = ("base", "expert", "own", "merge", "procedure", "compressed", "ensemble", "multi_task")


def encode(right: np.ndarray) -> str:
    """Right or wrong for each example as a text of ones and zeros.

    Example:
        >>> encode(np.array([True, False, True]))
        '101'
    """
    return "".join("01"[bool(x)] for x in right)


def decode(text: str) -> np.ndarray:
    """The other way round.

    Example:
        >>> decode("101").tolist()
        [True, False, True]
    """
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def summarise(
    records: Mapping[str, Record], tasks: Mapping[str, Mapping[str, Any]], shared: bool
) -> dict[str, Any]:
    """Puts all models of a run together.

    Args:
        records: by name, what is kept about each model: `name`, `kind`, `test` (per task a text of
            ones and zeros); of merges also `chain`, `settings`, `seconds` and so on.
        tasks: by name, what is known about each task.
        shared: whether image i of every task's test split comes from the same scan.

    Returns:
        `tasks`, `models` (a row each, merges in the order of their validation accuracy), `verdict`,
        `sweeps` (see `sweeps.tables`) and `orders` (see `orders.leads`); accuracies are shares
        of 1.
    """
    right = {name: _right(record, tasks) for name, record in records.items()}
    of_task = {r["task"]: name for name, r in records.items() if r["kind"] == "expert"}
    experts = {task: of_task[task] for task in tasks}
    own = [right[experts[task]][i] for i, task in enumerate(tasks)]
    rows = [_row(record, right[name], own, tasks, shared) for name, record in records.items()]
    rows.append(_row({"name": OWN, "kind": "own"}, own, own, tasks, shared))
    rows.sort(key=lambda row: _place(row, list(experts.values())))
    merges = [row for row in rows if row["kind"] == "merge"]
    base = next((row for row in rows if row["kind"] == "base"), None)
    return {
        "tasks": dict(tasks),
        "scans_shared_by_tasks": shared,
        "models": rows,
        "verdict": _verdict(merges, base, right, shared),
        "sweeps": sweeps.tables(records),
        "orders": orders.leads({row["name"]: right[row["name"]] for row in merges}, shared),
    }


def _place(row: Mapping[str, Any], experts: Sequence[str]) -> tuple[Any, ...]:
    """Where a row stands: experts in the order of their tasks, merges by validation accuracy."""
    kind = ORDER.index(row["kind"])
    if row["kind"] == "expert":
        return kind, experts.index(row["name"])
    return kind, -row["validation"] if row["kind"] == "merge" else 0.0, row["name"]


def _right(record: Record, tasks: Mapping[str, Any]) -> list[np.ndarray]:
    return [decode(record["test"][task]) for task in tasks]


def _row(
    record: Record,
    right: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    tasks: Mapping[str, Any],
    shared: bool,
) -> dict[str, Any]:
    each = [metrics.wilson(int(x.sum()), len(x)) for x in right]
    facts = ("name", "kind", "chain", "given", "calibration", "without_statistics", "exams")
    costs = ("seconds", "peak_bytes", "stored_bytes")
    row = {key: record.get(key) for key in (*facts, *costs)}
    row["settings"] = len(record["settings"]) if "settings" in record else None
    validation = record.get("validation")
    row["validation"] = None if validation is None else float(np.mean(list(validation.values())))
    row["accuracy"] = {t: e._asdict() for t, e in zip(tasks, each, strict=True)}
    row["mean"] = metrics.mean_over_tasks(right, shared)._asdict()
    row["normalised"] = normalised(right, own)
    return row


def normalised(right: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> float | None:
    """Mean share of the accuracy that each task's own expert reaches.

    Args:
        right: per task, right or wrong for each example.
        own: the same of each task's expert.

    Returns:
        The mean, or None where an expert is never right, which would make its share meaningless.

    Example:
        >>> normalised([np.array([1, 0])], [np.array([1, 1])])
        0.5
    """
    marks = [float(np.mean(x)) for x in own]
    if not all(marks):
        return None
    return float(np.mean([np.mean(x) / mark for x, mark in zip(right, marks, strict=True)]))


def _verdict(
    merges: Sequence[dict[str, Any]],
    base: dict[str, Any] | None,
    right: Mapping[str, list[np.ndarray]],
    shared: bool,
) -> dict[str, Any] | None:
    """The merge to take, chosen on validation, and whether its leads on test exceed the noise."""
    if not merges:
        return None
    best = merges[0]
    others = [row for row in merges[1:] if _canonical(row) != _canonical(best)]
    average = next((row for row in merges if _canonical(row) == "average()"), None)
    verdict: dict[str, Any] = {"best": best["name"], "chain": best["chain"]}
    marks = {"runner_up": others[0] if others else None, "average": average, "base": base}
    for key, other in marks.items():
        if other is not None and other is not best:
            lead = metrics.difference(right[best["name"]], right[other["name"]], shared)
            verdict[key] = {
                "name": other["name"],
                "chain": other.get("chain"),
                "lead": lead._asdict(),
                "exceeds_noise": metrics.exceeds_noise(lead),
            }
    verdict["sentence"] = sentence(best, verdict)
    return verdict


def _canonical(row: Mapping[str, Any]) -> str:
    return repr(language.parse(row["chain"]))


def sentence(best: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """The verdict in words.

    Args:
        best: the row of the merge to take.
        verdict: `runner_up`, `average` and `base`, each with a lead, or without some of them.
    """
    labels = {
        "runner_up": "the runner-up",
        "average": "the plain average",
        "base": "the base",
    }
    parts = [f"on test it reaches {interval(best['mean'])} %"]
    for key, label in labels.items():
        if key in verdict:
            named = f"{label} {verdict[key]['chain']}" if key == "runner_up" else label
            parts.append(_lead(verdict[key], named))
    ahead = "base" not in verdict or verdict["base"]["lead"]["value"] > 0
    advice = (
        f"Take {best['chain']}: it" if ahead else f"Keep the base: of the merges {best['chain']}"
    )
    return (
        f"{advice} has the best mean accuracy on the validation examples "
        f"({100 * best['validation']:.1f} %); {', and '.join(parts)}."
    )


def _lead(other: Mapping[str, Any], label: str) -> str:
    lead = other["lead"]
    if lead["value"] == lead["low"] == lead["high"] == 0.0:
        return f"is right about exactly the examples that {label} is right about"
    sign, side = (1, "ahead of") if lead["value"] >= 0 else (-1, "behind")
    low, high = sorted((sign * lead["low"], sign * lead["high"]))
    shown = interval({"value": sign * lead["value"], "low": low, "high": high})
    noise = "more than" if other["exceeds_noise"] else "within"
    return f"is {shown} points {side} {label}, which is {noise} the noise"


def interval(estimate: Mapping[str, float]) -> str:
    """A share with its interval in percent.

    Example:
        >>> interval({"value": 0.912, "low": 0.9, "high": 0.924})
        '91.2 [90.0, 92.4]'
    """
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
