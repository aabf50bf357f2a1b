"""Statistics that a merge of aligned networks reads: the order of units, and regressions."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergejax.alignment.assignment import check_structure
from mergejax.alignment.permutations import Permutations, sources
from mergejax.alignment.structure import Symmetries, check, size_of
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, did_you_mean, raise_all, some
from mergejax.leaves import LeafInfo, as_matrix, describe
from mergejax.units import Units, take


def statistics(
    symmetries: Symmetries, permutations: Sequence[Permutations], experts: Sequence[Tree]
) -> dict[str, list[dict[str, Units]]]:
    """The statistic 'permutation' of every expert, for `mj.merge(..., stats=...)`.

    Args:
        symmetries: of the experts.
        permutations: one dict per expert, `{}` for one that stays as it is.
        experts: the models, or trees of their shapes.

    Returns:
        {'permutation': [{leaf name: Units}, ...]}.

    Raises:
        MergeError: not one dict per expert, symmetries that do not fit, experts of different
            structure, groups that have another number of units in another expert.

    Example:
        >>> from mergejax import alignment
        >>> group = alignment.Symmetries({'h': alignment.Group(2)}, {'b': ('h',)})
        >>> stats = statistics(group, [{}, {'h': np.array([1, 0])}], [{'b': np.ones(2)}] * 2)
        >>> stats['permutation'][1]['b'].indices[0].tolist()
        [1, 0]
    """
    if len(permutations) != len(experts):
        raise MergeError(
            f"statistics: there are {len(permutations)} sets of permutations for {len(experts)} "
            "experts; give one each, {} for one that stays as it is"
        )
    check(symmetries, experts[0])
    first, *others = _leaves(experts)
    for other in others:
        check_structure(first, other)
    whole = _same_groups(symmetries, permutations)
    shapes = {n: tuple(x.shape) for n, x in first.items()}
    found = []
    for own in whole:
        widths = {n: group.size for n, group in symmetries.groups.items()}
        widths |= {n: p.shape[-1] for n, p in own.items()}
        units = {}
        for name, axes in symmetries.axes.items():
            indices = sources(symmetries, axes, shapes[name], own)
            pairs = zip(axes, shapes[name], strict=True)
            shape = tuple(size_of(axis, widths, n) for axis, n in pairs)
            if indices:
                units[name] = Units({i: x.astype(np.int32) for i, x in indices.items()}, shape)
        found.append(units)
    return {"permutation": found}


def _same_groups(
    symmetries: Symmetries, permutations: Sequence[Permutations]
) -> list[dict[str, np.ndarray]]:
    """All permutations of every expert, the identity where one is left out."""
    names = dict.fromkeys(name for own in permutations for name in own)
    problems, whole = [], [dict(own) for own in permutations]
    for name in names:
        if name not in symmetries.groups:
            hint = did_you_mean(name, symmetries.groups)
            problems.append(f"no group is called '{name}', {hint}")
            continue
        group = symmetries.groups[name]
        shape = (*(symmetries.groups[outer].size for outer in group.within), group.size)
        for own in whole:
            own.setdefault(name, np.broadcast_to(np.arange(group.size, dtype=np.int32), shape))
        shapes = {np.shape(own[name]) for own in whole}
        if len(shapes) > 1:
            problems.append(
                f"group '{name}' has permutations of shapes {sorted(shapes)}; all experts must "
                "have the same number of places, -1 for an empty one"
            )
    raise_all(problems)
    return whole


def regression(
    joint: Mapping[str, Any],
    stats: Mapping[str, Sequence[Mapping[str, Units]]],
    experts: Sequence[Tree],
    *,
    layout: str = "flax",
    layouts: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    r"""The statistics that `least_squares` solves, for `mj.merge(..., shared=...)`.

    With S and M the maps of each expert's inputs and outputs to the merged ones and :math:`W_0` the
    joined kernel, :math:`G = Z^\top Z` and the residual :math:`Z^\top(Y - ZW_0 - b_0)` follow from
    the joint Gram matrix alone.

    Args:
        joint: of `mj.collect.joint_gram` on the experts, in their order.
        stats: of `statistics`.
        experts: the models.
        layout, layouts: as for `mj.merge`.

    Returns:
        {'aligned_gram': {leaf: [in + 1, in + 1]}, 'aligned_residual': {leaf: [in + 1, out]},
        'aligned_owners': {leaf: bool [experts, in + 1 + out]}} for kernels and the biases
        beside them.

    Raises:
        MergeError: a Gram matrix of another number of experts or inputs, or of an unknown leaf, or
            that is not finite; experts of different structure.

    Warns:
        UserWarning: fewer rows than inputs; the regression is then regularised towards the join.

    Example:
        >>> w = {'kernel': np.ones((2, 1), np.float32)}
        >>> joint, stats = {'kernel': np.eye(5)}, {'permutation': [{}, {}]}
        >>> shared = regression(joint, stats, [w, w])
        >>> shared['aligned_residual']['kernel'].shape
        (3, 1)
    """
    trees = _leaves(experts)
    for other in trees[1:]:
        check_structure(trees[0], other)
    infos = {
        info.name: info
        for info in describe(
            {n: (tuple(x.shape), x.dtype) for n, x in trees[0].items()},
            style=layout,
            layouts=layouts,
        )
    }
    raise_all(_problems(joint, infos, len(experts)))
    _tell_of_few_rows(joint, len(experts))
    shared: dict[str, dict[str, Any]] = {
        name: {} for name in ("aligned_gram", "aligned_residual", "aligned_owners")
    }
    for name, q in joint.items():
        units = [tree.get(name) for tree in stats["permutation"]]
        found = _layer(np.asarray(q, np.float64), infos[name], units, [t[name] for t in trees])
        bias = name.removesuffix("kernel") + "bias"
        if name.endswith("weight"):
            bias = name.removesuffix("weight") + "bias"
        for leaf in (name, bias) if bias in infos and infos[bias].shape else (name,):
            for kind, value in zip(shared, found, strict=True):
                shared[kind][leaf] = value
    return shared


def _leaves(experts: Sequence[Tree]) -> list[dict[str, Any]]:
    return [leaves_by_name(tree, f"expert {i}")[0] for i, tree in enumerate(experts)]


def _tell_of_few_rows(joint: Mapping[str, Any], experts: int) -> None:
    """Warns where there are fewer rows than inputs: the regression is then decided by its ridge."""
    rows = getattr(joint, "rows", {})
    few = [name for name in rows if rows[name] < 1 + (len(joint[name]) - 1) // experts]
    if few:
        counts = [int(rows[name]) for name in few]
        warnings.warn(
            f"regression: the inputs of {some(few)} were measured on {min(counts)} rows, fewer "
            "than inputs, so the ridge keeps what they leave open at the joined kernels; give "
            "joint_gram more examples",
            stacklevel=3,
        )


def _problems(joint: Mapping[str, Any], infos: Mapping[str, LeafInfo], experts: int) -> list[str]:
    problems = []
    for name, q in joint.items():
        info = infos.get(name)
        if info is None or not info.layout:
            problems.append(
                f"joint Gram matrix of '{name}': no kernel has this name, "
                f"{did_you_mean(name, infos)}"
            )
            continue
        inputs = info.size
        for n, letter in zip(info.shape, info.layout, strict=True):
            inputs //= n if letter == "o" else 1
        if np.shape(q) != (experts * inputs + 1,) * 2:
            problems.append(
                f"joint Gram matrix of '{name}' has shape {np.shape(q)}, expected "
                f"{(experts * inputs + 1,) * 2} for {experts} experts with {inputs} inputs; "
                "collect it again with these models"
            )
        elif not np.isfinite(np.asarray(q)).all():
            problems.append(
                f"joint Gram matrix of '{name}' is not finite; check the models and the data for "
                "NaN and Inf, and collect it again"
            )
    return problems


def _layer(
    q: np.ndarray, info: LeafInfo, units: Sequence[Units | None], kernels: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """G, the residual and the owners of one layer."""
    count = len(kernels)
    rows = [_rows(info, one) for one in units]
    readers = np.stack([row >= 0 for row in rows])
    pairs = zip(units, kernels, strict=True)
    moved = [_matrix(info, one, np.asarray(kernel, np.float32)) for one, kernel in pairs]
    writers = np.stack(
        [_matrix(info, one, np.ones(info.shape, np.float32)).any(0) for one in units]
    )
    length = (len(q) - 1) // count
    # Columns of the joint Gram matrix, in aligned order; behind them the one.
    places = [
        np.append(np.where(row >= 0, row + k * length, -1), len(q) - 1)
        for k, row in enumerate(rows)
    ]
    weights = [np.append(own / readers.sum(0), 1 / count) for own in readers]
    kernels_out = [kernel / writers.sum(0) for kernel in moved]
    size = readers.shape[1] + 1
    gram, cross = np.zeros((size, size)), np.zeros((size, writers.shape[1]))
    for mine, weight in zip(places, weights, strict=True):
        for others, other_weight, kernel in zip(places, weights, kernels_out, strict=True):
            block = q[np.ix_(mine, others)]
            block = np.where((mine < 0)[:, None] | (others < 0)[None], 0, block) * weight[:, None]
            gram += block * other_weight[None]
            cross += block[:, :-1] @ kernel
    residual = cross - gram[:, :-1] @ np.sum(kernels_out, axis=0)
    owners = np.hstack([readers, np.ones((count, 1), bool), writers])
    return gram.astype(np.float32), residual.astype(np.float32), owners


def _matrix(info: LeafInfo, units: Units | None, kernel: np.ndarray) -> np.ndarray:
    moved = kernel if units is None else take(kernel, units.indices)
    return np.asarray(as_matrix(jnp.asarray(moved), info.layout)[0], np.float64)


def _rows(info: LeafInfo, units: Units | None) -> np.ndarray:
    """For each input of the aligned kernel, the expert's own input; -1 where it has none."""
    matrix, restore = as_matrix(jnp.zeros(info.shape, jnp.float32), info.layout)
    numbers = 1 + jnp.arange(matrix.shape[0], dtype=jnp.float32)[:, None]
    named = np.asarray(restore(jnp.broadcast_to(numbers, matrix.shape)))
    return _matrix(info, units, named).max(1).astype(np.int64) - 1
