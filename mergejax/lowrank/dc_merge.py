"""DC-Merge for adapters: even out the spectra, merge in a basis that covers all experts."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mergejax.core import Array
from mergejax.hyper import Positive, Scaling
from mergejax.linalg.triplets import polar
from mergejax.lowrank.factors import Adapter, Factors, product_svd
from mergejax.lowrank.methods import adapter_method, merge_coordinates, numbers_at

_HOST = "ties(density=0.001, scope='tensor', cut='exact', zero='plus')"


def _smoothed(values: Array, smoothing: str, ratio: Array) -> Array:
    """The singular values [r], those that are noise as zeros, redistributed; the sum stays."""
    real = values > 4 * jnp.finfo(values.dtype).eps * values.size * values[0]
    kept = jnp.where(real, values, 0.0)
    if smoothing == "none":
        return kept
    count = real.sum(dtype=jnp.int32)
    steps = jnp.arange(values.size, dtype=values.dtype)
    last = kept[jnp.maximum(count - 1, 0)]
    limit = jnp.float32(1) if smoothing == "mean" else ratio
    top = jnp.minimum(limit, kept[0] / jnp.where(last > 0, last, 1.0))
    fall = steps / jnp.maximum(count - 1, 1).astype(values.dtype)
    shape = jnp.where(real, top + (1 - top) * fall, 0.0)
    whole = shape.sum()
    return shape * kept.sum() / jnp.where(whole > 0, whole, 1.0)


@adapter_method
def dc_merge(
    adapters: Sequence[Adapter],
    rank: int = 16,
    smoothing: Literal["mean", "linear", "none"] = "mean",
    ratio: Positive = 5.0,
    host: Any = _HOST,
    scaling: Scaling = 1.0,
) -> dict[str, Factors]:
    r"""Merges adapters of even spectra in a basis that covers the directions of all of them.

    .. math:: \hat\Delta_i=U_i\,smooth(\Sigma_i)\,V_i^\top,\quad U=polar[U_1,\ldots,U_N],\quad
        V=polar[V_1,\ldots,V_N],\qquad
        \Delta=\lambda\,U\big(B\odot f(U^\top\hat\Delta_1V,\ldots,U^\top\hat\Delta_NV)\big)V^\top

    with r directions of each expert, f the host method on the cores, and B one on N diagonal
    blocks of size r, zero elsewhere.

    Args:
        adapters: one per expert.
        rank: r; directions that an adapter of lower rank lacks are left out.
        smoothing: singular values become their 'mean', fall in a 'linear' way, or stay ('none').
        ratio: of the first to the last singular value that 'linear' allows at most.
        host: f, a chain or a text that reduces its experts; by default TIES on the largest
            thousandth of each core, at least one element, as published.
        scaling: :math:`\lambda`; searched in 0.1 to 3 by the authors.

    Returns:
        An adapter of rank N r.

    Raises:
        MergeError: a rank above a leaf's, or what the host refuses.

    Example:
        >>> adapter = {'q': Factors(jnp.eye(2), jnp.diag(jnp.asarray([3.0, 1.0])))}
        >>> merged = dc_merge([adapter], rank=2, host='average()')['q']
        >>> print((merged.down @ merged.up).round(4))
        [[2. 0.]
         [0. 2.]]

    DC-Merge (2026, arXiv:2603.06242), the authors' form for LoRA.
    """
    bases: dict[str, tuple[Array, Array]] = {}
    cores: list[dict[str, Array]] = [{} for _ in adapters]
    for name in adapters[0]:
        several = [adapter[name] for adapter in adapters]
        left, right, found = _covered(several, numbers_at(ratio, name, 1)[0], rank, smoothing)
        bases[name] = (left, right)
        for own, core in zip(cores, found, strict=True):
            own[name] = core
    merged = merge_coordinates("dc_merge", host, cores)
    block = jnp.arange(rank * len(adapters)) // rank
    inside = (block[:, None] == block[None, :]).astype(jnp.float32)
    return {
        name: Factors(
            left,
            numbers_at(scaling, name, 1)[0] * (merged[name] * inside) @ right.T,
            jnp.float32(1),
        )
        for name, (left, right) in bases.items()
    }


def _padded(x: Array, rank: int) -> Array:
    """The first entries of the last axis, zeros behind them where there are fewer."""
    kept = x[..., :rank]
    widths = [(0, 0)] * (x.ndim - 1) + [(0, rank - kept.shape[-1])]
    return jnp.pad(kept, widths)


@functools.partial(jax.jit, static_argnames=("rank", "smoothing"))
def _covered(
    several: Sequence[Factors], ratio: Array, rank: int, smoothing: str
) -> tuple[Array, Array, list[Array]]:
    """Bases that cover the leading directions of one leaf's deltas, and the deltas in them."""
    triplets = []
    for factors in several:
        u, values, vt = product_svd(factors)
        smooth = _smoothed(_padded(values, rank), smoothing, ratio)
        there = (smooth > 0).astype(smooth.dtype)[None, :]
        triplets.append((_padded(u, rank) * there, smooth, _padded(vt.T, rank) * there))
    left = polar(jnp.concatenate([u for u, _, _ in triplets], 1))
    right = polar(jnp.concatenate([v for _, _, v in triplets], 1))
    cores = [((left.T @ u) * values[None, :]) @ (v.T @ right) for u, values, v in triplets]
    return left, right, cores
