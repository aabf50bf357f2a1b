"""Whether a model computes the same when its units are permuted."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mergejax.alignment.permutations import Permutations, apply, random
from mergejax.alignment.structure import Symmetries, movable, require
from mergejax.collect.streaming import running
from mergejax.door import Tree
from mergejax.errors import MergeError, some
from mergejax.leaves import is_floating

# A wrong axis changes outputs by a share of themselves; rounding of float32 through some hundred
# layers stays two orders below.
TOLERANCE = 1e-3
_done: "weakref.WeakSet[Symmetries]" = weakref.WeakSet()


def verify(
    apply_fn: Callable[[Tree, Any], Any],
    params: Tree,
    example: Any,
    symmetries: Symmetries,
    *,
    seed: int = 0,
) -> float:
    """Permutes every group at random and checks that the model computes the same.

    The check is made on a disturbed copy, every leaf times (1 + 0.1 n) with n normal, zeros
    replaced by 0.1 |n|: equal scales and biases of zero would hide a wrong axis.

    Args:
        apply_fn: (params, example) -> outputs, in inference mode.
        params: the model, every array that the symmetries act on.
        example: what the model is called on; where only its shape is given, numbers are drawn.
        symmetries: of the model.
        seed: of the permutations and the disturbance.

    Returns:
        The largest difference of the outputs, relative to the largest output.

    Raises:
        MergeError: symmetries that do not fit, an example that the model does not run on, outputs
            that are not finite, or that change by more than a thousandth; the groups that change
            them are named.

    Example:
        >>> import jax.numpy as jnp
        >>> from mergejax import alignment
        >>> params = {'a': jnp.ones((3, 8)), 'b': jnp.ones((8, 2))}
        >>> model, x = lambda p, x: jnp.tanh(x @ p['a']) @ p['b'], jnp.ones((5, 3))
        >>> found = alignment.symmetries(model, params, x)
        >>> verify(model, params, x, found) < 1e-5
        True
    """
    require(symmetries)
    key = jax.random.key(seed)
    example = _concrete(example, jax.random.fold_in(key, 1))
    disturbed = _disturbed(params, seed)
    run = jax.jit(apply_fn)

    def outputs(permutations: Permutations) -> list[np.ndarray]:
        with jax.default_matmul_precision("highest"):
            found = run(apply(symmetries, permutations, disturbed), example)
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(found) if is_floating(x.dtype)]

    with running("verify", "the example", example):
        expected = outputs({})
    if not expected or not all(x.size and np.isfinite(x).all() for x in expected):
        raise MergeError(
            "verify: the outputs on the example are none or not finite numbers, so nothing can be "
            "compared; check the parameters and the example"
        )
    permutations = random(symmetries, seed)
    error = _difference(expected, outputs(permutations))
    if not error <= TOLERANCE:
        wrong = [
            name
            for name in movable(symmetries)
            if not _difference(expected, outputs({name: permutations[name]})) <= TOLERANCE
        ]
        where = f"group {some(wrong)}" if wrong else "several groups together"
        raise MergeError(
            f"verify: permuting {where} changes the outputs by {error:.2g} of the largest; pin "
            "its axes (None), or name all axes that it acts on"
        )
    return error


def verified(symmetries: Symmetries, params: Tree) -> None:
    """Verifies symmetries on the model that they were derived from, once; what matchers call.

    Raises:
        MergeError: as `verify`.
    """
    require(symmetries)
    if symmetries.model is not None and symmetries not in _done:
        verify(symmetries.model[0], params, symmetries.model[1], symmetries)
        _done.add(symmetries)


def _difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    pairs = zip(expected, found, strict=True)
    return max(float(abs(a - b).max() / max(abs(a).max(), 1e-30)) for a, b in pairs)


def _disturbed(params: Tree, seed: int) -> Tree:
    generator = np.random.default_rng(seed)

    def disturb(x: Any) -> Any:
        if not is_floating(x.dtype):
            return x
        noise = 0.1 * generator.standard_normal(x.shape)
        x32 = np.asarray(x, np.float32)
        return np.where(x32 == 0, abs(noise), x32 * (1 + noise)).astype(x.dtype)

    return jax.tree.map(disturb, params)


def _concrete(example: Any, key: jax.Array) -> Any:
    """The example with numbers in it: normal ones, integers 0 and 1."""

    def fill(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if is_floating(x.dtype):
            return jax.random.normal(key, x.shape, x.dtype)
        return jax.random.randint(key, x.shape, 0, 2).astype(x.dtype)

    return jax.tree.map(fill, example)
