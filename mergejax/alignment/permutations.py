"""Permutations of a model's groups: made, applied, composed and undone."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.alignment.structure import (
    Axis,
    Symmetries,
    check,
    groups_of,
    movable,
    shape_of,
    size_of,
)
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import did_you_mean, raise_all
from mergejax.units import take

Permutations = Mapping[str, np.ndarray]


def check_permutations(symmetries: Symmetries, permutations: Permutations) -> None:
    """Refuses arrays that are no permutations of the groups.

    Raises:
        MergeError: unknown groups, another shape, an array that leaves out or repeats a unit.
    """
    problems = []
    for name, array in permutations.items():
        group = symmetries.groups.get(name)
        if group is None or group.fixed:
            hint = did_you_mean(name, movable(symmetries))
            problems.append(f"no group that may be permuted is called '{name}', {hint}")
            continue
        shape = shape_of(symmetries, name)
        found = np.asarray(array)
        if found.shape != shape:
            problems.append(
                f"the permutation of group '{name}' has shape {found.shape}, expected {shape}"
            )
        elif not (np.sort(found, axis=-1) == np.arange(group.size)).all():
            problems.append(
                f"the permutation of group '{name}' is none: each number from 0 to "
                f"{group.size - 1} must occur once"
            )
    raise_all(problems)


def identity(symmetries: Symmetries) -> dict[str, np.ndarray]:
    """The permutations that leave every unit where it is."""
    return {
        name: np.broadcast_to(
            np.arange(symmetries.groups[name].size, dtype=np.int32), shape_of(symmetries, name)
        ).copy()
        for name in movable(symmetries)
    }


def random(symmetries: Symmetries, seed: int) -> dict[str, np.ndarray]:
    """A random permutation of every group.

    Example:
        >>> from mergejax import alignment
        >>> symmetries = alignment.Symmetries({'hidden': alignment.Group(4)}, {})
        >>> random(symmetries, seed=0)['hidden'].tolist()
        [2, 0, 1, 3]
    """
    generator = np.random.default_rng(seed)
    return {name: generator.permuted(p, axis=-1) for name, p in identity(symmetries).items()}


def sources(
    symmetries: Symmetries, axes: Sequence[Axis], shape: Sequence[int], permutations: Permutations
) -> dict[int, np.ndarray]:
    """For each axis of a leaf that moves, where its aligned entries come from.

    Args:
        symmetries: the groups.
        axes: of the leaf.
        shape: of the leaf before it is aligned.
        permutations: by group; an entry -1 names a unit that the model lacks.

    Returns:
        By axis, integers that broadcast against the aligned leaf; -1 where the model has nothing.
    """
    sizes = {name: group.size for name, group in symmetries.groups.items()}
    widths = {**sizes, **{name: p.shape[-1] for name, p in permutations.items()}}
    rank = len(shape)
    positions = []
    outer: dict[str, np.ndarray] = {}
    for i, (axis, n) in enumerate(zip(axes, shape, strict=True)):
        place = [1] * rank
        place[i] = -1
        positions.append(np.arange(size_of(axis, widths, n)).reshape(place))
        outer.update(_coordinates(axis, positions[i], widths))
    found = {}
    for i, axis in enumerate(axes):
        if any(name in permutations for name in groups_of(axis)):
            find = _Sources(symmetries, permutations, sizes, widths)
            found[i] = find(axis, positions[i], outer)
    return found


def _coordinates(axis: Axis, local: np.ndarray, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The positions in each group along an axis, where every entry of the axis has one."""
    if isinstance(axis, str):
        return {axis: local}
    found: dict[str, np.ndarray] = {}
    if isinstance(axis, tuple):
        for part in reversed(axis):
            size = size_of(part, widths, 1)
            found.update(_coordinates(part, local % size, widths))
            local = local // size
    return found


@dataclasses.dataclass(frozen=True)
class _Sources:
    """Position in the model that is moved, of positions in the aligned one."""

    symmetries: Symmetries
    permutations: Permutations
    sizes: Mapping[str, int]
    widths: Mapping[str, int]

    def __call__(self, axis: Axis, local: np.ndarray, outer: Mapping[str, np.ndarray]) -> Any:
        if isinstance(axis, str) and axis in self.permutations:
            within = self.symmetries.groups[axis].within
            return self.permutations[axis][(*(outer[name] for name in within), local)]
        if isinstance(axis, tuple):
            return self._factors(axis, local, outer)
        if isinstance(axis, list):
            return self._segments(axis, local, outer)
        return local

    def _factors(self, axis: tuple, local: np.ndarray, outer: Mapping[str, np.ndarray]) -> Any:
        outer = {**outer, **_coordinates(axis, local, self.widths)}
        source, missing, stride = np.zeros_like(local), np.zeros(local.shape, bool), 1
        for part in reversed(axis):
            width = size_of(part, self.widths, 1)
            entry = self(part, local % width, outer)
            source, missing = source + stride * entry, missing | (entry < 0)
            local, stride = local // width, stride * size_of(part, self.sizes, 1)
        return np.where(missing, -1, source)

    def _segments(self, axis: list, local: np.ndarray, outer: Mapping[str, np.ndarray]) -> Any:
        source, start, begin = np.full_like(local, -1), 0, 0
        for part in axis:
            width = size_of(part, self.widths, 1)
            inside = (local >= start) & (local < start + width)
            entry = self(part, np.clip(local - start, 0, width - 1), outer)
            source = np.where(inside & (entry >= 0), entry + begin, source)
            start, begin = start + width, begin + size_of(part, self.sizes, 1)
        return source


def apply(symmetries: Symmetries, permutations: Permutations, params: Tree) -> Tree:
    """The same model with its units in another order.

    Unit i of the result is unit permutation[i] of the model, in every group. Groups that are not
    named stay as they are. A permutation may have more entries than the group has units: -1 leaves
    a place empty.

    Args:
        symmetries: of the model.
        permutations: integers by group, [size], or [outer sizes..., size] for a group within
            others, where the outer positions are those of the result.
        params: the model.

    Returns:
        A tree like `params`.

    Raises:
        MergeError: symmetries that do not fit the model, or arrays that are no permutations.

    Example:
        >>> import jax.numpy as jnp
        >>> from mergejax import alignment
        >>> symmetries = alignment.Symmetries({'hidden': alignment.Group(3)}, {'bias': ('hidden',)})
        >>> params = {'bias': jnp.array([10.0, 20.0, 30.0])}
        >>> print(apply(symmetries, {'hidden': np.array([2, 0, 1])}, params)['bias'])
        [30. 10. 20.]
    """
    check(symmetries, params)
    check_permutations(symmetries, permutations)
    return moved(symmetries, permutations, params)


def moved(symmetries: Symmetries, permutations: Permutations, params: Tree) -> Tree:
    """`apply` without its checks; places may be left empty."""
    leaves, back = leaves_by_name(params, "the model")
    found = {}
    for name, x in leaves.items():
        axes = symmetries.axes.get(name, ())
        indices = sources(symmetries, axes, x.shape, permutations) if axes else {}
        found[name] = take(x, indices) if indices else x
    return back(found)


def compose(symmetries: Symmetries, first: Permutations, then: Permutations) -> dict[str, Any]:
    """One set of permutations for two that are applied one after the other.

    Example:
        >>> from mergejax import alignment
        >>> symmetries = alignment.Symmetries({'hidden': alignment.Group(3)}, {})
        >>> first, then = {'hidden': np.array([2, 0, 1])}, {'hidden': np.array([1, 0, 2])}
        >>> compose(symmetries, first, then)['hidden'].tolist()
        [0, 2, 1]
    """
    start = {**identity(symmetries), **first}
    found = {}
    for name, p in start.items():
        axes = (*symmetries.groups[name].within, name)
        found[name] = take(p, sources(symmetries, axes, p.shape, then))
    return found


def invert(symmetries: Symmetries, permutations: Permutations) -> dict[str, np.ndarray]:
    """The permutations that undo others.

    Example:
        >>> from mergejax import alignment
        >>> symmetries = alignment.Symmetries({'hidden': alignment.Group(3)}, {})
        >>> invert(symmetries, {'hidden': np.array([2, 0, 1])})['hidden'].tolist()
        [1, 2, 0]
    """
    whole = {**identity(symmetries), **permutations}
    found: dict[str, np.ndarray] = {}
    for name in movable(symmetries):  # outer groups first: their inverse places the inner ones
        inner = np.argsort(whole[name], axis=-1).astype(np.int32)
        axes = (*symmetries.groups[name].within, None)
        found[name] = take(inner, sources(symmetries, axes, inner.shape, found))
    return found


def alike(symmetries: Symmetries, first: Permutations, second: Permutations) -> bool:
    """Whether two sets of permutations are the same; what is left out is the identity."""
    whole = identity(symmetries)
    return all(np.array_equal(first.get(name, p), second.get(name, p)) for name, p in whole.items())
