"""Activation matching: units that respond alike to the same data."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mergejax.alignment.assignment import Pair, assign, costs, make_pair, pieces
from mergejax.alignment.structure import Symmetries, check, movable
from mergejax.alignment.verify import verified
from mergejax.alignment.weights import Matching
from mergejax.door import Tree
from mergejax.errors import MergeError, did_you_mean
from mergejax.leaves import as_matrix, layout_of, role_of

KINDS = ("correlation", "inner", "distance")


def activation_matching(
    symmetries: Symmetries,
    reference: Tree,
    params: Tree,
    joint: Mapping[str, Any],
    *,
    kind: Literal["correlation", "inner", "distance"] = "correlation",
    layout: str = "flax",
) -> Matching:
    r"""Aligns a model to a reference by the inputs of their layers on the same data.

    The units of a group are seen wherever a layer reads them: behind the nonlinearity, every token
    and pixel a row. Over all these places the similarities are added,

    .. math:: \text{correlation } \frac{E[ab]-E[a]E[b]}{\sigma_a\sigma_b},\quad
        \text{inner } E[ab],\quad \text{distance } -E[(a-b)^2]

    and every group is matched once. A unit that never changes correlates with nothing. Groups that
    no layer reads (query and key dimensions, experts) are matched by weights, given the others.

    Args:
        symmetries: of both models.
        reference: the model A that stays.
        params: the model B that is moved.
        joint: of `mj.collect.joint_gram(model, [reference, params], batches)`.
        kind: of similarity.
        layout: 'flax' or 'torch'.

    Returns:
        A `Matching`; its scores are similarities.

    Raises:
        MergeError: an unknown kind, a Gram matrix that does not fit, models of different structure,
            symmetries that do not hold.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries({'hidden': alignment.Group(2)}, {'kernel': ('hidden', None)})
        >>> q = np.array([[1.0, 2.0, 3.0, 0.5, 1.0], [2.0, 0.0, 1.0, 3.0, 1.0]])  # a a | b b | 1
        >>> joint, w = {'kernel': q.T @ q / 2}, {'kernel': np.ones((2, 1), np.float32)}
        >>> activation_matching(mlp, w, w, joint).permutations['hidden'].tolist()
        [1, 0]

    Git Re-Basin (Ainsworth et al., 2023, arXiv:2209.04836), activation matching.
    """
    if kind not in KINDS:
        raise MergeError(f"activation_matching: no similarity is called '{kind}', known: {KINDS}")
    check(symmetries, reference)
    verified(symmetries, reference)
    pair = make_pair(symmetries, reference, params)
    similar = {}
    for name, q in joint.items():
        half = len(q) // 2
        a, b = slice(half), slice(half, -1)
        similar[name] = similarity(np.asarray(q, np.float64), kind, a, b)
    scores: dict[str, np.ndarray] = {}
    unseen = []
    for group in movable(symmetries):
        cost = np.zeros(())
        for name, matrix in similar.items():
            cost = cost + _cost(pair, group, name, matrix, layout)
        if not np.ndim(cost):
            unseen.append(group)
            continue
        _match(pair, group, cost, scores)
    for group in unseen:
        _match(pair, group, costs(pair, group), scores)
    return Matching(pair.permutations, scores, pair.objective(), 1)


def _match(pair: Pair, group: str, cost: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    found = assign(cost, f"the costs of group '{group}'")
    scores[group] = np.take_along_axis(cost, found[..., None], axis=-1)[..., 0]
    pair.move({group: found})


def similarity(q: np.ndarray, kind: str, a: slice, b: slice) -> np.ndarray:
    """Units at the rows a of a joint Gram matrix × those at the rows b."""
    second, mean = np.diagonal(q), q[-1]
    if kind == "inner":
        return q[a, b]
    if kind == "distance":
        return 2 * q[a, b] - second[a][:, None] - second[b][None]
    variance = second - mean**2
    # Below the rounding of float32 sums a variance says nothing: the unit is dead.
    alive = variance > 1e-6 * np.maximum(second, 1e-30)
    scale = np.where(alive, 1 / np.sqrt(np.where(alive, variance, 1)), 0)
    covariance = q[a, b] - mean[a][:, None] * mean[b][None]
    return covariance * scale[a][:, None] * scale[b][None]


def _cost(pair: Pair, group: str, name: str, matrix: np.ndarray, layout: str) -> Any:
    """What the inputs of one layer say of a group, in the basis of the model moved so far."""
    if name not in pair.reference:
        raise MergeError(
            f"joint Gram matrix of '{name}': no leaf that is aligned has this name, "
            f"{did_you_mean(name, pair.reference)}"
        )
    labels, places = input_labels(pair.symmetries, name, pair.reference[name], layout)
    if places.size != len(matrix):
        raise MergeError(
            f"joint Gram matrix of '{name}' is of two models with {len(matrix)} inputs each, "
            f"expected {places.size}; collect it again with these two models"
        )
    if group not in labels:
        return np.zeros(())
    own = pair.symmetries.groups[group]
    sizes = places.shape
    moved = _moved(pair, labels, places)
    grid = matrix[np.ix_(places.ravel(), moved.ravel())].reshape(*sizes, *sizes)
    return _contract(pair, group, labels, grid, own.within)


def input_labels(
    symmetries: Symmetries, name: str, kernel: np.ndarray, layout: str
) -> tuple[tuple[str | None, ...], np.ndarray]:
    """The groups over the inputs of a layer, and the row of each position on their grid."""
    meaning = layout_of(name, kernel.shape, role_of(name, kernel.shape, kernel.dtype), layout)
    view, restore = as_matrix(jnp.zeros(kernel.shape, jnp.float32), meaning)
    rows = view.shape[0]
    numbers = np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None], view.shape)
    whole = np.asarray(restore(jnp.asarray(numbers))).astype(np.int64)
    outputs = [i for i, letter in enumerate(meaning) if letter == "o"]
    places = whole[tuple(0 if i in outputs else slice(None) for i in range(whole.ndim))]
    axes = [axis for i, axis in enumerate(symmetries.axes[name]) if i not in outputs]
    sizes = {group: one.size for group, one in symmetries.groups.items()}
    found = list(pieces(axes, sizes, places))
    if len(found) != 1:
        return (), places  # a concatenation: its parts are read by other layers, too
    return found[0]


def _moved(pair: Pair, labels: Sequence[str | None], places: np.ndarray) -> np.ndarray:
    """Rows of the model in the order in which it has been permuted so far."""
    grids = np.indices(places.shape)
    where = dict(zip(labels, grids, strict=True))
    index = []
    for label, grid in zip(labels, grids, strict=True):
        if label in pair.permutations:
            within = pair.symmetries.groups[label].within
            if all(outer in where for outer in within):
                grid = pair.permutations[label][(*(where[outer] for outer in within), grid)]
        index.append(grid)
    return places[tuple(index)]


def _contract(
    pair: Pair, group: str, labels: Sequence[str | None], grid: np.ndarray, within: Sequence[str]
) -> Any:
    """[outer..., n, n] of a grid over (reference, model) positions; inner groups matched best."""
    rank = len(labels)
    place = labels.index(group)
    outer = [labels.index(name) for name in within if name in labels]
    if len(outer) < len(within):
        return np.zeros(())
    inner = [i for i, n in enumerate(labels) if n is not None and n in pair.children(group)]
    if len(inner) > 1:
        return np.zeros(())
    letters = [chr(97 + i) for i in range(rank)]
    other = [chr(110 + i) if i in (place, *inner) else letters[i] for i in range(rank)]
    kept = "".join(letters[i] for i in outer) + letters[place] + other[place]
    kept += "".join(letters[i] + other[i] for i in inner)
    total = np.einsum(f"{''.join(letters)}{''.join(other)}->{kept}", grid)
    return _best(total) if inner else total


def _best(total: np.ndarray) -> np.ndarray:
    found = np.zeros(total.shape[:-2])
    for index in np.ndindex(*found.shape):
        order = assign(total[index])
        found[index] = total[index][np.arange(len(order)), order].sum()
    return found
