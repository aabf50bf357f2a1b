"""Statistics of every expert on examples of its task, collected once and kept in the workdir."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from mergejax import collect, errors, fit, train
from mergejax.data.task import Task
from mergejax.models import bodies
from mergejax.progress import Reporter

Tree = Any
FOLDER = "statistics"
MICROBATCH = 32  # examples whose gradients are held at once
ESTIMATORS = ("exact", "sampled")
LABELLED = ("fisher", "output_gram", "block_fisher")  # of gradients, by an estimator
SMALL = 256  # elements of the largest leaf with a whole Fisher matrix
Advance = Callable[[int, int, str], None]


class Source(NamedTuple):
    """What a statistic of one expert is collected from.

    Attributes:
        trained: all models.
        name: the expert's, and its task's.
        batches: inputs [batch, ...] each.
        estimator: of the Fisher information.
    """

    trained: train.Trained
    name: str
    batches: list[np.ndarray]
    estimator: Literal["exact", "sampled"]


def check(settings: ml_collections.ConfigDict) -> None:
    """Refuses calibration settings that are no positive numbers, and unknown estimators.

    Raises:
        MergeError: names each of them.
    """
    problems = [
        f"config.calibration.{name} must be at least 1, not {settings[name]}"
        for name in ("examples", "batch")
        if settings[name] < 1
    ]
    if settings.estimator not in ESTIMATORS:
        hint = errors.did_you_mean(settings.estimator, ESTIMATORS)
        problems.append(f"config.calibration.estimator: '{settings.estimator}' is unknown, {hint}")
    errors.raise_all(problems)


def noted(settings: ml_collections.ConfigDict, needs: Sequence[str]) -> dict[str, Any] | None:
    """What a record keeps about the statistics that a merge needed; None if it needed none."""
    estimator = {"estimator": settings.estimator} if set(needs) & set(LABELLED) else {}
    return {"examples": settings.examples, **estimator} if needs else None


def check_known(needs: Sequence[str]) -> None:
    """Refuses statistics that have no collector here.

    Raises:
        MergeError: names each of them.
    """
    errors.raise_all(
        [
            f"no collector makes the statistic '{need}'; choose methods that need "
            f"{' or '.join(COLLECTORS)} or nothing"
            for need in needs
            if need not in COLLECTORS
        ]
    )


def statistics(
    needs: Sequence[str],
    settings: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    trained: train.Trained,
    workdir: pathlib.Path,
    reporter: Reporter,
) -> dict[str, list[Tree]]:
    """Collects what is missing in the workdir and restores the rest.

    Args:
        needs: names of `COLLECTORS`; all are of the body, under the head of its task.
        settings: `examples`, the number of training examples of each expert's own task, their
            number in a `batch`, and the `estimator` of the Fisher information, 'exact' or
            'sampled'.
        tasks: by name.
        trained: the experts and their heads.
        workdir: where statistics are kept, by name, number of examples and task.
        reporter: told what is collected, what is reused, and how far it is.

    Returns:
        By name a list with one tree per expert, in the order of the tasks.

    Raises:
        MergeError: a statistic that has no collector, a task without examples, files of other
            experts.
    """
    check_known(needs)
    empty = [name for name, task in tasks.items() if needs and not len(task.train)]
    if empty:
        raise errors.MergeError(
            f"{errors.some(empty)} has no training example to collect {', '.join(needs)} from; "
            "leave the task out, or choose methods that need no data"
        )
    found: dict[str, list[Tree]] = {}
    for need in needs:
        words = [need, *(noted(settings, [need]) or {}).values()]
        folder = workdir / FOLDER / "_".join(map(str, words))
        paths = {name: folder / f"{name}.safetensors" for name in tasks}
        missing = [name for name, path in paths.items() if not path.exists()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            given = {name: batches(tasks[name], settings) for name in missing}
            total = sum(len(several) for several in given.values())
            with reporter.progress(f"collect {need}", total) as advance:
                for name in missing:
                    source = Source(trained, name, given[name], settings.estimator)
                    one = COLLECTORS[need](source, lambda done, total, what: advance(1))
                    data = f"{name}/train[:{min(settings.examples, len(tasks[name].train))}]"
                    collect.save(paths[name], one, trained.experts[name], data)
        else:
            reporter.log(f"{need}: reused, collected before on {settings.examples} examples a task")
        found[need] = [
            traverse_util.unflatten_dict(
                dict(collect.load(path, trained.experts[name])[need]), sep="/"
            )
            for name, path in paths.items()
        ]
    return found


def batches(task: Task, settings: ml_collections.ConfigDict) -> list[Any]:
    """The inputs that statistics of a task are collected from, in batches."""
    inputs = task.train.inputs[: settings.examples]
    return [inputs[i : i + settings.batch] for i in range(0, len(inputs), settings.batch)]


def _under_head(collector: Any, source: Source, **options: Any) -> collect.Statistics:
    # The head is passed with the body, not closed over, and padded to the largest one: so all tasks
    # share a compilation. A class that is never predicted adds nothing to the information.
    heads = source.trained.heads
    classes = max(len(head["bias"]) for head in heads.values())
    padded = jax.tree.map(lambda leaf: leaf[0], fit.stack_heads([heads[source.name]], classes))
    return collector(
        _logits_of(source.trained.model),
        {"body": source.trained.experts[source.name], "head": padded},
        source.batches,
        estimator=source.estimator,
        key=jax.random.key(0),
        **options,
    )


@functools.lru_cache(maxsize=1)
def _logits_of(model: Any) -> Callable[[Tree, Any], Any]:
    return lambda params, inputs: train.logits(model, params["body"], params["head"], inputs)


def _fisher(source: Source, advance: Advance) -> collect.Statistics:
    found = _under_head(collect.fisher, source, microbatch=MICROBATCH, progress=advance)
    return found.under("body")


def _output_gram(source: Source, advance: Advance) -> collect.Statistics:
    found = _under_head(collect.output_gram, source, exclude="^head/", progress=advance)
    return found.under("body")


def _block_fisher(source: Source, advance: Advance) -> collect.Statistics:
    options: dict[str, Any] = {"largest": SMALL, "exclude": "^head/"}
    return _under_head(collect.block_fisher, source, **options, progress=advance).under("body")


def _gram(source: Source, advance: Advance) -> collect.Statistics:
    return _of_inputs(collect.gram, source, advance)


def _affine_gram(source: Source, advance: Advance) -> collect.Statistics:
    return _of_inputs(collect.affine_gram, source, advance)


def _norm_square(source: Source, advance: Advance) -> collect.Statistics:
    return _of_inputs(collect.norm_square, source, advance)


def _of_inputs(collector: Any, source: Source, advance: Advance) -> collect.Statistics:
    model, expert = source.trained.model, source.trained.experts[source.name]
    return collector(model, expert, source.batches, mask=bodies.mask(model), progress=advance)


COLLECTORS = {
    "fisher": _fisher,
    "gram": _gram,
    "affine_gram": _affine_gram,
    "norm_square": _norm_square,
    "output_gram": _output_gram,
    "block_fisher": _block_fisher,
}
