r"""Invertible maps inside attention heads that no output shows: a lock, and how it is undone.

In a head with queries Q, keys K, values V, [width, size], and output O, [size, width], only
:math:`QK^\top` and :math:`VO` matter. So for any invertible A and B

.. math:: Q\to QA,\quad K\to KA^{-\top},\quad V\to VB,\quad O\to B^{-1}O

leaves the model as it is (biases are one more row of Q, K and V), but its average with another
model is worthless. Heads that share keys and values share A and B. Where positions turn pairs of
dimensions (rotary embeddings), A must commute with the turning: one complex number for each pair.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mergejax.alignment.heads import Attention, Heads, checked, read, write
from mergejax.errors import MergeError

Tree = Any


def _complex(x: np.ndarray) -> np.ndarray:
    """Dimensions that are turned together, as one complex number: [..., size] to [..., size/2]."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def _real(z: np.ndarray) -> np.ndarray:
    return np.concatenate([z.real, z.imag], axis=-1)


def _turned(heads: Heads, group: int, a: np.ndarray, b: np.ndarray, rotary: bool) -> None:
    """Puts A and B into one group of heads; A is a matrix, or complex numbers of pairs."""
    if rotary:
        heads.query[group] = _real(_complex(heads.query[group]) * a)
        heads.key[group] = _real(_complex(heads.key[group]) / a.conj())
    else:
        heads.query[group] = heads.query[group] @ a
        heads.key[group] = np.linalg.solve(a, heads.key[group].T).T
    heads.value[group] = heads.value[group] @ b
    heads.out[group] = np.linalg.solve(b, heads.out[group])


def _ordered(heads: Heads, groups: Any, within: Sequence[Any]) -> Heads:
    """Heads in another order: groups, and the queries of each."""
    pick = lambda x: np.stack([x[g][list(w)] for g, w in zip(groups, within, strict=True)])
    chosen = list(groups)
    return Heads(pick(heads.query), heads.key[chosen], heads.value[chosen], pick(heads.out))


def lock(params: Tree, layers: Sequence[Attention], *, seed: int, condition: float = 10.0) -> Tree:
    r"""The same model with random maps in its heads, and its heads in random order.

    A and B are :math:`U\,diag(s)\,V^\top` with random rotations and log-uniform s.

    Args:
        params: a tree of a Flax model.
        layers: its attention layers, see `attentions`.
        seed: of the maps.
        condition: the largest ratio of singular values. Outputs change by rounding alone: at 10 by
            about 1e-6 in float32, but by 1 % in bfloat16.

    Returns:
        A tree like `params`, computed in float64 and rounded once.

    Raises:
        MergeError: layers that the tree does not have, or heads that do not divide its axes.

    Example:
        >>> part = lambda: {'kernel': np.random.default_rng(0).normal(size=(4, 4))}
        >>> tree = {'mix': {name: part() for name in ('query', 'key', 'value', 'out')}}
        >>> locked = lock(tree, [Attention('mix', heads=2, groups=2)], seed=0)
        >>> bool(np.allclose(tree['mix']['query']['kernel'], locked['mix']['query']['kernel']))
        False

    MergeLock (Wang et al., 2025, arXiv:2509.01548), from the paper's description; the authors' code
    was not to be had. `unlock` undoes it.
    """
    leaves, rebuild = checked(params, layers, "params")
    rng = np.random.default_rng(seed)
    for layer in layers:
        heads = read(leaves, layer)
        count = layer.heads // layer.groups
        within = [rng.permutation(count) for _ in range(layer.groups)]
        heads = _ordered(heads, rng.permutation(layer.groups), within)
        size = heads.key.shape[-1]
        for group in range(layer.groups):
            a = _scales(rng, size // 2, condition) * np.exp(2j * np.pi * rng.random(size // 2))
            if not layer.rotary:
                a = _matrix(rng, size, condition)
            _turned(heads, group, a, _matrix(rng, size, condition), layer.rotary)
        write(leaves, layer, heads)
    return rebuild(leaves)


def _scales(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    return np.exp(rng.uniform(-0.5, 0.5, size) * np.log(condition))


def _matrix(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    return (left * _scales(rng, size, condition)) @ right.T


def unlock(params: Tree, reference: Tree, layers: Sequence[Attention]) -> Tree:
    r"""The same model with its heads in the order and the coordinates of a reference.

    Heads are matched by the cosines of :math:`QK^\top` and :math:`VO`, which no lock changes; then

    .. math:: \hat A=\arg\min_A\|Q_{ref}A-Q\|,\qquad \hat B=\arg\min_B\|V_{ref}B-V\|

    are taken out again. Whatever they are, the model's function stays.

    Args:
        params: a tree of a Flax model, locked or not.
        reference: a tree of a model with the same layers: the base, or another expert.
        layers: their attention layers, see `attentions`.

    Returns:
        A tree like `params`.

    Raises:
        MergeError: layers that a tree does not have; a head whose map cannot be inverted.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> parts = ('query', 'key', 'value', 'out')
        >>> tree = {'mix': {n: {'kernel': rng.normal(size=(4, 4))} for n in parts}}
        >>> layers = [Attention('mix', heads=2, groups=2)]
        >>> found = unlock(lock(tree, layers, seed=0), tree, layers)
        >>> bool(np.allclose(tree['mix']['query']['kernel'], found['mix']['query']['kernel']))
        True
    """
    leaves, rebuild = checked(params, layers, "params")
    known, _ = checked(reference, layers, "the reference")
    for layer in layers:
        heads, wanted = read(leaves, layer), read(known, layer)
        heads = _matched(heads, wanted)
        for group in range(layer.groups):
            a = _map(wanted.query[group], heads.query[group], layer.rotary)
            b = _map(wanted.value[group], heads.value[group], False)
            singular = [np.linalg.cond(x) > 1e12 for x in (np.diag(a) if a.ndim == 1 else a, b)]
            if any(singular):
                raise MergeError(
                    f"group {group} of '{layer.name}' has no map that leads to the reference; "
                    "leave the layer out"
                )
            inverse = 1 / a if layer.rotary else np.linalg.inv(a)
            _turned(heads, group, inverse, np.linalg.inv(b), layer.rotary)
        write(leaves, layer, heads)
    return rebuild(leaves)


def _map(wanted: np.ndarray, found: np.ndarray, rotary: bool) -> np.ndarray:
    """What leads from the rows of one matrix to those of another, by least squares."""
    rows, others = (x.reshape(-1, x.shape[-1]) for x in (wanted, found))
    if not rotary:
        return np.linalg.lstsq(rows, others, rcond=None)[0]
    z, w = _complex(rows), _complex(others)
    return (z.conj() * w).sum(0) / np.maximum((abs(z) ** 2).sum(0), np.finfo(np.float64).tiny)


def _matched(heads: Heads, wanted: Heads) -> Heads:
    """The heads in the order in which they are most like those that are wanted."""
    groups, count = wanted.query.shape[:2]
    best = np.empty((groups, groups))
    inner = {}
    for i in range(groups):
        for j in range(groups):
            likeness = np.array(
                [[_likeness(wanted, i, a, heads, j, b) for b in range(count)] for a in range(count)]
            )
            rows, inner[i, j] = linear_sum_assignment(likeness, maximize=True)
            best[i, j] = likeness[rows, inner[i, j]].sum()
    order = linear_sum_assignment(best, maximize=True)[1]
    return _ordered(heads, order, [inner[i, j] for i, j in enumerate(order)])


def _likeness(one: Heads, i: int, a: int, other: Heads, j: int, b: int) -> float:
    """The cosines of the products of two heads, added up; products are never formed."""
    pairs = [
        (one.query[i, a], one.key[i], other.query[j, b], other.key[j]),
        (one.value[i], one.out[i, a].T, other.value[j], other.out[j, b].T),
    ]
    return sum(_cosine(*pair) for pair in pairs)


def _cosine(q: np.ndarray, k: np.ndarray, p: np.ndarray, h: np.ndarray) -> float:
    """The cosine of q k' and p h'."""
    inner = lambda q, k, p, h: float(np.sum((q.T @ p) * (k.T @ h)))
    norm = np.sqrt(inner(q, k, q, k) * inner(p, h, p, h))
    return inner(q, k, p, h) / norm if norm else 0.0
