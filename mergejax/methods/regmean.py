"""RegMean: the weights that reproduce every expert's layer outputs best, in closed form."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import by_stats, chain
from mergejax.core import method, reduce
from mergejax.hyper import Fraction, NonNegatives
from mergejax.linalg.regression import on_groups, regress, shrunk
from mergejax.linalg.spectral import highest
from mergejax.methods.combine import mean
from mergejax.methods.elect import per_expert


@reduce(space="weights", needs=("gram",))
def gram_solve(shrink: Fraction = 0.9, weights: NonNegatives = 1.0):
    r"""Solves the layer-wise regression on the experts' outputs.

    See `regmean` for the formula and the arguments.

    Returns:
        A reduction of kernels that reads the statistic 'gram' ([N, in, in] float32).

    Example:
        >>> import mergejax as mj
        >>> mj.gram_solve(shrink=0.5)
        gram_solve(shrink=0.5)
    """

    def apply(ds, leaf, seen):
        shrink_one = lambda gram, rows: shrunk(gram, shrink)
        return _regressed(ds, leaf, "gram", shrink_one, per_expert(weights, len(ds)))

    return apply


@reduce(space="weights", needs=("affine_gram",))
def affine_solve(shrink: Fraction = 0.9, weights: NonNegatives = 1.0):
    r"""`gram_solve` for a kernel and its bias together, the last row of :math:`[W; b]`.

    What is shrunk are the covariances of the inputs; their means are not, as the matrix would
    cease to be positive semi-definite.

    Returns:
        A reduction that reads the statistic 'affine_gram' ([N, in + 1, in + 1] float32).

    Example:
        >>> import mergejax as mj
        >>> mj.affine_solve(shrink=0.5)
        affine_solve(shrink=0.5)
    """

    def apply(ds, leaf, seen):
        # A layer without a bias has no last row.
        shrink_one = lambda gram, rows: affine_shrunk(gram, shrink)[:rows, :rows]
        return _regressed(ds, leaf, "affine_gram", shrink_one, per_expert(weights, len(ds)))

    return apply


@highest()
def affine_shrunk(gram, alpha):
    """Shrinks the covariances in a Gram matrix of inputs and a one; the means stay."""
    mean = gram[:-1, -1:]
    product = mean @ mean.T
    inputs = shrunk(gram[:-1, :-1] - product, alpha) + product
    return jnp.block([[inputs, mean], [gram[-1:]]])


def _regressed(ds, leaf, need, shrink_one, weights):
    def merge(experts, grams):
        rows = len(experts[0])
        grams = [w * shrink_one(gram, rows) for w, gram in zip(weights, grams, strict=True)]
        middle = experts[0] + sum(w - experts[0] for w in experts) / len(experts)
        return regress(experts, grams, middle)

    return on_groups(merge, leaf.layout, ds, [g.astype(ds[0].dtype) for g in leaf.stats[need]])


@method
def regmean(
    shrink: Fraction = 0.9,
    weights: NonNegatives = 1.0,
    biases: Literal["averaged", "joint"] = "averaged",
):
    r"""Merges every linear layer by least squares on its experts' outputs.

    .. math:: W = \Big(\sum_i w_i\hat G_i\Big)^{-1}\sum_i w_i\hat G_iW_i,\qquad
        \hat G_i = \alpha G_i + (1-\alpha)\,diag(G_i)

    with :math:`G_i` the mean Gram matrix of expert i's inputs to the layer. It is solved as a
    correction of the plain mean, which stays finite where the Gram matrices are singular. Leaves
    without a Gram matrix (biases, norms, embeddings, ...) are averaged.

    Args:
        shrink: :math:`\alpha`, in [0, 1]; 1 leaves the Gram matrices as they are, 0 their diagonal.
            The authors take 0.9 or 0.1 by task; search it on validation data.
        weights: w, a number or one per expert.
        biases: 'averaged', as the authors do, or solved with their kernel as the weights of a
            constant input of 1.

    Returns:
        A method that needs no base and reads the statistic 'gram' (see `mj.collect.gram`), or
        'affine_gram' (`mj.collect.affine_gram`).

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'dense': {'kernel': jnp.asarray([[x], [x]])}} for x in (0.0, 1.0)]
        >>> grams = [{'dense/kernel': jnp.diag(jnp.asarray(g))} for g in ([3.0, 1.0], [1.0, 1.0])]
        >>> merged = mj.merge(mj.regmean(), None, experts, stats={'gram': grams})
        >>> print(merged['dense']['kernel'].round(3))
        [[0.25]
         [0.5 ]]

    Dataless knowledge fusion by merging weights of language models (Jin et al., 2023,
    arXiv:2212.09849), with the mean Gram matrix per row, as all public codes have it.
    """
    solve = by_stats(gram=gram_solve(shrink, weights), otherwise=mean())
    joint = by_stats(affine_gram=affine_solve(shrink, weights), otherwise=mean())
    return chain({"averaged": solve, "joint": joint}[biases])
