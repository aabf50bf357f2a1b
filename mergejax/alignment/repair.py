"""After a merge: statistics of activations brought back to where the experts have them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.alignment.assignment import check_structure
from mergejax.collect.rows import input_rows, refusal
from mergejax.collect.streaming import as_function, total
from mergejax.collect.taps import tap_linen
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError
from mergejax.leaves import as_matrix, layout_of, role_of

DEAD = 1e-5


def reestimate(
    update: Callable[[Tree, Any], Tree], statistics: Tree, batches: Iterable[Any]
) -> Tree:
    r"""Running statistics of BatchNorm, measured anew on data.

    Every layer moves its statistics to :math:`m\,old + (1-m)\,new`; run from zeros and from ones
    this tells both m and the batch's statistics, whatever the layer's momentum. Those of all
    batches are averaged.

    Args:
        update: (statistics, batch) -> statistics after one batch in training mode, for instance
            `lambda stats, x: model.apply({'params': merged, 'batch_stats': stats}, x, train=True,
            mutable=['batch_stats'])[1]['batch_stats']`. Dropout off. Compile it with `jax.jit`,
            the variables among its arguments where several networks share the program.
        statistics: a tree of the statistics' shapes; its values are forgotten.
        batches: about a hundred; the more examples in each the better.

    Returns:
        A tree like `statistics`.

    Raises:
        MergeError: no batch; an update that does not change the statistics (evaluation mode).

    Example:
        >>> update = lambda stats, x: {'mean': 0.9 * stats['mean'] + 0.1 * x.mean(0)}
        >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
        >>> print(reestimate(update, {'mean': jnp.zeros(1)}, batches)['mean'].round(5))
        [4.]

    REPAIR (Jordan et al., 2023, arXiv:2211.08403), for networks with BatchNorm.
    """

    def measured(batch: Any) -> tuple[Tree, Tree]:
        def from_value(value: float) -> Tree:
            return update(jax.tree.map(lambda x: jnp.full_like(x, value), statistics), batch)

        zero, one = from_value(0.0), from_value(1.0)
        kept = jax.tree.map(lambda a, b: b - a, zero, one)
        return jax.tree.map(lambda a, m: a / jnp.maximum(1 - m, 1e-6), zero, kept), kept

    sums, count = None, 0
    for batch in batches:
        found, kept = measured(batch)
        if not count and any(float(jnp.max(m)) > 1 - 1e-6 for m in jax.tree.leaves(kept)):
            raise MergeError(
                "reestimate: the update leaves the statistics as they are; call the model in "
                "training mode, with mutable=['batch_stats']"
            )
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        count += 1
    if sums is None:
        raise MergeError("reestimate: there is no batch to measure on; pass at least one")
    return jax.tree.map(lambda x: x / count, sums)


def repair(
    model: Any,
    merged: Tree,
    experts: Sequence[Tree],
    batches: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
) -> Tree:
    r"""Gives every unit of a merged network the mean and spread that it has in the experts.

    For each layer in the order of computation, with (μ_k, σ_k) of the outputs before the
    nonlinearity in expert k, and (m, s) in the merged network with all earlier layers repaired,

    .. math:: W' = W\,\sigma/s,\quad b' = (b-m)\,\sigma/s + \mu,\quad
        \mu = \sum_k w_k\mu_k,\ \sigma = \sum_k w_k\sigma_k

    It is for networks without BatchNorm (see `reestimate`) whose layers have biases; the last layer
    is repaired, too. One pass over the data for each layer.

    Args:
        model: a linen model that is called on the batch, or a function (params, batch).
        merged: the merged network's parameters.
        experts: aligned ones, of the same shapes.
        batches: a list of batches of training data.
        weights: of the experts, by default equal.

    Returns:
        A tree like `merged`.

    Raises:
        MergeError: a layer without a bias, a grouped convolution, no batch or example, batches that
            the model does not run on, experts of another structure, outputs that are not finite.

    Example:
        >>> import flax.linen as nn
        >>> model, x = nn.Dense(2), jnp.array([[1.0], [3.0]])
        >>> params = {'kernel': jnp.array([[1.0, 2.0]]), 'bias': jnp.zeros(2)}
        >>> half = {'kernel': params['kernel'] / 2, 'bias': jnp.zeros(2)}
        >>> print(repair(model, half, [params, params], [x])['kernel'].round(4))
        [[1. 2.]]

    REPAIR (Jordan et al., 2023, arXiv:2211.08403).
    """
    trees = [leaves_by_name(expert, f"expert {i}")[0] for i, expert in enumerate(experts)]
    leaves, back = leaves_by_name(merged, "the merged network")
    for own in trees:
        check_structure(leaves, own)
    count = len(experts)
    shares = [1 / count] * count if weights is None else list(weights)
    several = [_moments(model, params, batches) for params in experts]
    mean = {n: sum(w * m[n][0] for w, m in zip(shares, several, strict=True)) for n in several[0]}
    spread = {n: sum(w * m[n][1] for w, m in zip(shares, several, strict=True)) for n in mean}
    for kernel in mean:
        bias = kernel.removesuffix("kernel") + "bias"
        if bias not in leaves:
            raise MergeError(
                f"repair: layer '{kernel}' has no bias to take the correction; give it one of zeros"
            )
        now, width = _moments(model, back(leaves), batches)[kernel]
        ratio = spread[kernel] / np.maximum(width, DEAD)
        matrix, restore = as_matrix(leaves[kernel], _layout(kernel, leaves[kernel]))
        leaves[kernel] = restore(matrix * ratio[None].astype(np.float32))
        shift = (np.asarray(leaves[bias]).ravel() - now) * ratio + mean[kernel]
        leaves[bias] = jnp.asarray(shift.reshape(leaves[bias].shape), leaves[bias].dtype)
    return back(leaves)


def _layout(name: str, x: Any) -> str:
    return layout_of(name, x.shape, role_of(name, x.shape, x.dtype), "flax")


def _moments(model: Any, params: Tree, batches: Sequence[Any]) -> dict[str, Any]:
    """{kernel: (mean, standard deviation)} of every layer's outputs, in the order of calls."""
    function, params = as_function(model, params)
    leaves, _ = leaves_by_name(params, "the network")
    items = ((batch,) for batch in batches)
    sums = total(_statistic, function, (), params, items, len(batches), (None, "repair"))
    found = {}
    for name, (products, rows) in sums.items():
        if not float(rows):
            raise MergeError("repair: the batches have no examples; give at least one")
        gram = np.asarray(products, np.float64) / float(rows)
        kernel = np.asarray(as_matrix(leaves[name], _layout(name, leaves[name]))[0], np.float64)
        bias = leaves.get(name.removesuffix("kernel") + "bias")
        inputs = gram[-1, :-1]
        covariance = gram[:-1, :-1] - np.outer(inputs, inputs)
        with np.errstate(invalid="ignore", over="ignore"):  # told in words below
            variance = (kernel * (covariance @ kernel)).sum(0)
        mean = inputs @ kernel + (0 if bias is None else np.asarray(bias, np.float64).ravel())
        if not np.isfinite(mean + variance).all():
            raise MergeError(
                f"repair: the outputs of layer '{name}' are not finite; check the networks and the "
                "batches for NaN and Inf"
            )
        found[name] = (mean, np.sqrt(np.maximum(variance, 0)))
    return found


def _statistic(function: Any) -> Any:
    def measure(layer: Any, name: str, inputs: Any) -> Any:
        if refusal(layer):
            raise MergeError(f"repair: layer '{name}' {refusal(layer)}, which is not supported")
        rows = input_rows(layer, inputs).astype(jnp.float32)
        x = rows.reshape(-1, rows.shape[-1])
        x = jnp.concatenate([x, jnp.ones((len(x), 1), jnp.float32)], axis=-1)
        return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST), jnp.float32(len(x))

    return lambda params, item: tap_linen(function, params, item[0], measure)[0]
