"""Products of the inputs of one layer in several models on the same data."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mergejax.collect.rows import input_rows, refusal
from mergejax.collect.statistics import Statistics
from mergejax.collect.streaming import Function, Progress, as_function, length, nnx_parts, total
from mergejax.collect.taps import tap_linen, tap_nnx
from mergejax.errors import MergeError, some


def joint_gram(
    model: Any,
    several: Sequence[Any],
    batches: Iterable[Any],
    *,
    progress: Progress | None = None,
) -> Statistics:
    r"""Mean Gram matrix of the inputs of every layer in all models side by side, and a one.

    .. math:: Q = \frac1R\sum_r q_r^\top q_r,\qquad q_r = [x_r^{(1)} | \ldots | x_r^{(N)} | 1]

    with :math:`x_r^{(k)}` row r (token, pixel) of the inputs of the layer in model k, all models on
    the same data. It is all that activation matching and least squares need, for any permutation
    and any width. Rows are those of `gram`: the patches of a convolution, channel first.

    Args:
        model: as for `gram`, shared by all models: a function (params, batch), a linen model called
            on the batch, or an NNX model.
        several: the models' parameters.
        batches: any iterable of batches, of the same shapes as far as possible.
        progress: called as progress(done, total, 'joint_gram') after each batch.

    Returns:
        {leaf name of the kernel: Q [N·in + 1, N·in + 1] float32}, which remember their rows. Layers
        of which one matrix cannot say enough (grouped convolutions) are left out.

    Raises:
        MergeError: no batch or example, fewer than two models, batches that the models do not run
            on, a layer that is called more than once, inputs that are not finite.

    Example:
        >>> import flax.linen as nn
        >>> model, x = nn.Dense(3), jnp.array([[1.0, 2.0]])
        >>> params = model.init(jax.random.key(0), x)['params']
        >>> joint_gram(model, [params, params], [x])['kernel'].tolist()[0]
        [1.0, 2.0, 1.0, 2.0, 1.0]
    """
    several = list(several)
    if len(several) < 2:
        raise MergeError(f"joint_gram: there are {len(several)} models; give at least two")
    make, function = _statistic(model, several[0])
    count = length(batches, "joint_gram")
    items = (len(several) * [batch] for batch in batches)
    sums = total(make, function, (), several, items, count, (progress, "joint_gram"))
    return _means(sums, "joint_gram")


def joint_gram_sums(
    model: Any, several: Sequence[Any], batch: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    r"""What `joint_gram` adds up, of one batch: a pure function to run under your own transforms.

    .. math:: \Big(\sum_rq_r^\top q_r,\ \sum_r1/c\Big),\qquad c\text{ the calls of the layer}

    Args:
        model: as for `joint_gram`.
        several: the models' parameters; traced, for instance.
        batch: one batch, or a device's share of it.

    Returns:
        {leaf name of the kernel: (Σ qᵀq [N·in + 1, N·in + 1] float32, Σ rows / calls)}, to be added
        over batches and devices. Divided by its last entry the first is `joint_gram`.

    Raises:
        MergeError: a layer that the model keeps from being measured.

    Example:
        >>> import flax.linen as nn
        >>> params = {'kernel': jnp.ones((1, 3)), 'bias': jnp.zeros(3)}
        >>> run = jax.jit(lambda p, x: joint_gram_sums(nn.Dense(3), [p, p], x))
        >>> run(params, jnp.array([[1.0], [3.0]]))['kernel'][0].tolist()[-1]
        [4.0, 4.0, 2.0]
    """
    make, function = _statistic(model, several[0])
    return make(function.call)(list(several), len(several) * [batch])


def drift(
    model: Any,
    student: Any,
    expert: Any,
    batches: Iterable[tuple[Any, Any]],
    *,
    progress: Progress | None = None,
) -> Statistics:
    r"""Mean products of the inputs of every layer in a merged model and in an expert, and a one.

    .. math:: Q = \frac1R\sum_r q_r^\top q_r,\qquad q_r = [x_r^{student} | x_r^{expert} | 1]

    As `joint_gram` of the two, but each on inputs of its own, row by row those of one example: what
    reaches a block in the merged model, and what reaches it in the expert.

    Args:
        model: as for `gram`.
        student: the merged model's parameters.
        expert: the expert's.
        batches: any iterable of pairs, the student's batch and the expert's.
        progress: called as progress(done, total, 'drift') after each batch.

    Returns:
        {leaf name of the kernel: Q [2·in + 1, 2·in + 1] float32}.

    Raises:
        MergeError: as `joint_gram`.

    Example:
        >>> import flax.linen as nn
        >>> pair = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 3.0]])
        >>> params = nn.Dense(3).init(jax.random.key(0), pair[0])['params']
        >>> drift(nn.Dense(3), params, params, [pair])['kernel'].tolist()[-1]
        [1.0, 2.0, 1.0, 3.0, 1.0]

    Source: FeatCal, 2026, arXiv:2605.13030.
    """
    make, function = _statistic(model, student)
    count = length(batches, "drift")
    several, items = [student, expert], (list(pair) for pair in batches)
    sums = total(make, function, (), several, items, count, (progress, "drift"))
    return _means(sums, "drift")


def _means(sums: dict[str, Any], caller: str) -> Statistics:
    again = [name for name, (q, calls) in sums.items() if float(calls) * 1.5 < float(q[-1, -1])]
    broken = [name for name, (q, _) in sums.items() if not bool(jnp.isfinite(q).all())]
    if any(float(q[-1, -1]) == 0 for q, _ in sums.values()):
        raise MergeError(f"{caller}: the batches have no examples; give at least one")
    if again or broken:
        raise MergeError(
            f"{caller}: {some(again)} are called more than once, so their inputs cannot be paired"
            if again
            else f"{caller}: the inputs of {some(broken)} are not finite; check the models"
        )
    if not sums:
        raise MergeError(f"{caller}: no Dense, DenseGeneral or Conv layer was seen in the model")
    means = {name: q / q[-1, -1] for name, (q, _) in sums.items()}
    return Statistics(caller, means, {name: q[-1, -1] for name, (q, _) in sums.items()})


def _statistic(model: Any, params: Any) -> tuple[Any, Function]:
    if isinstance(model, nnx.Module):
        return _nnx_statistic, Function(nnx_parts(model, params)[0], False)
    return _linen_statistic, as_function(model, params)[0]


def _linen_statistic(function):
    return lambda several, batches: _measured(tap_linen, function, several, batches)


def _nnx_statistic(build):
    return lambda several, batches: _measured(tap_nnx, build, several, batches)


def _measured(tap, function, several, batches):
    """{leaf name: (Σ qᵀq, Σ rows / calls)} of a batch for each model."""

    def measure(layer, name, inputs):
        if refusal(layer):
            return None
        rows = input_rows(layer, inputs).astype(jnp.float32)
        return rows.reshape(-1, rows.shape[-1]), jnp.float32(1)

    pairs = zip(several, batches, strict=True)
    found = [tap(function, params, batch, measure)[0] for params, batch in pairs]
    products = OrderedDict()
    for name, (first, calls) in found[0].items():
        one = jnp.ones((len(first), 1), jnp.float32)
        q = jnp.concatenate([*(other[name][0] for other in found), one], axis=-1)
        gram = jnp.matmul(q.T, q, precision=lax.Precision.HIGHEST)
        products[name] = (gram, len(first) / calls)
    return products
