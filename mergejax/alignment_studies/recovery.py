"""Training after experts were merged: distillation from the whole network, and pruning."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax import alignment, fit
from mergejax.alignment_studies import mixture
from mergejax.data.task import Split

Tree = Any
TEMPERATURE, SHARE, MEMORY = 2.0, 0.2, 0.85  # of the teacher; of the distillation; of importance


def train(
    model: mixture.Transformer,
    params: Tree,
    groups: Mapping[str, Any],
    teacher: Tree,
    split: Split,
    settings: fit.Settings,
    seed: Sequence[int],
    keep: float = 1.0,
) -> Tree:
    r"""Trains merged experts by their labels and by the network they come from.

    .. math:: CE(y,s)+\lambda T^2\,KL(softmax(t/T)\,\|\,softmax(s/T)),\quad \lambda=0.2,\ T=2

    Where arrays are split into low rank and rest, columns of the rests are set to zero as the
    schedule of `mj.alignment.kept_share` says, those with the least mean of |rest · gradient|.

    Args:
        model: of both networks.
        params: merged; see `mixture.grown`.
        groups: by layer the group of every expert.
        teacher: parameters of the whole network.
        split: what it learns from.
        settings: steps, batch size, learning rate.
        seed: of the order of the examples.
        keep: the share of the rests' columns that stays in the end.

    Returns:
        Parameters like `params`.

    M-SMoE and MC-SMoE (Li et al., 2024, arXiv:2310.01334).
    """
    params, teacher, groups = jax.tree.map(jnp.asarray, (params, teacher, dict(groups)))
    state = fit.direction(settings.weight_decay).init(params)
    rates, generator = fit.learning_rates(settings), np.random.default_rng(list(seed))
    importance: dict[str, Any] = {name: np.zeros(x.shape) for name, x in rests(params).items()}
    for start in range(0, settings.steps, fit.CHUNK):
        count = min(fit.CHUNK, settings.steps - start)
        batches = fit.draw([split], count, settings.batch, generator)
        for i in range(count):
            batch = jax.tree.map(lambda x, i=i: x[i], batches)  # type: ignore[misc]
            params, state, weighed = _step(
                params, state, groups, teacher, batch, rates[start + i],
                jnp.float32(settings.weight_decay), model,
            )  # fmt: skip
            if importance:
                importance = {
                    name: MEMORY * x + (1 - MEMORY) * np.asarray(weighed[name])
                    for name, x in importance.items()
                }
                share = alignment.kept_share(
                    start + i, settings.steps, keep, settings.steps // 6, settings.steps // 3
                )
                params = pruned(params, importance, share)
    return jax.tree.map(np.asarray, params)


@functools.partial(jax.jit, static_argnames="model")
def _step(
    params: Tree,
    state: Tree,
    groups: Mapping[str, jax.Array],
    teacher: Tree,
    batch: fit.Batch,
    rate: jax.Array,
    decay: jax.Array,
    model: nn.Module,
) -> tuple[Tree, Tree, dict[str, jax.Array]]:
    """One step; parameters, optimiser state and |rest · gradient| of the rests."""
    told: Any = model.apply({"params": teacher}, batch.inputs)

    def loss(params: Tree) -> jax.Array:
        logits: Any = model.apply({"params": mixture.grown(params, groups)}, batch.inputs)
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        soft = optax.kl_divergence(
            jax.nn.log_softmax(logits / TEMPERATURE), jax.nn.softmax(told / TEMPERATURE)
        )
        return (hard + SHARE * TEMPERATURE**2 * soft).mean()

    gradient = jax.grad(loss)(params)
    weighed = {n: abs(x * rests(gradient)[n]) for n, x in rests(params).items()}
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = fit.direction(decay).update(gradient, state, params)
    return jax.tree.map(lambda x, u: x - rate * u, params, updates), state, weighed


def rests(params: Tree) -> dict[str, Any]:
    """The sparse parts of split arrays, [groups, in, out], by layer/array."""
    return {
        f"{layer}/{name}": x.rest
        for layer in mixture.mixtures(params)
        for name, x in params[layer].items()
        if isinstance(x, alignment.Split)
    }


def pruned(params: Tree, importance: Mapping[str, np.ndarray], share: float) -> Tree:
    """Keeps a share of the columns of all rests, the most important ones."""
    flat = {f"{n}/{i}": x for n, rest in rests(params).items() for i, x in enumerate(rest)}
    by_expert = {f"{n}/{i}": x for n, several in importance.items() for i, x in enumerate(several)}
    kept = alignment.prune(flat, by_expert, share)
    found = dict(params)
    for name, rest in rests(params).items():
        layer, array = name.split("/")
        sparse = jnp.stack([kept[f"{name}/{i}"] for i in range(len(rest))])
        found[layer] = {**found[layer], array: found[layer][array]._replace(rest=sparse)}
    return found


def split(params: Tree, rank: int) -> Tree:
    """The kernels of all experts as low rank and rest."""
    found = dict(params)
    for layer in mixture.mixtures(params):
        own = dict(params[layer])
        for name in ("up", "down"):
            parts = [alignment.low_rank_and_rest(x, rank) for x in own[name]]
            own[name] = alignment.Split(*(np.stack(x) for x in zip(*parts, strict=True)))
        found[layer] = own
    return found
