"""What the normalisation layers of a model see, before their scale and shift."""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mergejax.collect import layers
from mergejax.collect.layers import Measurement, Rows
from mergejax.collect.rows import NORMS
from mergejax.collect.statistics import Statistics, means
from mergejax.collect.streaming import Mask, Progress


def norm_square(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    r"""Mean square of every feature of the normalised inputs of a model's norms.

    .. math:: s_d=\sum_rw_r\hat x_{rd}^2\,/\,\sum_rw_r

    over all rows r (tokens, pixels) of all batches, with :math:`\hat x` the input of a LayerNorm or
    RMSNorm after normalisation and before scale and shift; it is computed from the input, so that
    scales near 0 do no harm.

    Args:
        model: as for `gram`: a function (params, batch), a linen or an NNX model; norms may be
            stacked or rematerialised.
        params: the expert's parameters, a tree of arrays; None for an NNX model's own.
        batches: any iterable of batches.
        mask: batch -> weights of the rows, [examples] or [examples, tokens, ...]; 0 for padding.
        exclude: regular expressions of scales to leave out.
        progress: called as progress(done, total, 'norm_square') after each batch.

    Returns:
        {leaf name of the scale ('block_0/norm/scale'): s [features] float32}; empty for a model
        without such norms.

    Raises:
        MergeError: no batch, inputs that are not finite, a mask that does not fit, a pattern that
            matches no leaf, norms inside JAX's own transforms.

    Example:
        >>> model = nn.LayerNorm()
        >>> batches = [jnp.array([[1.0, 3.0], [5.0, 1.0]])]  # normalised: -1, 1 and 1, -1
        >>> params = model.init(jax.random.key(0), batches[0])['params']
        >>> {n: s.round(3).tolist() for n, s in norm_square(model, params, batches).items()}
        {'scale': [1.0, 1.0]}

    Source: LOT Merging, 2025, arXiv:2505.23859; CAT Merging, 2025, arXiv:2505.06977.
    """
    measurement = Measurement("norm_square", NORMS, normalised, _squares, complete=False)
    found = layers.sums(measurement, model, params, batches, mask, exclude, progress=progress)
    return means("norm_square", found)


def norm_moments(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    r"""Mean square and mean of every feature of the normalised inputs of a model's norms.

    .. math:: e_d=\sum_rw_r\hat x_{rd}^2\,/\,\sum_rw_r,\qquad
        m_d=\sum_rw_r\hat x_{rd}\,/\,\sum_rw_r

    which is all that a scale and a shift can be fitted with; arguments and errors are those of
    `norm_square`.

    Returns:
        {leaf name of the scale: [2, features] float32, first e, then m}; empty for a model without
        such norms.

    Example:
        >>> model, x = nn.LayerNorm(), jnp.array([[1.0, 3.0], [5.0, 7.0]])
        >>> params = model.init(jax.random.key(0), x)['params']
        >>> {n: s.round(3).tolist() for n, s in norm_moments(model, params, [x]).items()}
        {'scale': [[1.0, 1.0], [-1.0, 1.0]]}

    Source: FeatCal, 2026, arXiv:2605.13030.
    """
    measurement = Measurement("norm_moments", NORMS, normalised, _moments, complete=False)
    found = layers.sums(measurement, model, params, batches, mask, exclude, progress=progress)
    return means("norm_moments", found)


def normalised(layer: Any, x: jax.Array) -> jax.Array:
    """A norm's input after normalisation, before scale and shift."""
    axes = tuple(int(axis) for axis in np.atleast_1d(layer.reduction_axes))
    x = x.astype(jnp.float32)
    if isinstance(layer, nn.LayerNorm | nnx.LayerNorm):
        x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + layer.epsilon)


def _squares(layer: Any, rows: Rows) -> jax.Array:
    return (rows.weighted * rows.values).sum(0)


def _moments(layer: Any, rows: Rows) -> jax.Array:
    return jnp.stack([_squares(layer, rows), rows.weighted.sum(0)])
