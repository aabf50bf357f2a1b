"""SWUDI and ASWUDI: the interference of kernels filtered out in closed form."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Array, method, reduce
from mergejax.hyper import Density, Positive, Scaling
from mergejax.linalg.spectral import gram_filter, on_matrices
from mergejax.methods.combine import mean, scale
from mergejax.methods.wudi import input_gram, interference, mean_of_present

Start = Literal["sum", "mean", "zero"]
_STARTS: dict[str, Callable[..., Array]] = {
    "sum": sum,
    "mean": mean_of_present,
    "zero": lambda ds: jnp.zeros_like(ds[0]),
}
_FLOOR = 1e-8  # of the eigenvalues that decide how many of them are kept


def _filtered(ds, start, response):
    """The start without so much of its interference in each direction of the inputs.

    `response` is (eigenvalues, descending) -> share of the way to the optimum in each direction.
    """
    begin = _STARTS[start](ds)
    residual, slope = interference(begin, ds, [input_gram(d) for d in ds])

    def inverse(values: Array) -> Array:
        return response(values) / jnp.where(values > 0, values, 1.0)

    return begin - gram_filter(residual, slope, inverse)


@reduce
def flow_from_interference(time: Positive = 300.0, density: Density = 0.65, start: Start = "sum"):
    r"""Follows the gradient flow of the interference for some time, in the leading directions.

    See `swudi` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.flow_from_interference(time=1300.0)
        flow_from_interference(time=1300.0)
    """

    def merge(*ds):
        def response(values):
            count = jnp.floor(len(values) * density + 0.999)
            kept = jnp.arange(len(values)).astype(values.dtype) < count
            return jnp.where(kept, -jnp.expm1(-time * values), 0.0)

        return _filtered(ds, start, response)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def swudi(
    scaling: Scaling = 1.0,
    time: Positive = 300.0,
    density: Density = 0.65,
    start: Start = "sum",
):
    r"""WUDI in closed form: its gradient flow up to a time, in the leading input directions.

    .. math:: X=X_0-(X_0C-D)\,Q\,diag\Big(\frac{1-e^{-\Lambda t}}{\Lambda}\Big)Q^\top,\qquad
        C=\sum_i\frac{\tau_i^\top\tau_i}{\|\tau_i\|^2}=Q\Lambda Q^\top,\quad
        D=\sum_i\tau_i\frac{\tau_i^\top\tau_i}{\|\tau_i\|^2}

    for kernels [out, in], over the :math:`\lceil density\cdot in\rceil` largest eigenvalues;
    :math:`\theta=\theta_0+\lambda X`. All other leaves are averaged and scaled alike.

    Args:
        scaling: :math:`\lambda`.
        time: t; 300 by default, 1300 when tuned.
        density: the share of input directions that is kept, in (0, 1].
        start: :math:`X_0`: the 'sum' or the 'mean' of the deltas, or 'zero'.

    Returns:
        A method; a single expert comes back as it is, but for the start 'zero'.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> experts = [{'kernel': jnp.diag(jnp.asarray(x))} for x in ([1.0, 0.0], [1.0, 0.0])]
        >>> print(mj.merge(mj.swudi(), base, experts)['kernel'].round(4))
        [[1. 0.]
         [0. 0.]]

    SWUDI, of the authors of OptMerge (Wei et al., 2025, arXiv:2505.19892). The form above is theirs
    without dividing by eigenvalues that are zero; an expert whose delta is zero has no part.
    """
    kernels = flow_from_interference(time, density, start)
    return chain(by_role(kernel=kernels, otherwise=mean()), scale(scaling))


@reduce
def least_interference_of_leading(start: Start = "sum"):
    r"""Removes the interference altogether in as many directions as the spectrum has of weight.

    See `aswudi` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.least_interference_of_leading(start='mean')
        least_interference_of_leading(start='mean')
    """

    def merge(*ds):
        def response(values):
            floored = jnp.maximum(values, _FLOOR)
            count = jnp.ceil(jnp.sum(jnp.sqrt(floored)) ** 2 / jnp.sum(floored))
            return (jnp.arange(len(values)).astype(values.dtype) < count).astype(values.dtype)

        return _filtered(ds, start, response)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def aswudi(scaling: Scaling = 1.0, start: Start = "sum"):
    r"""WUDI in closed form, at its optimum in the leading input directions.

    .. math:: X=X_0-(X_0C-D)\,Q_K\Lambda_K^{-1}Q_K^\top,\qquad
        K=\Big\lceil\frac{(\sum_j\sqrt{\Lambda_j})^2}{\sum_j\Lambda_j}\Big\rceil

    with C, D and the eigenvalues :math:`\Lambda` of C as in `swudi`, for kernels [out, in];
    :math:`\theta=\theta_0+\lambda X`. All other leaves are averaged and scaled alike.

    Args:
        scaling: :math:`\lambda`.
        start: :math:`X_0`: the 'sum' or the 'mean' of the deltas, or 'zero'.

    Returns:
        A method; a single expert comes back as it is, but for the start 'zero'.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> experts = [{'kernel': jnp.diag(jnp.asarray(x))} for x in ([1.0, 0.0], [1.0, 0.0])]
        >>> print(mj.merge(mj.aswudi(), base, experts)['kernel'].round(4))
        [[1. 0.]
         [0. 0.]]

    ASWUDI, of the authors of OptMerge (Wei et al., 2025, arXiv:2505.19892), with their rule
    'participation_sqrt' for K.
    """
    kernels = least_interference_of_leading(start)
    return chain(by_role(kernel=kernels, otherwise=mean()), scale(scaling))
