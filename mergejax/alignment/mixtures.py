"""Experts of mixture layers merged by how often and how alike they are used (M-SMoE).

A layer holds its experts stacked: arrays [experts, ...]. Their hidden units are brought into one
order, experts are dealt out to groups, each led by one that is used much, and every group becomes
the mean of its experts, weighted by how often they are used. The router stays; a table sends each
of its columns to a group.

Merge, Then Compress (Li et al., 2024, arXiv:2310.01334).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergejax.alignment.assignment import assign
from mergejax.errors import raise_all

Arrays = Mapping[str, Any]
_LITTLE = 1e-12


class Routing(NamedTuple):
    """How a router deals tokens out.

    Attributes:
        usage: share of the choices that fall on each expert, [experts], float64; they sum to 1.
        likeness: cosine of the router's logits of each two experts, [experts, experts], float64.
    """

    usage: np.ndarray
    likeness: np.ndarray


def routing(logits: Any, top: int = 1, mask: Any = None) -> Routing:
    """Usage and likeness of the experts of one layer, from its router's logits.

    Args:
        logits: [..., experts], of any number of tokens.
        top: how many experts a token goes to.
        mask: [...], zero for padding, which the published code counts as tokens.

    Returns:
        A `Routing`.

    Raises:
        MergeError: no tokens; logits that are not finite; a `top` beyond the experts.

    Example:
        >>> routing(np.array([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0]])).usage.round(2).tolist()
        [0.67, 0.33]
    """
    flat = np.asarray(logits, np.float64).reshape(-1, np.shape(logits)[-1])
    if mask is not None:
        flat = flat[np.asarray(mask).reshape(-1) != 0]
    problems = []
    if not flat.size:
        problems.append("routing: there are no tokens; give logits of unmasked ones")
    if not np.isfinite(flat).all():
        problems.append("routing: the logits are not finite; check the model for NaN and Inf")
    if not 1 <= top <= flat.shape[1]:
        problems.append(f"routing: top must be from 1 to the {flat.shape[1]} experts, not {top}")
    raise_all(problems)
    chosen = np.argsort(-flat, axis=1, kind="stable")[:, :top]
    usage = np.bincount(chosen.ravel(), minlength=flat.shape[1]) / chosen.size
    gram = flat.T @ flat
    norms = np.sqrt(np.maximum(np.diag(gram), _LITTLE))
    return Routing(usage, gram / np.outer(norms, norms))


def align_experts(into: Arrays, out: Arrays) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    r"""Brings the hidden units of all experts of a layer into the order of the first.

    .. math:: \max_\pi\sum_i\langle W^{in}_{0,i},W^{in}_{e,\pi(i)}\rangle
              +\langle W^{out}_{0,i},W^{out}_{e,\pi(i)}\rangle

    Args:
        into: arrays whose last axis are the units, such as kernels [experts, in, units] (gate and
            up of a gated expert) and biases [experts, units].
        out: arrays whose second axis are the units, [experts, units, out].

    Returns:
        The arrays in their new order, and the permutations, int32 [experts, units].

    Raises:
        MergeError: arrays of other numbers of experts or units; values that are not finite.

    Example:
        >>> up = np.array([[[1.0, 2.0]], [[2.0, 1.0]]])
        >>> _, _, found = align_experts({'up': up}, {'down': up.swapaxes(1, 2)})
        >>> found.tolist()
        [[0, 1], [1, 0]]
    """
    columns = {name: np.asarray(x, np.float64) for name, x in into.items()}
    rows = {name: np.asarray(x, np.float64) for name, x in out.items()}
    units = {n: (len(x), x.shape[-1]) for n, x in columns.items()}
    units |= {n: (len(x), x.shape[1]) for n, x in rows.items()}
    wanted = next(iter(units.values()))
    raise_all(
        [
            f"'{name}' has {found[0]} experts with {found[1]} units, but '{next(iter(units))}' has "
            f"{wanted[0]} with {wanted[1]}; give arrays of one layer"
            for name, found in units.items()
            if found != wanted
        ]
    )
    count, size = wanted
    costs = np.zeros((count, size, size))
    for x in columns.values():
        flat = x.reshape(count, -1, size)
        costs += np.einsum("du,edv->euv", flat[0], flat)
    for x in rows.values():
        flat = x.reshape(count, size, -1)
        costs += np.einsum("ud,evd->euv", flat[0], flat)
    found = assign(costs, "the likeness of the experts' units")
    moved_in = {
        n: np.take_along_axis(
            np.asarray(x), found.reshape(count, *[1] * (np.ndim(x) - 2), size), axis=-1
        )
        for n, x in into.items()
    }
    moved_out = {
        n: np.take_along_axis(
            np.asarray(x), found.reshape(count, size, *[1] * (np.ndim(x) - 2)), axis=1
        )
        for n, x in out.items()
    }
    return moved_in, moved_out, found


def group_experts(
    layers: Sequence[Routing], average: float, keep: Sequence[int] = ()
) -> list[np.ndarray]:
    """Deals the experts of all layers out to groups.

    The experts that are used most in all layers together lead a group, at least one in each layer;
    every other expert joins the leader of its layer that it is most like.

    Args:
        layers: of each mixture layer its `Routing`.
        average: how many groups a layer has on average, of those that are not kept.
        keep: indices of layers whose experts stay as they are.

    Returns:
        For each layer the group of every expert, int32 [experts]; groups are numbered in the order
        of their leaders.

    Raises:
        MergeError: an average below 1 or above the number of experts; indices out of range.

    Example:
        >>> alike = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.1], [0.0, 0.1, 1.0]])
        >>> group_experts([Routing(np.array([0.5, 0.2, 0.3]), alike)], average=2)[0].tolist()
        [0, 0, 1]
    """
    counts = [len(layer.usage) for layer in layers]
    problems = [
        f"group_experts: keep has {index}, but layers go from 0 to {len(layers) - 1}"
        for index in keep
        if not 0 <= index < len(layers)
    ]
    if not 1 <= average <= min(counts):
        problems.append(
            f"group_experts: average must be from 1 to the {min(counts)} experts, not {average}"
        )
    raise_all(problems)
    ranked = []
    for number, layer in enumerate(layers):
        first = np.argmax(layer.usage)
        for expert, usage in enumerate(layer.usage):
            sure = number in keep or expert == first
            ranked.append((-math.inf if sure else -usage, number, expert))
    merged = sum(number not in keep for number in range(len(layers)))
    total = round(average * merged) + sum(counts[number] for number in set(keep))
    leaders: list[list[int]] = [[] for _ in layers]
    for _, number, expert in sorted(ranked)[:total]:
        leaders[number].append(expert)
    return [_joined(layer, sorted(chosen)) for layer, chosen in zip(layers, leaders, strict=True)]


def _joined(layer: Routing, leaders: Sequence[int]) -> np.ndarray:
    groups = np.argmax(layer.likeness[:, leaders], axis=1)
    groups[list(leaders)] = np.arange(len(leaders))
    return groups.astype(np.int32)


def merge_experts(arrays: Arrays, groups: Any, usage: Any) -> dict[str, np.ndarray]:
    r"""One expert for every group, :math:`W_g=\sum_{e\in g}f_eW_e/\sum_{e\in g}f_e`.

    Args:
        arrays: stacked experts of one layer, [experts, ...], their units in one order.
        groups: of every expert, [experts].
        usage: f, [experts]; a group that is never used becomes the plain mean.

    Returns:
        Arrays [groups, ...] of the same types. Expert e of the router is `merged[groups[e]]`; a
        model whose arrays hold all experts takes `merged[groups]`.

    Raises:
        MergeError: groups or usage of another number of experts; a group without an expert.

    Example:
        >>> experts = {'w': np.array([[1.0], [3.0], [7.0]])}
        >>> merge_experts(experts, groups=[0, 0, 1], usage=[1, 3, 1])['w'].tolist()
        [[2.5], [7.0]]
    """
    groups, usage = np.asarray(groups), np.asarray(usage, np.float64)
    problems = [
        f"merge_experts: '{name}' has {len(x)} experts, but there are {len(groups)} groups and "
        f"{len(usage)} shares of usage; give one for each expert"
        for name, x in arrays.items()
        if not len(x) == len(groups) == len(usage)
    ]
    number = int(groups.max()) + 1
    empty = sorted(set(range(number)) - set(groups.tolist()))
    problems += [f"merge_experts: group {group} has no expert" for group in empty]
    raise_all(problems)
    member = np.equal.outer(np.arange(number), groups)
    weights = member * usage[None]
    never = weights.sum(1) <= 0
    weights[never] = member[never]
    weights /= weights.sum(1, keepdims=True)
    return {
        name: np.tensordot(weights, np.asarray(x, np.float64), 1).astype(np.asarray(x).dtype)
        for name, x in arrays.items()
    }
