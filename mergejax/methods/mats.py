"""MaTS: the model that matches its experts in their task subspaces, by conjugate gradients."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import by_stats, chain
from mergejax.core import method, refine
from mergejax.hyper import Fraction, NonNegative, Scaling, Weights, Whole
from mergejax.linalg.regression import conjugate_gradients, on_groups, on_layers, shrunk
from mergejax.methods.combine import mean, scale, total


def _solved(merged, ds, operators, steps, tolerance):
    """Conjugate gradients on (Σ C_i) x = Σ C_i τ_i from the merged delta."""
    operator = lambda x: sum(apply(x) for apply in operators)
    right = sum(apply(d) for apply, d in zip(operators, ds, strict=True))
    return conjugate_gradients(operator, right, merged, steps, tolerance)


@refine(needs=("gram",))
def match_inputs(steps: Whole = 100, shrink: Fraction = 1.0, tolerance: NonNegative = 1e-6):
    r"""Moves a merged kernel towards its experts' outputs, :math:`C_i:X\mapsto G_iX`.

    See `mats` for the formula and the arguments.

    Returns:
        A stage behind the reduction that reads the statistic 'gram'.

    Example:
        >>> import mergejax as mj
        >>> mj.parse('ties()|match_inputs(steps=10)')
        ties()|match_inputs(steps=10)
    """

    def apply(merged, ds, leaf, seen):
        def solve(matrices, grams):
            start, *taus = matrices
            grams = [shrunk(gram, shrink) for gram in grams]
            operators = [lambda x, g=gram: g @ x for gram in grams]
            return _solved(start, taus, operators, steps, tolerance)

        grams = [gram.astype(merged.dtype) for gram in leaf.stats["gram"]]
        return on_groups(solve, leaf.layout, [merged, *ds], grams)

    return apply


@refine(needs=("gram", "output_gram"))
def match_both_sides(steps: Whole = 100, shrink: Fraction = 1.0, tolerance: NonNegative = 1e-6):
    r"""Moves a merged kernel to its experts by K-FAC, :math:`C_i:X\mapsto G_iXB_i`.

    See `mats` for the formula and the arguments.

    Returns:
        A stage behind the reduction that reads the statistics 'gram' and 'output_gram'.

    Example:
        >>> import mergejax as mj
        >>> mj.parse('ties()|match_both_sides(steps=10)')
        ties()|match_both_sides(steps=10)
    """

    def apply(merged, ds, leaf, seen):
        pairs = [
            (shrunk(a.astype(merged.dtype), shrink), shrunk(b.astype(merged.dtype), shrink))
            for a, b in zip(leaf.stats["gram"], leaf.stats["output_gram"], strict=True)
        ]
        # Gradients are small, and so are their Gram matrices: one common factor changes nothing
        # but keeps the products in range.
        size = sum(jnp.trace(b) / b.shape[0] for _, b in pairs) / len(pairs)
        pairs = [(a, b / jnp.where(size > 0, size, 1)) for a, b in pairs]
        operators = [lambda x, a=a, b=b: a @ x @ b for a, b in pairs]

        def solve(start, *taus):
            return _solved(start, taus, operators, steps, tolerance)

        return on_layers(solve, leaf.layout, merged, *ds)

    return apply


@refine(needs=("fisher",))
def match_fisher(steps: Whole = 100, tolerance: NonNegative = 1e-6, floor: NonNegative = 1e-8):
    r"""Moves a merged leaf to its experts by their diagonal Fisher information.

    See `mats` for the formula and the arguments. To convergence it is `fisher` without its norms;
    stopped early, elements with little information stay where they were.

    Returns:
        A stage behind the reduction that reads the statistic 'fisher'.

    Example:
        >>> import mergejax as mj
        >>> mj.parse('ties()|match_fisher(steps=10)')
        ties()|match_fisher(steps=10)
    """

    def apply(merged, ds, leaf, seen):
        several = [jnp.maximum(f, floor) for f in leaf.stats["fisher"]]
        size = sum(f.mean() for f in several)
        operators = [lambda x, f=f: f / jnp.where(size > 0, size, 1) * x for f in several]
        return _solved(merged, ds, operators, steps, tolerance)

    return apply


@refine(needs=("block_fisher",))
def match_blocks(steps: Whole = 10, tolerance: NonNegative = 1e-6):
    r"""Moves a small merged leaf to its experts by their whole Fisher matrices.

    See `mats` for the formula and the arguments.

    Returns:
        A stage behind the reduction that reads the statistic 'block_fisher' ([n, n] for a leaf of
        n elements, row by row).

    Example:
        >>> import mergejax as mj
        >>> mj.parse('total()|match_blocks(steps=5)')
        total()|match_blocks(steps=5)
    """

    def apply(merged, ds, leaf, seen):
        blocks = [f.astype(merged.dtype) for f in leaf.stats["block_fisher"]]
        size = sum(jnp.trace(f) / f.shape[0] for f in blocks)
        operators = [lambda x, f=f: f / jnp.where(size > 0, size, 1) @ x for f in blocks]
        flat = [d.ravel() for d in ds]
        return _solved(merged.ravel(), flat, operators, steps, tolerance).reshape(merged.shape)

    return apply


Operator = Literal["gram", "kfac", "fisher", "block_fisher"]


@method
def mats(
    operator: Operator = "gram",
    steps: Whole = 100,
    scaling: Scaling = 0.3,
    weights: Weights = 1.0,
    shrink: Fraction = 1.0,
    tolerance: NonNegative = 1e-6,
):
    r"""Matches the experts in their task subspaces, by conjugate gradients from task arithmetic.

    .. math:: \Big(\sum_iC_i\Big)\tau=\sum_iC_i\tau_i,\qquad
        \tau_{start}=\lambda\sum_iw_i\tau_i

    solved by so many steps: stopping early is what regularises, and where the operator is singular
    the start decides. Leaves without the statistic are averaged.

    Args:
        operator: 'gram' (:math:`C_i\tau=G_i\tau`, of inputs: forward passes only), 'kfac'
            (:math:`G_i\tau B_i`, with Gram matrices of the gradients at the outputs), 'fisher'
            (diagonal), 'block_fisher' (whole, of small leaves).
        steps: at most so many; the authors take 100, and 10 for 'block_fisher'. Static.
        scaling: :math:`\lambda` of the start; the authors' best starts are task arithmetic at 0.3,
            and 0.2 for small leaves. To start from any other method, put a stage behind it:
            'ties()|match_inputs()'.
        weights: w of the start, a number or one per expert.
        shrink: what is left of off-diagonal entries of Gram matrices, in [0, 1].
        tolerance: stops where the residual is this share of the start's; 0 for all steps.

    Returns:
        A method that reads the statistic 'gram', 'gram' and 'output_gram', 'fisher' or
        'block_fisher'.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 1))}
        >>> experts = [{'kernel': jnp.full((2, 1), x)} for x in (0.0, 1.0)]
        >>> grams = [{'kernel': jnp.diag(jnp.asarray(g))} for g in ([3.0, 1.0], [1.0, 1.0])]
        >>> print(mj.merge(mj.mats(), base, experts, stats={'gram': grams})['kernel'].round(3))
        [[0.25]
         [0.5 ]]

    Merging by matching models in task parameter subspaces (Tam et al., 2024, arXiv:2312.04339).
    """
    start = chain(total(weights), scale(scaling))
    piece = {
        "gram": ("gram", match_inputs(steps, shrink, tolerance)),
        "kfac": ("output_gram", match_both_sides(steps, shrink, tolerance)),
        "fisher": ("fisher", match_fisher(steps, tolerance)),
        "block_fisher": ("block_fisher", match_blocks(steps, tolerance)),
    }
    need, matched = piece[operator]
    return chain(by_stats(**{need: chain(start, matched)}, otherwise=mean()))
