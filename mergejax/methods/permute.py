"""Merging networks whose units were matched: permuted, kept apart in part, and regressed."""

from typing import Any

import jax
import jax.numpy as jnp

from mergejax.chains import by_stats, chain
from mergejax.core import each, method, reduce
from mergejax.errors import MergeError
from mergejax.hyper import NonNegative
from mergejax.leaves import as_matrix
from mergejax.linalg.solve import safe_solve
from mergejax.units import present, take

HIGHEST = jax.lax.Precision.HIGHEST


@each(space="weights", needs=("permutation",))
def take_units():
    """Brings the units of every expert into the order that its statistic 'permutation' tells.

    Returns:
        A stage for one expert's weights; see `permute`.

    Example:
        >>> import mergejax as mj
        >>> mj.take_units()
        take_units()
    """

    def apply(x, leaf, seen):
        units = leaf.stats["permutation"]
        moved = take(x, units.indices)
        if leaf.base is not None and moved.shape != leaf.base.shape:
            raise MergeError(
                "permute: units are kept apart, so the merged model is wider than the base; pass "
                "base=None and a method on weights, such as permute()|join()"
            )
        return moved

    return apply


@each(elementwise=True, space="either")
def unchanged():
    """Leaves every expert as it is.

    Returns:
        A stage for one expert.

    Example:
        >>> import mergejax as mj
        >>> mj.unchanged()
        unchanged()
    """
    return lambda x, leaf, seen: x


@method
def permute():
    r"""Aligns every expert, so that any method may follow: `permute() | ties()`.

    .. math:: \theta_i \mapsto \pi_i(\theta_i)

    Where a base is given, the deltas behind it are those of the aligned experts to the base.
    Running statistics of BatchNorm are aligned too. Leaves without the statistic stay as they are.

    Returns:
        A chain that reads the statistic 'permutation' (`mj.alignment.statistics`).

    Example:
        >>> import jax.numpy as jnp, numpy as np, mergejax as mj
        >>> group = mj.alignment.Symmetries({'h': mj.alignment.Group(2)}, {'b': ('h',)})
        >>> experts = [{'b': jnp.asarray(b)} for b in ([1.0, 5.0], [5.0, 1.0])]
        >>> orders = [{'h': np.array([0, 1])}, {'h': np.array([1, 0])}]
        >>> stats = mj.alignment.statistics(group, orders, experts)
        >>> print(mj.merge(mj.permute() | mj.mean(), None, experts, stats=stats)['b'])
        [1. 5.]

    Git Re-Basin (Ainsworth et al., 2023, arXiv:2209.04836).
    """
    return chain(by_stats(permutation=take_units(), otherwise=unchanged()))


def _joined(ds: Any, leaf: Any) -> jax.Array:
    """The mean of the experts that have a unit, over its outgoing side."""
    units = leaf.stats.get("permutation")
    if units is None:
        return ds[0] + sum(d - ds[0] for d in ds) / len(ds)
    layout = leaf.layout or "o" * ds[0].ndim
    outputs = [axis for axis, letter in enumerate(layout) if letter != "i"]
    count = sum(present(one, outputs) for one in units)
    # As a correction of the first, which leaves equal experts as they are, to the bit.
    whole = ds[0] + sum(d - ds[0] for d in ds) / len(ds)
    return jnp.where(count == len(ds), whole, sum(ds) / jnp.maximum(count, 1))


@reduce(space="weights")
def join():
    r"""Averages matched units and keeps the others beside each other.

    .. math:: W_{ij} = \frac{1}{|S_j|}\sum_{k} (W_k)_{ij}

    with :math:`S_j` the experts that have output unit j, and zero where expert k lacks i or j: what
    leads from one expert's own units to another's own is zero. It is the plain mean where no unit
    is kept apart.

    Returns:
        A reduction behind `permute()`.

    Example:
        >>> import jax.numpy as jnp, numpy as np, mergejax as mj
        >>> group = mj.alignment.Symmetries({'h': mj.alignment.Group(2)}, {'b': ('h',)})
        >>> experts = [{'b': jnp.asarray(b)} for b in ([1.0, 5.0], [3.0, 7.0])]
        >>> orders = [{'h': np.array([0, 1, -1])}, {'h': np.array([0, -1, 1])}]  # unit 0 is shared
        >>> stats = mj.alignment.statistics(group, orders, experts)
        >>> print(mj.merge(mj.permute() | mj.join(), None, experts, stats=stats)['b'])
        [2. 5. 7.]

    PLeaS (Nasery et al., 2025, arXiv:2407.02447), partial merging; ZipIt (2305.03053) for zipped
    layers.
    """
    return lambda ds, leaf, seen: _joined(ds, leaf)


@reduce(space="weights", needs=("aligned_gram", "aligned_residual", "aligned_owners"))
def regress(ridge: NonNegative = 1e-6):
    """Least squares around `join`; see `least_squares`.

    Returns:
        A reduction for kernels and the biases beside them.

    Example:
        >>> import mergejax as mj
        >>> mj.regress(ridge=0.01)
        regress(ridge=0.01)
    """

    def apply(ds, leaf, seen):
        start = _joined(ds, leaf)
        gram, residual = leaf.shared["aligned_gram"], leaf.shared["aligned_residual"]
        owners = leaf.shared["aligned_owners"]
        readers, writers = owners[:, : len(gram)], owners[:, len(gram) :]
        change = _solve(gram, residual, readers, writers, ridge)
        if start.ndim == 1:
            return start + change[-1]
        matrix, restore = as_matrix(start, leaf.layout)
        return restore(matrix + change[:-1])

    return apply


def _solve(gram: Any, residual: Any, readers: Any, writers: Any, ridge: Any) -> jax.Array:
    """Per set of owners of the outputs, the least squares on the inputs that they share."""
    live = jnp.diagonal(gram) > 0
    level = ridge * jnp.trace(gram) / jnp.maximum(live.sum().astype(gram.dtype), 1)
    gram = gram + jnp.diag(jnp.where(live, level, 0))
    shared = writers.all(0)

    def change(allowed: Any, columns: Any) -> jax.Array:
        kept = jnp.where(allowed[:, None] & allowed[None, :], gram, 0)
        right = jnp.where(allowed[:, None] & columns[None, :], residual, 0)
        return jnp.where(allowed[:, None] & columns[None, :], safe_solve(kept, right), 0)

    total = change(readers.any(0), shared)
    for k in range(len(readers)):
        total = total + change(readers[k], writers[k] & ~shared)
    return total


@method
def least_squares(ridge: NonNegative = 1e-6):
    r"""Merges every layer so that it maps merged inputs to merged outputs, in closed form.

    With :math:`z_k` the inputs of the layer in expert k, aligned, and :math:`o_k` its outputs,

    .. math:: Z = \Big[\tfrac1N\textstyle\sum_k z_k\ \Big|\ z_1^{own}\ \Big|\ \ldots\Big],\quad
        Y = \Big[\tfrac1N\textstyle\sum_k o_k\ \Big|\ o_1^{own}\ \Big|\ \ldots\Big],\quad
        \min_{W,b}\|ZW+b-Y\|^2+\lambda\|W-W_0\|^2

    with :math:`W_0` the result of `join`, and zero kept where one expert's own inputs would lead to
    another's own outputs. Leaves without the statistics (norms, embeddings) are joined.

    Args:
        ridge: :math:`\lambda` as a share of the mean of the Gram matrix' diagonal. Directions that
            the data do not determine stay at :math:`W_0`.

    Returns:
        A reduction behind `permute()` that reads 'aligned_gram', 'aligned_residual' and
        'aligned_owners' (`mj.alignment.regression`).

    Raises:
        MergeError: a ridge below zero.

    Example:
        >>> import mergejax as mj
        >>> mj.permute() | mj.least_squares(ridge=1e-4)
        permute()|least_squares(ridge=0.0001)

    PLeaS (Nasery et al., 2025, arXiv:2407.02447); solved exactly, where the authors take 400 steps
    of Adam.
    """
    return chain(by_stats(aligned_gram=regress(ridge), otherwise=join()))


@method
def pleas(ridge: NonNegative = 1e-6):
    """Permutations and least squares: units are aligned, joined in part, and layers regressed.

    Args:
        ridge: see `least_squares`; 1e-6 to 1e-3.

    Returns:
        A method that needs no base and reads the statistics of `permute` and `least_squares`.

    Raises:
        MergeError: a ridge below zero.

    Example:
        >>> import mergejax as mj
        >>> mj.chain(mj.pleas())
        pleas()

    PLeaS (Nasery et al., 2025, arXiv:2407.02447).
    """
    return chain(permute(), least_squares(ridge))
