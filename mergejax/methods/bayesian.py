"""Bayesian Model Merging: a ridge regression on the experts' outputs around any other merge."""

from mergejax.chains import by_role, by_stats, chain
from mergejax.core import method, refine
from mergejax.hyper import NonNegative, Positive, Scaling
from mergejax.linalg.regression import on_groups, on_layers, regress, unit_gram
from mergejax.linalg.spectral import highest
from mergejax.methods.combine import scale, total


@refine(needs=("gram",))
def anchored_solve(ridge: NonNegative = 1.0):
    r"""Moves a merged kernel, the anchor, towards its experts' outputs.

    .. math:: W=W_a+\Big(\sum_i\hat G_i+\lambda I\Big)^{-1}\sum_i\hat G_i(W_i-W_a),\qquad
        \hat G_i=G_i/\|G_i\|_F

    Args:
        ridge: :math:`\lambda`; 0 gives the regression itself, a large one the anchor.

    Returns:
        A stage behind the reduction that reads the statistic 'gram'.

    Example:
        >>> import mergejax as mj
        >>> mj.parse('ties()|anchored_solve(ridge=0.1)')
        ties()|anchored_solve(ridge=0.1)
    """

    def apply(merged, ds, leaf, seen):
        def solve(matrices, grams):
            anchor, *taus = matrices
            return regress(taus, [unit_gram(gram) for gram in grams], anchor, ridge)

        grams = [gram.astype(merged.dtype) for gram in leaf.stats["gram"]]
        return on_groups(solve, leaf.layout, [merged, *ds], grams)

    return apply


@refine
def anchored_solve_data_free(ridge: Positive = 1.0):
    r"""`anchored_solve` with :math:`G_i\approx\tau_i\tau_i^\top`, which needs no data.

    The updates of gradient descent are sums of outer products of a layer's inputs with gradients:
    so the columns of a delta span the inputs.

    Args:
        ridge: :math:`\lambda`, above 0: the approximation has at most the rank of the delta.

    Returns:
        A stage behind the reduction, for kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.by_role(kernel=mj.anchored_solve_data_free(ridge=0.1), otherwise=mj.scale(1.0))
        by_role(kernel=anchored_solve_data_free(ridge=0.1), otherwise=scale())
    """

    @highest()
    def solve(anchor, *taus):
        return regress(taus, [unit_gram(tau @ tau.T) for tau in taus], anchor, ridge)

    return lambda merged, ds, leaf, seen: on_layers(solve, leaf.layout, merged, *ds)


@method
def bayesian(ridge: NonNegative = 1.0, scaling: Scaling = 1.0, anchor_scaling: Scaling = 0.3):
    r"""The most probable layer under the experts' outputs and a prior around task arithmetic.

    .. math:: W=W_0+s\,(\hat W-W_0),\qquad
        \hat W=W_a+\Big(\sum_i\hat G_i+\lambda I\Big)^{-1}\sum_i\hat G_i(W_i-W_a)

    with the anchor :math:`W_a=W_0+a\sum_i\tau_i` and Gram matrices of Frobenius norm 1, so that
    :math:`\lambda` means the same in every layer. Leaves without a Gram matrix keep the anchor.

    Args:
        ridge: :math:`\lambda`, the precision of the prior; search it in [0.001, 100].
        scaling: s, of what is solved; search it in [0.5, 2.5]. Both may differ by group of layers:
            by_name({'attention': 0.1, '.*': 1.0}), see `mj.search_groups`.
        anchor_scaling: a. For another anchor put the stage behind it: 'ties()|anchored_solve()'.

    Returns:
        A method that reads the statistic 'gram'.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((1, 1))}
        >>> experts = [{'kernel': jnp.full((1, 1), x)} for x in (1.0, 3.0)]
        >>> stats = {'gram': [{'kernel': jnp.eye(1)}] * 2}
        >>> for ridge in (0.0, 2.0, 1e6):  # the regression, in between, the anchor
        ...     merged = mj.merge(mj.bayesian(ridge=ridge), base, experts, stats=stats)
        ...     print((10 * merged['kernel']).round())
        [[20.]]
        [[16.]]
        [[12.]]

    Bayesian model merging (Li et al., 2026, arXiv:2605.12843). No code of theirs is known; the
    formula is the posterior mean of their model, unit noise for every expert.
    """
    solved = chain(anchored_solve(ridge), scale(scaling))
    anchor = chain(total(), scale(anchor_scaling))
    return chain(anchor, by_stats(gram=solved, otherwise=scale(1.0)))


@method
def bayesian_data_free(
    ridge: Positive = 1.0, scaling: Scaling = 1.0, anchor_scaling: Scaling = 0.3
):
    r"""`bayesian` without data: :math:`\tau_i\tau_i^\top` takes the place of Gram matrices.

    Args:
        ridge: :math:`\lambda`, above 0.
        scaling: s, of kernels.
        anchor_scaling: a.

    Returns:
        A method. Leaves that are no kernels keep the anchor.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 1))}  # each expert changed another input's weight
        >>> experts = [{'kernel': jnp.asarray(x)} for x in ([[1.0], [0.0]], [[0.0], [1.0]])]
        >>> merged = mj.merge(mj.bayesian_data_free(ridge=0.01), base, experts)
        >>> print((100 * merged['kernel']).round())
        [[99.]
         [99.]]

    Bayesian model merging (Li et al., 2026, arXiv:2605.12843), the form without data. Next to it
    stands FroM (arXiv:2506.02478): multiples of the identity, :math:`\|\tau_i\|_F^2I`, as Gram
    matrices of the regression give `frobenius_weighted(power=2)`.
    """
    solved = chain(anchored_solve_data_free(ridge), scale(scaling))
    anchor = chain(total(), scale(anchor_scaling))
    return chain(anchor, by_role(kernel=solved, otherwise=scale(1.0)))
