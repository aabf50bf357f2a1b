"""Gram matrices of the inputs of a model's layers."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mergejax.collect import layers
from mergejax.collect.layers import Measurement, RowMask, Rows, Sums
from mergejax.collect.rows import KERNELS, groups_of, input_rows, several_kernels
from mergejax.collect.statistics import Statistics, means
from mergejax.collect.streaming import Mask, Progress


def gram(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    exclude: str | Sequence[str] = (),
    row_mask: RowMask | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Mean Gram matrix of the inputs of every layer with a kernel, without changing the model.

    For a layer y = x W + b, G = Σ_r w_r x_rᵀ x_r / Σ_r w_r over all rows r (tokens, pixels) of all
    batches, w_r = 1 without a mask; x_r is a row of the canonical view in which the kernel is a
    matrix [in, out]: the contracted axes of DenseGeneral flattened in order, the patches of a
    convolution with the channel first (`mergejax.leaves.as_matrix`). The sums are float32 at the
    highest matmul precision. A grouped convolution has a matrix for each group, [groups, in, in],
    and is merged group by group. A layer that is called several times sums over its calls; stacked
    layers (nn.scan with variable_axes {'intermediates': 0}, nnx.scan) give [layers, in, in].

    Tapped are Dense, DenseGeneral and Conv of linen, Linear, LinearGeneral and Conv of NNX, so
    also the projections of attention. The model runs as it is called: call linen models with
    dropout off and running statistics in use (an NNX model is switched to evaluation).

    Args:
        model: a function (params, batch) that calls linen modules by `Module.apply`, outside
            other JAX transforms; its output is not used. Or a linen or NNX model that is called on
            the batch. Linen models and functions under `jax.jit` are compiled once for all
            experts, other functions once a call, as they may depend on what has changed since.
        params: the expert's parameters, a tree of arrays; for an NNX model its `nnx.Param` state,
            or None for the model's own. Kernels are named by their place in this tree.
        batches: any iterable of batches, the same shapes throughout except for the last one (each
            new shape compiles once more).
        mask: batch -> weights of the rows, 0 for padding: [examples], or [examples, tokens, ...]
            for layers whose rows have these axes; layers that see fewer axes (pooled ones) take
            the largest weight over the missing ones.
        exclude: regular expressions (`re.search` on leaf names) of kernels to leave out.
        row_mask: (leaf name, inputs) -> weights of its rows from their values, or None for all
            rows: for the experts of a mixture, whose buffers are padded,
            `lambda name, x: (x != 0).any(-1) if 'experts' in name else None`. An expert that got no
            row has a Gram matrix of zeros, which leaves its weights to the average.
        budget: bytes of the sums that are on the device at once; where all layers take more, they
            are collected in groups, a pass over the batches (a list, then) for each. None: all.
        progress: called as progress(done, total, 'gram') after each batch; total is 0 where
            `batches` has no length.

    Returns:
        {leaf name of the kernel ('block/dense/kernel'): G [in, in] float32, symmetric}, a
        dictionary that knows its rows (`mj.collect.Statistics`).

    Raises:
        MergeError: no batch; a layer with an input that is not finite; a kernel that got no Gram
            matrix and is not excluded (its layer was not called or is of another kind); a mask
            that does not fit; a DenseGeneral with batch axes that is not excluded; a pattern that
            matches no leaf.

    Example:
        >>> import flax.linen as nn
        >>> model = nn.Dense(3)
        >>> batches = [jnp.array([[1.0, 2.0], [3.0, 4.0]])]
        >>> params = model.init(jax.random.key(0), batches[0])['params']
        >>> {name: g.tolist() for name, g in gram(model, params, batches).items()}
        {'kernel': [[5.0, 7.0], [7.0, 10.0]]}

    Source: RegMean, 2023, arXiv:2212.09849.
    """
    found = layers.sums(GRAM, model, params, batches, mask, exclude, row_mask, progress, budget)
    return means("gram", found, idle=row_mask is not None, form=whole)


def gram_sums(
    model: Any,
    params: Any,
    batch: Any,
    weights: Any = None,
    *,
    exclude: Sequence[str] = (),
    row_mask: RowMask | None = None,
) -> Sums:
    r"""What `gram` adds up, of one batch: a pure function to run under your own transforms.

    .. math:: \Big(\sum_rw_rx_r^\top x_r,\ \sum_rw_r\Big)

    Args:
        model: as for `gram`.
        params: as for `gram`; traced, for instance.
        batch: one batch, or a device's share of it.
        weights: of its rows, as `mask` gives them, or None.
        exclude: as for `gram`.
        row_mask: as for `gram`.

    Returns:
        {leaf name: (Σ w xᵀx [in, in] float32, Σ w)}, to be added over batches and devices, by
        `jax.lax.psum` inside `jax.shard_map`, and made `mj.collect.means('gram', sums)`.

    Raises:
        MergeError: what `gram` says of the model and the mask.

    Example:
        >>> import flax.linen as nn
        >>> params = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
        >>> sums = jax.jit(lambda p, x: gram_sums(nn.Dense(3), p, x))(params, jnp.eye(2))
        >>> means('gram', sums)['kernel'].tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    found = layers.sums_of_batch(GRAM, model, params, batch, weights, exclude, row_mask)
    return OrderedDict((name, (whole(blocks), weight)) for name, (blocks, weight) in found.items())


def products(rows: Rows) -> tuple[jax.Array, ...]:
    """Σ w xᵀx [features, features] at the highest precision of float32, its lower triangle.

    In blocks of rows, each as wide as the triangle is there: little more than half of the work and
    of the memory.
    """
    features = rows.values.shape[-1]
    height = max(NARROWEST, -(-features // MOST))
    return tuple(
        jnp.matmul(
            rows.weighted[:, start : start + height].T,
            rows.values[:, : start + height],
            precision=lax.Precision.HIGHEST,
        )
        for start in range(0, features, height)
    )


def products_of_groups(layer: Any, rows: Rows) -> tuple[jax.Array, ...]:
    """`products`, of a grouped convolution with the groups' axis in front."""
    groups = groups_of(layer)
    if groups == 1:
        return products(rows)
    values, weighted = (
        jnp.moveaxis(x.reshape(len(x), groups, -1), 1, 0) for x in (rows.values, rows.weighted)
    )
    return jax.vmap(lambda x, y: products(Rows(x, y, rows.weight)))(values, weighted)


def whole(blocks: tuple[jax.Array, ...]) -> jax.Array:
    """The symmetric matrix [..., features, features] of what `products` made or of their sums."""
    rows = []
    for i, block in enumerate(blocks):
        start, stop = block.shape[-1] - block.shape[-2], block.shape[-1]
        lower = jnp.tril(block[..., start:])
        diagonal = lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)
        right = [jnp.swapaxes(x[..., start:stop], -1, -2) for x in blocks[i + 1 :]]
        rows.append(jnp.concatenate([block[..., :start], diagonal, *right], axis=-1))
    return jnp.concatenate(rows, axis=-2)


NARROWEST, MOST = 192, 8  # blocks: narrower ones are slow, more of them save nothing
GRAM = Measurement("gram", KERNELS, input_rows, products_of_groups, several_kernels)
