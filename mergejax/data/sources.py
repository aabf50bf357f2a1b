"""Data sets of TensorFlow Datasets as tasks, read by `tfds.data_source` without TensorFlow.

What was decoded is kept in the workdir for the next run.
"""

import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from mergejax import errors
from mergejax.data.task import Split, Task
from mergejax.progress import Reporter

PARTS = ("train", "validation", "test")
CACHE = "decoded"  # folder in the workdir
FORMAT = "array_record"  # of parquet files TFDS reads the whole whatever slice is asked for
Decode = Callable[[Mapping[str, Any]], np.ndarray]


class Source(NamedTuple):
    """Where a task's examples come from.

    Attributes:
        builder: name for `tfds.data_source`.
        train: what the experts learn from, as a TFDS split with slices.
        validation: what hyper-parameters are picked on.
        test: what is reported.
        origin: where the data can be had; empty if TFDS can download and prepare them itself.
        label: name of the feature that holds the label.
        features: names of the features that hold the image, or the one or two texts.
        first: the smallest label.
    """

    builder: str
    train: str = "train[:90%]"
    validation: str = "train[90%:]"
    test: str = "test"
    origin: str = ""
    label: str = "label"
    features: tuple[str, ...] = ("image",)
    first: int = 0


class Kind(NamedTuple):
    """A kind of data: images or texts.

    Attributes:
        name: in messages, such as 'image'.
        extra: what `pip install 'mergejax[...]'` needs in the brackets.
        sources: the tasks that are known, by name.
        decoder: a source -> what makes an array of a record, always of the same shape and dtype.
        recipe: what else the arrays depend on, as JSON has it.
        floats: whether pixels become floats in [0, 1]; otherwise they stay bytes.
    """

    name: str
    extra: str
    sources: Mapping[str, Source]
    decoder: Callable[[Source], Decode]
    recipe: Sequence[Any]
    floats: bool = True


def load(
    kind: Kind,
    names: Sequence[str],
    data: ml_collections.ConfigDict,
    data_dir: str,
    workdir: pathlib.Path,
    reporter: Reporter,
) -> dict[str, Task]:
    """Reads the tasks from what an earlier run decoded, or from TensorFlow Datasets.

    Args:
        kind: of the data.
        names: of the tasks, some of the kind's sources.
        data: `head` where all tasks share one (they have the same labels), and `limits`, the most
            examples to use of each part, so that a full official copy takes no longer than a
            subset.
        data_dir: folder of the data sets; if empty the environment's TFDS_DATA_DIR, or what TFDS
            takes by default.
        workdir: what was decoded is kept in its folder `decoded`.
        reporter: told what is decoded and what is reused.

    Returns:
        The tasks by name; what is decoded as uint8 becomes float32 in [0, 1], if the kind says so.

    Raises:
        MergeError: for unknown tasks, and for every data set that is missing.
    """
    errors.raise_all(
        [
            f"config.data: there is no {kind.name} task '{name}', "
            f"{errors.did_you_mean(name, kind.sources)}"
            for name in names
            if name not in kind.sources
        ]
    )
    paths = {name: workdir / CACHE / _file_name(kind, name, data, data_dir) for name in names}
    opened = _open_all(kind, [name for name in paths if not paths[name].exists()], data_dir)
    for name, parts in opened.items():
        _decode_task(name, kind, parts, data.limits, paths[name], reporter)
    if len(opened) < len(paths):
        reused = len(paths) - len(opened)
        reporter.log(f"{kind.name}s: {reused} tasks reused from {workdir / CACHE}")
    head = data.get("head", "")
    tasks = {name: _read(name, path, head, kind.floats) for name, path in paths.items()}
    _check_heads(tasks)
    return tasks


def _check_heads(tasks: Mapping[str, Task]) -> None:
    """Refuses a common head for tasks whose labels differ in number."""
    first: dict[str, Task] = {}
    problems = []
    for name, task in tasks.items():
        other = first.setdefault(task.head, task)
        if len(other.labels) != len(task.labels):
            problems.append(
                f"config.data.head: '{task.head}' cannot be the head of '{name}' with "
                f"{len(task.labels)} labels and of '{other.name}' with {len(other.labels)} "
                "labels; choose tasks with the same labels, or leave config.data.head empty"
            )
    errors.raise_all(problems)


def _folder(data_dir: str) -> str | None:
    return data_dir or os.environ.get("TFDS_DATA_DIR") or None


def _file_name(kind: Kind, name: str, data: ml_collections.ConfigDict, data_dir: str) -> str:
    """Names what was decoded after everything that it depends on."""
    folder = pathlib.Path(_folder(data_dir) or "~/tensorflow_datasets").expanduser().absolute()
    limits = sorted(data.limits.items())
    recipe = json.dumps([kind.sources[name], *kind.recipe, limits, str(folder)])
    return f"{name}-{zlib.crc32(recipe.encode()):08x}.npz"


def _open_all(kind: Kind, names: Sequence[str], data_dir: str) -> dict[str, dict[str, Any]]:
    """Opens train, validation and test of every task; one sentence for each that is missing."""
    if not names:
        return {}
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise errors.MergeError(
            f"the {kind.name} tasks need a package that is not installed ({error}): "
            f"run pip install 'mergejax[{kind.extra}]'"
        ) from error
    opened, problems = {}, []
    for name in names:
        source = kind.sources[name]
        where = {"data_dir": _folder(data_dir), "download": False}
        try:
            opened[name] = {
                part: tfds.data_source(source.builder, split=getattr(source, part), **where)
                for part in PARTS
            }
            if opened[name]["test"].dataset_info.file_format.value != FORMAT:
                raise ValueError("its files are not of the format array_record")
        except Exception as error:  # TFDS has no one error for what is not there
            problems.append(_missing(name, source, data_dir, error))
    errors.raise_all(problems)
    return opened


def _missing(name: str, source: Source, data_dir: str, reason: Exception) -> str:
    folder = _folder(data_dir) or "~/tensorflow_datasets"
    place = pathlib.Path(folder).expanduser()
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    why = lines[0].partition(". ")[0][:120].rstrip(".")
    if not (place / source.builder).is_dir():
        why = (
            f"it has no folder '{source.builder}'" if place.is_dir() else "there is no such folder"
        )
    features = ", ".join(f"'{feature}'" for feature in source.features)
    how = (
        f"write one of the format {FORMAT} with the features {features} and '{source.label}' from "
        f"the data of {source.origin}"
        if source.origin
        else "prepare it once, with TensorFlow installed, by tfds.data_source("
        f"'{source.builder}', data_dir='{folder}', builder_kwargs={{'file_format': '{FORMAT}'}})"
    )
    return (
        f"task '{name}': the data set '{source.builder}' cannot be read in {folder} "
        f"({why}); set --config.data_dir or TFDS_DATA_DIR to the folder that holds it, or {how}"
    )


def _decode_task(
    name: str,
    kind: Kind,
    parts: Mapping[str, Any],
    limits: Mapping[str, int],
    path: pathlib.Path,
    reporter: Reporter,
) -> None:
    """Writes one task's arrays to `path`, by renaming."""
    source = kind.sources[name]
    decode, label = kind.decoder(source), source.label
    counts = {part: min(len(records), limits[part]) for part, records in parts.items()}
    arrays: dict[str, Any] = {}
    with reporter.progress(f"decode {name}", sum(counts.values())) as advance:
        for part, records in parts.items():
            read = (records[place] for place in range(counts[part]))
            pairs = [(decode(record), record[label] - source.first) for record in read]
            inputs, labels = zip(*pairs, strict=True)
            arrays |= {
                f"{part}_inputs": np.stack(inputs),
                f"{part}_labels": np.array(labels, np.int32),
            }
            advance(counts[part])
    known = parts["train"].dataset_info.features[label]
    most = 1 + max(int(arrays[f"{part}_labels"].max()) for part in parts)
    # A set may number its labels without naming them.
    names = getattr(known, "names", None) or [str(i) for i in range(source.first + most)]
    arrays["names"] = np.array(names[source.first :])
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    with staged.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(staged, path)


def _read(name: str, path: pathlib.Path, head: str, floats: bool) -> Task:
    """Reads what `_decode_task` wrote; without a common head a task has one of its own."""
    try:
        with path.open("rb") as file, np.load(file) as saved:
            arrays = dict(saved)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise errors.MergeError(
            f"{path}: the decoded examples are damaged ({error}); delete the file to have it made "
            "again"
        ) from error

    def split(part: str) -> Split:
        inputs = arrays[f"{part}_inputs"]
        pixels = floats and inputs.dtype == np.uint8
        return Split(
            inputs.astype(np.float32) / np.float32(255) if pixels else inputs,
            arrays[f"{part}_labels"],
        )

    labels = tuple(str(label) for label in arrays["names"])
    return Task(name=name, labels=labels, head=head or name, **{p: split(p) for p in PARTS})
