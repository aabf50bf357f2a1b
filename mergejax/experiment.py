"""The main job, train, search, merge, evaluate, report; and `load`, which predicts with its result.

Everything is kept in the workdir as soon as it is made: a second run reuses it, other methods are
added to it, an interrupted run continues.
"""

import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mergejax import (
    calibration,
    data,
    errors,
    preflight,
    procedures,
    search,
    train,
    trial,
    workdir,
)
from mergejax.checkpoints import fingerprint, orbax
from mergejax.eval import conflict, report, tables
from mergejax.models import bodies
from mergejax.preflight import Job
from mergejax.procedures import PROCEDURES

Tree = Any
SAMPLES = 8  # test examples of each task that are kept to try predictions with
CONFIG, RESULTS, REPORT, LOG = "config.json", "results.json", "results.md", "log.txt"


def run(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    book: workdir.Logbook,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """Runs the main job, or what of it the workdir does not hold yet.

    Args:
        config: see `configs/digits.py`.
        folder: the workdir; may be empty or absent.
        book: told what is going on.
        origin: where the config comes from: `file`, `argument` and `overrides`.

    Returns:
        What `results.json` holds.

    Raises:
        MergeError: bad input, before anything is written.
    """
    workdir.check(folder)
    calibration.check(config.calibration)
    planned, left_out = preflight.plan(config, PROCEDURES)
    fingerprint.check(config, folder)
    tasks = data.load(config, folder, book)
    held_out = data.held_out(config, folder, book)
    fingerprint.check(config, folder, {**tasks, **held_out})
    job = preflight.job(config, folder, tasks, book, held_out)
    preflight.check(job, planned)
    preflight.check_compressions(job)
    asked = [name for name in config.methods if name in PROCEDURES]
    procedures.check(job, asked)
    book.keep(folder / LOG)
    fingerprint.write_json(folder / CONFIG, _shown(config, origin))
    missing, notes = preflight.pending(job, planned)
    with preflight.compiling(job, missing) as compiled:
        trained = train.train_all(config, tasks, folder, book, held_out)
        for sentence in (*left_out, *notes):
            book.log(sentence)
        trial.marks(job, trained)
        trial.merges(job, trained, missing, compiled)
    procedures.measure(job, trained, asked)
    trial.compressions(job, trained)
    return _finish(job, trained, _scaling(job, trained))


def _scaling(job: Job, trained: train.Trained) -> dict[str, dict[str, float | None]]:
    """Merges fewer experts, as `config.scaling` says; by number and method the normalised accuracy.

    Hyper-parameters are searched anew for every number of experts.
    """
    asked = job.config.get("scaling", {"counts": (), "methods": ()})
    known = workdir.read_records(job.results)
    found: dict[str, dict[str, float | None]] = {}
    for count in asked["counts"]:
        measured = count == len(job.tasks) and known.keys() >= set(asked["methods"])
        few = job if measured else preflight.fewer(job, count)
        planned = {
            name: search.settings(name, job.config.search, count) for name in asked["methods"]
        }
        missing, _ = preflight.pending(few, planned)
        with preflight.compiling(few, missing) as compiled:
            trial.merges(few, trained, missing, compiled)
        records = workdir.read_records(few.results)
        own = [report.decode(known[f"expert_{name}"]["test"][name]) for name in few.tasks]
        found[str(count)] = {
            name: report.normalised(
                [report.decode(records[name]["test"][task]) for task in few.tasks], own
            )
            for name in planned
        }
    return found


def _shown(config: ml_collections.ConfigDict, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config with what was overridden; of absolute paths the last part only."""
    hidden = {
        value: f".../{pathlib.Path(value).name}"
        for value in (config.data_dir, *origin["overrides"].values())
        if isinstance(value, str) and pathlib.Path(value).is_absolute()
    }
    text = json.dumps({"config": config.to_dict(), "from": dict(origin)})
    for path, shown in hidden.items():
        text = text.replace(json.dumps(path), json.dumps(shown))
    return json.loads(text)


def _finish(
    job: Job, trained: train.Trained, scaling: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any]:
    """Writes results, pictures, the best merge and the report."""
    known = {
        name: {"labels": task.labels, "validation": len(task.validation), "test": len(task.test)}
        for name, task in job.tasks.items()
    }
    # Only the digits show one set of scans to all tasks; image sets are separate.
    shared = job.config.data.suite == "digits"
    results = report.summarise(workdir.read_records(job.results), known, shared)
    results["training"] = trained.log
    results["scaling"] = scaling
    results["conflict"] = conflict.by_block(trained.base, list(trained.experts.values()))
    _keep_best(job, trained, results)
    names = _pictures(job, trained, results)
    results = json.loads(json.dumps(results))
    fingerprint.write_json(job.folder / RESULTS, results)
    workdir.write_text(job.folder / REPORT, _markdown(results, names))
    return results


def _keep_best(job: Job, trained: train.Trained, results: Mapping[str, Any]) -> None:
    """Saves the best merge, unless it is there, and some examples to predict on."""
    if results["verdict"] is None:
        return
    row = next(r for r in results["models"] if r["name"] == results["verdict"]["best"])
    if workdir.saved_best(job.folder) != row["chain"]:
        needed = preflight.needs([row["chain"]])
        stats = trial.statistics(job, trained, needed, row["calibration"])
        workdir.save_best(job.folder, row["chain"], trial.merged(job, trained, row["chain"], stats))
        job.reporter.log(f"best merge: saved as {workdir.BEST}")
    content = io.BytesIO()
    samples: dict[str, Any] = {n: task.test.inputs[:SAMPLES] for n, task in job.tasks.items()}
    np.savez(content, **samples)
    workdir.write_bytes(job.folder / "samples.npz", content.getvalue())


def _pictures(job: Job, trained: train.Trained, results: Mapping[str, Any]) -> dict[str, str]:
    """Draws the pictures; returns their captions by file name."""
    from mergejax.eval import plots  # Matplotlib takes a second to import

    def delta(expert: Tree) -> np.ndarray:
        leaves = jax.tree.map(lambda a, b: np.ravel(np.asarray(a) - np.asarray(b)), expert, base)
        return np.concatenate(jax.tree.leaves(leaves))

    base = trained.base
    cosines, signs = plots.similarity([delta(expert) for expert in trained.experts.values()])
    drawn = {
        "accuracy.png": ("Accuracy per task and model", plots.accuracies(results)),
        "means.png": ("Mean accuracy with 95 % intervals", plots.means(results)),
        "deltas.png": (
            "How alike the experts' deltas are: cosine, and share of equal signs",
            plots.deltas(list(job.tasks), cosines, signs),
        ),
    }
    for name, table in results["sweeps"].items():
        title = f"Validation accuracy of {name} over {table['rows'][0]} and {table['columns'][0]}"
        drawn[f"{name}_sweep.png"] = (title, plots.sweep(name, table))
    for name, (_, figure) in drawn.items():
        content = io.BytesIO()
        figure.savefig(content, format="png")
        workdir.write_bytes(job.folder / name, content.getvalue())
    return {name: title for name, (title, _) in drawn.items()}


def _markdown(results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    verdict = results["verdict"]
    shown = [f"## {title}\n\n![{title}]({name})" for name, title in pictures.items()]
    return "\n\n".join(
        [
            "# Results",
            verdict["sentence"] if verdict else "Nothing was merged.",
            tables.markdown(results),
            tables.caption(results),
            *shown,
            "## Every accuracy with its 95 % interval (Wilson)",
            tables.intervals(results),
            *tables.fallbacks(results),
            "",
        ]
    )


@dataclasses.dataclass(frozen=True)
class Best:
    """The best merge of a run.

    Attributes:
        chain: how it was merged.
        model: the module of its body.
        params: the body's parameters.
        heads: by task, kernel and bias.
        labels: by task, the names of the classes.
        samples: by task, some test inputs, [n, ...] as in `data.Split`.
        read: makes such inputs of what `predict` is given.
    """

    chain: str
    model: nn.Module
    params: Tree
    heads: dict[str, Tree]
    labels: dict[str, list[str]]
    samples: dict[str, np.ndarray]
    read: Callable[[Any], np.ndarray]

    def predict(self, inputs: Any, task: str) -> list[str]:
        """Names the class of each image or text.

        Args:
            inputs: images, float32 [n, height, width, channels] in [0, 1]; or a list of texts, a
                pair of texts each where the task has pairs.
            task: whose classes.

        Returns:
            One name per image or text.

        Raises:
            MergeError: an unknown task, inputs of another shape.
        """
        if task not in self.heads:
            hint = errors.did_you_mean(task, self.heads)
            raise errors.MergeError(f"there is no task '{task}', {hint}")
        given = self.read(inputs)
        wanted, shape = self.samples[task].shape[1:], given.shape
        if shape[1:] != wanted or not shape:
            raise errors.MergeError(
                f"inputs have shape {shape}, expected (n, {', '.join(map(str, wanted))})"
            )
        found = train.logits(self.model, self.params, self.heads[task], jnp.asarray(given))
        return [self.labels[task][i] for i in np.asarray(found).argmax(axis=1)]


def load(folder: str | pathlib.Path) -> Best:
    """Loads the best merge of a run.

    Args:
        folder: its workdir.

    Returns:
        The merge, ready to predict.

    Raises:
        MergeError: there is no finished run in the folder.

    Example:
        >>> load("no/such/folder")
        Traceback (most recent call last):
        mergejax.errors.MergeError: no/such/folder holds no finished run; run mergejax.main first
    """
    folder = pathlib.Path(folder)
    chain, results = workdir.saved_best(folder), fingerprint.read_json(folder / RESULTS)
    if not chain or not results:
        raise errors.MergeError(f"{folder} holds no finished run; run mergejax.main first")
    config = fingerprint.read_json(folder / CONFIG)["config"]
    with np.load(folder / "samples.npz") as samples:
        return Best(
            chain=chain,
            model=bodies.build(config["model"]),
            params=orbax.restore(folder / workdir.BEST),
            heads=orbax.restore(folder / fingerprint.FOLDER / "heads"),
            labels={name: list(task["labels"]) for name, task in results["tasks"].items()},
            samples=dict(samples),
            read=data.reader(config),
        )
