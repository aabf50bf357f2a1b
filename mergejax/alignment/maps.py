"""Units mapped linearly to the units of another network: the general form of a permutation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergejax.alignment.structure import Axis, Symmetries, check, groups_of, shape_of, size_of
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import did_you_mean, raise_all
from mergejax.leaves import describe


class Maps(NamedTuple):
    """Where the units of a model go, by group.

    Attributes:
        reads: share of unit i in what unit j of the result passes on, [units, new units]; rows sum
            to one where nothing is lost.
        writes: share of unit i in what unit j of the result receives; columns sum to one where the
            result is a mean.

    For a group within others both are [outer sizes..., new outer sizes..., units, new units].
    """

    reads: Mapping[str, np.ndarray]
    writes: Mapping[str, np.ndarray]


def transport(symmetries: Symmetries, maps: Maps, params: Tree) -> Tree:
    r"""A model written in the units of another one, of which it may have fewer or more.

    .. math:: W' = U^\top W M,\qquad b' = bM

    with U (`reads`) of the group on the input axis and M (`writes`) of the one on the output axis.
    Norms, biases and embeddings are mapped as outputs. With permutation matrices this is `apply`.
    What comes out is a tree like any other, so a chain follows: `mj.merge('mean()', None, [...])`.

    Args:
        symmetries: of the model.
        maps: groups left out stay as they are.
        params: the model.

    Returns:
        A tree with the new widths.

    Raises:
        MergeError: symmetries that do not fit the model; maps of an unknown group or of another
            number of units.

    Example:
        >>> from mergejax import alignment
        >>> group = alignment.Symmetries({'h': alignment.Group(2)}, {'in/kernel': (None, 'h')})
        >>> both = np.array([[1.0], [1.0]])  # the mean of the two units
        >>> maps = alignment.Maps({'h': both}, {'h': both / 2})
        >>> transport(group, maps, {'in': {'kernel': np.array([[2.0, 4.0]])}})['in']['kernel']
        array([[3.]])

    Transformer Fusion (Imfeld et al., 2024, arXiv:2310.05719) and ZipIt (Stoica et al., 2024,
    arXiv:2305.03053) both come down to it.
    """
    check(symmetries, params)
    _check_maps(symmetries, maps)
    leaves, back = leaves_by_name(params, "the model")
    infos = describe({n: (tuple(x.shape), x.dtype) for n, x in leaves.items()})
    found = {}
    for info in infos:
        x, axes = leaves[info.name], symmetries.axes.get(info.name, ())
        moved = {name for axis in axes for name in groups_of(axis)} & set(maps.writes)
        if moved:
            mapped = carry(symmetries, maps, axes, info.layout, np.asarray(x, np.float64))
            x = mapped.astype(x.dtype)
        found[info.name] = x
    return back(found)


def carry(
    symmetries: Symmetries, maps: Maps, axes: Sequence[Axis], layout: str | None, x: np.ndarray
) -> np.ndarray:
    """`transport` of one leaf; only the groups that have maps move."""
    letters = layout or "o" * x.ndim
    sizes = {name: group.size for name, group in symmetries.groups.items()}
    for i, axis in enumerate(axes):
        if isinstance(axis, tuple):
            parts = [size_of(part, sizes, 1) for part in axis]
            wider = x.reshape(*x.shape[:i], *parts, *x.shape[i + 1 :])
            more = letters[:i] + letters[i] * len(axis) + letters[i + 1 :]
            done = carry(symmetries, maps, (*axes[:i], *axis, *axes[i + 1 :]), more, wider)
            return done.reshape(*done.shape[:i], -1, *done.shape[i + len(axis) :])
        if isinstance(axis, list):
            ends = np.cumsum([size_of(part, sizes, 1) for part in axis])
            cuts = zip(axis, np.split(x, ends[:-1], axis=i), strict=True)
            segments = [
                carry(symmetries, maps, (*axes[:i], part, *axes[i + 1 :]), letters, cut)
                for part, cut in cuts
            ]
            return np.concatenate(segments, axis=i)
    return _contract(symmetries, maps, axes, letters, x)


def _contract(
    symmetries: Symmetries, maps: Maps, labels: Sequence[Any], letters: str, x: np.ndarray
) -> np.ndarray:
    """The sum over all units, where every axis has one group or none."""
    rank = len(labels)
    place = {name: i for i, name in enumerate(labels)}
    after = [i + rank if name in maps.writes else i for i, name in enumerate(labels)]
    operands: list[Any] = [x, list(range(rank))]
    for i, name in enumerate(labels):
        if name in maps.writes:
            outer = [place[n] for n in symmetries.groups[name].within]
            one = maps.reads[name] if letters[i] == "i" else maps.writes[name]
            operands += [one, [*outer, *(after[n] for n in outer), i, after[i]]]
    return np.einsum(*operands, after, optimize=True)


def _check_maps(symmetries: Symmetries, maps: Maps) -> None:
    problems = []
    for kind, found in (("reads", maps.reads), ("writes", maps.writes)):
        for name, one in found.items():
            if name not in symmetries.groups:
                hint = did_you_mean(name, symmetries.groups)
                problems.append(f"maps.{kind} name a group '{name}' that the model lacks, {hint}")
                continue
            shape, outer = shape_of(symmetries, name), len(symmetries.groups[name].within)
            old = (*one.shape[:outer], *one.shape[-2:-1])
            if one.ndim != 2 * outer + 2 or old != shape:
                problems.append(
                    f"maps.{kind}['{name}'] has shape {one.shape}, expected "
                    f"[outer sizes..., new outer sizes..., units, new units] with {shape} units"
                )
    problems += [
        f"group '{name}' is in only one of maps.reads and maps.writes; give both"
        for name in set(maps.reads) ^ set(maps.writes)
    ]
    raise_all(problems)
