"""Units of one network that do nearly the same, merged: how many features a layer really has."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

from mergejax.alignment.assignment import pieces
from mergejax.alignment.maps import Maps, transport
from mergejax.alignment.structure import Symmetries, check
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, raise_all


class Features(NamedTuple):
    """A network with fewer units.

    Attributes:
        params: its tree, with narrower leaves.
        groups: by group of the symmetries, the unit of the result that every unit went into, int32.
    """

    params: Tree
    groups: dict[str, np.ndarray]


def merge_features(
    symmetries: Symmetries,
    params: Tree,
    *,
    threshold: float = 0.1,
    most: float = 1.0,
    rule: Literal["mean_in", "sum_in"] = "mean_in",
) -> Features:
    r"""Merges units of one network whose weights, in and out, are nearest, again and again.

    The distance of two units is that of their incoming and outgoing weights together; of merged
    ones, of the means. The nearest two are merged while

    .. math:: \min D\le\beta\max D_0

    with :math:`D_0` the distances at the beginning. A merged unit has the mean of its incoming
    weights and the sum of its outgoing ones: exact for equal units, whatever the activation.

    Args:
        symmetries: of the model, see `symmetries`; groups that cannot change their width (under a
            norm, or inside other groups) stay as they are.
        params: the tree.
        threshold: :math:`\beta`.
        most: the largest share of a group's units that is merged away.
        rule: 'sum_in' sums what comes in and averages what goes out, as the paper does; that is
            exact for activations such as ReLU only, and without norms.

    Returns:
        `Features`.

    Raises:
        MergeError: numbers out of range; symmetries of another model; values that are not finite.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries(
        ...     {'hidden': alignment.Group(3)},
        ...     {'in/kernel': (None, 'hidden'), 'out/kernel': ('hidden', None)},
        ... )
        >>> tree = {'in': {'kernel': np.array([[1.0, 1.0, 5.0]])},
        ...         'out': {'kernel': np.array([[2.0], [2.0], [1.0]])}}
        >>> found = merge_features(mlp, tree, threshold=0.1)
        >>> found.params['in']['kernel'].tolist(), found.params['out']['kernel'].tolist()
        ([[1.0, 5.0]], [[4.0], [1.0]])

    Iterative Feature Merging (Chen et al., 2024, arXiv:2310.06756).
    """
    problems = [
        f"merge_features: {name} must be in [0, 1], not {value}"
        for name, value in (("threshold", threshold), ("most", most))
        if not 0 <= value <= 1
    ]
    if rule not in ("mean_in", "sum_in"):
        problems.append(f"merge_features: rule must be 'mean_in' or 'sum_in', not '{rule}'")
    raise_all(problems)
    check(symmetries, params)
    merged = {}
    outside = {outer for group in symmetries.groups.values() for outer in group.within}
    for name, group in symmetries.groups.items():
        if name in outside or group.within or not group.widens:
            continue
        labels = _clusters(_weights(symmetries, params, name), name, threshold, most)
        merged[name] = labels
        params = transport(symmetries, _maps(name, labels, rule), params)
        smaller = dataclasses.replace(group, size=int(labels.max()) + 1)
        symmetries = dataclasses.replace(symmetries, groups={**symmetries.groups, name: smaller})
    return Features(params, merged)


def _weights(symmetries: Symmetries, params: Tree, group: str) -> np.ndarray:
    """All that the network holds of every unit of a group, float64 [units, weights]."""
    sizes = {name: one.size for name, one in symmetries.groups.items()}
    leaves, _ = leaves_by_name(params, "the model")
    rows = []
    for leaf, axes in symmetries.axes.items():
        for labels, part in pieces(axes, sizes, np.asarray(leaves[leaf], np.float64)):
            for axis, label in enumerate(labels):
                if label == group:
                    rows.append(np.moveaxis(part, axis, 0).reshape(sizes[group], -1))
    return np.concatenate(rows, axis=1)


def _clusters(weights: np.ndarray, group: str, threshold: float, most: float) -> np.ndarray:
    """The new unit of every unit; new ones are numbered in the order of their first old one."""
    count = len(weights)
    if not np.isfinite(weights).all():
        raise MergeError(
            f"the weights of group '{group}' are not finite; check the model for NaN and Inf"
        )
    owners = np.arange(count)
    if count > 1:
        largest = distance.pdist(weights).max()
        tree = hierarchy.linkage(weights, "centroid")
        near = np.minimum.accumulate(tree[:, 2] <= threshold * largest)
        steps = min(int(near.sum()), int(most * count + 1e-9))
        for step, (a, b) in enumerate(tree[:steps, :2].astype(int)):
            owners[(owners == a) | (owners == b)] = count + step
    _, first, labels = np.unique(owners, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels].astype(np.int32)


def _maps(group: str, labels: np.ndarray, rule: str) -> Maps:
    """The mean of what comes in and the sum of what goes out, or the other way round."""
    total = np.eye(int(labels.max()) + 1)[labels]
    mean = total / total.sum(0)
    reads, writes = (mean, total) if rule == "sum_in" else (total, mean)
    return Maps({group: reads}, {group: writes})
