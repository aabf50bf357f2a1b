"""WIDEN: weigh each input's column by how much its length and its direction changed."""

import jax
import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import method, reduce
from mergejax.hyper import NonNegative
from mergejax.leaves import as_matrix
from mergejax.summaries import ranks_by_row, value_key


def _units(x, layout):
    """One row for each input (or token), holding its weights; and the way back."""
    if layout:
        return as_matrix(x, layout)
    return x.reshape(-1, x.shape[-1]), lambda rows: rows.reshape(x.shape)


def _scores(significance, above, value):
    """Softmax over experts; what is far above an expert's own mean gets a fixed score."""
    return jnp.where(above, value, jax.nn.softmax(significance, axis=0))


def _scores_of_ranks(changes, ratio, value):
    """With the place of each change in its expert's stable ascending order as significance."""
    ranks = ranks_by_row(value_key(jnp.stack(changes))).astype(jnp.float32)
    count = ranks.shape[1]
    # The mean of the places is known; a sum of shares would round the middle one above or below it.
    return _scores(ranks / count, ranks > ratio * ((count - 1) / 2), value)


def _length_and_direction(d, base):
    """How far each row moves in length, and one minus the cosine between before and after.

    Both from the delta: lengths and directions of fine-tuned rows are equal to most of their digits
    before and after, and the ranks of what subtracting them leaves would be those of roundings.
    """
    before, after = (jnp.sqrt(jnp.square(x).sum(1)) for x in (base, base + d))
    positive = lambda x: jnp.where(x > 0, x, 1.0)
    longer = (d * (2 * base + d)).sum(1) / positive(before + after)
    turned = (d - base * (longer / positive(before))[:, None]) / positive(after)[:, None]
    real = (before > 0) & (after > 0)
    return jnp.abs(longer), jnp.where(real, jnp.square(turned).sum(1) / 2, 0.0)


@reduce
def disentangled(ratio: NonNegative = 1.0, value: NonNegative = 1.0):
    r"""Weighs each input's delta by the ranks of the changes of its length and its direction.

    .. math:: \tau_m[j]=\sum_i\tfrac12(s^\mu_i[j]+s^d_i[j])\,\tau_i[j],\qquad
        s_i=softmax_i\big(rank_j(\Delta_i[j])/n\big)

    with :math:`\Delta^\mu=|\mu_i-\mu_0|` of the columns' lengths and :math:`\Delta^d` one minus the
    cosine between the columns; s becomes `value` where an expert's rank exceeds `ratio` times its
    mean. Vectors take :math:`|\tau|` itself in place of a rank, element by element.

    Args:
        ratio: of the mean rank above which a column counts as significant.
        value: the score of significant columns.

    Returns:
        A reduction. The columns of a kernel are its inputs, those of an embedding its tokens.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.eye(2)}, {'kernel': 2 * jnp.eye(2)}
        >>> print(mj.merge(mj.disentangled(), base, [expert])['kernel'])
        [[2. 0.]
         [0. 2.]]
    """

    def apply(ds, leaf, seen):
        if ds[0].ndim < 2:
            deltas = jnp.stack(ds)
            sizes = jnp.abs(deltas)
            means = sizes.mean(tuple(range(1, sizes.ndim)), keepdims=True)
            above = sizes > ratio * means
            return (_scores(sizes, above, value) * deltas).sum(0)
        base, restore = _units(leaf.base, leaf.layout)
        rows = [_units(d, leaf.layout)[0] for d in ds]
        changes = [_length_and_direction(d, base) for d in rows]
        scores = [_scores_of_ranks(several, ratio, value) for several in zip(*changes, strict=True)]
        weights = (scores[0] + scores[1]) / 2
        return restore(sum(w[:, None] * d for w, d in zip(weights, rows, strict=True)))

    return apply


@method
def widen(ratio: NonNegative = 1.0, value: NonNegative = 1.0):
    r"""Disentangles weights into lengths and directions and weighs columns by how they changed.

    .. math:: \theta[j]=\theta_0[j]+\sum_i\tfrac12(s^\mu_i[j]+s^d_i[j])\,\tau_i[j]

    with scores s from the ranks of the changes, see `disentangled`. For experts that moved by very
    different amounts, such as an instruction-tuned and a continually pre-trained model.

    Args:
        ratio: of the mean rank above which a column counts as significant.
        value: the score of significant columns.

    Returns:
        A method. The scores of a column need not add up to one, as published.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.eye(2)}, {'kernel': 2 * jnp.eye(2)}
        >>> print(mj.merge(mj.widen(), base, [expert])['kernel'])
        [[2. 0.]
         [0. 2.]]

    WIDEN (Yu et al., 2024, arXiv:2408.03092), as in the authors' code.
    """
    return chain(disentangled(ratio, value))
