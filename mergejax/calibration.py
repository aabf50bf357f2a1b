"""Statistics of every expert on images of its own task, collected once and kept in the workdir."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from flax import traverse_util

from mergejax import collect, errors, train
from mergejax.checkpoints import orbax
from mergejax.data.task import Task
from mergejax.progress import Reporter

Tree = Any
FOLDER = "statistics"
MICROBATCH = 32  # examples whose gradients are held at once


def check(settings: ml_collections.ConfigDict) -> None:
    """Refuses calibration settings that are no positive numbers.

    Raises:
        MergeError: names each of them.
    """
    errors.raise_all(
        [
            f"config.calibration.{name} must be at least 1, not {settings[name]}"
            for name in ("examples", "batch")
            if settings[name] < 1
        ]
    )


def noted(settings: ml_collections.ConfigDict, needs: Sequence[str]) -> dict[str, int] | None:
    """What a record keeps about the statistics that a merge needed; None if it needed none."""
    return {"examples": settings.examples} if needs else None


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
        needs: 'fisher' (exact, diagonal) or 'gram' (inputs of every kernel of the body).
        settings: `examples`, the number of training images of each expert's own task, and `batch`.
        tasks: by name.
        trained: the experts and their heads.
        workdir: where statistics are kept, by name, number of examples and task.
        reporter: told what is collected, what is reused, and how far it is.

    Returns:
        By name a list with one tree per expert, in the order of the tasks.

    Raises:
        MergeError: a statistic that has no collector.
    """
    check_known(needs)
    found: dict[str, list[Tree]] = {}
    for need in needs:
        folder = workdir / FOLDER / f"{need}_{settings.examples}"
        missing = [name for name in tasks if not orbax.is_saved(folder / name)]
        if missing:
            batches = {name: _batches(tasks[name], settings) for name in missing}
            total = sum(len(several) for several in batches.values())
            with reporter.progress(f"collect {need}", total) as advance:
                for name in missing:
                    tree = COLLECTORS[need](trained, name, batches[name], advance)
                    orbax.save(folder / name, tree)
        else:
            reporter.log(f"{need}: reused, collected before on {settings.examples} images a task")
        found[need] = [orbax.restore(folder / name) for name in tasks]
    return found


def _batches(task: Task, settings: ml_collections.ConfigDict) -> list[Any]:
    images = task.train.images[: settings.examples]
    return [images[i : i + settings.batch] for i in range(0, len(images), settings.batch)]


def _fisher(trained: train.Trained, name: str, batches: Sequence[Any], advance: Any) -> Tree:
    # The head is passed with the body, not closed over, so that tasks with as many classes share
    # a compilation; its own information is not needed.
    def logits(params: Tree, images: Any) -> Any:
        return train.logits(trained.model, params["body"], params["head"], images)

    params = {"body": trained.experts[name], "head": trained.heads[name]}
    found = collect.fisher(
        logits,
        params,
        batches,
        microbatch=MICROBATCH,
        progress=lambda done, total, what: advance(1),
    )
    return found["body"]


def _gram(trained: train.Trained, name: str, batches: Sequence[Any], advance: Any) -> Tree:
    grams = collect.gram(
        trained.model,
        trained.experts[name],
        batches,
        progress=lambda done, total, what: advance(1),
    )
    return traverse_util.unflatten_dict(grams, sep="/")


COLLECTORS = {"fisher": _fisher, "gram": _gram}
