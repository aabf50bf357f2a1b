"""Where experts disagree: signs and directions of their deltas, block by block."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mergejax.leaves import describe

Tree = Any
OUTSIDE = "outside"


def by_block(base: Tree, experts: Sequence[Tree]) -> list[dict[str, Any]]:
    r"""How far experts moved and how much they disagree in every block.

    Args:
        base: tree of arrays.
        experts: trees like it.

    Returns:
        A row for each block in the order of depth, leaves outside the blocks last: `group`,
        `change` (mean norm of the deltas as a share of the base's), `cosine` (mean over pairs of
        experts, None for a single one) and `conflict` (the share of elements that some expert
        raises and another lowers, among those that any of them changes).

    Example:
        >>> def model(*values):
        ...     return {f"block_{i}": {"kernel": np.full([1, 1], x)} for i, x in enumerate(values)}
        >>> rows = by_block(model(1.0, 1.0), [model(2.0, 2.0), model(2.0, 0.0)])
        >>> [(row["group"], row["change"], row["cosine"], row["conflict"]) for row in rows]
        [('block 0', 1.0, 1.0, 0.0), ('block 1', 1.0, -1.0, 1.0)]
    """
    names = {
        "/".join(str(getattr(key, "key", key)) for key in path): index
        for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(base))
    }
    starts = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(base)]
    ends = [[np.asarray(x, np.float64) for x in jax.tree.leaves(one)] for one in experts]
    specs = {name: (starts[i].shape, starts[i].dtype) for name, i in names.items()}
    groups: dict[int, list[int]] = {}
    for info in describe(specs):
        groups.setdefault(info.block, []).append(names[info.name])
    order = sorted(groups, key=lambda block: (block < 0, block))
    return [_row(block, groups[block], starts, ends) for block in order]


def _row(
    block: int,
    places: Sequence[int],
    starts: Sequence[np.ndarray],
    ends: Sequence[Sequence[np.ndarray]],
) -> dict[str, Any]:
    ds = np.stack([np.concatenate([(x[i] - starts[i]).ravel() for i in places]) for x in ends])
    norm = np.sqrt(sum(float(np.sum(starts[i] ** 2)) for i in places))
    norms = np.linalg.norm(ds, axis=1)
    units = ds / np.where(norms > 0, norms, 1.0)[:, None]
    pairs = (units @ units.T)[np.triu_indices(len(ds), 1)]
    up, down = (ds > 0).any(axis=0), (ds < 0).any(axis=0)
    touched = int((up | down).sum())
    return {
        "group": OUTSIDE if block < 0 else f"block {block}",
        "change": float(norms.mean() / norm) if norm else None,
        "cosine": float(pairs.mean()) if len(pairs) else None,
        "conflict": float((up & down).sum() / touched) if touched else 0.0,
    }
