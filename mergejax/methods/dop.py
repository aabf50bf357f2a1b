"""DOP: experts that arrive one by one, each merged in the directions that matter to either side."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Array, Parts, fold, method
from mergejax.hyper import Fraction, Positive, Whole
from mergejax.linalg.descent import descend
from mergejax.linalg.spectral import decompose, on_matrices
from mergejax.methods.running import exponential_mean

Space = Literal["both", "outputs", "inputs"]
_ENDS = 0.001, 0.999  # of the weight where one gradient alone is the shortest


class _Side(NamedTuple):
    """What one model wants kept: its delta, and the weights of its output and input directions."""

    delta: Array
    outputs: Array
    inputs: Array

    def gradient(self, x: Array) -> tuple[Array, Array]:
        """The gradient of the squared, weighted distance, and the distance."""
        moved = x - self.delta
        slope = self.outputs @ moved + moved @ self.inputs
        return 2 * slope, jnp.sum(moved * slope)


def _side(delta: Array, epsilon: Array, space: str) -> _Side:
    triplets = decompose(delta)
    mass = triplets.values.sum()
    share = jnp.cumsum(triplets.values) / jnp.where(mass > 0, mass, 1.0)
    squared = jnp.where(share < epsilon, triplets.values**2, 0.0)
    outputs = triplets._replace(values=squared, right=triplets.left).compose()
    inputs = triplets._replace(values=squared, left=triplets.right).compose()
    return _Side(
        delta,
        outputs if space != "inputs" else jnp.zeros_like(outputs),
        inputs if space != "outputs" else jnp.zeros_like(inputs),
    )


def _shortest(first: Array, second: Array) -> Array:
    """The weight of the first gradient in the shortest combination of the two."""
    cross, one, two = (jnp.sum(a * b) for a, b in ((first, second), (first, first), (second,) * 2))
    below = one + two - 2 * cross
    inner = (two - cross) / jnp.where(below > 0, below, 1.0)
    inner = jnp.where(cross >= one, _ENDS[1], jnp.where(cross >= two, _ENDS[0], inner))
    return jnp.where((one > 0) & (two > 0), inner, 0.5)


def balanced(start: Array, decay: Array) -> Any:
    """Adds up two gradients with a weight that follows the shortest combination of them.

    Args:
        start: the first one's weight at the beginning.
        decay: of the weight's moving average; 1 keeps the start.

    Returns:
        An `optax.GradientTransformation` of ((gradient, loss), (gradient, loss)).
    """

    import optax  # here, for it takes a third of the time that JAX does

    def update(pair: Any, weight: Array, _: Any = None) -> tuple[Array, Array]:
        normalized = [g / jnp.where(loss <= 0, 1.0, loss) for g, loss in pair]
        weight = decay * weight + (1 - decay) * _shortest(*normalized)
        return weight * pair[0][0] + (1 - weight) * pair[1][0], weight

    return optax.GradientTransformation(lambda x: jnp.asarray(start, x.dtype), update)


@fold
def dual_projection(
    alpha: Fraction = 0.8,
    decay: Fraction = 0.999,
    epsilon: Fraction = 0.99999,
    steps: Whole = 200,
    learning_rate: Positive = 1e-4,
    space: Space = "both",
) -> Parts:
    r"""Merges each new delta with what is merged so far, by descent on two weighted distances.

    See `dop` for the formula and the arguments.

    Returns:
        A reduction of kernels, one expert at a time.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import mergejax as mj
        >>> mj.dual_projection(alpha=0.5, decay=1.0)
        dual_projection(alpha=0.5, decay=1.0)
    """

    def merge(so_far, new):
        sides = _side(so_far, epsilon, space), _side(new, epsilon, space)
        import optax

        optimizer = optax.chain(balanced(alpha, decay), optax.adam(learning_rate))
        middle = so_far + (new - so_far) / 2
        return descend(lambda x: tuple(s.gradient(x) for s in sides), middle, optimizer, steps)

    def apply(state, d, leaf, seen):
        later = lambda: on_matrices(merge, leaf.layout, state, d)
        return jax.lax.cond(leaf.expert == 0, lambda: d, later)

    return Parts(apply=apply, init=lambda leaf, zeros: zeros)


@method
def dop(
    alpha: Fraction = 0.8,
    decay: Fraction = 0.999,
    epsilon: Fraction = 0.99999,
    steps: Whole = 200,
    learning_rate: Positive = 1e-4,
    space: Space = "both",
):
    r"""Merges experts one after the other, near both sides in the directions that matter to them.

    .. math:: \min_X\ \alpha\,\ell_a(X)+(1-\alpha)\,\ell_b(X),\qquad
        \ell_i=\|S_iU_i^\top(X-\tau_i)\|^2+\|(X-\tau_i)V_iS_i\|^2

    for kernels [out, in], with a what is merged so far and b the new expert, by so many steps of
    Adam from their mean; :math:`U_iS_iV_i^\top=\tau_i` without the last singular values, from
    where their cumulative share reaches :math:`\varepsilon`. The weight follows the shortest
    combination :math:`\gamma` of the two gradients, each divided by its loss:
    :math:`\alpha\leftarrow\beta\alpha+(1-\beta)\gamma`. All other leaves are averaged pairwise, so
    that later experts count more. The result depends on the order of the experts.

    Args:
        alpha: :math:`\alpha` at the beginning, in [0, 1].
        decay: :math:`\beta`, in [0, 1]; 1 keeps :math:`\alpha` fixed, 0 takes :math:`\gamma`.
        epsilon: :math:`\varepsilon`, in [0, 1].
        steps: static.
        learning_rate: of Adam.
        space: 'both' terms of the loss, or that of the 'outputs' (U) or of the 'inputs' (V) only.

    Returns:
        A method; with `mj.continual` it takes one expert at a time.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.zeros((2, 2))}, {'kernel': jnp.eye(2)}
        >>> print(mj.merge(mj.dop(), base, [expert, expert])['kernel'].round(4))
        [[1. 0.]
         [0. 1.]]

    Dual orthogonal projection (2025), as FusionBench computes it: directions are weighted by the
    singular values themselves.
    """
    kernels = dual_projection(alpha, decay, epsilon, steps, learning_rate, space)
    return chain(by_role(kernel=kernels, otherwise=exponential_mean(decay=0.5)))
