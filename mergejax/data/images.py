"""Eight image sets as tasks, a small cousin of the eight-task benchmark of CLIP merging.

The sets are read as TensorFlow Datasets keeps them, by `tfds.data_source`, without TensorFlow.
Every image becomes a small colour square; what was decoded is kept in the workdir for the next run.
"""

import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from mergejax import errors
from mergejax.data.task import Split, Task
from mergejax.progress import Reporter

PARTS = ("train", "validation", "test")
CACHE = "images"  # folder in the workdir
FORMAT = "array_record"  # of parquet files TFDS reads the whole whatever slice is asked for


class Source(NamedTuple):
    """Where a task's images come from.

    Attributes:
        builder: name for `tfds.data_source`.
        train: what the experts learn from, as a TFDS split with slices.
        validation: what hyper-parameters are picked on.
        test: what is reported.
        origin: where the images can be had; empty if TFDS can download and prepare them itself.
        label: name of the feature that holds the label.
    """

    builder: str
    train: str = "train[:90%]"
    validation: str = "train[90%:]"
    test: str = "test"
    origin: str = ""
    label: str = "label"


SOURCES: Mapping[str, Source] = {
    "scene15": Source("scene15", origin="github.com/YongKyeom/cv-hw3-eurosat-detectron"),
    "cars_body": Source("cars_body", origin="github.com/fmejbah/car_dataset1"),
    "rsscn7": Source("rsscn7", origin="github.com/palewithout/RSSCN7"),
    "eurosat": Source("eurosat/rgb", "train[:70%]", "train[70%:80%]", "train[80%:]"),
    "street_characters": Source(
        "street_characters", label="label_ci", origin="github.com/zchen36/IdentifyCharacter"
    ),
    "gtsrb": Source("gtsrb", origin="benchmark.ini.rub.de/gtsrb_news.html"),
    "mnist": Source("mnist"),
    "dtd": Source("dtd", "train", "validation", "test"),
    "cifar10": Source("cifar10"),
    "fashion_mnist": Source("fashion_mnist"),
    "bangla": Source("cmaterdb/bangla"),
    "devanagari": Source("cmaterdb/devanagari"),
    "telugu": Source("cmaterdb/telugu"),
    "usps": Source("usps", origin="github.com/marionmari/Graph_stuff"),
    "not_mnist": Source("not_mnist", origin="github.com/davidflanagan/notMNIST-to-MNIST"),
}


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Makes a colour square of an image: grey is repeated, small is padded, large is averaged down.

    Args:
        image: uint8 [height, width, 1 or 3].
        size: side of the square in pixels. An image with a longer side is cut to its middle square
            and averaged down to `size`; others get a black frame.

    Returns:
        uint8 [size, size, 3].

    Example:
        >>> square(np.full([28, 28, 1], 255, np.uint8), 32)[2, :4, 0]
        array([  0,   0, 255, 255], dtype=uint8)
    """
    from PIL import Image  # here, because only image sets need it

    height, width = image.shape[:2]
    colour = np.broadcast_to(image, (height, width, 3))
    if max(height, width) > size:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        middle = Image.fromarray(np.ascontiguousarray(colour[top : top + side, left : left + side]))
        return np.asarray(middle.resize((size, size), Image.Resampling.BOX))
    top, left = (size - height) // 2, (size - width) // 2
    bottom, right = size - height - top, size - width - left
    return np.pad(colour, [(top, bottom), (left, right), (0, 0)])


def load(
    names: Sequence[str],
    data: ml_collections.ConfigDict,
    data_dir: str,
    workdir: pathlib.Path,
    reporter: Reporter,
) -> dict[str, Task]:
    """Reads the tasks from what an earlier run decoded, or from TensorFlow Datasets.

    Args:
        names: of the tasks, some of `SOURCES`.
        data: `size` in pixels, `head` where all tasks share one (they have the same labels), and
            `limits`, the most images to use of each part, so that a full official copy takes no
            longer than a subset.
        data_dir: folder of the data sets; if empty the environment's TFDS_DATA_DIR, or what TFDS
            takes by default.
        workdir: decoded images are kept in its folder `images`.
        reporter: told what is decoded and what is reused.

    Returns:
        The tasks by name; images float32 [n, size, size, 3].

    Raises:
        MergeError: for unknown tasks, and for every data set that is missing.
    """
    errors.raise_all(
        [
            f"config.data: there is no image task '{name}', {errors.did_you_mean(name, SOURCES)}"
            for name in names
            if name not in SOURCES
        ]
    )
    paths = {name: workdir / CACHE / _file_name(name, data, data_dir) for name in names}
    opened = _open_all([name for name in paths if not paths[name].exists()], data_dir)
    for name, parts in opened.items():
        _decode_task(name, parts, data, paths[name], reporter)
    if len(opened) < len(paths):
        reporter.log(f"images: {len(paths) - len(opened)} tasks reused from {workdir / CACHE}")
    tasks = {name: _read(name, path, data.get("head", "")) for name, path in paths.items()}
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


def _file_name(name: str, data: ml_collections.ConfigDict, data_dir: str) -> str:
    """Names the decoded images after everything that they depend on."""
    folder = pathlib.Path(_folder(data_dir) or "~/tensorflow_datasets").expanduser().absolute()
    recipe = json.dumps([SOURCES[name], data.size, sorted(data.limits.items()), str(folder)])
    return f"{name}-{zlib.crc32(recipe.encode()):08x}.npz"


def _open_all(names: Sequence[str], data_dir: str) -> dict[str, dict[str, Any]]:
    """Opens train, validation and test of every task; one sentence for each that is missing."""
    if not names:
        return {}
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise errors.MergeError(
            f"the image tasks need a package that is not installed ({error}): "
            "run pip install 'mergejax[images]'"
        ) from error
    opened, problems = {}, []
    for name in names:
        source = SOURCES[name]
        where = {"data_dir": _folder(data_dir), "download": False}
        try:
            opened[name] = {
                part: tfds.data_source(source.builder, split=getattr(source, part), **where)
                for part in PARTS
            }
            if opened[name]["test"].dataset_info.file_format.value != FORMAT:
                raise ValueError("its files are not of the format array_record")
        except Exception as error:  # TFDS has no one error for what is not there
            problems.append(_missing(name, data_dir, error))
    errors.raise_all(problems)
    return opened


def _missing(name: str, data_dir: str, reason: Exception) -> str:
    source, folder = SOURCES[name], _folder(data_dir) or "~/tensorflow_datasets"
    place = pathlib.Path(folder).expanduser()
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    why = lines[0].partition(". ")[0][:120].rstrip(".")
    if not (place / source.builder).is_dir():
        why = (
            f"it has no folder '{source.builder}'" if place.is_dir() else "there is no such folder"
        )
    how = (
        f"write one of the format {FORMAT} with the features 'image' and '{source.label}' from "
        f"the images of {source.origin}"
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
    parts: Mapping[str, Any],
    data: ml_collections.ConfigDict,
    path: pathlib.Path,
    reporter: Reporter,
) -> None:
    """Writes one task's small squares, uint8, to `path`, by renaming."""
    label = SOURCES[name].label
    counts = {part: min(len(records), data.limits[part]) for part, records in parts.items()}
    arrays: dict[str, Any] = {"names": np.array(parts["train"].dataset_info.features[label].names)}
    with reporter.progress(f"decode {name}", sum(counts.values())) as advance:
        for part, records in parts.items():
            images = np.empty([counts[part], data.size, data.size, 3], np.uint8)
            labels = np.empty([counts[part]], np.int32)
            for place in range(counts[part]):
                record = records[place]
                images[place], labels[place] = square(record["image"], data.size), record[label]
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
            advance(counts[part])
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    with staged.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(staged, path)


def _read(name: str, path: pathlib.Path, head: str) -> Task:
    """Reads what `_decode_task` wrote; without a common head a task has one of its own."""
    try:
        with path.open("rb") as file, np.load(file) as saved:
            arrays = dict(saved)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise errors.MergeError(
            f"{path}: the decoded images are damaged ({error}); delete the file to have it made "
            "again"
        ) from error
    splits = {
        part: Split(
            arrays[f"{part}_images"].astype(np.float32) / np.float32(255),
            arrays[f"{part}_labels"],
        )
        for part in PARTS
    }
    labels = tuple(str(label) for label in arrays["names"])
    return Task(name=name, labels=labels, head=head or name, **splits)
