"""Costs between the units of two models, and the assignment that is best for them."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mergejax.alignment.permutations import Permutations, compose, identity, sources
from mergejax.alignment.structure import Axis, Symmetries, groups_of, movable, size_of
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, raise_all
from mergejax.leaves import STATISTIC, is_floating, role_of
from mergejax.units import take

Labels = tuple[str | None, ...]  # the group of each axis
Piece = tuple[Labels, np.ndarray, np.ndarray]
# A better sum of costs than this share of the largest is rounding of float32 sums.
GAIN = 1e-6
BLOCK = 2**25  # numbers in a block of costs


def assign(costs: np.ndarray, where: str = "the costs") -> np.ndarray:
    """The permutation with the largest sum of costs[..., i, p[i]], by SciPy on the host.

    Args:
        costs: similarity of unit i of one model to unit j of another, [..., n, n].
        where: names the costs in an error.

    Returns:
        p, int32 [..., n].

    Raises:
        MergeError: costs that are not finite.

    Example:
        >>> assign(np.array([[1.0, 5.0], [0.0, 1.0]])).tolist()
        [1, 0]
    """
    if not np.isfinite(costs).all():
        raise MergeError(
            f"{where} are not finite, so units cannot be matched; check both models for NaN and Inf"
        )
    flat = costs.reshape(-1, *costs.shape[-2:])
    return np.asarray([_best(cost) for cost in flat], np.int32).reshape(costs.shape[:-1])


def _best(cost: np.ndarray) -> np.ndarray:
    wanted = cost.argmax(axis=1)
    # Where all units want another partner each, nothing is better: the sum of the largest. This is
    # the usual case in later sweeps, and saves the time of the cubic algorithm.
    if np.bincount(wanted, minlength=len(cost)).all():
        return wanted
    return linear_sum_assignment(cost, maximize=True)[1]


def pieces(axes: Sequence[Axis], sizes: Mapping[str, int], *arrays: np.ndarray) -> Iterator[Any]:
    """Cuts arrays of one leaf into parts in which every axis belongs to one group or none."""
    for i, axis in enumerate(axes):
        if isinstance(axis, tuple):
            parts = [size_of(part, sizes, 1) for part in axis]
            wider = [x.reshape(*x.shape[:i], *parts, *x.shape[i + 1 :]) for x in arrays]
            labels = (None if isinstance(part, int) else part for part in axis)
            yield from pieces((*axes[:i], *labels, *axes[i + 1 :]), sizes, *wider)
            return
        if isinstance(axis, list):
            start = 0
            for part in axis:
                stop = start + size_of(part, sizes, 1)
                taken = [x[(slice(None),) * i + (slice(start, stop),)] for x in arrays]
                label = None if isinstance(part, int) else part
                yield from pieces((*axes[:i], label, *axes[i + 1 :]), sizes, *taken)
                start = stop
            return
    yield (tuple(axes), *arrays)


@dataclasses.dataclass
class Pair:
    """A reference and a model on its way to it.

    Attributes:
        reference: leaves that count, float32.
        moving: those of the model, permuted so far.
        permutations: so far.
    """

    symmetries: Symmetries
    reference: dict[str, np.ndarray]
    moving: dict[str, np.ndarray]
    permutations: dict[str, np.ndarray]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: group.size for name, group in self.symmetries.groups.items()}

    def leaves(self, group: str) -> list[str]:
        axes = self.symmetries.axes
        return [n for n in self.reference if any(group in groups_of(a) for a in axes[n])]

    def pieces(self, leaf: str) -> Iterator[Piece]:
        yield from pieces(
            self.symmetries.axes[leaf], self.sizes, self.reference[leaf], self.moving[leaf]
        )

    def neighbours(self, group: str) -> set[str]:
        axes = self.symmetries.axes
        return {n for leaf in self.leaves(group) for axis in axes[leaf] for n in groups_of(axis)}

    def children(self, group: str) -> list[str]:
        groups = self.symmetries.groups
        return [name for name in movable(self.symmetries) if group in groups[name].within]

    def move(self, change: Permutations) -> None:
        """Permutes the model further."""
        self.permutations = compose(self.symmetries, self.permutations, change)
        for leaf in {leaf for group in change for leaf in self.leaves(group)}:
            x, axes = self.moving[leaf], self.symmetries.axes[leaf]
            self.moving[leaf] = take(x, sources(self.symmetries, axes, x.shape, change))

    def objective(self, leaves: Collection[str] | None = None) -> float:
        """Sum of products of the reference and the model, over the leaves."""
        names = self.reference if leaves is None else leaves
        return float(
            sum(
                np.vdot(self.reference[n].astype(np.float64), self.moving[n].astype(np.float64))
                for n in names
            )
        )


def make_pair(
    symmetries: Symmetries, reference: Tree, params: Tree, start: Permutations | None = None
) -> Pair:
    """Checks two models against each other, and takes the leaves that count for matching.

    Running statistics of BatchNorm are permuted with their units, but do not count.

    Raises:
        MergeError: models of different structure, with what differs; values that are not finite.
    """
    ours, theirs = (
        leaves_by_name(tree, owner)[0]
        for tree, owner in ((reference, "the reference"), (params, "the model"))
    )
    check_structure(ours, theirs)
    counted = [
        name
        for name, x in ours.items()
        if name in symmetries.axes
        and is_floating(x.dtype)
        and role_of(name, x.shape, x.dtype) != STATISTIC
    ]
    sides = [{n: np.asarray(side[n], np.float32) for n in counted} for side in (ours, theirs)]
    raise_all(
        [
            f"leaf '{name}' of {owner} has values that are not finite; nothing can be matched to it"
            for side, owner in zip(sides, ("the reference", "the model"), strict=True)
            for name, x in side.items()
            if not np.isfinite(x).all()
        ]
    )
    pair = Pair(symmetries, sides[0], sides[1], identity(symmetries))
    if start:
        pair.move(start)
    return pair


def check_structure(reference: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuses models whose leaves or shapes differ.

    Raises:
        MergeError: with every leaf that differs.
    """
    problems = [
        f"leaf '{name}' is only in {owner}; align networks of one structure"
        for owner, own, rest in (
            ("the reference", reference, other),
            ("the model", other, reference),
        )
        for name in own
        if name not in rest
    ]
    problems += [
        f"leaf '{name}' has shape {tuple(x.shape)} in the reference and "
        f"{tuple(other[name].shape)} in the model; align networks of one structure"
        for name, x in reference.items()
        if name in other and tuple(x.shape) != tuple(other[name].shape)
    ]
    raise_all(problems)


def units(
    piece: tuple[Any, ...], place: int, group: str, within: Sequence[str]
) -> list[np.ndarray]:
    """The arrays as [outer units..., units, rest], for the axis at a place."""
    labels, *arrays = piece
    outer = [labels.index(name) for name in within]
    rest = [i for i in range(len(labels)) if i != place and i not in outer]
    moved = [x.transpose(*outer, place, *rest) for x in arrays]
    return [x.reshape(*x.shape[: len(outer) + 1], -1) for x in moved]


def costs(pair: Pair, group: str, known: Collection[str] | None = None) -> np.ndarray:
    """How similar the units of a group are, given how all other groups are matched.

    Args:
        pair: the models; the result is in the basis of the permuted one.
        group: whose units.
        known: the groups whose matching counts already; by default all.

    Returns:
        float64 [outer sizes..., n, n]; zeros where nothing is known.
    """
    own = pair.symmetries.groups[group]
    outer = tuple(pair.symmetries.groups[name].size for name in own.within)
    total = np.zeros((*outer, own.size, own.size))
    children = set(pair.children(group))
    for leaf in pair.leaves(group):
        for piece in pair.pieces(leaf):
            labels = piece[0]
            for place in (i for i, label in enumerate(labels) if label == group):
                others = {n for i, n in enumerate(labels) if n is not None and i != place}
                if others & children or not _all_known(pair, others - {group}, known):
                    continue
                a, b = units(piece, place, group, own.within)
                total += a @ np.swapaxes(b, -1, -2)
    for child in children:
        total += _best_inside(pair, group, child, known)
    return total


def _all_known(pair: Pair, names: set[str], known: Collection[str] | None) -> bool:
    groups = pair.symmetries.groups
    return known is None or all(name in known or groups[name].fixed for name in names)


def _best_inside(pair: Pair, group: str, child: str, known: Collection[str] | None) -> np.ndarray:
    """For each two units, how similar they are when the child's units inside are matched best.

    Leaves in which two groups lie within the units are left out: they cannot be matched at once.
    """
    within = pair.symmetries.groups[child].within
    siblings = set(pair.children(group)) - {child}
    pairs = []
    for leaf in pair.leaves(child):
        for piece in pair.pieces(leaf):
            labels = piece[0]
            others = {n for n in labels if n is not None} - {child, *within}
            if child not in labels or others & siblings or not _all_known(pair, others, known):
                continue
            pairs.append(units(piece, labels.index(child), child, within))
    place = within.index(group)
    own = pair.symmetries.groups[group]
    shape = tuple(pair.symmetries.groups[name].size for name in own.within)
    found = np.zeros((*shape, own.size, own.size))
    if not pairs or place != len(within) - 1:
        return found
    size = pair.symmetries.groups[child].size
    # As few products as memory allows: thousands of small ones keep threads waiting.
    rows = max(1, BLOCK // (own.size * size**2))
    for outer in np.ndindex(*shape):
        for first in range(0, own.size, rows):
            cost = sum(
                a[outer][first : first + rows].reshape(-1, a.shape[-1])
                @ b[outer].reshape(-1, b.shape[-1]).T
                for a, b in pairs
            )
            grid = cost.reshape(-1, size, own.size, size).swapaxes(1, 2)
            for i, j in np.ndindex(*grid.shape[:2]):
                best = grid[i, j][np.arange(size), _best(grid[i, j])]
                found[(*outer, first + i, j)] = best.sum()
    return found
