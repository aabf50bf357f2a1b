"""Data sets as tasks: `load` gives the tasks of a config, `pretraining` what their base learns."""

import pathlib
from collections.abc import Mapping, Sequence

import ml_collections

from mergejax import errors
from mergejax.data import digits, images
from mergejax.data.task import Split as Split
from mergejax.data.task import Task as Task
from mergejax.progress import Reporter

SUITES = ("digits", "images")


def load(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, reporter: Reporter
) -> dict[str, Task]:
    """Loads the tasks that a config names.

    Args:
        config: `data` (suite and its settings), `data_dir` (image sets only) and `seed`.
        workdir: where decoded images are kept for the next run; digits write nothing.
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
        case "images":
            return _images(data.tasks, config, workdir, reporter)
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
        For digits, distorted upright scans with every kind of label that the tasks ask for; for
        images, the training splits of the sets that `config.data.pretraining` names.

    Raises:
        MergeError: for unknown sets, and data sets that are missing.
    """
    data = config.data
    if data.suite == "digits":
        return digits.pretraining(tasks, data.train, data.validation, config.seed, data.variants)
    apart = config.copy_and_resolve_references().unlock()
    apart.data.head = ""
    sets = _images(data.pretraining, apart, workdir, reporter)
    return {name: one.train for name, one in sets.items()}


def _images(
    names: Sequence[str],
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    reporter: Reporter,
) -> dict[str, Task]:
    return images.load(names, config.data, config.data_dir, pathlib.Path(workdir), reporter)
