"""What is measured of every model: methods searched on validation, merged, and tested.

Each model leaves one record in the workdir as soon as it is measured, and is not measured again
while the settings that it came from are the same.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from mergejax import api, calibration, compress, memory, search, train, workdir
from mergejax.eval import predict, report, sweeps
from mergejax.leaves import name_of
from mergejax.preflight import Compiled, Job, Plan, Record, Tree, needs

Right = Callable[[predict.Bundle], jax.Array | np.ndarray]
Stats = Mapping[str, Sequence[Tree]]


def marks(job: Job, trained: train.Trained) -> None:
    """Measures what merges are compared with: base, experts, ensemble, multi-task training."""
    head = predict.join_heads(trained.heads, job.names)
    wide = predict.join_heads({**trained.heads, **trained.multi_task_heads}, job.names)

    def one(body: Tree, head: Tree) -> Right:
        return lambda images: predict.right(job.model, body, head, images)

    def together(images: predict.Bundle) -> jax.Array:
        return predict.ensemble_right(job.model, list(trained.experts.values()), head, images)

    measured: dict[str, tuple[Record, Right]] = {
        "base": ({"kind": "base", **_stored(trained.base)}, one(trained.base, head)),
        **{
            f"expert_{name}": ({"kind": "expert", "task": name, **_stored(body)}, one(body, head))
            for name, body in trained.experts.items()
        },
        "ensemble": ({"kind": "ensemble", **_stored(trained.experts)}, together),
        "multi_task": (
            {"kind": "multi_task", **_stored(trained.multi_task)},
            one(trained.multi_task, wide),
        ),
    }
    known = workdir.read_records(job.results)
    missing = {
        name: made
        for name, made in measured.items()
        if name not in known or known[name].get("examined") != job.examined
    }
    if not missing:
        job.reporter.log(f"base, experts and upper marks: reused {len(measured)} evaluations")
        return
    with job.reporter.progress("evaluate base, experts and upper marks", len(missing)) as advance:
        for name, (facts, right) in missing.items():
            workdir.write_record(job.results, {"name": name, **facts, **accuracy(job, right)})
            advance(1)


def merges(job: Job, trained: train.Trained, missing: Plan, compiled: Compiled) -> None:
    """Searches, merges and measures methods; each is kept as soon as it is measured.

    Args:
        job: what is known before training.
        trained: base, experts and heads.
        missing: by method its chains.
        compiled: the programs of those with several chains.
    """
    if not missing:
        return
    wanted = needs([chains[0] for chains in missing.values()])
    stats = statistics(job, trained, wanted)
    total = sum(len(chains) + 1 for chains in missing.values())
    with job.reporter.progress("search and merge", total) as advance:
        for name, chains in missing.items():
            programs = compiled[name].result() if name in compiled else []
            record = _merge(job, trained, name, chains, programs, stats, advance)
            workdir.write_record(job.results, record)
            job.reporter.log(_told(record))


def compressions(job: Job, trained: train.Trained) -> None:
    """Measures what keeps a model for each task, in fewer bytes, as `config.compressions` says."""
    known = workdir.read_records(job.results)
    asked = [
        text
        for text in job.config.get("compressions", ())
        if known.get(text, {}).get("examined") != job.examined
    ]
    if not asked:
        return
    head = predict.join_heads(trained.heads, job.names)
    deltas = compress.deltas(trained.base, list(trained.experts.values()))
    # There is no model for tasks that nobody learned.
    own = dataclasses.replace(job, exams={k: v for k, v in job.exams.items() if k != "held_out"})
    with job.reporter.progress("compress the experts", len(asked)) as advance:
        for text in asked:
            packed = compress.encode(text, deltas)
            bodies = compress.restore(trained.base, packed)
            whole = _stored(trained.base)["stored_bytes"]

            def right(images: predict.Bundle, bodies: Sequence[Tree] = bodies) -> np.ndarray:
                return predict.own_right(job.model, bodies, head, images)

            record = {
                "name": text,
                "kind": "compressed",
                "chain": text,
                "given": False,
                "stored_bytes": whole + compress.size(packed).payload,
                **accuracy(own, right),
                "examined": job.examined,
            }
            workdir.write_record(job.results, record)
            advance(1)


def statistics(
    job: Job, trained: train.Trained, wanted: Sequence[str], noted: Record | None = None
) -> dict[str, list[Tree]]:
    """Statistics of all experts by name, collected or reused; if noted, as they were then."""
    settings = job.config.calibration.copy_and_resolve_references()
    settings.update(noted or {})
    return calibration.statistics(wanted, settings, job.tasks, trained, job.folder, job.reporter)


def merged(job: Job, trained: train.Trained, chain: str, stats: Stats) -> Tree:
    """Merges the experts of a job by a chain in the string language."""
    return api.merge(
        chain,
        trained.base,
        [trained.experts[name] for name in job.tasks],
        names=list(job.tasks),
        seed=job.config.seed,
        stats={need: stats[need] for need in needs([chain])},
    )


def _merge(
    job: Job,
    trained: train.Trained,
    name: str,
    chains: list[str],
    programs: Sequence[search.Program],
    stats: Stats,
    advance: Callable[[int], object],
) -> Record:
    """Chooses a setting on validation, merges by it with the usual executor, and tests that."""
    head = predict.join_heads(trained.heads, job.names)
    chosen, searched = 0, None
    if programs:
        found = search.search(
            programs,
            trained.base,
            [trained.experts[name] for name in job.tasks],
            (head, job.validation),
            stats={need: stats[need] for need in needs(chains[:1])},
            advance=advance,
        )
        means = [list(_means(job, right, job.validation).values()) for right in found.measured]
        chosen = search.best(np.array(means))
        searched = {
            "validation": means,
            "programs": found.programs,
            "compile_seconds": round(found.compile_seconds, 2),
            "seconds": round(found.seconds, 2),
        }
    else:
        advance(1)
    merged(job, trained, chains[chosen], stats)  # compiles
    memory.give_back()
    before = memory.anonymous()
    with memory.watched() as peak:
        started = time.perf_counter()
        body = jax.block_until_ready(merged(job, trained, chains[chosen], stats))
        seconds = time.perf_counter() - started
    advance(1)
    return {
        "name": name,
        "kind": "merge",
        "chain": chains[chosen],
        "given": "(" in name,
        "settings": chains,
        "search": searched,
        "calibration": calibration.noted(job.config.calibration, needs(chains[:1])),
        "without_statistics": _without(trained.base, stats, needs(chains[:1])),
        "seconds": round(seconds, 4),
        "peak_bytes": peak[0] - before if peak and before is not None else None,
        **_stored(body),
        **accuracy(job, lambda images: predict.right(job.model, body, head, images)),
    }


def _without(base: Tree, stats: Stats, wanted: Sequence[str]) -> list[str]:
    """The leaves that have none of the statistics that a method reads, if it reads any."""
    known = [jax.tree_util.tree_leaves_with_path(stats[need][0]) for need in wanted]
    there = {name_of(path) for found in known for path, _ in found}
    leaves = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(base)]
    return [name for name in leaves if wanted and name not in there]


def _stored(models: Tree) -> Record:
    """Bytes of the bodies that a model consists of."""
    return {
        "stored_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(models))
    }


def accuracy(job: Job, right: Right) -> Record:
    """Validation accuracy by task, what is right and wrong on test, and accuracy in exams."""
    on_test = predict.by_task(np.asarray(right(job.test)), job.test, list(job.tasks))
    return {
        "validation": _means(job, np.asarray(right(job.validation)), job.validation),
        "test": {name: report.encode(values) for name, values in on_test.items()},
        "examined": job.examined,
        "exams": {
            name: _means(job, np.asarray(right(images)), images)
            for name, images in job.exams.items()
        },
    }


def _means(job: Job, right: np.ndarray, images: predict.Bundle) -> dict[str, float]:
    parts = predict.by_task(right, images, job.names)
    return {name: float(values.mean()) for name, values in parts.items() if len(values)}


def _told(record: Record) -> str:
    mean = 100 * float(np.mean(list(record["validation"].values())))
    found = record["search"]
    if not found:
        return f"{record['name']}: {mean:.1f} % on validation"
    return (
        f"{record['name']}: {len(record['settings'])} settings {sweeps.cost(found)}, "
        f"chosen on validation: {record['chain']}, {mean:.1f} %"
    )
