"""Modifiers that settle lengths: NAN's coefficients, equal norms before and behind a method."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, Round, joint, method, refine
from mergejax.methods.combine import total
from mergejax.summaries import ratio, squares

Scope = Literal["model", "tensor"]
Order = Literal["l2", "l1"]


def _measured(x, order):
    """What adds up over leaves to a norm."""
    return squares(x) if order == "l2" else jnp.abs(x).sum()


def _norm(total, order):
    return total**0.5 if order == "l2" else total


@joint(elementwise=True)
def inverse_norm(of: Literal["weights", "deltas"] = "weights") -> Parts:
    r"""Multiplies each delta by a coefficient inverse to its model's norm.

    .. math:: \tau_i\leftarrow\frac N2\,\frac{1/\|\theta_i\|}{\sum_j1/\|\theta_j\|}\,\tau_i

    with norms over the whole model.

    Args:
        of: the norm of the 'weights', or of the 'deltas', which differ more between experts.

    Returns:
        A stage on all experts' deltas, to stand before any method. A zero norm counts as infinite:
        that expert has nothing to add.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 3.0))
        >>> print(mj.merge('inverse_norm()|total()', base, [a, b])['w'])
        [1.5]
    """

    def measure(ds, leaf, seen):
        return jnp.stack([squares(d + leaf.base if of == "weights" else d) for d in ds])

    def solve(totals, size, memory):
        inverse = ratio(1.0, totals[0] ** 0.5)
        return ratio(inverse * len(inverse) / 2, inverse.sum())

    return Parts(
        apply=lambda ds, leaf, seen: [c * d for c, d in zip(seen[0], ds, strict=True)],
        rounds=(Round(measure, solve),),
    )


@method
def nan(of: Literal["weights", "deltas"] = "weights"):
    r"""Adds up deltas with coefficients inverse to the norms of their models.

    .. math:: \theta=\theta_0+\frac N2\sum_i c_i\tau_i,\qquad
        c_i=\frac{1/\|\theta_i\|}{\sum_j1/\|\theta_j\|}

    Args:
        of: the norm of the 'weights', as published, or of the 'deltas'.

    Returns:
        A method; before another one write `inverse_norm()|ties()`.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 3.0))
        >>> print(mj.merge(mj.parse('nan()'), base, [a, b])['w'])
        [1.5]

    NAN (2025, arXiv:2505.16148): the abstract gives the inverse norms, the factor N/2 is that of
    other people's code. Equal norms make it task arithmetic with scaling 0.5.
    """
    return chain(inverse_norm(of), total())


@joint
def equal_norms(order: Order = "l2", scope: Scope = "model") -> Parts:
    r"""Scales every expert's delta to the mean of their norms.

    .. math:: \tau_i\leftarrow\frac{\frac1N\sum_j\|\tau_j\|}{\|\tau_i\|}\,\tau_i

    Args:
        order: 'l2' or 'l1' norm.
        scope: the norm of the whole 'model', or of each 'tensor'.

    Returns:
        A stage on all experts' deltas, to stand before any method; a zero delta stays zero.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 3.0))
        >>> print(mj.merge('equal_norms()|total()', base, [a, b])['w'])
        [4.]
    """

    def measure(ds, leaf, seen):
        return jnp.stack([_measured(d, order) for d in ds])

    def solve(totals, size, memory):
        norms = _norm(totals[0], order)
        return ratio(norms.mean(), norms)

    def apply(ds, leaf, seen):
        factors = seen[0] if scope == "model" else solve([measure(ds, leaf, ())], None, None)
        return [factor * d for factor, d in zip(factors, ds, strict=True)]

    if scope == "tensor":
        return Parts(apply=apply)
    return Parts(apply=apply, rounds=(Round(measure, solve),), elementwise=True)


@refine
def match_norm(order: Order = "l2", scope: Scope = "model") -> Parts:
    r"""Scales the merged delta to the mean norm of the experts' deltas.

    .. math:: \tau_m\leftarrow\frac{\frac1N\sum_i\|\tau_i\|}{\|\tau_m\|}\,\tau_m

    Args:
        order: 'l2' or 'l1' norm.
        scope: the norm of the whole 'model', or of each 'tensor'.

    Returns:
        A stage behind the reduction; a zero delta stays zero.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 3.0))
        >>> print(mj.merge('total()|match_norm()', base, [a, b])['w'])
        [2.]
    """

    def measure(merged, ds, leaf, seen):
        return _measured(merged, order), jnp.stack([_measured(d, order) for d in ds])

    def solve(totals, size, memory):
        merged, experts = totals[0]
        return ratio(_norm(experts, order).mean(), _norm(merged, order))

    def apply(merged, ds, leaf, seen):
        if scope == "model":
            return seen[0] * merged
        return solve([measure(merged, ds, leaf, ())], None, None) * merged

    if scope == "tensor":
        return Parts(apply=apply)
    return Parts(apply=apply, rounds=(Round(measure, solve),), elementwise=True)
