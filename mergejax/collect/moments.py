"""Means and mean squares of what layers see, and how often embeddings see each token."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.collect import layers
from mergejax.collect.layers import Measurement, Rows
from mergejax.collect.rows import (
    BATCH_NORMS,
    EMBEDDINGS,
    KERNELS,
    NORMS,
    input_rows,
    several_kernels,
)
from mergejax.collect.statistics import Statistics, means
from mergejax.collect.streaming import Mask, Progress


def moments(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Statistics, Statistics]:
    r"""Mean and mean square of every feature of the inputs of every layer.

    .. math:: m=\sum_rw_rx_r\,/\,\sum_rw_r,\qquad s=\sum_rw_rx_r^2\,/\,\sum_rw_r

    over the rows that `gram` sees (of a grouped convolution the groups one after the other), also
    of LayerNorm, RMSNorm and BatchNorm, whose inputs are taken before they are normalised: s − m²
    is the variance that BatchNorm would measure.

    Args:
        model: as for `gram`.
        params: as for `gram`.
        batches: any iterable of batches.
        mask: as for `gram`.
        exclude: regular expressions of kernels and scales to leave out.
        progress: called as progress(done, total, 'moments') after each batch.

    Returns:
        m and s, each {leaf name of the kernel or scale: float32 [features]}.

    Raises:
        MergeError: as `gram`.

    Example:
        >>> import flax.linen as nn
        >>> params = {'kernel': jnp.ones((2, 1)), 'bias': jnp.zeros(1)}
        >>> mean, square = moments(nn.Dense(1), params, [jnp.array([[1.0, 2.0], [3.0, 2.0]])])
        >>> mean['kernel'].tolist(), square['kernel'].tolist()
        ([2.0, 2.0], [5.0, 4.0])
    """
    found = layers.sums(MOMENTS, model, params, batches, mask, exclude, progress=progress)
    both = [
        {name: (total[..., i, :], weight) for name, (total, weight) in found.items()}
        for i in (0, 1)
    ]
    return means("input_mean", both[0]), means("input_square", both[1])


def token_share(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    """The share of each token among all that an embedding sees: the diagonal of its Gram matrix.

    The input of an embedding is a row with a single one, so its mean Gram matrix is diagonal.

    Args:
        model: as for `gram`, with nn.Embed or nnx.Embed.
        params: as for `gram`.
        batches: any iterable of batches.
        mask: as for `gram`; padding is a token, too, unless it is masked.
        exclude: regular expressions of embeddings to leave out.
        progress: called as progress(done, total, 'token_share') after each batch.

    Returns:
        {leaf name of the embedding: float32 [tokens], summing to 1}; empty without embeddings.

    Raises:
        MergeError: no batch, a mask that does not fit or is zero throughout.

    Example:
        >>> import flax.linen as nn
        >>> params = {'embedding': jnp.ones((3, 2))}
        >>> token_share(nn.Embed(3, 2), params, [jnp.array([[0, 2, 2, 2]])])['embedding'].tolist()
        [0.25, 0.0, 0.75]
    """
    found = layers.sums(TOKENS, model, params, batches, mask, exclude, progress=progress)
    return means("token_share", found)


def _features(layer: Any, inputs: jax.Array) -> jax.Array:
    return input_rows(layer, inputs) if isinstance(layer, KERNELS) else inputs


def _moments(layer: Any, rows: Rows) -> jax.Array:
    return jnp.stack([rows.weighted.sum(0), (rows.weighted * rows.values).sum(0)])


def _tokens(layer: Any, inputs: jax.Array) -> jax.Array:
    # Beside each token a one, which becomes its weight. float32 holds integers up to 2^24.
    return jnp.stack([inputs.astype(jnp.float32), jnp.ones(inputs.shape, jnp.float32)], axis=-1)


def _shares(layer: Any, rows: Rows) -> jax.Array:
    tokens = rows.values[:, 0].astype(jnp.int32)
    return jnp.zeros(layer.num_embeddings, jnp.float32).at[tokens].add(rows.weighted[:, 1])


LAYERS = KERNELS + NORMS + BATCH_NORMS
MOMENTS = Measurement("moments", LAYERS, _features, _moments, several_kernels)
TOKENS = Measurement("token_share", EMBEDDINGS, _tokens, _shares, complete=False)
