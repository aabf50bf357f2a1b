"""A mixture of experts merged from eight experts to four a layer (M-SMoE, MC-SMoE)."""

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from mergejax import alignment, fit
from mergejax.alignment_studies import mixture, networks, recovery, tables
from mergejax.data.task import Split, Task
from mergejax.progress import Reporter

Tree = Any
Record = dict[str, Any]
Routings = Mapping[str, alignment.Routing]
NEVER = -1e9  # logit of an expert that was dropped


def measure(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    folder: pathlib.Path,
    book: Reporter,
) -> list[Record]:
    """Accuracy and size of every merge of one seed, before and after training.

    Args:
        config: `model.transformer`, `training`, and `alignment` with `average` experts a layer,
            `examples` for routing, `recovery`, `compression`, `rank` and `keep`.
        tasks: the data; the network learns all of them, their labels beside each other.
        folder: where the trained network is kept.
        book: told what is going on.

    Returns:
        Records of `method`, `parameters`, `merged` (accuracy as merged) and `trained` (after the
        recovery).
    """
    asked, train, test = config.alignment, together(tasks, "train"), together(tasks, "test")
    settings = {**config.model.transformer, "classes": int(train.labels.max()) + 1}
    model = mixture.Transformer(**settings)
    path, seed = folder / "checkpoints" / "mixture", [config.seed, 0]
    training = fit.Settings(**config.training.transformer)
    full = networks.trained(model, train, training, seed, path, book)["params"]
    every = {layer: np.arange(model.experts) for layer in mixture.mixtures(full)}

    def right(params: Tree, groups: Mapping[str, np.ndarray]) -> float:
        variables = {"params": mixture.grown(params, groups)}
        logits = networks.logits(model, variables, test.inputs)
        return float(np.mean(logits.argmax(1) == test.labels))

    def recovered(params: Tree, groups: Any, settings: Any, **more: Any) -> Tree:
        teach = fit.Settings(**settings)
        return recovery.train(model, params, groups, full, train, teach, [config.seed, 1], **more)

    base = right(full, every)
    records: list[Record] = [
        {"method": "eight experts", "parameters": size(full), "merged": base, "trained": None}
    ]
    book.log(f"seed {config.seed}, eight experts: {100 * base:.1f} %")
    found = routings(model, full, train.inputs[: asked.examples])
    for method, params, groups in merges(full, found, asked.average):
        better = recovered(params, groups, asked.recovery)
        rated = {"merged": right(params, groups), "trained": right(better, groups)}
        records.append({"method": method, "parameters": size(params), **rated})
        book.log(f"seed {config.seed}, {method}: " + ", ".join(
            f"{100 * x:.1f} % {name}" for name, x in rated.items()))  # fmt: skip
    # The last one is M-SMoE, `better` what it is after its recovery.
    split = recovery.split(better, asked.rank)
    for method, start, keep in (
        ("M-SMoE, trained longer", better, 1),
        ("MC-SMoE", split, asked.keep),
    ):
        longer = recovered(start, groups, asked.compression, keep=keep)
        trained = right(longer, groups)
        records.append(
            {"method": method, "parameters": size(longer), "merged": None, "trained": trained}
        )
        book.log(f"seed {config.seed}, {method}: {100 * trained:.1f} %")
    return records


def together(tasks: Mapping[str, Task], part: str) -> Split:
    """The examples of all tasks, the labels of each behind those of the one before, shuffled."""
    first = np.cumsum([0, *(len(task.labels) for task in tasks.values())])
    splits = [getattr(task, part) for task in tasks.values()]
    inputs = np.concatenate([split.inputs for split in splits])
    labels = np.concatenate([s.labels + n for s, n in zip(splits, first, strict=False)])
    order = np.random.default_rng(0).permutation(len(labels))
    return Split(inputs[order], labels[order].astype(np.int32))


def routings(model: nn.Module, params: Tree, images: np.ndarray) -> Routings:
    """How the routers of a network deal the tokens of images out, by layer."""
    logits = [_logits(params, batch, model) for batch in networks.batches_of(images)]
    return {
        layer: alignment.routing(np.concatenate([one[layer] for one in logits]), top=2)
        for layer in logits[0]
    }


@functools.partial(jax.jit, static_argnames="model")
def _logits(params: Tree, images: jax.Array, model: nn.Module) -> dict[str, jax.Array]:
    sown = model.apply({"params": params}, images, mutable=["intermediates"])[1]["intermediates"]
    return {layer: sown[layer]["logits"][0] for layer in mixture.mixtures(params)}


def merges(
    full: Tree, found: Routings, average: float
) -> Iterator[tuple[str, Tree, dict[str, np.ndarray]]]:
    """Every way to merge experts: its name, the merged parameters, and groups by layer.

    Args:
        full: parameters of a `mixture.Transformer`.
        found: of `routings`.
        average: how many groups a layer has on average.
    """
    several = alignment.group_experts(list(found.values()), average)
    groups = dict(zip(found, several, strict=True))
    pairs = {n: (np.arange(len(g)) * average // len(g)).astype(int) for n, g in groups.items()}
    flat = {layer: np.ones(len(g)) for layer, g in groups.items()}
    usage = {layer: one.usage for layer, one in found.items()}
    yield "average of neighbours", _merged(full, pairs, flat), pairs
    yield "most used experts", _leaders(full, groups, usage), groups
    yield "M-SMoE, not aligned", _merged(full, groups, usage), groups
    yield "M-SMoE", _merged(_aligned(full, list(found)), groups, usage), groups


def _merged(full: Tree, groups: Mapping[str, Any], usage: Mapping[str, Any]) -> Tree:
    found = dict(full)
    for layer, own in groups.items():
        arrays = {name: full[layer][name] for name in mixture.ARRAYS}
        found[layer] = {**full[layer], **alignment.merge_experts(arrays, own, usage[layer])}
    return found


def _aligned(full: Tree, layers: Sequence[str]) -> Tree:
    found = dict(full)
    for layer in layers:
        into = {name: full[layer][name] for name in ("up", "up_bias")}
        into, out, _ = alignment.align_experts(into, {"down": full[layer]["down"]})
        found[layer] = {**full[layer], **into, **out}
    return found


def _leaders(full: Tree, groups: Mapping[str, Any], usage: Mapping[str, Any]) -> Tree:
    """Only the most used expert of every group; no token is sent to the others."""
    found = dict(full)
    for layer, own in groups.items():
        best = [int(np.where(own == g, usage[layer], -1).argmax()) for g in range(own.max() + 1)]
        router, gone = full[layer]["router"], np.isin(np.arange(len(own)), best, invert=True)
        bias = np.where(gone, np.float32(NEVER), router["bias"])
        arrays = {name: full[layer][name][best] for name in mixture.ARRAYS}
        found[layer] = {**full[layer], **arrays, "router": {**router, "bias": bias}}
    return found


def size(params: Tree) -> int:
    """Parameters that are not zero by construction: of a sparse rest, those that are left."""
    total = 0
    for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, alignment.Split)):
        split = isinstance(x, alignment.Split)
        total += x.left.size + x.right.size + np.count_nonzero(x.rest) if split else x.size
    return int(total)


def table(records: Sequence[Record]) -> str:
    """Accuracy and parameters, mean ± spread over seeds, in Markdown."""
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        mine = [r for r in records if r["method"] == method]
        cells = [
            tables.spread([r[name] for r in mine if r[name] is not None])
            for name in ("merged", "trained")
        ]
        rows.append([method, tables.spread([r["parameters"] for r in mine], 1e-3), *cells])
    return tables.markdown(["method", "thousand parameters", "merged", "trained again"], rows)


def picture(records: Sequence[Record]) -> Any:
    """Accuracy as merged and after training, a line for each method and its size."""
    from matplotlib import figure

    from mergejax.eval.plots import BLUE, ORANGE

    methods = list(dict.fromkeys(r["method"] for r in records))
    canvas = figure.Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
    axes, names = canvas.subplots(), []
    for place, method in enumerate(methods):
        mine = [r for r in records if r["method"] == method]
        names.append(f"{method}, {np.mean([r['parameters'] for r in mine]) / 1000:.0f} k")
        for name, colour, mark in (("merged", ORANGE, "o"), ("trained", BLUE, "D")):
            found = [100 * r[name] for r in mine if r[name] is not None]
            if found:
                axes.errorbar(np.mean(found), place, xerr=np.std(found), fmt=mark, color=colour,
                              capsize=2, markersize=5, linestyle="none")  # fmt: skip
    for colour, mark, label in ((ORANGE, "o", "as merged"), (BLUE, "D", "trained again")):
        axes.plot([], [], mark, color=colour, markersize=5, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("test accuracy in %", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return canvas
