"""Products of the inputs of a layer in two models on the same data; what models give out."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mergejax.collect.layers import weighted_rows
from mergejax.collect.rows import input_rows, refusal
from mergejax.collect.statistics import Statistics, means
from mergejax.collect.streaming import (
    Function,
    Mask,
    Progress,
    as_function,
    length,
    nnx_parts,
    row_weights,
    total,
)
from mergejax.collect.taps import tap_linen, tap_nnx
from mergejax.errors import MergeError, some


def cross_gram(
    model: Any,
    params: Any,
    other: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    progress: Progress | None = None,
) -> Statistics:
    r"""Mean product of the inputs of every layer in two models on the same data.

    .. math:: D=\sum_rw_rx_r^\top y_r\,/\,\sum_rw_r

    with x the inputs in the first model and y those in the other: what a regression needs whose
    targets are the other's outputs (FeatCal, with the merged model first and an expert second).

    Args:
        model: as for `gram`, shared by both.
        params: of the first model.
        other: of the second, a tree like it.
        batches: any iterable of batches.
        mask: as for `gram`.
        progress: called as progress(done, total, 'cross_gram') after each batch.

    Returns:
        {leaf name of the kernel: D float32 [in, in]}, not symmetric. Layers without one Gram matrix
        (grouped convolutions) are left out.

    Raises:
        MergeError: no batch, a layer that is called more than once, inputs that are not finite, a
            mask that does not fit.

    Example:
        >>> import flax.linen as nn
        >>> model, x = nn.Sequential([nn.Dense(1), nn.Dense(1)]), jnp.array([[2.0]])
        >>> tree = lambda w: {f'layers_{i}': {'kernel': jnp.full((1, 1), w), 'bias': jnp.zeros(1)}
        ...                   for i in range(2)}
        >>> {n: d.tolist() for n, d in cross_gram(model, tree(1.0), tree(3.0), [x]).items()}
        {'layers_0/kernel': [[4.0]], 'layers_1/kernel': [[12.0]]}
    """
    if isinstance(model, nnx.Module):
        make, function = _nnx_statistic, Function(nnx_parts(model, params)[0], False)
    else:
        make, function = _linen_statistic, as_function(model, params)[0]
    count = length(batches, "cross_gram")
    items = ((batch, row_weights(mask, batch, "cross_gram")) for batch in batches)
    told = progress, "cross_gram"
    found = total(make, function, (), (params, other), items, count, told)
    again = [name for name, (_, _, more) in found.items() if np.any(np.asarray(more) > 0)]
    if again:
        raise MergeError(
            f"cross_gram: {some(again)} are called more than once, so their inputs cannot be paired"
        )
    return means("cross_gram", {name: (d, weight) for name, (d, weight, _) in found.items()})


def _linen_statistic(function):
    return lambda both, item: _measured(tap_linen, function, both, *item)


def _nnx_statistic(build):
    return lambda both, item: _measured(tap_nnx, build, both, *item)


def _measured(tap, function, both, batch, weights):
    """{leaf name: (Σ w xᵀy, Σ w, calls beyond the first)} of one batch."""

    def measure(layer, name, inputs):
        if refusal(layer):
            return None
        rows = weighted_rows("cross_gram", name, input_rows(layer, inputs), weights)
        return rows.weighted, rows.values, rows.weight, jnp.float32(1)

    first, second = (tap(function, params, batch, measure)[0] for params in both)
    products = OrderedDict()
    for name, (weighted, _, weight, calls) in first.items():
        y = second[name][1]
        product = jnp.einsum("...ri,...rj->...ij", weighted, y, precision=lax.Precision.HIGHEST)
        products[name] = (product, weight, calls - 1)
    return products


def representations(
    model: Any, params: Any, batches: Iterable[Any], *, progress: Progress | None = None
) -> np.ndarray:
    """What a model gives out for all examples, such as the features before its head.

    Args:
        model: a function (params, batch) -> array [examples, ...], a linen or an NNX model.
        params: its parameters; for an NNX model its state, or None for its own.
        batches: any iterable of batches.
        progress: called as progress(done, total, 'representations') after each batch.

    Returns:
        An array [all examples, ...] on the host, of the model's type.

    Raises:
        MergeError: no batch, values that are not finite.

    Example:
        >>> representations(lambda params, x: params * x, 2.0, [np.ones((1, 2)), np.zeros((1, 2))])
        array([[2., 2.],
               [0., 0.]], dtype=float32)
    """
    function, params = as_function(model, params)
    run = jax.jit(function.call)
    count, found = length(batches, "representations"), []
    for done, batch in enumerate(batches, start=1):
        found.append(np.asarray(run(params, batch)))
        if not np.isfinite(found[-1]).all():
            raise MergeError(
                f"representations: the outputs for batch {done} are not finite; check the data and "
                "the parameters"
            )
        if progress:
            progress(done, count, "representations")
    if not found:
        raise MergeError("representations: there is no batch; pass at least one")
    return np.concatenate(found)
