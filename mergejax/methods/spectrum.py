"""Modifiers of a merged delta's singular values: SVC and Subspace Boosting."""

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import each, method, refine
from mergejax.hyper import Fraction, Positive
from mergejax.linalg.spectral import decompose, is_real, on_matrices, spectral_map
from mergejax.methods.combine import scale


@refine
def calibrate_spectrum(alpha: Positive = 1.0):
    r"""Divides each singular value of the merged delta by how often the experts share it.

    See `svc` for the formula and the arguments.

    Returns:
        A stage behind the reduction, for kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.chain(mj.total(), mj.calibrate_spectrum())
        total()|calibrate_spectrum()
    """

    def calibrate(merged, *ds):
        whole = decompose(merged)
        real = is_real(whole.values, merged.shape)
        shared = whole.values[:, None] * whole.right.T
        counts = []
        for d in ds:
            response = whole.left.T @ d
            norm = jnp.sqrt(jnp.sum(response * response, axis=1))
            inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)[:, None]
            counts.append(jnp.sum((shared * inverse) * (response * inverse), axis=1))
        factor = len(ds) / sum(jnp.maximum(alpha, count) for count in counts)
        return whole._replace(values=jnp.where(real, factor * whole.values, 0.0)).compose()

    return lambda merged, ds, leaf, seen: on_matrices(calibrate, leaf.layout, merged, *ds)


@method
def svc(alpha: Positive = 1.0):
    r"""Calibrates the merged delta: directions that many experts share are counted once.

    .. math:: \sigma_r\leftarrow\frac{N}{\sum_i\max(\alpha,s_r^i)}\,\sigma_r,\qquad
        s_r^i=\frac{\langle\sigma_rv_r^\top,\,u_r^\top\tau_i\rangle}{\|u_r^\top\tau_i\|^2}

    with :math:`\sum_r\sigma_ru_rv_r^\top` the merged delta of a kernel [out, in] and
    :math:`\tau_i` the experts' raw deltas; other leaves stay as they are.

    Args:
        alpha: lower bound of an expert's count; factors are in :math:`(0,1/\alpha]`, and 1 only
            shrinks.

    Returns:
        A modifier behind any reduction.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.zeros((2, 2))}, {'kernel': jnp.eye(2)}
        >>> print(mj.merge('total()|svc()', base, [expert, expert])['kernel'].round(4))
        [[1. 0.]
         [0. 1.]]

    When shared knowledge hurts (2026, arXiv:2602.05536), singular value calibration. It is applied
    to the merged delta as it stands, its scaling included.
    """
    return chain(by_role(kernel=calibrate_spectrum(alpha), otherwise=scale(1.0)))


@each
def lift_spectrum(beta: Fraction = 0.01):
    r"""Lifts the small singular values of a kernel's delta to a floor.

    See `subspace_boosting` for the formula and the arguments.

    Returns:
        A stage for one kernel's delta, before or behind the reduction.

    Example:
        >>> import mergejax as mj
        >>> mj.lift_spectrum(beta=0.1)
        lift_spectrum(beta=0.1)
    """

    def lifted(values):
        mass = values.sum()
        share = jnp.cumsum(values) / jnp.where(mass > 0, mass, 1.0)
        place = jnp.sum(share < beta)
        floor = jnp.where(beta < 1, values[jnp.minimum(place, len(values) - 1)], 0.0)
        return jnp.maximum(values, floor)

    return lambda d, leaf, seen: on_matrices(lambda x: spectral_map(x, lifted), leaf.layout, d)


@method
def subspace_boosting(beta: Fraction = 0.01):
    r"""Lifts the small singular values of the merged delta to a floor.

    .. math:: \sigma_j\leftarrow\max(\sigma_j,\sigma_{j^*}),\qquad
        j^*=\min\Big\{j:\ \textstyle\sum_{l\le j}\sigma_l\,/\sum_l\sigma_l\ge\beta\Big\}

    for kernels; other leaves stay as they are.

    Args:
        beta: share of the singular values' sum that stays as it is, in [0, 1]; 0 makes all values
            equal to the largest, 1 changes nothing. The authors take 0 to 0.1.

    Returns:
        A modifier behind any reduction.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> expert = {'kernel': jnp.diag(jnp.asarray([3.0, 1.0]))}
        >>> print(mj.merge('total()|subspace_boosting(0.0)', base, [expert])['kernel'].round(4))
        [[3. 0.]
         [0. 3.]]

    Subspace-boosted model merging (Skorobogat et al., 2025, arXiv:2506.16506). Directions whose
    singular value is zero stay without one: their vectors are arbitrary.
    """
    return chain(by_role(kernel=lift_spectrum(beta), otherwise=scale(1.0)))
