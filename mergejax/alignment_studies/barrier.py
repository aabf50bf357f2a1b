"""The barrier of the loss on the line between two networks, before and after alignment."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mergejax import alignment, fit
from mergejax.alignment_studies import networks, tables
from mergejax.collect import joint_gram
from mergejax.data.task import Split, Task
from mergejax.progress import Reporter

Tree = Any
Record = dict[str, Any]
ALIGNMENTS = ("none", "weights", "activations")


def measure(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    folder: pathlib.Path,
    book: Reporter,
) -> list[Record]:
    """The curves of one seed: a record for every network, alignment, with and without REPAIR.

    Args:
        config: `model` and `training` by network, `alignment` with `points` of the line and
            `examples` for matching and repair.
        tasks: the data; `config.model` says which one a network learns.
        folder: where the trained networks are kept.
        book: told what is going on.

    Returns:
        Records of `network`, `alignment`, `repaired`, `loss` and `accuracy` (along the line, on
        test examples) and `barrier`.
    """
    records = []
    for name, settings in config.model.items():
        task = tasks[settings.task]
        model = networks.build(settings, len(task.labels))
        pair = [
            networks.trained(
                model,
                task.train,
                fit.Settings(**config.training[name]),
                [config.seed, place],
                folder / "checkpoints" / f"{name}_{letter}",
                book,
            )
            for place, letter in enumerate("ab")
        ]
        images = task.train.inputs[: config.alignment.examples]
        for record in curves(model, pair, images, task.test, config.alignment.points):
            records.append({"network": name, **record})
            kind = f"{record['alignment']}{', repaired' if record['repaired'] else ''}"
            book.log(f"seed {config.seed}, {name}, {kind}: barrier {record['barrier']:.3f}")
    return records


def curves(
    model: nn.Module, pair: Sequence[Tree], images: np.ndarray, test: Split, points: int
) -> list[Record]:
    """Loss and accuracy on the lines from one network to the other, aligned in three ways.

    Args:
        model: of both.
        pair: their variables.
        images: for activations and statistics; no labels are needed.
        test: what the loss is measured on.
        points: on each line, ends included.
    """
    a, b = pair
    batches = networks.batches_of(images)
    apply = networks.function(model)
    symmetries = alignment.symmetries(apply.__wrapped__, a, images[:2])
    joint = joint_gram(apply, pair, batches)
    orders: Mapping[str, Any] = {
        "none": {},
        "weights": alignment.weight_matching(symmetries, a, b).permutations,
        "activations": alignment.activation_matching(symmetries, a, b, joint).permutations,
    }
    shares = np.linspace(0, 1, points)
    records = []
    for kind in ALIGNMENTS:
        moved = alignment.apply(symmetries, orders[kind], b)
        line = [networks.interpolate(a, moved, share) for share in shares]
        mended = _mended(model, line, [a, moved], shares, batches)
        for repaired, several in ((False, line), (True, mended)):
            found = np.array([_score(model, one, test) for one in several])
            losses = found[:, 0]
            straight = (1 - shares) * losses[0] + shares * losses[-1]
            records.append(
                {
                    "alignment": kind,
                    "repaired": repaired,
                    "loss": losses.tolist(),
                    "accuracy": found[:, 1].tolist(),
                    "barrier": float((losses - straight).max()),
                }
            )
    return records


def _mended(
    model: nn.Module,
    line: Sequence[Tree],
    ends: Sequence[Tree],
    shares: np.ndarray,
    batches: Sequence[np.ndarray],
) -> list[Tree]:
    """Every network of a line with the statistics that it should have (REPAIR)."""
    if "batch_stats" in line[0]:
        return [networks.reestimated(model, one, batches) for one in line]
    apply = networks.function(model)
    return [
        alignment.repair(apply, one, ends, batches, weights=[1 - share, share])
        for one, share in zip(line, shares.tolist(), strict=True)
    ]


def _score(model: nn.Module, variables: Tree, test: Split) -> tuple[float, float]:
    """Mean cross entropy and accuracy."""
    scores = jnp.asarray(networks.logits(model, variables, test.inputs))
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.asarray(test.labels))
    right = np.asarray(scores).argmax(1) == test.labels
    return float(losses.mean()), float(right.mean())


def table(records: Sequence[Record]) -> str:
    """Barriers, and accuracy half-way, mean ± spread over seeds, in Markdown."""
    header = ["network", "alignment", "barrier", "barrier, repaired", "half-way",
              "half-way, repaired", "ends"]  # fmt: skip
    rows = []
    for network in dict.fromkeys(r["network"] for r in records):
        for kind in ALIGNMENTS:
            mine = [
                [r for r in records
                 if (r["network"], r["alignment"], r["repaired"]) == (network, kind, repaired)]
                for repaired in (False, True)
            ]  # fmt: skip
            barriers = [tables.spread([r["barrier"] for r in some], 1, 3) for some in mine]
            middle = [
                tables.spread([r["accuracy"][len(r["accuracy"]) // 2] for r in some])
                for some in mine
            ]
            ends = tables.spread([np.mean([r["accuracy"][0], r["accuracy"][-1]]) for r in mine[0]])
            rows.append([network, kind, *barriers, *middle, ends])
    return tables.markdown(header, rows)


def picture(records: Sequence[Record]) -> Any:
    """Test loss along the line, mean and spread over seeds, one panel for each network."""
    from matplotlib import figure

    from mergejax.eval.plots import BLUE, GREY, ORANGE

    colours = dict(zip(ALIGNMENTS, (GREY, BLUE, ORANGE), strict=True))
    found = list(dict.fromkeys(r["network"] for r in records))
    size = (4.6 * len(found), 3.8)
    canvas = figure.Figure(figsize=size, dpi=150, layout="constrained")
    for axes, network in zip(canvas.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for kind in ALIGNMENTS:
            for repaired in (False, True):
                losses = np.array([
                    r["loss"] for r in records
                    if (r["network"], r["alignment"], r["repaired"]) == (network, kind, repaired)
                ])  # fmt: skip
                shares, mean = np.linspace(0, 1, losses.shape[1]), losses.mean(0)
                label = f"aligned by {kind}" if kind != "none" else "not aligned"
                style = "--" if repaired else "-"
                axes.plot(shares, mean, style, color=colours[kind], linewidth=1.5,
                          label=f"{label}, REPAIR" if repaired else label)  # fmt: skip
                width = losses.std(0)
                axes.fill_between(
                    shares, mean - width, mean + width, color=colours[kind], alpha=0.15, linewidth=0
                )
        axes.set_title(network, fontsize=10, loc="left")
        axes.set_xlabel("share of the second network", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.axes[0].set_ylabel("test loss", fontsize=9)
    handles = canvas.axes[0].get_lines()
    canvas.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return canvas
