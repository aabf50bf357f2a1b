"""Data sets as tasks: `load` gives the tasks of a config, `pretraining` what their base learns."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from mergejax import errors
from mergejax.data import clip, digits, images, sources, texts
from mergejax.data.task import Split as Split
from mergejax.data.task import Task as Task
from mergejax.progress import Reporter

SUITES = ("digits", "images", "texts", "clip")


def load(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, reporter: Reporter
) -> dict[str, Task]:
    """Loads the tasks that a config names.

    Args:
        config: `data` (suite and its settings), `data_dir` (not for digits) and `seed`.
        workdir: where what was decoded is kept for the next run; digits write nothing.
        reporter: told what takes time.

    Returns:
        The tasks by name, in the order of `config.data.tasks`.

    Raises:
        MergeError: for unknown suites and tasks, and data sets that are missing.
    """
    data = config.data
    match data.suite:
        case "digits":
            return digits.load(data.tasks, data.train, data.validation, config.seed)
        case "images" | "texts" | "clip":
            return _sets(data.tasks, config, workdir, reporter)
    raise errors.MergeError(
        f"config.data.suite: there is no suite '{data.suite}', "
        f"{errors.did_you_mean(data.suite, SUITES)}"
    )


def held_out(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, reporter: Reporter
) -> dict[str, Task]:
    """Loads the tasks that no expert learns, `config.data.held_out`; usually there are none.

    Raises:
        MergeError: as `load`; also for a task that has an expert.
    """
    names = config.data.get("held_out", ())
    errors.raise_all(
        [
            f"config.data.held_out: '{name}' is one of config.data.tasks; choose another"
            for name in names
            if name in config.data.tasks
        ]
    )
    if not names:
        return {}
    asked = config.copy_and_resolve_references().unlock()
    asked.data.tasks, asked.data.head = names, ""
    return load(asked, workdir, reporter)


def pretraining(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    workdir: str | pathlib.Path,
    reporter: Reporter,
) -> dict[str, Split]:
    """The problems that the base learns, by the name of the head that each of them trains.

    Args:
        config: as for `load`.
        tasks: what `load` returned.
        workdir: as for `load`.
        reporter: as for `load`.

    Returns:
        For digits, distorted upright scans with every kind of label that the tasks ask for;
        otherwise the training splits of the sets that `config.data.pretraining` names, none for a
        model that comes pre-trained.

    Raises:
        MergeError: for unknown sets, and data sets that are missing.
    """
    data = config.data
    if data.suite == "digits":
        return digits.pretraining(tasks, data.train, data.validation, config.seed, data.variants)
    apart = config.copy_and_resolve_references().unlock()
    apart.data.head = ""
    sets = _sets(data.get("pretraining", ()), apart, workdir, reporter)
    return {name: one.train for name, one in sets.items()}


def sentences(
    config: ml_collections.ConfigDict, tasks: Mapping[str, Task]
) -> dict[str, list[list[str]]]:
    """By head, the sentences that describe each class, for models that make heads of words.

    Returns:
        For the tasks of CLIP what `clip.sentences` gives; nothing for others, whose heads are
        trained.
    """
    if config.data.suite != "clip":
        return {}
    return {task.head: clip.sentences(task.name, task.labels) for task in tasks.values()}


def reader(config: Mapping[str, Any]) -> Callable[[Any], np.ndarray]:
    """What makes inputs of a model of what a user has: images as they are, tokens of texts.

    Args:
        config: `data` and `model`, as for `load`.

    Example:
        >>> reader({"data": {"suite": "digits"}})([[0.5]]).shape
        (1, 1)
    """
    if config["data"]["suite"] != "texts":
        return np.asarray
    cut = texts.cutter(config["model"]["weights"], config["data"]["length"])
    return lambda given: np.stack([cut((t,) if isinstance(t, str) else t) for t in given])


def _sets(
    names: Sequence[str],
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    reporter: Reporter,
) -> dict[str, Task]:
    data = config.data
    match data.suite:
        case "images":
            kind = images.kind(data.size)
        case "clip":
            kind = clip.kind(data.size)
        case _:
            kind = texts.kind(config.model.weights, data.length)
    return sources.load(kind, names, data, config.data_dir, pathlib.Path(workdir), reporter)
