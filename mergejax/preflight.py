"""What a run is going to do, found out before anything is trained: methods, shapes, programs.

Shapes are known before values are. So impossible methods are refused at once, and the programs of
the search are compiled in the background while the models are trained.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from flax import traverse_util

from mergejax import api, calibration, compress, errors, language, search, train, workdir
from mergejax.data import corrupt
from mergejax.data.task import Task
from mergejax.eval import predict
from mergejax.models import bodies
from mergejax.progress import Reporter

Tree = Any
Record = dict[str, Any]
Plan = dict[str, list[str]]
Compiled = Mapping[str, futures.Future[list[search.Program]]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What every step of a run needs, and is known before training.

    Attributes:
        config: the whole config.
        folder: the workdir.
        results: folder of the records.
        tasks: by name; the experts have the same names and order.
        held_out: by name, the tasks that have a head and no expert.
        model: the module of every body.
        base: shapes and dtypes of a body's parameters.
        head: of all tasks' heads side by side, those of held-out tasks last.
        stats: of each statistic of one expert, by its name.
        validation: the validation examples of all tasks; values are chosen on them.
        test: the test examples of all tasks; nothing is chosen on them.
        exams: by name, more examples that every model is measured on: of held-out tasks, corrupted.
        reporter: told what is going on.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    results: pathlib.Path
    tasks: dict[str, Task]
    held_out: dict[str, Task]
    model: nn.Module
    base: Tree
    head: Tree
    stats: dict[str, Tree]
    validation: predict.Bundle
    test: predict.Bundle
    exams: dict[str, predict.Bundle]
    reporter: Reporter

    @property
    def names(self) -> list[str]:
        """The tasks in the order of the heads, held-out ones last."""
        return [*self.tasks, *self.held_out]

    @property
    def examined(self) -> dict[str, int]:
        """Number of examples of each exam."""
        return {name: len(one.labels) for name, one in self.exams.items()}


def plan(
    config: ml_collections.ConfigDict, procedures: Collection[str] = ()
) -> tuple[Plan, list[str]]:
    """The methods of a config with the chains to try for each, and what is left out and why.

    Args:
        config: `methods` (none stands for `search.USUAL`, 'all' for every registered one that
            applies), `search` and `data.tasks`.
        procedures: names that stand for more than a chain, and are no part of the plan.

    Returns:
        By method its chains; a sentence for every method that does not apply.

    Raises:
        MergeError: unknown methods and parameters, values out of range.
    """
    experts = len(config.data.tasks)
    everything = tuple(config.methods) == ("all",)
    names, left_out = search.applicable(experts, everything)
    named = config.methods and not everything
    chosen, notes = (list(config.methods), []) if named else (names, left_out)
    chosen = [name for name in chosen if name not in procedures]
    found: Plan = {}
    problems = []
    for name in chosen:
        try:
            found[name] = search.settings(name, config.search, experts)
        except errors.MergeError as error:
            problems.append(str(error))
    errors.raise_all(problems)
    return found, notes


def job(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    tasks: dict[str, Task],
    reporter: Reporter,
    held_out: Mapping[str, Task] | None = None,
) -> Job:
    """Puts together what is known before training.

    Raises:
        MergeError: a model that cannot be built.
    """
    example = next(iter(tasks.values())).train.inputs[:1]
    every = {**tasks, **(held_out or {})}
    classes = {name: len(task.labels) for name, task in every.items()}
    try:
        model = bodies.build(config.model)
        base, heads = jax.eval_shape(lambda: train.initial(model, example, classes, config.seed))
    except errors.MergeError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise errors.MergeError(f"config.model cannot be built: {reason}") from error

    flat = traverse_util.flatten_dict(base)
    norms = {path: leaf for path, leaf in flat.items() if path[-1] == "scale"}
    kernels = {path: leaf for path, leaf in flat.items() if path[-1] == "kernel"}
    small = {path: leaf for path, leaf in flat.items() if leaf.size <= calibration.SMALL}

    return Job(
        config=config,
        folder=folder,
        results=folder / workdir.RESULTS,
        tasks=tasks,
        model=model,
        base=base,
        head=jax.eval_shape(lambda heads: predict.join_heads(heads, list(every)), heads),
        held_out=dict(held_out or {}),
        stats={
            "fisher": base,
            "gram": _squares(kernels, lambda leaf: math.prod(leaf.shape[:-1])),
            "affine_gram": _squares(kernels, lambda leaf: math.prod(leaf.shape[:-1]) + 1),
            "output_gram": _squares(kernels, lambda leaf: leaf.shape[-1]),
            "block_fisher": _squares(small, lambda leaf: leaf.size),
            "norm_square": traverse_util.unflatten_dict(norms),
        },
        validation=predict.bundle([t.validation for t in tasks.values()], list(classes.values())),
        test=predict.bundle([t.test for t in tasks.values()], list(classes.values())),
        exams=_exams(config, tasks, held_out or {}, list(classes.values())),
        reporter=reporter,
    )


def _squares(leaves: Mapping[Any, Any], size: Callable[[Any], int]) -> Tree:
    """Shapes of one square matrix for each leaf."""
    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(2 * (size(leaf),), leaf.dtype) for path, leaf in leaves.items()}
    )


def _exams(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    held_out: Mapping[str, Task],
    classes: Sequence[int],
) -> dict[str, predict.Bundle]:
    """The examples of held-out tasks, and of the tasks themselves, corrupted as the config says."""
    found = {}
    if held_out:
        splits = [task.test for task in held_out.values()]
        found["held_out"] = predict.bundle(splits, classes, skipped=len(tasks))
    asked = config.get("robustness", {"corruptions": (), "examples": None})
    known = corrupt.kinds(next(iter(tasks.values())).test)
    errors.raise_all(
        [
            f"config.robustness.corruptions: there is no corruption '{kind}' of these data, "
            f"{errors.did_you_mean(kind, known)}"
            for kind in asked["corruptions"]
            if kind not in known
        ]
    )
    for kind in asked["corruptions"]:
        splits = [
            corrupt.corrupted(task.test, kind, config.seed, asked["examples"])
            for task in tasks.values()
        ]
        found[kind] = predict.bundle(splits, classes)
    return found


def fewer(run: Job, count: int) -> Job:
    """The same job with fewer experts, its records apart.

    Args:
        run: with at least so many tasks.
        count: how many. They follow one another in the order of the tasks, from a place that the
            seed gives, so that several seeds see several choices.
    """
    every = list(run.tasks)
    kept = [every[(run.config.seed + i) % len(every)] for i in range(count)]
    tasks = {name: run.tasks[name] for name in every if name in kept}
    classes = [len(task.labels) for task in tasks.values()]
    rows = sum(classes)
    return dataclasses.replace(
        run,
        results=run.folder / f"{workdir.RESULTS}_of_{count}",
        tasks=tasks,
        held_out={},
        head=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*leaf.shape[:-1], rows), leaf.dtype), run.head
        ),
        validation=predict.bundle([t.validation for t in tasks.values()], classes),
        test=predict.bundle([t.test for t in tasks.values()], classes),
        exams={},
    )


def needs(chains: Sequence[str]) -> list[str]:
    """The statistics that chains read, each once."""
    found = (need for chain in chains for need in language.parse(chain).needs)
    return list(dict.fromkeys(found))


def check(run: Job, planned: Plan) -> None:
    """Tries on shapes alone the methods whose chains a user composed.

    Raises:
        MergeError: a chain that cannot merge these experts.
    """
    problems = []
    fine = set(search.applicable(len(run.tasks))[0]) & set(search.RECIPES)
    for name in (name for name in planned if name not in fine):
        chain = planned[name][0]
        try:
            calibration.check_known(needs([chain]))
            stats = {need: len(run.tasks) * [run.stats[need]] for need in needs([chain])}
            merged = jax.eval_shape(
                lambda base, experts, stats, chain=chain: api.merge(
                    chain, base, experts, names=list(run.tasks), stats=stats
                ),
                *(run.base, len(run.tasks) * [run.base], stats),
            )
        except errors.MergeError as error:
            problems.append(str(error))
            continue
        if isinstance(merged, list):
            problems.append(
                f"'{chain}' leaves one model per expert; end it with a reduction such as mean(), "
                "total() or a named method"
            )
    errors.raise_all(problems)


def check_compressions(run: Job) -> None:
    """Refuses what `config.compressions` names and cannot compress deltas.

    Raises:
        MergeError: names each of them.
    """
    problems = []
    delta = {"kernel": np.ones([2, 2], np.float32)}
    for text in run.config.get("compressions", ()):
        try:
            compress.encode(text, len(run.tasks) * [delta])
        except errors.MergeError as error:
            problems.append(f"config.compressions: {error}")
    errors.raise_all(problems)


def pending(run: Job, planned: Plan) -> tuple[Plan, list[str]]:
    """What of a plan the workdir does not hold yet, and sentences about what it holds."""
    known = workdir.read_records(run.results)
    missing: Plan = {}
    reused, notes = [], []
    for name, chains in planned.items():
        former = _former(run, known, name, chains)
        if former is not None:
            reused.append(name if former == name else f"{name} (there as {former})")
            continue
        missing[name] = chains
        if name in known:
            notes.append(f"{name}: there from other settings, made again")
    if reused:
        notes.append(f"merges: reused {len(reused)}: {', '.join(reused)}")
    return missing, notes


def _former(run: Job, known: Mapping[str, Record], name: str, chains: list[str]) -> str | None:
    """The name of the record that holds a method already, or None."""
    calibrated = calibration.noted(run.config.calibration, needs(chains[:1]))
    known = {n: r for n, r in known.items() if r.get("examined") == run.examined}
    if name in known:
        same = (known[name]["settings"], known[name]["calibration"]) == (chains, calibrated)
        return name if same else None
    if len(chains) > 1:
        return None
    wanted = repr(language.parse(chains[0]))
    for other, record in known.items():
        there = record["kind"] == "merge" and record["calibration"] == calibrated
        if there and repr(language.parse(record["chain"])) == wanted:
            return other
    return None


@contextlib.contextmanager
def compiling(run: Job, missing: Plan) -> Iterator[Compiled]:
    """Compiles the programs of the search in the background while the block runs.

    Args:
        run: what is known before training.
        missing: by method its chains.

    Yields:
        By method the programs to come; methods with one chain have none.
    """
    bodies = len(run.tasks) * [run.base]

    def measure(body: Tree, data: Any) -> jax.Array:
        return predict.is_right(run.model, body, *data)

    def programs(chains: list[str]) -> list[search.Program]:
        stats = {need: len(run.tasks) * [run.stats[need]] for need in needs(chains[:1])}
        return search.prepare(
            chains,
            run.base,
            bodies,
            measure,
            (run.head, run.validation),
            names=list(run.tasks),
            seed=run.config.seed,
            stats=stats,
        )

    pool = futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
    try:
        several = {name: chains for name, chains in missing.items() if len(chains) > 1}
        yield {name: pool.submit(programs, chains) for name, chains in several.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
