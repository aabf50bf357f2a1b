"""The permutation symmetries of a model: groups of units, and the axes they act on."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, did_you_mean, raise_all

# None: pinned. 'group'. int: pinned, of that size. Tuple: factors, last fastest. List: segments.
Axis = None | str | int | tuple | list
Permutations = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that may be permuted together.

    Attributes:
        size: number of units.
        within: groups outside of it, outermost first: each of their units has units of its own,
            as every head has its own head dimensions and every expert its own hidden units.
        fixed: whether it is never permuted, but other groups lie within it (stacked layers).
        widens: whether some of its units may be kept apart, which adds units. Not so where a norm,
            a softmax or a mean runs over them: more units change its statistics. Nor for units
            within others; those of a head that is kept apart go with it.
    """

    size: int
    within: tuple[str, ...] = ()
    fixed: bool = False
    widens: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Symmetries:
    """Which groups act on which axes of a model's leaves.

    An axis is None (pinned), the name of a group, a tuple of factors in C order, the last one
    fastest (`('heads', 'dim')`; a flattened image is `(49, 'channels')`), or a list of segments
    (`['a', 'b']`, a concatenation). A number in a tuple or list is a pinned part of that size.

    Attributes:
        groups: by name.
        axes: by leaf name, one entry per axis; leaves without an entry are not permuted.
        pinned: by (leaf name, axis), why it may not be permuted.
        model: (apply_fn, example) that they were derived from; matchers verify them on it.

    Example:
        >>> mlp = Symmetries(
        ...     groups={'hidden': Group(64)},
        ...     axes={'in/kernel': (None, 'hidden'), 'in/bias': ('hidden',),
        ...           'out/kernel': ('hidden', None)},
        ... )
        >>> print(mlp)
        hidden: 64 units, in/kernel[1], in/bias[0], out/kernel[0]
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis, ...]]
    pinned: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    model: tuple[Callable[..., Any], Any] | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        lines = []
        for name, group in self.groups.items():
            places = [
                f"{leaf}[{i}]"
                for leaf, axes in self.axes.items()
                for i, axis in enumerate(axes)
                if name in groups_of(axis)
            ]
            inside = f" in each of {', '.join(group.within)}" if group.within else ""
            count = f"{group.size} {'fixed ' if group.fixed else ''}units{inside}"
            lines.append(f"{name}: {count}, {', '.join(places)}")
        lines += [f"pinned {leaf}[{i}]: {reason}" for (leaf, i), reason in self.pinned.items()]
        return "\n".join(lines)


def groups_of(axis: Axis) -> Iterator[str]:
    """The groups that act on an axis."""
    if isinstance(axis, str):
        yield axis
    elif isinstance(axis, tuple | list):
        for part in axis:
            yield from groups_of(part)


def size_of(axis: Axis, sizes: Mapping[str, int], whole: int) -> int:
    """The length of an axis, given the sizes of groups; a pinned one keeps its own."""
    match axis:
        case None:
            return whole
        case str():
            return sizes[axis]
        case int():
            return axis
        case tuple():
            return math.prod(size_of(part, sizes, 1) for part in axis)
    return sum(size_of(part, sizes, 1) for part in axis)


def check(symmetries: Symmetries, params: Tree) -> None:
    """Refuses symmetries that do not fit a model.

    Raises:
        MergeError: unknown groups or leaves, axes of another number or length.
    """
    leaves, _ = leaves_by_name(params, "the model")
    groups, problems = symmetries.groups, []
    problems += [
        f"group '{name}' lies within '{outer}', which is no group, {did_you_mean(outer, groups)}"
        for name, group in groups.items()
        for outer in group.within
        if outer not in groups
    ]
    sizes = {name: group.size for name, group in groups.items()}
    for leaf, axes in symmetries.axes.items():
        if leaf not in leaves:
            problems.append(
                f"symmetries name a leaf '{leaf}' that the model lacks, "
                f"{did_you_mean(leaf, leaves)}"
            )
            continue
        shape = tuple(leaves[leaf].shape)
        unknown = [name for axis in axes for name in groups_of(axis) if name not in groups]
        problems += [
            f"leaf '{leaf}' is in group '{name}', which is not declared, "
            f"{did_you_mean(name, groups)}"
            for name in unknown
        ]
        if len(axes) != len(shape):
            problems.append(
                f"symmetries give leaf '{leaf}' {len(axes)} axes, but its shape is {shape}; "
                "give one entry per axis, None for a pinned one"
            )
        elif not unknown:
            problems += [
                f"axis {i} of leaf '{leaf}' has length {n}, but its groups {axis!r} have "
                f"{size_of(axis, sizes, n)}; all axes of one group have its size"
                for i, (axis, n) in enumerate(zip(axes, shape, strict=True))
                if size_of(axis, sizes, n) != n
            ]
    raise_all(problems)


def movable(symmetries: Symmetries) -> list[str]:
    """The groups that may be permuted, outer ones before those within."""
    names = [name for name, group in symmetries.groups.items() if not group.fixed]
    return sorted(names, key=lambda name: len(symmetries.groups[name].within))


def shape_of(symmetries: Symmetries, name: str) -> tuple[int, ...]:
    """The shape of a group's permutation: sizes of the groups outside, then its own."""
    group = symmetries.groups[name]
    return (*(symmetries.groups[outer].size for outer in group.within), group.size)


def require(symmetries: Symmetries) -> None:
    """Refuses a model without any group that may be permuted.

    Raises:
        MergeError: with the reasons.
    """
    if movable(symmetries):
        return
    reasons = [f"{leaf}[{i}]: {why}" for (leaf, i), why in list(symmetries.pinned.items())[:5]]
    raise MergeError(
        "no axis of the model may be permuted"
        + (f" ({'; '.join(reasons)})" if reasons else "")
        + "; write its symmetries by hand with mj.alignment.Symmetries"
    )
