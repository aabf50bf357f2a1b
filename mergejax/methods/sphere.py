"""Averages on the sphere: NuSLERP, multi-SLERP and the Karcher mean."""

from typing import Literal

import jax
import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import method, reduce
from mergejax.hyper import Positive, Weights, Whole
from mergejax.leaves import as_rows
from mergejax.linalg.spectral import highest
from mergejax.methods.combine import of_deltas, of_weights
from mergejax.methods.elect import per_expert

Scope = Literal["tensor", "row", "column"]
Space = Literal["deltas", "weights"]
_SPACES = {"deltas": of_deltas, "weights": of_weights}


def _vectors(x, layout, scope):
    """A leaf as rows, each of them one vector, and the way back."""
    if scope == "tensor":
        return x.reshape(1, -1), lambda rows: rows.reshape(x.shape)
    rows, restore = as_rows(x, layout)
    if scope == "row" or rows.shape[0] == 1:
        return rows, restore
    return rows.T, lambda columns: restore(columns.T)


def _arc(a, b, t):
    """The point at t on the arc from a to b, row by row; straight where they are parallel."""
    lengths = [jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)) for x in (a, b)]
    units = [x / jnp.maximum(n, 1e-7) for x, n in zip((a, b), lengths, strict=True)]
    angle = jnp.arccos(jnp.clip(jnp.sum(units[0] * units[1], -1, keepdims=True), -1.0, 1.0))
    straight = jnp.sin(angle) < 1e-8
    sine = jnp.where(straight, 1.0, jnp.sin(angle))
    first = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / sine)
    second = jnp.where(straight, t, jnp.sin(t * angle) / sine)
    return first * a + second * b


@reduce(space="either", experts=2)
def arc_between(weights: Weights = 1.0, scope: Scope = "tensor"):
    r"""Interpolates along the arc between two experts, seen from zero.

    .. math:: \frac{\sin((1-t)\varphi)\,\tau_1+\sin(t\varphi)\,\tau_2}{\sin\varphi},\qquad
        t=\frac{w_2}{w_1+w_2}

    Args:
        weights: w, one per expert; 1 for both gives the middle.
        scope: one angle for a 'tensor', for each 'row' (all inputs of one output) or for each
            'column'.

    Returns:
        A reduction of exactly two experts, of their deltas behind `of_deltas`, else of weights.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.arc_between(), None, experts)['w'].round(4))
        [0.7071 0.7071]
    """

    def apply(ds, leaf, seen):
        first, second = per_expert(weights, 2)
        mass = first + second
        usable = jnp.abs(mass) >= 1e-6
        t = jnp.where(usable, second / jnp.where(usable, mass, 1.0), 0.5)
        (a, restore), (b, _) = (_vectors(d, leaf.layout, scope) for d in ds)
        return restore(_arc(a, b, t))

    return apply


@method
def nuslerp(
    weights: Weights = 1.0,
    scope: Scope = "tensor",
    of: Space = "deltas",
):
    r"""Spherical interpolation of two experts by weights, of their deltas or of their weights.

    .. math:: \theta=\theta_0+\frac{\sin((1-t)\varphi)\,\tau_1+\sin(t\varphi)\,\tau_2}{\sin\varphi},
        \qquad t=\frac{w_2}{w_1+w_2}

    Args:
        weights: w, one per expert.
        scope: one angle for a 'tensor', for each 'row' (all inputs of one output) or 'column'.
        of: 'deltas' needs a base, 'weights' does not.

    Returns:
        A method of exactly two experts.

    Raises:
        MergeError: when merging: not exactly two experts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([1.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.nuslerp(weights=[1, 1]), base, experts)['w'].round(4))
        [0.7071 0.7071]

    NuSLERP of mergekit 0.1.5.
    """
    return chain(_SPACES[of](), arc_between(weights, scope))


def _gram(ds):
    """Inner products [experts, experts] of all experts' leaves.

    Sums of products, which XLA fuses with reading, take a quarter of the time of one product of
    stacked leaves on the CPU.
    """
    count = range(len(ds))
    found = {(i, j): jnp.sum(ds[i] * ds[j]) for i in count for j in count if i <= j}
    return jnp.stack([jnp.stack([found[min(i, j), max(i, j)] for j in count]) for i in count])


def _versines(ds):
    r"""Lengths [experts] and :math:`1-\cos` of the angles [experts, experts] between leaves.

    From differences, for cosines of fine-tuned models are 1 to within their rounding. A leaf of
    zeros has no direction; its entries are 0.
    """
    lengths = jnp.stack([jnp.sqrt(jnp.sum(d * d)) for d in ds])
    count = range(len(ds))
    apart = {(i, j): jnp.sum(jnp.square(ds[i] - ds[j])) for i in count for j in count if i < j}
    between = lambda i, j: apart[min(i, j), max(i, j)] if i != j else jnp.zeros_like(lengths[0])
    squares = jnp.stack([jnp.stack([between(i, j) for j in count]) for i in count])
    inverse = jnp.where(lengths > 0, 1 / _positive_or(lengths, 1.0), 0.0)
    # In units of the lengths, whose squares may be beyond the range of a float.
    unequal = (lengths[:, None] - lengths[None, :]) * inverse[:, None]
    ratio = lengths[:, None] * inverse[None, :]
    scaled = squares * inverse[:, None] * inverse[None, :]
    return lengths, jnp.maximum(scaled - unequal**2 * ratio, 0.0) / 2


def _mix(coefficients, ds):
    return sum(c * d for c, d in zip(coefficients, ds, strict=True))


def _positive_or(x, otherwise):
    return jnp.where(x > 0, x, otherwise)


def _root(x):
    """The square root, 0 of what rounding left below zero; its derivative there is 0."""
    return jnp.where(x > 0, jnp.sqrt(_positive_or(x, 1.0)), 0.0)


@reduce(space="either")
def sphere_mean(weights: Weights = 1.0, normalize: bool = True):
    r"""Averages directions and gives the result their mean length, leaf by leaf.

    .. math:: \Big(\sum_i w_i\|\tau_i\|\Big)\frac{\mu}{\|\mu\|},\qquad
        \mu=\sum_i w_i\frac{\tau_i}{\|\tau_i\|}

    Args:
        weights: w, a number or one per expert.
        normalize: whether the weights are divided by their sum.

    Returns:
        A reduction, of deltas behind `of_deltas`, else of weights; where the directions cancel,
        the weighted mean.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.sphere_mean(), base, experts)['w'].round(4))
        [1.4142 1.4142]
    """

    def apply(ds, leaf, seen):
        shares = jnp.stack(per_expert(weights, len(ds)))
        shares = shares / shares.sum() if normalize else shares
        gram = _gram(ds)
        lengths = jnp.sqrt(jnp.diagonal(gram))
        directions = jnp.where(lengths > 0, shares / _positive_or(lengths, 1.0), 0.0)
        norm = jnp.sqrt(jnp.maximum(directions @ gram @ directions, 0.0))
        usable = norm >= 1e-8
        length = (shares * lengths).sum()
        return _mix(jnp.where(usable, directions * length / _positive_or(norm, 1.0), shares), ds)

    return apply


@method
def multislerp(weights: Weights = 1.0, normalize: bool = True, of: Space = "deltas"):
    r"""Averages the directions of any number of deltas and keeps their mean length.

    .. math:: \theta=\theta_0+\Big(\sum_i w_i\|\tau_i\|\Big)\frac{\mu}{\|\mu\|},\qquad
        \mu=\sum_i w_i\frac{\tau_i}{\|\tau_i\|}

    Args:
        weights: w, a number or one per expert.
        normalize: whether the weights are divided by their sum.
        of: 'deltas' needs a base, 'weights' are seen from zero and do not.

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.multislerp(), base, experts)['w'].round(4))
        [1.4142 1.4142]

    multislerp of mergekit 0.1.5. Its average in the tangent space at the mean direction is zero by
    construction, so that this form is all that is left of it.
    """
    return chain(_SPACES[of](), sphere_mean(weights, normalize))


@reduce(space="weights")
def karcher_mean(weights: Weights = 1.0, iterations: Whole = 10, tolerance: Positive = 1e-5):
    r"""The point on the sphere with the least mean squared angle to all experts, leaf by leaf.

    .. math:: \Big(\sum_i w_i\|\theta_i\|\Big)\,\arg\min_{\|x\|=1}\sum_i w_i
        \arccos^2\Big\langle x,\frac{\theta_i}{\|\theta_i\|}\Big\rangle

    by Riemannian gradient descent. All iterates are combinations of the experts, so
    the steps are taken on their coefficients, with inner products from one matrix of angles.

    Args:
        weights: w, a number or one per expert, divided by their sum.
        iterations: steps at most.
        tolerance: a step shorter than this, in radians, is the last; experts nearer than that to
            the mean do not pull.

    Returns:
        A reduction; it needs no base. A zero leaf has no direction and does not count.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.karcher_mean(), None, experts)['w'].round(4))
        [0.7071 0.7071]
    """

    def apply(ds, leaf, seen):
        shares = jnp.stack(per_expert(weights, len(ds)))
        shares = shares / shares.sum()
        lengths, versines = _versines(ds)
        counted = jnp.where(lengths > 0, shares, 0.0)
        counted = counted / _positive_or(counted.sum(), 1.0)
        direction = _karcher(versines, counted, iterations, tolerance)
        inverse = jnp.where(lengths > 0, 1 / _positive_or(lengths, 1.0), 0.0)
        return _mix(direction * inverse * (shares * lengths).sum(), ds)

    return apply


@highest()
def _karcher(versines, shares, iterations, tolerance):
    r"""Coefficients of the Karcher mean in the experts' directions.

    With V the versines a combination c of unit vectors has the squared length
    :math:`(\sum c)^2-c^\top Vc`; that of x is 1, so :math:`s=\sum x=\sqrt{1+x^\top Vx}`. Nothing
    here subtracts numbers that are nearly 1.
    """

    def length(c, total):
        return _root(total * total - c @ versines @ c)

    def step(_, state):
        x, done = state
        bend = x @ versines @ x
        total = jnp.sqrt(1 + bend)
        off = jnp.clip(versines @ x - bend / (1 + total), 0.0, 2.0)  # 1 - cos of the angles to x
        angle = 2 * jnp.arcsin(_root(off / 2))
        far = angle >= tolerance
        pull = jnp.where(far, shares * angle / jnp.where(far, jnp.sin(angle), 1.0), 0.0)
        tangent = pull - (pull * (1 - off)).sum() * x
        size = length(tangent, (pull * (off * total - bend / (1 + total))).sum())
        done = done | (size < tolerance)
        moved = jnp.cos(size) * x + jnp.sin(size) / _positive_or(size, 1.0) * tangent
        return jnp.where(done, x, moved / _positive_or(length(moved, moved.sum()), 1.0)), done

    norm = length(shares, shares.sum())
    first = jnp.zeros_like(shares).at[jnp.argmax(shares > 0)].set(1.0)
    start = jnp.where(norm < 1e-7, first, shares / _positive_or(norm, 1.0))
    return jax.lax.fori_loop(0, iterations, step, (start, jnp.bool_(False)))[0]


@method
def karcher(weights: Weights = 1.0, iterations: Whole = 10, tolerance: Positive = 1e-5):
    r"""The Karcher mean of the experts' directions, with their mean length, leaf by leaf.

    .. math:: \theta=\Big(\sum_i w_i\|\theta_i\|\Big)\,\arg\min_{\|x\|=1}\sum_i w_i
        \arccos^2\Big\langle x,\frac{\theta_i}{\|\theta_i\|}\Big\rangle

    Args:
        weights: w, a number or one per expert, divided by their sum.
        iterations: steps at most.
        tolerance: a step shorter than this, in radians, is the last.

    Returns:
        A method; it needs no base.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.karcher(), None, experts)['w'].round(4))
        [0.7071 0.7071]

    The Karcher mean (Karcher, 1977) of whole weights, as in mergekit 0.1.5.
    """
    return chain(karcher_mean(weights, iterations, tolerance))
