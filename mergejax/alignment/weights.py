"""Weight matching: permutations that bring the weights of networks as close as they can be."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mergejax.alignment.assignment import GAIN, Pair, assign, costs, make_pair
from mergejax.alignment.permutations import (
    Permutations,
    alike,
    check_permutations,
    compose,
    identity,
    invert,
    moved,
)
from mergejax.alignment.structure import Symmetries, check, groups_of, movable
from mergejax.alignment.verify import verified
from mergejax.door import Tree
from mergejax.errors import MergeError


class Matching(NamedTuple):
    """How a model is aligned to another.

    Attributes:
        permutations: by group, int32; unit i of the aligned model is unit p[i] of the model.
        scores: by group, how similar unit i of the reference and of the aligned model are.
        objective: Σ⟨reference, aligned model⟩ over all leaves that count.
        sweeps: passes over all groups until nothing changed.
    """

    permutations: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    objective: float
    sweeps: int


def weight_matching(
    symmetries: Symmetries,
    reference: Tree,
    params: Tree,
    *,
    seed: int = 0,
    sweeps: int = 100,
    start: Permutations | None = None,
    restarts: int = 1,
) -> Matching:
    r"""Aligns a model to a reference by its weights alone.

    Coordinate ascent on :math:`\sum_\ell\langle A_\ell, \pi(B_\ell)\rangle`: one group after the
    other, in a random order, is matched exactly by linear assignment given all others, with

    .. math:: C_{ij} = \sum_{\text{leaves, axes of the group}} \langle A[i], \tilde B[j]\rangle

    until a whole sweep improves nothing. Before the first sweep groups are matched from the inputs
    and outputs inwards, each by what its already matched neighbours say (the paper starts at the
    identity, which `start={}` does): a permuted copy is then recovered. Units that have
    units of their own (heads, experts) are compared with those matched best.

    Args:
        symmetries: of both models; verified first where they were derived from a model.
        reference: the model A that stays.
        params: the model B that is moved.
        seed: of the order of groups.
        sweeps: at most so many.
        start: permutations to begin with, which are not changed; groups left out start at the
            identity.
        restarts: number of seeds to try; the best objective counts.

    Returns:
        A `Matching`.

    Raises:
        MergeError: models of different structure, values that are not finite, symmetries that do
            not hold, permutations that are none.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries({'hidden': alignment.Group(3)}, {'in': (None, 'hidden')})
        >>> a = {'in': np.array([[1.0, 2.0, 3.0]], np.float32)}
        >>> weight_matching(mlp, a, {'in': a['in'][:, [2, 0, 1]]}).permutations['hidden'].tolist()
        [1, 2, 0]

    Git Re-Basin (Ainsworth et al., 2023, arXiv:2209.04836), algorithm 1.
    """
    check(symmetries, reference)
    verified(symmetries, reference)
    check_permutations(symmetries, start or {})
    if sweeps < 1 or restarts < 1:
        raise MergeError(f"weight_matching: sweeps={sweeps} and restarts={restarts}, at least 1")
    pair = make_pair(symmetries, reference, params, start)
    scores = _from_the_ends(pair) if start is None else {}
    begun = dataclasses.replace(pair, moving=dict(pair.moving))
    best = _ascend(pair, seed, sweeps, scores)
    for again in range(1, restarts):
        other = dataclasses.replace(begun, moving=dict(begun.moving))
        found = _ascend(other, seed + again, sweeps, scores)
        best = found if found.objective > best.objective else best
    return best


def _ascend(pair: Pair, seed: int, sweeps: int, scores: dict[str, np.ndarray]) -> Matching:
    """Sweeps over the groups whose neighbours changed, until none does.

    Groups that have scores are matched best already.
    """
    generator = np.random.default_rng(seed)
    names = movable(pair.symmetries)
    due, scores = set(names) - set(scores), dict(scores)
    done = 0
    while due and done < sweeps:
        done += 1
        for name in (names[i] for i in generator.permutation(len(names))):
            if name in due:
                due.discard(name)
                cost = costs(pair, name)
                scores[name] = np.diagonal(cost, axis1=-2, axis2=-1)
                if _improve(pair, name, cost):
                    due |= pair.neighbours(name)
    return Matching(pair.permutations, scores, pair.objective(), done)


def _improve(pair: Pair, name: str, cost: np.ndarray) -> bool:
    """Matches one group anew, and what lies within its units; False if that is no better."""
    found = assign(cost, f"the costs of group '{name}'")
    gain = np.take_along_axis(cost, found[..., None], axis=-1)[..., 0]
    gain = (gain - np.diagonal(cost, axis1=-2, axis2=-1)).sum()
    if not gain > GAIN * abs(cost).max():
        return False
    children = pair.children(name)
    leaves = pair.leaves(name)
    if not children:
        pair.move({name: found})
        return True
    before, kept = pair.objective(leaves), dataclasses.replace(pair, moving=dict(pair.moving))
    pair.move({name: found})
    for child in children:
        pair.move({child: assign(costs(pair, child), f"the costs of group '{child}'")})
    if pair.objective(leaves) > before + GAIN * abs(cost).max():
        return True
    pair.moving, pair.permutations = kept.moving, kept.permutations
    return False


def _from_the_ends(pair: Pair) -> dict[str, np.ndarray]:
    """Matches every group once, those first of which most is known.

    Returns:
        The scores of groups of which everything was known: no sweep needs to look at them before a
        neighbour changes.
    """
    known: set[str] = set()
    scores = {}
    left, groups = movable(pair.symmetries), pair.symmetries.groups
    while left:
        name = max(left, key=lambda group: _evidence(pair, group, known))
        cost = costs(pair, name, known)
        found = assign(cost, f"the costs of group '{name}'")
        pair.move({name: found})
        known.add(name)
        left.remove(name)
        twice = any(
            sum(name in groups_of(axis) for axis in pair.symmetries.axes[leaf]) > 1
            for leaf in pair.leaves(name)
        )
        settled = all(n in known or groups[n].fixed for n in pair.neighbours(name))
        if settled and not twice and not pair.children(name):
            scores[name] = np.take_along_axis(cost, found[..., None], axis=-1)[..., 0]
    return scores


def _evidence(pair: Pair, group: str, known: Collection[str]) -> tuple[bool, float]:
    """The share of a group's weights that its known neighbours, or pinned axes, fix."""
    groups = pair.symmetries.groups
    ready = all(name in known or groups[name].fixed for name in groups[group].within)
    children = set(pair.children(group))
    total = anchored = 0
    for leaf in pair.leaves(group):
        for labels, x, _ in pair.pieces(leaf):
            others = {n for n in labels if n is not None and n != group} - children
            total += x.size * (group in labels)
            fixed = all(n in known or groups[n].fixed for n in others)
            anchored += x.size * (group in labels and fixed)
    return ready, anchored / max(total, 1)


def match_many(
    symmetries: Symmetries, models: Sequence[Tree], *, seed: int = 0, rounds: int = 100
) -> list[dict[str, np.ndarray]]:
    """Aligns any number of models to each other.

    Every model is matched to the first one; then, in a random order, each to the mean of all
    others as they are aligned, until a round changes nothing. The result is turned so that the
    first model stays as it is.

    Args:
        symmetries: of the models.
        models: at least two.
        seed: of the orders.
        rounds: at most so many.

    Returns:
        Permutations for each model; those of the first are the identity.

    Raises:
        MergeError: as `weight_matching`; fewer than two models.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries({'hidden': alignment.Group(3)}, {'in': (None, 'hidden')})
        >>> a = np.array([[1.0, 2.0, 3.0]], np.float32)
        >>> models = [{'in': a[:, order]} for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2])]
        >>> [found['hidden'].tolist() for found in match_many(mlp, models)]
        [[0, 1, 2], [2, 1, 0], [1, 0, 2]]

    Git Re-Basin (Ainsworth et al., 2023, arXiv:2209.04836), algorithm MergeMany.
    """
    if len(models) < 2:
        raise MergeError(f"match_many: there are {len(models)} models; give at least two")
    first = models[0]
    found = [identity(symmetries)]
    found += [weight_matching(symmetries, first, m, seed=seed).permutations for m in models[1:]]
    generator = np.random.default_rng(seed)
    aligned = [moved(symmetries, p, m) for p, m in zip(found, models, strict=True)]
    for again in range(rounds if len(models) > 2 else 0):
        changed = False
        for i in generator.permutation(len(models)):
            others = [aligned[j] for j in range(len(models)) if j != i]
            mean = jax.tree.map(lambda *xs: _mean(xs), *others)
            match = weight_matching(symmetries, mean, models[i], seed=seed + again, start=found[i])
            if not alike(symmetries, match.permutations, found[i]):
                found[i], changed = match.permutations, True
                aligned[i] = moved(symmetries, found[i], models[i])
        if not changed:
            break
    back = invert(symmetries, found[0])
    return [compose(symmetries, p, back) for p in found]


def _mean(several: Sequence[Any]) -> np.ndarray:
    return np.stack([np.asarray(x, np.float32) for x in several]).mean(0)
