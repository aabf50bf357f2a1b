"""FeatCal: a merged model calibrated layer by layer to the features of its experts."""

import jax.numpy as jnp

from mergejax.chains import by_stats, chain
from mergejax.core import method, refine
from mergejax.hyper import Fraction, NonNegative, Scaling
from mergejax.linalg.regression import on_layers
from mergejax.linalg.solve import safe_solve
from mergejax.linalg.spectral import highest
from mergejax.methods.combine import scale, total

SMALLEST = 1e-8  # of a norm's determinant


@refine(needs=("drift",))
def calibrate_layer(
    ridge: NonNegative = 0.05, extrapolation: Scaling = 2.2, expert_share: Fraction = 0.25
):
    r"""Moves a merged layer towards its experts' outputs, on the inputs that it will have.

    See `featcal` for the formulas and the arguments.

    Returns:
        A stage behind the reduction that reads the statistic 'drift' (see `mj.collect.drift`).

    Example:
        >>> import mergejax as mj
        >>> mj.parse('ties()|calibrate_layer(ridge=0.1)')
        ties()|calibrate_layer(ridge=0.1)
    """

    def apply(merged, ds, leaf, seen):
        products = [q.astype(merged.dtype) for q in leaf.stats["drift"]]

        def solve(merged, base, *taus):
            return _layer(extrapolation * merged, base, taus, products, ridge, expert_share)

        return on_layers(solve, leaf.layout, merged, leaf.base, *ds)

    return apply


@highest()
def _layer(anchor, base, taus, products, ridge, share):
    """The delta [in, out], or [in + 1, out] with the bias as its last row, from an anchor."""
    inside = slice(0, (products[0].shape[0] - 1) // 2)
    normed = [_unit(q, inside) for q in products]
    right = sum(
        q[inside, inside] @ (tau - anchor)[inside]
        + share * _ahead(q, inside, inside) @ (base + tau)[inside]
        for q, tau in zip(normed, taus, strict=True)
    )
    grams = sum(q[inside, inside] for q in normed)
    whole = grams + ridge * jnp.eye(grams.shape[0], dtype=grams.dtype)
    kernel = anchor[inside] + safe_solve(whole, right)
    last = slice(-1, None)
    moved = sum(
        q[last, last] * (tau - anchor)[inside.stop :]
        + q[last, inside] @ (tau[inside] - kernel)
        + share * _ahead(q, last, inside) @ (base + tau)[inside]
        for q, tau in zip(normed, taus, strict=True)
    )
    mass = sum(q[last, last] for q in normed) + ridge
    bias = anchor[inside.stop :] + moved / jnp.where(mass > 0, mass, 1)
    return jnp.concatenate([kernel, bias])  # of no rows where the layer has no bias


def _unit(q, inside):
    """Products over the Frobenius norm of the merged model's Gram matrix: all tasks count alike."""
    size = jnp.linalg.norm(q[inside, inside])
    return q / jnp.where(size > 0, size, 1)


def _ahead(q, rows, inside):
    """Rows of the merged model, multiplied by what the expert's inputs are ahead of its own."""
    return q[rows, inside.stop : -1] - q[rows, inside]


@refine(needs=("norm_moments",))
def calibrate_norm(ridge: NonNegative = 0.05, extrapolation: Scaling = 2.2):
    r"""Moves a merged norm's scale and shift towards its experts' outputs.

    See `featcal` for the formulas and the arguments.

    Returns:
        A stage behind the reduction that reads the statistic 'norm_moments'.

    Example:
        >>> import mergejax as mj
        >>> mj.calibrate_norm(ridge=0.1)
        calibrate_norm(ridge=0.1)
    """

    def apply(merged, ds, leaf, seen):
        anchor = extrapolation * merged
        several = list(zip(leaf.stats["norm_moments"], ds, strict=True))
        energy = sum(e for (e, _), _ in several) + ridge
        if merged.ndim == 1:  # a norm without a shift
            moved = sum(e * (tau - anchor) for (e, _), tau in several)
            return anchor + moved / jnp.where(energy > 0, energy, 1)
        mean, count = sum(m for (_, m), _ in several), len(ds) + ridge
        steps = [(e, m, tau - anchor) for (e, m), tau in several]
        scaled = sum(e * step[0] + m * step[1] for e, m, step in steps)
        shifted = sum(m * step[0] + step[1] for _, m, step in steps)
        determinant = jnp.maximum(energy * count - mean**2, SMALLEST)
        solved = [count * scaled - mean * shifted, energy * shifted - mean * scaled]
        return anchor + jnp.stack(solved) / determinant[None]

    return apply


@method
def featcal(
    scaling: Scaling = 0.3,
    ridge: NonNegative = 0.05,
    extrapolation: Scaling = 2.2,
    expert_share: Fraction = 0.25,
):
    r"""Calibrates task arithmetic layer by layer to the features of its experts.

    .. math:: W=\Big(\sum_i\hat C_i+\lambda I\Big)^{-1}\Big(\sum_i\hat D_iW_i+\lambda W_a\Big),
        \qquad b=\frac{\sum_i s_i(b_i+\bar t_iW_i-\bar x_iW)+\lambda b_a}{\sum_i s_i+\lambda}

    with :math:`x_i` the inputs of the layer in the calibrated model on the data of expert i,
    :math:`e_i` those in the expert, and targets :math:`t_i=\alpha e_i+(1-\alpha)x_i`;
    :math:`C_i=mean\,x_i^\top x_i`, :math:`D_i=mean\,x_i^\top t_i`, both times
    :math:`s_i=1/\|C_i\|_F`; the anchor is :math:`\theta_a=\theta_0+\rho\lambda_0\sum_i\tau_i`. The
    scale and the shift of a norm minimise
    :math:`\sum_i mean\,(\gamma z_i+\beta-\gamma_iz_i-\beta_i)^2+\lambda\|(\gamma,\beta)-(\gamma_a,
    \beta_a)\|^2` on its normalised inputs :math:`z_i`. All other leaves are task arithmetic's.

    Args:
        scaling: :math:`\lambda_0` of task arithmetic. To calibrate another merge, put the stages
            behind it: 'ties()|by_stats(drift=calibrate_layer(), norm_moments=calibrate_norm(),
            otherwise=scale())'.
        ridge: :math:`\lambda`, the pull towards the anchor.
        extrapolation: :math:`\rho`, how far along the merged delta the anchor is; the paper has
            2.0, the authors' script 2.2.
        expert_share: :math:`\alpha` of the targets; 0 asks for the experts' outputs on the
            calibrated model's inputs; the paper has 0.3, the script 0.25.

    Returns:
        A method that reads the statistics 'drift' and 'norm_moments', which `mj.sequential`
        collects block by block.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((1, 1)), 'bias': jnp.zeros(1)}
        >>> experts = [{'kernel': jnp.full((1, 1), x), 'bias': jnp.full(1, x)} for x in (1.0, 3.0)]
        >>> q = jnp.asarray([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])  # no drift yet
        >>> stats = {'drift': [{'kernel': q}] * 2, 'norm_moments': [{}] * 2}
        >>> merged = mj.merge(mj.featcal(ridge=0.0), base, experts, stats=stats)
        >>> print(merged['kernel'].round(3), merged['bias'].round(3))
        [[2.]] [2.]

    Feature calibration for post-merging models (2026, arXiv:2605.13030). As in the authors' code
    the bias is solved behind the kernel, and statistics inside a block are those of the block
    before it is calibrated; their lower weight for tokens of the last block that are not read is
    left out.
    """
    calibrated = by_stats(
        drift=calibrate_layer(ridge, extrapolation, expert_share),
        norm_moments=calibrate_norm(ridge, extrapolation),
        otherwise=scale(1.0),
    )
    return chain(total(), scale(scaling), calibrated)
