"""Gram matrices of the inputs of a model's layers with a one beside them, for the bias."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.collect import layers
from mergejax.collect.gram import GRAM, whole
from mergejax.collect.rows import groups_of, input_rows
from mergejax.collect.statistics import Statistics, means
from mergejax.collect.streaming import Mask, Progress


def affine_gram(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    r"""Mean Gram matrix of the inputs of every layer and a one: what kernel and bias share.

    .. math:: G = \sum_rw_r[x_r|1]^\top[x_r|1]\,/\,\sum_rw_r

    Arguments and errors are those of `gram`; methods that read it merge a kernel together with its
    bias.

    Returns:
        {leaf name of the kernel: G [in + 1, in + 1] float32, symmetric}.

    Example:
        >>> import flax.linen as nn
        >>> batches = [jnp.array([[1.0, 2.0], [3.0, 4.0]])]
        >>> params = nn.Dense(3).init(jax.random.key(0), batches[0])['params']
        >>> affine_gram(nn.Dense(3), params, batches)['kernel'].tolist()[-1]
        [2.0, 3.0, 1.0]
    """
    found = layers.sums(MEASUREMENT, model, params, batches, mask, exclude, progress=progress)
    return means("affine_gram", found, form=whole)


def affine_rows(layer: Any, inputs: jax.Array) -> jax.Array:
    """Rows [..., in + 1] of a layer's inputs and a one, of each group of a convolution."""
    rows = input_rows(layer, inputs)
    groups = rows.reshape(*rows.shape[:-1], groups_of(layer), -1)
    return jnp.concatenate([groups, jnp.ones_like(groups[..., :1])], axis=-1).reshape(
        *rows.shape[:-1], -1
    )


MEASUREMENT = GRAM._replace(caller="affine_gram", view=affine_rows)
