"""Masks of Localize-and-Stitch, learned on a few labelled examples of each task."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax.core import Array
from mergejax.door import check_alike, leaves_by_name
from mergejax.errors import MergeError, raise_all
from mergejax.leaves import BUFFER, HEAD, describe

Tree = Any
Loss = Callable[[Tree, Any], Array]


def localize(
    loss: Loss,
    base: Tree,
    expert: Tree,
    batches: Iterable[Any],
    *,
    density: float = 1e-5,
    steepness: float = 5.0,
    epochs: int = 10,
    learning_rate: float = 1e7,
    l1: float = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    exclude: str | tuple[str, ...] = (),
) -> tuple[Tree, Tree]:
    r"""Learns which of an expert's changes its task needs.

    Logits S start at +steepness for the largest `density` of the changes and at -steepness
    elsewhere. Each epoch, with the gradient g of the loss,
    summed over the batches, at :math:`\theta_0+\sigma(S)\odot\tau`,

    .. math:: S\leftarrow S-\eta\,g\odot\tau\odot\sigma'(S)+\lambda\,sign(S)\odot\sigma'(S)

    as in the authors' code, where the last term drives logits away from 0, whatever their sign.
    The mask is where S > 0 in the end.

    Args:
        loss: (params, batch) -> the mean cross entropy of a batch with the task's head.
        base: a tree of arrays.
        expert: a tree like it.
        batches: of the task's labelled examples (the authors take 64 per class); kept for all
            epochs.
        density: where the logits start; 1e-5 in the authors' code.
        steepness: of the start, their sigmoid bias.
        epochs: passes over the batches, one update each.
        learning_rate: :math:`\eta`; as large as it is because the start is saturated.
        l1: :math:`\lambda`; 10 for language models, 1 for vision.
        optimizer: if given, it minimises the loss plus l1 times the share of what is kept, as the
            paper states it, in place of the update above: `optax.adam(0.1)` is robust.
        exclude: regular expressions of leaves that keep the base's values.

    Returns:
        The mask, a tree like the base of uint8, and the logits, float32. Pass the masks of all
        experts as stats={'mask': [...]} to `mj.localize_and_stitch_trained`.

    Raises:
        MergeError: models that differ, no batch, values out of range, a loss that is not finite,
            a mask that ends up empty.

    Example:
        >>> base, expert = {'w': jnp.zeros(2)}, {'w': jnp.asarray([1.0, -0.9])}
        >>> loss = lambda params, target: jnp.sum((params['w'] - target) ** 2)
        >>> masks, _ = localize(loss, base, expert, [jnp.asarray([1.0, 0.0])], density=0.5,
        ...                     steepness=1.0, learning_rate=10.0, l1=0.0)
        >>> masks['w'].tolist()
        [1, 0]

    Localize-and-Stitch (He et al., 2025, arXiv:2408.13656).
    """
    _check(density, epochs)
    leaves, back = leaves_by_name(base, "the base")
    others, _ = leaves_by_name(expert, "the expert")
    check_alike(leaves, [others], ["the expert"])
    specs = {name: (tuple(x.shape), x.dtype) for name, x in leaves.items()}
    learned = [i.name for i in describe(specs, exclude=exclude) if i.role not in (BUFFER, HEAD)]
    taus = {n: jnp.asarray(others[n]).astype(jnp.float32) - leaves[n] for n in learned}
    kept = list(batches)
    if not kept:
        raise MergeError("localize: there is no batch to learn from; pass at least one")
    logits = _start(taus, density, steepness)

    def at(logits: dict[str, Array], batch: Any) -> Array:
        soft = {n: leaves[n] + jax.nn.sigmoid(s) * taus[n] for n, s in logits.items()}
        return loss(back({**leaves, **soft}), batch)

    slope = jax.jit(jax.value_and_grad(at))
    state = optimizer.init(logits) if optimizer else None
    for _ in range(epochs):
        found = [slope(logits, batch) for batch in kept]
        if not np.isfinite([float(value) for value, _ in found]).all():
            raise MergeError("localize: the loss is not finite; check the examples and the models")
        gradient = jax.tree.map(lambda *xs: sum(xs), *(g for _, g in found))
        if optimizer:
            logits, state = _optimised(logits, gradient, state, optimizer, l1)
        else:
            logits = jax.tree.map(lambda s, g: _updated(s, g, learning_rate, l1), logits, gradient)
    masks = {name: (s > 0).astype(jnp.uint8) for name, s in logits.items()}
    if not any(bool(m.any()) for m in masks.values()):
        raise MergeError(
            "localize: the mask is empty, the task needs none of the changes; take a larger "
            f"density than {density:g}, or fewer steps than epochs={epochs}"
        )
    fixed = {name: jnp.zeros(x.shape, jnp.uint8) for name, x in leaves.items()}
    start = {name: jnp.zeros(x.shape, jnp.float32) for name, x in leaves.items()}
    return back({**fixed, **masks}), back({**start, **logits})


def _check(density: float, epochs: int) -> None:
    problems = []
    if not 0 < density <= 1:
        problems.append(f"localize(density={density}) must be in (0, 1]")
    if epochs < 0:
        problems.append(f"localize(epochs={epochs}) must be at least 0")
    raise_all(problems)


def _start(taus: dict[str, Array], density: float, steepness: float) -> dict[str, Array]:
    """Logits: positive where a change is larger than the k-th largest of the whole model."""
    sizes = np.concatenate([np.abs(np.asarray(t)).ravel() for t in taus.values()])
    kept = max(int(density * sizes.size), 1)
    threshold = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
    if density == 1:
        threshold = -1.0
    return {n: jnp.where(jnp.abs(t) > threshold, steepness, -steepness) for n, t in taus.items()}


def _updated(s: Array, gradient: Array, learning_rate: float, l1: float) -> Array:
    """One step; `gradient` is by the logits, so it holds the delta and the sigmoid's slope."""
    slope = jax.nn.sigmoid(s) * (1 - jax.nn.sigmoid(s))
    return s - learning_rate * gradient + l1 * jnp.sign(s) * slope


def _optimised(logits, gradient, state, optimizer, l1):
    """One step of an optimiser on the loss and l1 times the mean of the soft mask."""
    size = sum(s.size for s in logits.values())

    def pulled(s: Array, g: Array) -> Array:
        return g + l1 / size * jax.nn.sigmoid(s) * (1 - jax.nn.sigmoid(s))

    slope = jax.tree.map(pulled, logits, gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        update, state = optimizer.update(slope, state, logits)
    return optax.apply_updates(logits, update), state
