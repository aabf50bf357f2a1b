"""From a config and its tasks to trained models: the base, one expert per task, a multi-task model.

The base is pre-trained on broader problems, together with their heads, or comes with the model;
heads for tasks that are not among them are then trained on the base as it is. All heads are frozen
then, and each expert is the base's body trained further on one task under the head of its kind, as
in the experiments with CLIP, whose heads are text embeddings (Ilharco et al. 2023,
arXiv:2212.04089). So every body works with every head, and only bodies are merged. The multi-task
model, an upper mark, starts from the base too and trains its own copies of the heads.
"""

import dataclasses
import functools
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mergejax import data, fit
from mergejax.checkpoints import fingerprint, orbax
from mergejax.data.task import Split, Task, joined
from mergejax.models import bodies
from mergejax.progress import Reporter

Tree = Any
Log = dict[str, dict[str, float]]
LOG = "log.json"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train_all` makes.

    Attributes:
        model: the module of every body.
        base: the pre-trained body's parameters.
        experts: by task, the fine-tuned bodies' parameters, trees like the base's.
        heads: by task, the head that goes with the base, the experts and every merge of them.
        multi_task: the parameters of the body trained on all tasks.
        multi_task_heads: by task, the heads that go with it.
        log: by phase ('base', 'experts/<task>', 'multi_task'): seconds, steps and last loss.
    """

    model: nn.Module
    base: Tree
    experts: dict[str, Tree]
    heads: dict[str, Tree]
    multi_task: Tree
    multi_task_heads: dict[str, Tree]
    log: Log


def logits(model: nn.Module, body: Tree, head: Tree, inputs: jax.Array) -> jax.Array:
    """Scores every class of one task: features(inputs) @ kernel + bias.

    Args:
        model: the body's module.
        body: its parameters.
        head: kernel [width, classes] and bias [classes].
        inputs: [n, ...] as in `data.Split`.

    Returns:
        float32 [n, classes].

    Example:
        >>> model = bodies.build(dict(patch=4, width=16, depth=1, heads=2))
        >>> body, heads = initial(model, jnp.zeros([1, 8, 8, 1]), {"digit": 10}, seed=0)
        >>> logits(model, body, heads["digit"], jnp.zeros([3, 8, 8, 1])).shape
        (3, 10)
    """
    features = model.apply({"params": body}, inputs)
    scores = nn.Dense(head["bias"].shape[0]).apply({"params": head}, features)
    return cast(jax.Array, scores)


def initial(
    model: nn.Module, example: Any, classes: Mapping[str, int], seed: int
) -> tuple[Tree, dict[str, Tree]]:
    """Draws a body and heads to start pre-training from.

    Args:
        model: the body's module.
        example: one input, [1, ...] as in `data.Split`.
        classes: number of classes of each head, by name.
        seed: of the draw.

    Returns:
        The body's parameters, and by name the heads: kernel [width, classes], bias [classes].
    """
    key = jax.random.key(seed)
    features, variables = jax.jit(model.init_with_output)(key, jnp.asarray(example))

    def head(index: int, outputs: int) -> Tree:
        dense = nn.Dense(outputs, kernel_init=nn.initializers.normal(0.02))
        return dense.init(jax.random.fold_in(key, index), features)["params"]

    heads = {name: head(index, classes[name]) for index, name in enumerate(sorted(classes))}
    return variables["params"], heads


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every phase needs; `log` grows as phases end."""

    config: ml_collections.ConfigDict
    tasks: Mapping[str, Task]
    every: Mapping[str, Task]  # those without an expert, too
    model: nn.Module
    folder: pathlib.Path
    reporter: Reporter
    log: Log


def train_all(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    workdir: str | pathlib.Path,
    reporter: Reporter,
    held_out: Mapping[str, Task] | None = None,
) -> Trained:
    """Trains what is missing in the workdir and restores the rest.

    Every result is a checkpoint in `workdir`/checkpoints as soon as it is made: `heads`, `base`,
    `experts/<task>`, `multi_task_heads`, `multi_task`. An interrupted phase is started again, with
    the same result.

    Args:
        config: `data`, `model`, `training` (`pretrain`, `heads`, `finetune`, `multi_task`) and
            `seed`.
        tasks: by name; all inputs of one shape.
        workdir: where checkpoints are kept.
        reporter: told what is trained, what is reused, and how far it is.
        held_out: tasks that get a head and no expert.

    Returns:
        The trained models.

    Raises:
        MergeError: if the workdir's checkpoints come from other data, models or training, before
            anything is written; or if one of them is damaged.
    """
    every = {**tasks, **(held_out or {})}
    fingerprint.claim(config, workdir, every)
    folder = pathlib.Path(workdir) / fingerprint.FOLDER
    model = bodies.build(config.model)
    run = _Run(config, tasks, every, model, folder, reporter, fingerprint.read_json(folder / LOG))
    heads, base = _kept(run, ["heads", "base"], lambda: _pretrain(run))
    experts = {}
    for name in tasks:
        make = functools.partial(_fine_tune, run, name, base, heads)
        (experts[name],) = _kept(run, [f"experts/{name}"], make)
    names = ["multi_task_heads", "multi_task"]
    multi_task_heads, multi_task = _kept(run, names, lambda: _train_jointly(run, base, heads))
    return Trained(
        model=model,
        base=base,
        experts=experts,
        heads=heads,
        multi_task=multi_task,
        multi_task_heads=multi_task_heads,
        log=run.log,
    )


def _kept(run: _Run, names: Sequence[str], make: Callable[[], list[Tree]]) -> list[Tree]:
    """Restores the trees called `names`, or makes and saves them if one of them is missing."""
    paths = [run.folder / name for name in names]
    if all(orbax.is_saved(path) for path in paths):
        run.reporter.log(f"{names[-1]}: reused from {paths[-1]}")
        return [orbax.restore(path) for path in paths]
    trees = make()
    for path, tree in zip(paths, trees, strict=True):
        orbax.save(path, tree)
    return trees


def _fit(
    run: _Run,
    kind: str,
    name: str,
    body: Tree,
    heads: Tree,
    splits: Mapping[str, Split],
    parts: Sequence[str] = ("body", "heads"),
) -> tuple[Tree, dict[str, Tree]]:
    """Trains with the settings of `kind`, logs it as `name`."""
    started = time.monotonic()
    settings = fit.Settings(**run.config.training[kind])
    with run.reporter.progress(f"train {name}", settings.steps) as advance:
        body, heads, losses = fit.fit(
            run.model,
            body,
            heads,
            splits,
            settings,
            seed=[run.config.seed, zlib.crc32(name.encode())],
            classes=max(
                *(len(task.labels) for task in run.every.values()),
                *(head["bias"].shape[0] for head in heads.values()),
            ),
            parts=parts,
            advance=advance,
        )
    run.log[name] = {
        "seconds": round(time.monotonic() - started, 2),
        "steps": settings.steps,
        "loss": float(np.mean(losses[-fit.CHUNK :])),
    }
    fingerprint.write_json(run.folder / LOG, run.log)
    return body, heads


def _pretrain(run: _Run) -> list[Tree]:
    """Returns the heads by task, and the base.

    Heads that pre-training does not teach are trained on the tasks afterwards, with the base as
    it is; a model that makes its heads of words needs no training at all.
    """
    given = bodies.pretrained(run.config.model)
    heads = bodies.heads(run.config.model, data.sentences(run.config, run.every))
    body = jax.tree.map(jnp.asarray, given)
    if not heads:
        body, heads = _taught(run, body)
    return [{task.name: heads[task.head] for task in run.every.values()}, body]


def _taught(run: _Run, given: Tree | None) -> tuple[Tree, dict[str, Tree]]:
    """Trains the heads, and the base unless it is given."""
    splits = data.pretraining(run.config, run.every, run.folder.parent, run.reporter)
    example = next(iter(run.tasks.values())).train.inputs[:1]
    classes = {name: int(split.labels.max()) + 1 for name, split in splits.items()}
    classes |= {task.head: len(task.labels) for task in run.every.values()}
    body, heads = initial(run.model, example, classes, run.config.seed)
    taught = {name: heads[name] for name in splits}
    if given is None:
        body, taught = _fit(run, "pretrain", "base", body, taught, splits)
    else:
        body = given
    heads |= taught
    untaught: dict[str, Split] = {}
    for task in run.every.values():
        if task.head not in taught:
            known = untaught.get(task.head)
            untaught[task.head] = task.train if known is None else joined(known, task.train)
    if untaught:
        new = {name: heads[name] for name in untaught}
        heads |= _fit(run, "heads", "heads", body, new, untaught, parts=("heads",))[1]
    return body, heads


def _fine_tune(run: _Run, name: str, base: Tree, heads: Mapping[str, Tree]) -> list[Tree]:
    """Returns the body of one expert, which the config may name."""
    given = bodies.expert(run.config.model, name)
    if given is not None:
        run.reporter.log(f"experts/{name}: {run.config.model.experts.format(task=name)}")
        return [jax.tree.map(jnp.asarray, given)]
    splits, own = {name: run.tasks[name].train}, {name: heads[name]}
    part = "adapters" if run.config.training.finetune.get("rank", 0) else "body"
    return [_fit(run, "finetune", f"experts/{name}", base, own, splits, parts=(part,))[0]]


def _train_jointly(run: _Run, base: Tree, heads: Mapping[str, Tree]) -> list[Tree]:
    """Returns the heads by task and the body of the multi-task model."""
    splits = {name: task.train for name, task in run.tasks.items()}
    own = {name: heads[name] for name in run.tasks}
    body, heads = _fit(run, "multi_task", "multi_task", base, own, splits)
    return [heads, body]
