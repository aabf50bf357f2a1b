"""What is measured of every model: methods searched on validation, merged, and tested.

Each model leaves one record in the workdir as soon as it is measured, and is not measured again
while the settings that it came from are the same.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from mergejax import api, calibration, errors, registry, search, train, workdir
from mergejax.data.task import Task
from mergejax.eval import predict, report
from mergejax.models import vit
from mergejax.progress import Reporter

Tree = Any
Record = dict[str, Any]
Plan = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What every step of a run needs.

    Attributes:
        config: the whole config.
        folder: the workdir.
        tasks: by name; the experts have the same names and order.
        trained: base, experts and heads.
        head: all tasks' heads side by side, for the base, the experts and every merge.
        validation: the validation images of all tasks; values are chosen on them.
        test: the test images of all tasks; nothing is chosen on them.
        reporter: told what is going on.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    tasks: dict[str, Task]
    trained: train.Trained
    head: Tree
    validation: predict.Bundle
    test: predict.Bundle
    reporter: Reporter

    @property
    def experts(self) -> list[Tree]:
        """The experts' parameters."""
        return [self.trained.experts[name] for name in self.tasks]


def plan(config: ml_collections.ConfigDict) -> tuple[Plan, list[str]]:
    """The methods of a config with the chains to try for each, and what is left out and why.

    Args:
        config: `methods` (none stands for every one that applies), `search` and `data.tasks`.

    Returns:
        By method its chains; a sentence for every method that does not apply.

    Raises:
        MergeError: unknown methods and parameters, values out of range.
    """
    experts = len(config.data.tasks)
    names, left_out = search.applicable(experts)
    chosen, notes = (list(config.methods), []) if config.methods else (names, left_out)
    found: Plan = {}
    problems = []
    for name in chosen:
        try:
            found[name] = search.settings(name, config.search, experts)
        except errors.MergeError as error:
            problems.append(str(error))
    errors.raise_all(problems)
    return found, notes


def check(config: ml_collections.ConfigDict, tasks: Mapping[str, Task], planned: Plan) -> None:
    """Tries every method on shapes alone, so that nothing impossible is found after training.

    Args:
        config: `model` and `seed`.
        tasks: by name.
        planned: what `plan` returned.

    Raises:
        MergeError: a model that cannot be built, a chain that cannot merge these experts.
    """
    image = next(iter(tasks.values())).train.images.shape[1:]
    classes = {task.head: len(task.labels) for task in tasks.values()}
    try:
        model = vit.VisionTransformer(**config.model)
        base = jax.eval_shape(lambda: train.initial(model, image, classes, config.seed)[0])
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise errors.MergeError(f"config.model cannot be built: {reason}") from error
    grams = jax.tree.map(lambda x: jax.ShapeDtypeStruct(2 * x.shape[:1], x.dtype), base)
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, gram: gram if path[-1].key == "kernel" else None, grams
    )
    shapes = {"fisher": base, "gram": kernels}
    problems = []
    for chains in planned.values():
        method = registry.parse(chains[0])
        stats = {need: [shapes[need]] * len(tasks) for need in method.needs if need in shapes}
        try:
            calibration.check_known(method.needs)
            merged = jax.eval_shape(
                lambda base, experts, stats, method=method: api.merge(
                    method, base, experts, names=list(tasks), stats=stats
                ),
                base,
                [base] * len(tasks),
                stats,
            )
        except errors.MergeError as error:
            problems.append(str(error))
            continue
        if isinstance(merged, list):
            problems.append(
                f"'{chains[0]}' leaves one model per expert; end it with a reduction such as "
                "mean(), total() or a named method"
            )
    errors.raise_all(problems)


def marks(job: Job) -> None:
    """Measures what merges are compared with: base, experts, ensemble, multi-task training."""
    trained, reporter = job.trained, job.reporter
    wide = predict.join_heads(trained.multi_task_heads, list(job.tasks))

    def one(body: Tree, head: Tree) -> Callable[[predict.Bundle], jax.Array]:
        return lambda images: predict.right(trained.model, body, head, images)

    def together(images: predict.Bundle) -> jax.Array:
        return predict.ensemble_right(trained.model, job.experts, job.head, images)

    measured: dict[str, tuple[Record, Callable[[predict.Bundle], jax.Array]]] = {
        "base": ({"kind": "base"}, one(trained.base, job.head)),
        **{
            f"expert_{name}": ({"kind": "expert", "task": name}, one(body, job.head))
            for name, body in trained.experts.items()
        },
        "ensemble": ({"kind": "ensemble"}, together),
        "multi_task": ({"kind": "multi_task"}, one(trained.multi_task, wide)),
    }
    known = workdir.read_records(job.folder)
    missing = {name: made for name, made in measured.items() if name not in known}
    if not missing:
        reporter.log(
            f"accuracies of base, experts and upper marks: reused ({len(measured)} models)"
        )
        return
    with reporter.progress("evaluate base, experts and upper marks", len(missing)) as advance:
        for name, (facts, right) in missing.items():
            workdir.write_record(job.folder, {"name": name, **facts, **_accuracy(job, right)})
            advance(1)


def merges(job: Job, planned: Plan) -> None:
    """Searches, merges and measures every planned method that the workdir does not hold yet."""
    known = workdir.read_records(job.folder)
    pending: Plan = {}
    reused: list[str] = []
    for name, chains in planned.items():
        former = _former(job, known, name, chains)
        if former is not None:
            reused.append(name if former == name else f"{name} (as {former})")
        else:
            pending[name] = chains
            if name in known:
                job.reporter.log(f"{name}: there with other settings, made again")
    if reused:
        job.reporter.log(f"merges: reused {len(reused)}: {', '.join(reused)}")
    if not pending:
        return
    wanted = needs([chains[0] for chains in pending.values()])
    stats = calibration.statistics(
        wanted, job.config.calibration, job.tasks, job.trained, job.folder, job.reporter
    )
    total = sum(len(chains) + 1 for chains in pending.values())
    with job.reporter.progress("search and merge", total) as advance:
        for name, chains in pending.items():
            record = _merge(job, name, chains, stats, advance)
            workdir.write_record(job.folder, record)
            job.reporter.log(_told(record))


def _former(job: Job, known: Mapping[str, Record], name: str, chains: list[str]) -> str | None:
    """The name of the record that holds this method already, or None."""
    if name in known:
        same = known[name]["settings"] == chains and known[name]["seed"] == job.config.seed
        return name if same and known[name]["calibration"] == _calibration(job, chains) else None
    if len(chains) > 1:
        return None
    wanted = repr(registry.parse(chains[0]))
    for other, record in known.items():
        if (
            record["kind"] == "merge"
            and repr(registry.parse(record["chain"])) == wanted
            and record["calibration"] == _calibration(job, chains)
        ):
            return other
    return None


def _calibration(job: Job, chains: Sequence[str]) -> dict[str, int] | None:
    return {"examples": job.config.calibration.examples} if needs(chains[:1]) else None


def needs(chains: Sequence[str]) -> list[str]:
    """The statistics that chains read, each once."""
    found = (need for chain in chains for need in registry.parse(chain).needs)
    return list(dict.fromkeys(found))


def merged(job: Job, chain: str, stats: Mapping[str, Sequence[Tree]]) -> Tree:
    """Merges the experts of a job by a chain in the string language."""
    return api.merge(
        chain,
        job.trained.base,
        job.experts,
        names=list(job.tasks),
        seed=job.config.seed,
        stats={need: stats[need] for need in needs([chain])},
    )


def _merge(
    job: Job,
    name: str,
    chains: list[str],
    stats: Mapping[str, Sequence[Tree]],
    advance: Callable[[int], object],
) -> Record:
    """Chooses a setting on validation, merges by it with the usual executor, and tests that."""
    chosen, searched = 0, None
    if len(chains) > 1:
        chosen, searched = _search(job, chains, stats, advance)
    else:
        advance(1)
    body = merged(job, chains[chosen], stats)
    started = time.perf_counter()
    body = jax.block_until_ready(merged(job, chains[chosen], stats))
    seconds = time.perf_counter() - started
    advance(1)
    return {
        "name": name,
        "kind": "merge",
        "chain": chains[chosen],
        "given": "(" in name,
        "settings": chains,
        "search": searched,
        "seed": job.config.seed,
        "calibration": _calibration(job, chains),
        "seconds": round(seconds, 4),
        **_accuracy(job, lambda images: predict.right(job.trained.model, body, job.head, images)),
    }


def _search(
    job: Job,
    chains: list[str],
    stats: Mapping[str, Sequence[Tree]],
    advance: Callable[[int], object],
) -> tuple[int, Record]:
    """The position of the best chain on validation, and how each of them did."""
    model = job.trained.model
    found = search.search(
        chains,
        job.trained.base,
        job.experts,
        lambda body, data: predict.is_right(model, body, *data),
        (job.head, job.validation),
        names=list(job.tasks),
        seed=job.config.seed,
        stats={need: stats[need] for need in needs(chains[:1])},
        advance=advance,
    )
    means = [list(_means(job, right, job.validation).values()) for right in found.measured]
    record = {
        "validation": means,
        "programs": found.programs,
        "compile_seconds": round(found.compile_seconds, 2),
        "seconds": round(found.seconds, 2),
    }
    return search.best(np.array(means)), record


def _accuracy(job: Job, right: Callable[[predict.Bundle], jax.Array]) -> Record:
    """Validation accuracy by task, and what is right and wrong on test."""
    on_test = predict.by_task(np.asarray(right(job.test)), job.test, list(job.tasks))
    return {
        "validation": _means(job, np.asarray(right(job.validation)), job.validation),
        "test": {name: report.encode(values) for name, values in on_test.items()},
    }


def _means(job: Job, right: np.ndarray, images: predict.Bundle) -> dict[str, float]:
    parts = predict.by_task(right, images, list(job.tasks))
    return {name: float(values.mean()) for name, values in parts.items()}


def _told(record: Record) -> str:
    mean = 100 * float(np.mean(list(record["validation"].values())))
    found = record["search"]
    if not found:
        return f"{record['name']}: {mean:.1f} % on validation"
    programs = "one program" if found["programs"] == 1 else f"{found['programs']} programs"
    return (
        f"{record['name']}: {len(record['settings'])} settings in {programs} "
        f"({found['compile_seconds']:.1f} s to compile, {found['seconds']:.1f} s to run), "
        f"chosen on validation: {record['chain']}, {mean:.1f} %"
    )
