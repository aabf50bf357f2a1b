"""Merges that are more than a chain: what a study does to get each of them.

Each takes a job, its trained models and the calibration settings, and returns what tells which
images are classified rightly, and a text with the setting. Images are those of training; strengths
are chosen on validation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mergejax import (
    api,
    bayesian_groups,
    block_by_block,
    calibration,
    collect,
    preflight,
    quantize,
    representation,
    train,
    trial,
    workdir,
)
from mergejax.errors import raise_all
from mergejax.eval import predict
from mergejax.models import vit

Tree = Any
Right = Callable[[predict.Bundle], Any]
HOST = "task_arithmetic(scaling=0.3)"  # the merge that is corrected or quantised


def _host(job: preflight.Job, trained: train.Trained) -> Tree:
    return api.merge(HOST, trained.base, list(trained.experts.values()))


def _features(job: preflight.Job, body: Tree, images: Any) -> jax.Array:
    return jax.jit(lambda p, x: job.model.apply({"params": p}, x))(body, jnp.asarray(images))


def _representations(
    job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
) -> tuple[Tree, dict[str, tuple[jax.Array, jax.Array]]]:
    """The host, and by task its and the expert's representations of calibration images."""
    body = _host(job, trained)
    images = {n: task.train.inputs[: settings.examples] for n, task in job.tasks.items()}
    both = {
        n: (_features(job, body, x), _features(job, trained.experts[n], x))
        for n, x in images.items()
    }
    return body, both


def _per_task(job: preflight.Job, body: Tree, heads: Mapping[str, Tree], edit: Any) -> Right:
    """Classifies each task's images by its own head, behind its own correction."""

    def right(images: predict.Bundle) -> np.ndarray:
        z = _features(job, body, images.inputs)
        first, found = 0, np.zeros(len(images.labels), bool)
        for index, name in enumerate(job.tasks):
            mine = images.tasks == index
            scores = edit(name, z[mine]) @ heads[name]["kernel"] + heads[name]["bias"][None, :]
            found[mine] = np.asarray(scores.argmax(1)) + first == images.labels[mine]
            first += heads[name]["bias"].shape[0]
        return found

    return right


def react(
    job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
) -> tuple[Right, str]:
    """ReACT with equal preferences: one correction for all tasks."""
    body, both = _representations(job, trained, settings)
    found = representation.correction([z for z, _ in both.values()], [y for _, y in both.values()])
    matrix = representation.correct(found, [1.0] * len(both))
    heads = {name: representation.absorb(head, matrix) for name, head in trained.heads.items()}
    joined = predict.join_heads(heads, list(job.tasks))
    return lambda images: predict.right(job.model, body, joined, images), f"{HOST}, beta=0.1"


def preferences(
    job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
) -> dict[str, Any]:
    """ReACT for preferences between the first two tasks: what `front_plot.draw` takes."""
    tasks = list(job.tasks)[:2]
    body, both = _representations(job, trained, settings)
    pairs = [both[name] for name in tasks]
    found = representation.correction([z for z, _ in pairs], [y for _, y in pairs])

    def scores(body: Tree, matrix: Any) -> list[float]:
        heads = {**trained.heads}
        heads |= {name: representation.absorb(heads[name], matrix) for name in tasks}
        right = predict.right(job.model, body, predict.join_heads(heads, list(job.tasks)), job.test)
        parts = predict.by_task(np.asarray(right), job.test, list(job.tasks))
        return [float(parts[name].mean()) for name in tasks]

    shares = [float(x) for x in np.linspace(0, 1, 21)]
    untouched = jnp.eye(found.weights.shape[-1])
    own = [scores(trained.experts[name], untouched)[i] for i, name in enumerate(tasks)]
    several = [scores(body, representation.correct(found, [x, 1 - x])) for x in shares]
    return {
        "tasks": tasks,
        "preferences": shares,
        "scores": several,
        "host": scores(body, untouched),
        "experts": own,
    }


def grouped(
    job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
) -> tuple[Right, str]:
    """Bayesian model merging with values for each group of layers, searched on validation."""
    body, chain = bayesian_groups.search(job, trained, settings)
    head = predict.join_heads(trained.heads, list(job.tasks))
    return lambda images: predict.right(job.model, body, head, images), chain


def surgery(
    job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
) -> tuple[Right, str]:
    """Representation Surgery, on training images; each task has its adapter."""
    body, both = _representations(job, trained, settings)
    adapters = {name: representation.adapt(z, y)[0] for name, (z, y) in both.items()}
    edit = lambda name, z: representation.operate(adapters[name], z)
    return _per_task(job, body, trained.heads, edit), f"{HOST}, rank=16"


def localized(
    job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
) -> tuple[Right, str]:
    """Localize-and-Stitch with learned masks, by Adam."""
    masks = []
    for name, task in job.tasks.items():
        head = trained.heads[name]

        def loss(body: Tree, batch: Any, head: Tree = head) -> jax.Array:
            scores = train.logits(job.model, body, head, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()

        batch = (task.train.inputs[: settings.examples], task.train.labels[: settings.examples])
        mask, _ = collect.localize(
            loss,
            trained.base,
            trained.experts[name],
            [batch],
            density=0.1,
            steepness=3.0,
            epochs=50,
            l1=1.0,
            optimizer=optax.adam(0.1),
        )
        masks.append(mask)
    stats = {"mask": masks}
    method = "localize_and_stitch_trained()"
    body = api.merge(method, trained.base, list(trained.experts.values()), stats=stats)
    head = predict.join_heads(trained.heads, list(job.tasks))
    return lambda images: predict.right(job.model, body, head, images), "Adam, 50 steps"


def _quantised(kind: str, bits: int) -> Callable[..., tuple[Right, str]]:
    def procedure(
        job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
    ) -> tuple[Right, str]:
        body, experts = _host(job, trained), list(trained.experts.values())
        if kind == "nearest":
            found = [(quantize.round_to_nearest(body, bits=bits), "")]
        else:
            stats = calibration.statistics(
                ["gram"], settings, job.tasks, trained, job.folder, job.reporter
            )
            pooled = jax.tree.map(lambda *gs: sum(gs) / len(gs), *stats["gram"])
            if kind == "gptq":
                found = [(quantize.gptq(body, pooled, bits=bits), "")]
            else:
                found = [
                    (
                        quantize.expert_guided(
                            body, experts, stats["gram"], anchor=anchor, bits=bits
                        ),
                        f", anchor={anchor}",
                    )
                    for anchor in (0.01, 0.1, 1.0)
                ]
        models = [(quantize.dequantize(m, like=body), text) for m, text in found]
        right, chosen = _best(job, trained, models)
        return right, f"{HOST}, {bits} bits{chosen}"

    return procedure


def _best(
    job: preflight.Job, trained: train.Trained, found: Sequence[tuple[Tree, str]]
) -> tuple[Right, str]:
    """Of several bodies the one that is right most often on validation."""
    head = predict.join_heads(trained.heads, list(job.tasks))

    def right(body: Tree) -> Right:
        return lambda images: predict.right(job.model, body, head, images)

    scores = [float(np.mean(np.asarray(right(body)(job.validation)))) for body, _ in found]
    best, text = found[int(np.argmax(scores))]
    return right(best), text


def _blockwise(*chains: str) -> Callable[..., tuple[Right, str]]:
    """Merges block by block with each of the chains."""

    def procedure(
        job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
    ) -> tuple[Right, str]:
        assert isinstance(job.model, vit.VisionTransformer)  # see `check`
        blocks = vit.blocks(job.model, trained.base)
        data = [calibration.batches(task, settings) for task in job.tasks.values()]
        experts = list(trained.experts.values())
        found = [
            (block_by_block.sequential(chain, blocks, trained.base, experts, data), chain)
            for chain in chains
        ]
        return _best(job, trained, found)

    return procedure


PROCEDURES: Mapping[str, Callable[..., tuple[Right, str]]] = {
    "regmean_plus_plus": _blockwise(*(f"regmean(shrink={x})" for x in (0.1, 0.5, 0.9, 1.0))),
    "featcal": _blockwise(
        *(f"featcal(scaling={s}, ridge={r})" for s in (0.15, 0.3) for r in (0.05, 0.5))
    ),
    bayesian_groups.NAME: grouped,
    "react": react,
    "surgery": surgery,
    "localize_and_stitch_trained": localized,
    "nearest_4_bits": _quantised("nearest", 4),
    "gptq_4_bits": _quantised("gptq", 4),
    "e_pmq_4_bits": _quantised("guided", 4),
    "e_pmq_8_bits": _quantised("guided", 8),
}
BLOCKWISE = ("regmean_plus_plus", "featcal")


def check(job: preflight.Job, names: Sequence[str]) -> None:
    """Refuses procedures that the job's model or config is not made for.

    Raises:
        MergeError: names each of them.
    """
    known = isinstance(job.model, vit.VisionTransformer)
    if bayesian_groups.NAME in names:
        bayesian_groups.check(job)
    raise_all(
        [
            f"config.methods: '{name}' merges block by block, and the blocks of "
            f"{type(job.model).__name__} are not known here; choose a vision transformer, or call "
            "mj.sequential with blocks of your own"
            for name in names
            if name in BLOCKWISE and not known
        ]
    )


def measure(job: preflight.Job, trained: train.Trained, names: Sequence[str]) -> None:
    """Measures what of the procedures the workdir does not hold yet.

    Args:
        job: what is known before training.
        trained: base, experts and heads.
        names: of `PROCEDURES`.
    """
    calibrated = {"examples": job.config.calibration.examples}
    known = workdir.read_records(job.results)
    for name in names:
        former = known.get(name, {})
        if (former.get("calibration"), former.get("examined")) == (calibrated, job.examined):
            job.reporter.log(f"{name}: reused")
            continue
        right, text = PROCEDURES[name](job, trained, job.config.calibration)
        facts = {"name": name, "kind": "procedure", "chain": text, "calibration": calibrated}
        record = {**facts, **trial.accuracy(job, right)}
        workdir.write_record(job.results, record)
        mean = 100 * float(np.mean(list(record["validation"].values())))
        job.reporter.log(f"{name}: {text}, {mean:.1f} % on validation")
