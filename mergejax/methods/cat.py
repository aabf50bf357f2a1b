"""CAT Merging: each delta without the directions that disturb other experts' features."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mergejax.chains import by_role, by_stats, chain
from mergejax.core import Array, joint, method
from mergejax.hyper import Fraction, Least, NonNegative, Scaling, Whole
from mergejax.linalg.regression import on_groups
from mergejax.linalg.spectral import highest
from mergejax.methods.combine import scale, total

Directions = Annotated[int, Least(-1)]  # -1 stands for all


@joint(needs=("gram",))
def project_conflicts(
    directions: Directions = 4, penalty: NonNegative = 5.0, energy: Fraction = 1.0
):
    r"""Removes from each kernel's delta the output directions that disturb the other experts.

    See `cat` for the formula and the arguments.

    Args:
        directions: at most so many for each expert that is protected; -1 for all. Static.
        penalty: :math:`\lambda`.
        energy: the fewest directions with this share of the squared positive eigenvalues.

    Returns:
        A stage on all experts' deltas that reads the statistic 'gram'.

    Example:
        >>> import mergejax as mj
        >>> mj.project_conflicts(directions=-1, energy=0.9)
        project_conflicts(directions=-1, energy=0.9)
    """

    @highest()
    def apply(ds, leaf, seen):
        if len(ds) == 1 or directions == 0:
            return ds
        trim = lambda taus, grams: _trimmed(taus, grams, directions, penalty, energy)
        grams = [gram.astype(ds[0].dtype) for gram in leaf.stats["gram"]]
        return on_groups(trim, leaf.layout, ds, grams)

    return apply


def _trimmed(
    taus: list[Array], grams: list[Array], directions: Directions, penalty: Array, energy: Array
) -> list[Array]:
    """Every delta without what disturbs the others."""
    bases = [
        _conflicting(_disturbance(taus, grams, k, penalty), directions, energy)
        for k in range(len(taus))
    ]
    for i in range(len(taus)):
        for basis in (b for k, b in enumerate(bases) if k != i):
            trimmed = taus[i] - (taus[i] @ basis) @ basis.T
            taus[i] = _with_norm_of(taus[i], trimmed)
    return taus


def _disturbance(taus: list[Array], grams: list[Array], protected: int, penalty: Array) -> Array:
    """Q_k [out, out]: what the others' deltas do to expert k's features, less what to their own."""
    others = [i for i in range(len(taus)) if i != protected]
    quadratic: Any = sum(
        taus[i].T @ (grams[protected] - penalty * grams[i]) @ taus[i] for i in others
    )
    return (quadratic + quadratic.T) / 2


def _conflicting(quadratic: Array, directions: Directions, energy: Array) -> Array:
    """Eigenvectors of the largest positive eigenvalues [out, directions], zeros for the others."""
    values, vectors = jnp.linalg.eigh(quadratic)
    count = len(values) if directions < 0 else min(directions, len(values))
    # Eigenvalues below rounding have arbitrary vectors.
    noise = len(values) * jnp.finfo(values.dtype).eps * jnp.abs(values).max()
    values, vectors = values[::-1], vectors[:, ::-1]
    squares = jnp.where(values > noise, values, 0) ** 2
    before = jnp.cumsum(squares) - squares
    kept = (values > noise) & (before <= energy * squares.sum()) & (energy > 0)
    return jnp.where(kept[None, :], vectors, 0)[:, :count]


def _with_norm_of(before: Array, after: Array) -> Array:
    """Rescaled to the former norm; what is left of a delta that was all conflict is rounding."""
    old, new = jnp.linalg.norm(before), jnp.linalg.norm(after)
    left = new > before.size * jnp.finfo(before.dtype).eps * old
    return after * jnp.where(left, old / jnp.where(left, new, 1), 0)


@joint(needs=("norm_square",))
def mask_norm_conflicts(count: Whole = 4, penalty: NonNegative = 10.0):
    r"""Zeroes in each norm's delta the features that disturb the other experts.

    See `cat` for the formula and the arguments.

    Returns:
        A stage on all experts' deltas that reads the statistic 'norm_square'.

    Example:
        >>> import mergejax as mj
        >>> mj.mask_norm_conflicts(count=2)
        mask_norm_conflicts(count=2)
    """

    def apply(ds, leaf, seen):
        energy = leaf.stats["norm_square"]

        def conflict(k):
            others = [i for i in range(len(ds)) if i != k]
            return sum(ds[i] ** 2 * (energy[k] - penalty * energy[i]) for i in others)

        return _masked(ds, conflict, count, _with_norm_of)

    return apply


@joint
def mask_bias_conflicts(count: Whole = 4):
    r"""Zeroes in each bias' delta the entries that the other experts are protected from.

    See `cat` for the formula and the arguments.

    Returns:
        A stage on all experts' deltas.

    Example:
        >>> import mergejax as mj
        >>> mj.mask_bias_conflicts(count=2)
        mask_bias_conflicts(count=2)
    """

    def apply(ds, leaf, seen):
        def conflict(k):
            return sum(d**2 for i, d in enumerate(ds) if i != k)

        return _masked(ds, conflict, count, lambda before, after: after)

    return apply


def _masked(ds, conflict, count, rescaled):
    """Every delta without the entries of the largest positive conflicts of all others."""
    if len(ds) == 1 or count == 0:
        return ds
    masks = [_largest(conflict(k), count) for k in range(len(ds))]
    trimmed = []
    for i, d in enumerate(ds):
        for mask in (m for k, m in enumerate(masks) if k != i):
            d = rescaled(d, jnp.where(mask, 0, d))
        trimmed.append(d)
    return trimmed


def _largest(scores: Array, count: int) -> Array:
    """Where the `count` largest positive scores are."""
    flat = scores.ravel()
    values, places = jax.lax.top_k(flat, min(count, flat.size))
    return jnp.zeros(flat.shape, bool).at[places].set(values > 0).reshape(scores.shape)


@method
def cat(
    scaling: Scaling = 0.4,
    directions: Directions = 4,
    penalty: NonNegative = 5.0,
    norm_count: Whole = 4,
    norm_penalty: NonNegative = 10.0,
    bias_count: Whole = 4,
):
    r"""Trims from each delta what disturbs the other experts' features, and adds up the rest.

    For each kernel and each protected expert k, with :math:`G` the mean Gram matrices of inputs,

    .. math:: Q_k=\sum_{i\ne k}\tau_i^\top(G_k-\lambda G_i)\tau_i,\qquad
        \tau_i\leftarrow\tau_i-\tau_iB_kB_k^\top\ \ (i\ne k),\qquad
        \theta=\theta_0+s\sum_i\tau_i

    with :math:`B_k` the eigenvectors of the largest positive eigenvalues of :math:`Q_k`; each delta
    keeps its Frobenius norm. For scales of norms the score of a feature is
    :math:`\sum_{i\ne k}\tau_i^2(s_k-\lambda s_i)` with s the mean square of the normalised input,
    for biases :math:`\sum_{i\ne k}\tau_i^2`; the features with the largest positive scores are
    zeroed in all other deltas, norms keep their length. Other leaves are added up as they are.

    Args:
        scaling: s.
        directions: at most so many of each kernel; -1 for all. Static, as are the other counts.
        penalty: :math:`\lambda` of kernels.
        norm_count: features of each norm.
        norm_penalty: :math:`\lambda` of norms.
        bias_count: entries of each bias.

    Returns:
        A method that reads the statistics 'gram' and 'norm_square', the authors' of 2 or 3 examples
        per task through :math:`\theta_0+s\tau_i`. Projections follow each other, so the order of
        the experts has some influence.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((1, 2))}
        >>> experts = [{'kernel': jnp.asarray([[1.0, 1.0]])}, {'kernel': jnp.asarray([[0.0, 1.0]])}]
        >>> grams = [{'kernel': jnp.full((1, 1), g)} for g in (9.0, 1.0)]  # the first is protected
        >>> stats = {'gram': grams, 'norm_square': [{}, {}]}  # there is no norm
        >>> print(mj.merge(mj.cat(scaling=1.0), base, experts, stats=stats)['kernel'].round(3))
        [[1. 1.]]

    CAT Merging (Sun et al., 2025, arXiv:2505.06977). Where a public port of it takes the smallest
    eigenvalues and the protected expert's own biases, this follows the stated objective: the
    largest eigenvalues, and only positive ones, and the others' biases.
    """
    trimmed = by_stats(
        gram=project_conflicts(directions, penalty),
        norm_square=mask_norm_conflicts(norm_count, norm_penalty),
        otherwise=by_role(bias=mask_bias_conflicts(bias_count), otherwise=scale(1.0)),
    )
    return chain(trimmed, total(), scale(scaling))
