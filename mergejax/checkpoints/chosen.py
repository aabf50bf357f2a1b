"""The method that a merge on disk was asked for, and what it reads."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import errors, forms, hyper
from mergejax.chains import Chain
from mergejax.core import Stage
from mergejax.language import as_chain
from mergejax.leaves import LeafInfo
from mergejax.run import Values, _as_data, _leaf


def method_of(method: Any, weights: Sequence[float] | None) -> Chain:
    """The chain that a request asks for.

    Raises:
        MergeError: it is none, or has no place for the weights.
    """
    chosen = as_chain(method)
    return chosen if weights is None else with_weights(chosen, weights)


def with_weights(method: Any, weights: Sequence[float]) -> Any:
    """The method with its parameter `weights` set.

    Raises:
        MergeError: it has none, or several.
    """
    places = [
        i
        for i, item in enumerate(method.items)
        if isinstance(item, Stage) and "weights" in item.arguments
    ]
    if len(places) != 1:
        raise errors.MergeError(
            f"--weights: {method!r} has {len(places) or 'no'} parameters 'weights'; write them "
            "into the method, such as ties(weights=[0.5, 0.5])"
        )
    items = list(method.items)
    stage = items[places[0]]
    arguments = {**stage.arguments, "weights": list(weights)}
    built = Stage(stage.factory, hyper.bind(stage.factory.function, (), arguments))
    built.build()
    items[places[0]] = built
    return Chain(items)


def needs_base(plan: Any, experts: int) -> bool:
    """Whether any stage reads the base's values, found out by running the chain without them."""
    distinct = {tuple(p.path for p in placed): placed for placed in plan.placed.values()}
    stages = [p.stage for placed in distinct.values() for p in placed]
    if any(stage.factory.space == "delta" for stage in stages) or plan.passes:
        return True
    info = LeafInfo("leaf", (4, 4), np.float32, "kernel", "io", 0.0, -1)
    leaf = _leaf(info, Values(None, []), 0)
    arrays = [np.zeros((4, 4), np.float32)] * experts
    names = np.zeros((experts, 2), np.uint32)
    try:
        for placed in distinct.values():
            run = lambda *xs, placed=placed: forms.run_leaf(
                _as_data(placed), leaf, xs, jnp.asarray(names), {}, {}
            )
            jax.eval_shape(run, *arrays)
    except Exception:  # whatever a stage does with a base that is None
        return True
    return False
