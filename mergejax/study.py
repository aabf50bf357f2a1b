"""Methods compared over several seeds and numbers of calibration examples.

    python -m mergejax.main --config=configs/proj/statistics/digits.py --workdir=runs/statistics

Models are trained once for each seed. What a method needs is collected for each number of examples;
its values are chosen on validation images each time. A second run measures what is missing.
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from mergejax import api, calibration, data, preflight, procedures, search, train, workdir
from mergejax.checkpoints import fingerprint
from mergejax.eval import predict, seeds
from mergejax.procedures import PROCEDURES, preferences

Tree = Any
Record = dict[str, Any]
RECORDS, TABLE, FRONT = "records.json", "results.md", "react_front.png"


def run(
    config: ml_collections.ConfigDict, folder: pathlib.Path, book: workdir.Logbook
) -> list[Record]:
    """Measures what of a study the workdir does not hold yet, and writes its table.

    Args:
        config: see `configs/proj/statistics/digits.py`; `study` says which seeds, numbers of
            examples, methods (by name the chains to choose from) and procedures.
        folder: the workdir; may be empty or absent.
        book: told what is going on.

    Returns:
        One record for each seed, method and number of examples.

    Raises:
        MergeError: bad input.
    """
    records: list[Record] = []
    for seed in config.study.seeds:
        one = config.copy_and_resolve_references()
        with one.unlocked():
            one.seed = seed
        records += _seed(one, folder / f"seed_{seed}", book)
        workdir.write_text(folder / TABLE, markdown(records, config.study.examples))
    return records


def _seed(
    config: ml_collections.ConfigDict, folder: pathlib.Path, book: workdir.Logbook
) -> list[Record]:
    tasks = data.load(config, folder, book)
    job = preflight.job(config, folder, tasks, book)
    procedures.check(job, config.study.procedures)
    trained = train.train_all(config, tasks, folder, book)
    known = fingerprint.read_json(folder / RECORDS) or {}
    planned = [("base", ""), ("experts", "")]
    planned += [(name, "") for name, chains in config.study.methods.items() if not _needs(chains)]
    for examples in config.study.examples:
        methods = [name for name, chains in config.study.methods.items() if _needs(chains)]
        planned += [(name, examples) for name in (*methods, *config.study.procedures)]
    for name, examples in planned:
        key = f"{name}@{examples}"
        settings = list(config.study.methods.get(name, ()))
        if key in known and known[key]["settings"] == settings:
            continue
        found = _measured(job, trained, name, examples)
        facts = {"seed": config.seed, "method": name, "examples": examples}
        known[key] = {**facts, "settings": settings, **found}
        fingerprint.write_json(folder / RECORDS, known)
        mean = 100 * float(np.mean(list(found["test"].values())))
        book.log(f"seed {config.seed}, {name} {examples}: {mean:.1f} % ({found['chain']})")
    if "react" in config.study.procedures and not (folder / FRONT).exists():
        _draw_front(job, trained, folder)
    return [known[f"{name}@{examples}"] for name, examples in planned]


def _draw_front(job: preflight.Job, trained: train.Trained, folder: pathlib.Path) -> None:
    """The Pareto front of ReACT between two tasks, with the largest number of examples."""
    from mergejax.eval import front_plot  # Matplotlib takes a second to import

    settings = job.config.calibration.copy_and_resolve_references()
    settings.examples = max(job.config.study.examples)
    content = io.BytesIO()
    front_plot.draw(**preferences(job, trained, settings)).savefig(content, format="png")
    workdir.write_bytes(folder / FRONT, content.getvalue())


def _needs(chains: Sequence[str]) -> list[str]:
    return preflight.needs(list(chains))


def _measured(job: preflight.Job, trained: train.Trained, name: str, examples: Any) -> Record:
    """Test accuracy by task, and with which setting."""
    head = predict.join_heads(trained.heads, list(job.tasks))

    def tested(body: Tree) -> dict[str, float]:
        return _by_task(job, predict.right(job.model, body, head, job.test))

    if name == "base":
        return {"chain": "", "test": tested(trained.base)}
    if name == "experts":
        own = {task: tested(trained.experts[task])[task] for task in job.tasks}
        return {"chain": "", "test": own}
    settings = job.config.calibration.copy_and_resolve_references()
    if examples:
        settings.examples = examples
    if name in PROCEDURES:
        right, chain = PROCEDURES[name](job, trained, settings)
        return {"chain": chain, "test": _by_task(job, right(job.test))}
    chains = list(job.config.study.methods[name])
    needed = _needs(chains)
    stats = calibration.statistics(needed, settings, job.tasks, trained, job.folder, job.reporter)
    chosen = _chosen(job, trained, chains, stats, head)
    body = api.merge(
        chosen, trained.base, list(trained.experts.values()), stats=stats, **_named(job)
    )
    return {"chain": chosen, "test": tested(body)}


def _named(job: preflight.Job) -> dict[str, Any]:
    return {"names": list(job.tasks), "seed": job.config.seed}


def _chosen(
    job: preflight.Job,
    trained: train.Trained,
    chains: list[str],
    stats: Mapping[str, Sequence[Tree]],
    head: Tree,
) -> str:
    """The chain with the best mean validation accuracy; all settings in one program."""
    if len(chains) == 1:
        return chains[0]
    experts, images = list(trained.experts.values()), (head, job.validation)

    def measure(body: Tree, data: Any) -> jax.Array:
        return predict.is_right(job.model, body, *data)

    base = trained.base
    programs = search.prepare(chains, base, experts, measure, images, stats=stats, **_named(job))
    found = search.search(programs, base, experts, images, stats=stats)
    means = [list(_by_task(job, right, job.validation).values()) for right in found.measured]
    return chains[search.best(np.array(means))]


def _by_task(job: preflight.Job, right: Any, images: predict.Bundle | None = None) -> Record:
    images = job.test if images is None else images
    parts = predict.by_task(np.asarray(right), images, list(job.tasks))
    return {name: float(values.mean()) for name, values in parts.items()}


def markdown(records: Sequence[Record], sizes: Sequence[int]) -> str:
    """The table of a study: mean test accuracy over tasks, mean ± spread over seeds, in per cent.

    Args:
        records: what `run` returned.
        sizes: numbers of calibration examples.

    Returns:
        A table in Markdown; the spread is the standard deviation over the seeds.

    Example:
        >>> test = {"a": 0.5, "b": 0.75}
        >>> told = [{"seed": s, "method": "lot", "examples": 16, "test": test} for s in (0, 1)]
        >>> print(markdown(told, [16]))
        | method | 16 |
        |---|---|
        | lot | 62.5 ± 0.0 |
    """
    methods = list(dict.fromkeys(record["method"] for record in records))
    lines = [f"| method | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
    for method in methods:
        cells = []
        for size in sizes:
            means = [
                100 * float(np.mean(list(record["test"].values())))
                for record in records
                if record["method"] == method and record["examples"] in ("", size)
            ]
            found = seeds.spread(means)
            cells.append(f"{found['mean']:.1f} ± {found['deviation']:.1f}" if found else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
