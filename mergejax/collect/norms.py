"""What the normalisation layers of a model see, before their scale and shift."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.collect.streaming import Mask, Progress, length, row_weights, total
from mergejax.errors import MergeError, raise_all, some


def norm_square(
    model: nn.Module,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    r"""Mean square of every feature of the normalised inputs of a linen model's norms.

    .. math:: s_d=\sum_rw_r\hat x_{rd}^2\,/\,\sum_rw_r

    over all rows r (tokens, pixels) of all batches, with :math:`\hat x` the input of a LayerNorm or
    RMSNorm after normalisation and before scale and shift; it is computed from the input, so that
    scales near 0 do no harm.

    Args:
        model: a linen model that is called on the batch. Norms inside nn.scan or nn.remat cannot be
            tapped here: unroll the layers.
        params: the expert's parameters, a tree of arrays.
        batches: any iterable of batches.
        mask: batch -> weights of the rows, [examples] or [examples, tokens, ...]; 0 for padding.
        progress: called as progress(done, total, 'norm_square') after each batch.

    Returns:
        {leaf name of the scale ('block_0/norm/scale'): s [features] float32}; empty for a model
        without such norms.

    Raises:
        MergeError: no batch, inputs that are not finite, a mask that does not fit, norms inside
            transforms, a model that is not of linen.

    Example:
        >>> model = nn.LayerNorm()
        >>> batches = [jnp.array([[1.0, 3.0], [5.0, 1.0]])]  # normalised: -1, 1 and 1, -1
        >>> params = model.init(jax.random.key(0), batches[0])['params']
        >>> {n: s.round(3).tolist() for n, s in norm_square(model, params, batches).items()}
        {'scale': [1.0, 1.0]}

    Source: LOT Merging, 2025, arXiv:2505.23859; CAT Merging, 2025, arXiv:2505.06977.
    """
    if not isinstance(model, nn.Module):
        raise MergeError("norm_square taps linen models; collect the norms of others by hand")

    def statistic(params: Any, item: Any) -> dict[str, Any]:
        batch, weights = item
        found: dict[str, Any] = {}
        with nn.intercept_methods(_tap(found, weights)):
            model.apply({"params": params}, batch)
        return found

    items = ((batch, row_weights(mask, batch, "norm_square")) for batch in batches)
    function: Any = _Once(statistic)
    try:
        sums, counts = _split(
            total(
                lambda call: call,
                function,
                (),
                params,
                items,
                length(batches),
                (progress, "norm_square"),
            )
        )
    except jax.errors.UnexpectedTracerError:
        raise MergeError(
            "norm_square: norms inside nn.scan or nn.remat cannot be tapped; unroll the layers"
        ) from None
    broken = [name for name, x in sums.items() if not bool(jnp.isfinite(x).all())]
    empty = [name for name, count in counts.items() if not float(count) > 0]
    raise_all(
        [f"norm_square: inputs of {some(broken)} are not finite; check the data"] * bool(broken)
        + [f"norm_square: every row of {some(empty)} has weight 0; unmask some"] * bool(empty)
    )
    return {name: x / counts[name] for name, x in sums.items()}


class _Once:
    """A statistic that is traced anew in every call, so that the tap is never missed."""

    reusable = False

    def __init__(self, call: Any):
        self.call = call


def _split(found: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    return {n: x for n, (x, _) in found.items()}, {n: c for n, (_, c) in found.items()}


def _tap(found: dict[str, Any], weights: Any) -> Any:
    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        tapped = isinstance(layer, nn.LayerNorm | nn.RMSNorm) and layer.use_scale
        if context.method_name == "__call__" and tapped:
            x = jnp.asarray(args[0] if args else kwargs["x"]).astype(jnp.float32)
            name = "/".join([*layer.path, "scale"])
            new = _square(normalised(layer, x), weights, name)
            old = found.get(name)
            found[name] = new if old is None else jax.tree.map(jnp.add, old, new)
        return call(*args, **kwargs)

    return intercept


def normalised(layer: Any, x: jax.Array) -> jax.Array:
    """A norm's input after normalisation, before scale and shift."""
    axes = tuple(int(axis) for axis in np.atleast_1d(layer.reduction_axes))
    if isinstance(layer, nn.LayerNorm):
        x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + layer.epsilon)


def _square(x: jax.Array, weights: Any, name: str) -> tuple[jax.Array, jax.Array]:
    rows = x.reshape(-1, x.shape[-1])
    if weights is None:
        return jnp.square(rows).sum(0), jnp.float32(len(rows))
    axes = weights.ndim
    if weights.shape != x.shape[: min(axes, x.ndim - 1)]:
        raise MergeError(
            f"norm_square: the mask has shape {weights.shape}, but the rows of '{name}' have "
            f"{x.shape[:-1]}"
        )
    shaped = weights.reshape(*weights.shape, *[1] * (x.ndim - 1 - axes))
    each = jnp.broadcast_to(shaped, x.shape[:-1]).reshape(-1, 1)
    return jnp.where(each > 0, each * jnp.square(rows), 0).sum(0), each.sum()
