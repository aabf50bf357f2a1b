"""Are these models mergeable at all? What experts changed, and how much they disagree."""

import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import errors
from mergejax.checkpoints import compare
from mergejax.checkpoints.files import Buffers, Files, ranges
from mergejax.checkpoints.folder import Model
from mergejax.checkpoints.job import Problems, open_models
from mergejax.checkpoints.pieces import MEASURED, read_piece
from mergejax.checkpoints.request import make_request
from mergejax.leaves import LeafInfo, describe

PROBES = 8  # random vectors of the estimate of a rank
COLUMNS = ("group", "parameters", "change", "cosine", "conflict", "rank", "changed")


@jax.jit
def _sums(base: jax.Array, experts: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """What adds up over pieces of one leaf."""
    base = base.astype(jnp.float32)
    ds = [expert.astype(jnp.float32) - base for expert in experts]
    up = functools.reduce(jnp.logical_or, [d > 0 for d in ds])
    down = functools.reduce(jnp.logical_or, [d < 0 for d in ds])
    return {
        "base": jnp.sum(base * base),
        "products": jnp.stack([jnp.stack([jnp.sum(a * b) for b in ds]) for a in ds]),
        "changed": jnp.stack([jnp.sum(d != 0, dtype=jnp.int32) for d in ds]),
        "touched": jnp.sum(up | down, dtype=jnp.int32),
        "conflict": jnp.sum(up & down, dtype=jnp.int32),
    }


@jax.jit
def _participation(base: jax.Array, expert: jax.Array, probes: jax.Array) -> jax.Array:
    """(sum of s^2)^2 / sum of s^4 of a delta's singular values s, the latter by random probes."""
    d = expert.astype(jnp.float32) - base.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        fourth = jnp.mean(jnp.sum(jnp.square(d.T @ (d @ probes)), axis=0))
    second = jnp.sum(d * d)
    return jnp.where(fourth > 0, second * second / jnp.where(fourth > 0, fourth, 1.0), 0.0)


def inspect(base: str | pathlib.Path, experts: Sequence[str | pathlib.Path]) -> dict[str, Any]:
    r"""Measures what experts changed, leaf by leaf, by layer and by role.

    For the deltas :math:`\tau_i` of a group of leaves: the change :math:`\|\tau_i\|/\|\theta_0\|`
    (mean over experts), the mean cosine between pairs of deltas, the share of changed elements
    whose signs conflict, the effective rank of kernels
    :math:`(\sum_j s_j^2)^2/\sum_j s_j^4` of the singular values s (the denominator estimated with
    8 random vectors; mean over kernels and experts), the share of elements that changed.

    Args:
        base: folder or file.
        experts: folders, files or adapters.

    Returns:
        `models`, `total`, `blocks`, `roles` (rows with the quantities above), `verdict`.

    Raises:
        MergeError: models that cannot be opened or do not fit together, as in a merge.
    """
    request = make_request(base, list(experts), "average()", None)
    problems = Problems()
    models = open_models(request, problems)
    errors.raise_all(problems.lines)
    findings = compare.differences(models[0], models[1:])
    errors.raise_all(compare.sentences(findings))
    specs = {name: (t.shape, t.dtype) for name, t in models[0].tensors.items()}
    infos = [
        info
        for info in describe(specs, style=compare.style(list(specs)))
        if compare.is_float(np.dtype(info.dtype)) and info.size
    ]
    with Files() as files:
        leaves = {info.name: _leaf(info, models, files) for info in infos}
    blocks: dict[str, list[LeafInfo]] = {}
    roles: dict[str, list[LeafInfo]] = {}
    for info in infos:
        group = "outside the blocks" if info.block < 0 else f"block {info.block}"
        blocks.setdefault(group, []).append(info)
        roles.setdefault(info.role, []).append(info)
    total = _row("all", infos, leaves)
    return {
        "models": [model.name for model in models],
        "total": total,
        "blocks": [_row(name, group, leaves) for name, group in blocks.items()],
        "roles": [_row(name, group, leaves) for name, group in roles.items()],
        "verdict": verdict(total, len(models) - 1),
    }


def _leaf(info: LeafInfo, models: Sequence[Model], files: Files) -> dict[str, Any]:
    """The sums of one leaf, in float64, and the effective ranks of a kernel."""
    tensors = [model.tensors[info.name] for model in models]
    buffers, total = Buffers(), None
    for piece in ranges(0, info.size, MEASURED):
        first, *rest = [read_piece(t, piece, files, buffers, i) for i, t in enumerate(tensors)]
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), _sums(first, rest))
        total = found if total is None else jax.tree.map(np.add, total, found)
    assert total is not None
    total["rank"] = []
    if info.role == "kernel" and len(info.shape) == 2:
        probes = jax.random.normal(jax.random.key(0), (info.shape[1], PROBES))
        whole = (0, info.size)
        first, *rest = [
            read_piece(t, whole, files, buffers, i).reshape(info.shape)
            for i, t in enumerate(tensors)
        ]
        total["rank"] = [float(_participation(first, x, probes)) for x in rest]
    return total


def _row(name: str, infos: Sequence[LeafInfo], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """One row: the quantities of a group of leaves."""
    found = [leaves[info.name] for info in infos]
    size = sum(info.size for info in infos)
    products = sum(leaf["products"] for leaf in found)
    norms = np.sqrt(np.diag(products))
    base = math.sqrt(sum(float(leaf["base"]) for leaf in found))
    pairs = [
        products[i, j] / (norms[i] * norms[j])
        for i in range(len(norms))
        for j in range(i)
        if norms[i] * norms[j] > 0
    ]
    ranks = [rank for leaf in found for rank in leaf["rank"]]
    touched = sum(float(leaf["touched"]) for leaf in found)
    conflict = sum(float(leaf["conflict"]) for leaf in found)
    return {
        "group": name,
        "parameters": size,
        "change": float(norms.mean() / base) if base else None,
        "cosine": float(np.mean(pairs)) if pairs else None,
        "conflict": conflict / touched if touched else 0.0,
        "rank": float(np.mean(ranks)) if ranks else None,
        "changed": float(sum(leaf["changed"] for leaf in found).mean() / size),
    }


def verdict(total: Mapping[str, Any], experts: int) -> str:
    """A plain sentence about the whole.

    Example:
        >>> print(verdict({'change': 2.0, 'cosine': 0.0, 'conflict': 0.5}, 2))
        These do not look like fine-tunes of this base: they are 2 times its norm away from it.
    """
    change, cosine = total["change"], total["cosine"]
    if not change:
        return "The experts hold the base's values: there is nothing to merge."
    if change > 0.5:
        return (
            "These do not look like fine-tunes of this base: they are "
            f"{change:.2g} times its norm away from it."
        )
    start = f"The experts changed the base by {100 * change:.2g} % of its norm"
    if experts == 1 or cosine is None:
        return f"{start}; a single one can be scaled or added."
    if cosine < -0.1:
        return f"{start}, in opposite directions (cosine {cosine:.2f}): merging undoes them."
    if cosine > 0.9:
        return f"{start}, nearly alike (cosine {cosine:.2f}): an average will do."
    conflict = 100 * total["conflict"]
    return (
        f"{start}, with a cosine of {cosine:.2f} between them and conflicting signs on "
        f"{conflict:.0f} % of what they changed: they can be merged; "
        + ("methods that settle conflicts (ties, dare) are worth a try." if conflict > 20 else "")
        + ("task_arithmetic is a good start." if conflict <= 20 else "")
    )


def table(found: Mapping[str, Any]) -> str:
    """What was found, as text."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for row in (*found["roles"], *found["blocks"], found["total"]):
        rows.append(tuple(_shown(name, row[name]) for name in COLUMNS))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), "", found["verdict"]])


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("conflict", "changed", "change"):
        return f"{100 * value:.3g} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(found: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes inspect.json and inspect.png into a folder."""
    from matplotlib import figure

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2) + "\n"
    (folder / "inspect.json").write_text(text, encoding="utf-8")
    picture = figure.Figure(figsize=(9, 2.4 * 3), layout="constrained")
    names = [row["group"] for row in found["blocks"]]
    axes = picture.subplots(3, sharex=True)
    labels = ("change of the norm", "cosine between experts", "conflicting signs")
    for axis, key, label in zip(axes, ("change", "cosine", "conflict"), labels, strict=True):
        axis.bar(names, [row[key] or 0 for row in found["blocks"]], color="#0072b2")
        axis.set_ylabel(label)
    axes[-1].tick_params(axis="x", rotation=90)
    picture.suptitle(f"{', '.join(found['models'][1:])} against {found['models'][0]}")
    picture.savefig(folder / "inspect.png", metadata={"Software": None})
