"""Methods that weigh each expert by how much it changed: SCE, VaRM, delta-guided fusion, ..."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Parts, joint, method, reduce
from mergejax.hyper import Fraction, NonNegative
from mergejax.methods.combine import mean
from mergejax.methods.elect import elect_sign
from mergejax.summaries import first_largest, magnitude_key

Measure = Literal["element", "mean", "norm"]


def _shares(changes, power):
    """Weights that sum to one, proportional to a power of the changes; equal if all are zero."""
    largest = jnp.stack(changes).max(0)
    # Relative to the largest, so that powers neither overflow nor vanish.
    relative = [c / jnp.where(largest > 0, largest, 1.0) for c in changes]
    parts = [jnp.where(largest > 0, r**power, 1.0) for r in relative]
    whole = sum(parts)
    return [part / whole for part in parts]


def _changes(ds, measure):
    if measure == "element":
        return [jnp.abs(d) for d in ds]
    if measure == "mean":
        return [jnp.abs(d).mean() for d in ds]
    return [jnp.sqrt(jnp.square(d).sum()) for d in ds]


@reduce
def change_weighted(power: NonNegative = 1.0, by: Measure = "norm") -> Parts:
    r"""Averages deltas with weights that grow with the change itself.

    .. math:: \tau_m = \sum_i w_i\tau_i,\qquad w_i = \delta_i^p\,/\sum_j\delta_j^p

    Args:
        power: p; 0 gives the mean, a large one the expert that changed most.
        by: :math:`\delta_i` is the magnitude of each 'element', the leaf's 'mean' magnitude or its
            Euclidean 'norm'.

    Returns:
        A reduction; where nothing changed, zero.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.change_weighted(), base, experts)['w'])
        [2.25 0.25]
    """

    def apply(ds, leaf, seen):
        weights = _shares(_changes(ds, by), power)
        return sum(w * d for w, d in zip(weights, ds, strict=True))

    return Parts(apply=apply, elementwise=by == "element")


@joint
def select_variance(density: Fraction = 0.1):
    r"""Keeps the elements on which the experts differ most, and sets all others to zero.

    .. math:: \hat\tau_{ij}=\tau_{ij}\,1[j\in top_k\,Var_i(\tau_{ij})],\quad
        k=\lfloor density\cdot\#\{j: Var_i(\tau_{ij})\ne0\}\rfloor

    Args:
        density: fraction of the elements with any variance that is kept, in [0, 1]; 1 keeps all.

    Returns:
        A stage on all experts' deltas, leaf by leaf; a single expert is left as it is.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([-3.0, 2.0])}]
        >>> print(mj.merge('select_variance(density=0.5)|total()', base, experts)['w'])
        [0. 0.]
    """

    def apply(ds, leaf, seen):
        if len(ds) == 1:
            return ds
        # Around the first expert, so that equal deltas have no variance at all.
        ahead = [d - ds[0] for d in ds]
        centre = sum(ahead) / len(ds)
        variance = jnp.asarray(sum(jnp.square(d - centre) for d in ahead)) / len(ds)
        varied = (variance > 0).sum(dtype=jnp.int32)
        count = jnp.floor(density * varied.astype(jnp.float32)).astype(jnp.int32)
        kept = first_largest(magnitude_key(variance).reshape(1, -1), count).reshape(variance.shape)
        return [jnp.where(kept | (density >= 1), d, 0.0) for d in ds]

    return apply


@reduce
def energy_consensus():
    r"""Averages the experts that agree with the elected sign, weighted by their energy.

    .. math:: \tau_m=\frac{\sum_{i:\,sign(\tau_i)=s}w_i\tau_i}{\sum_{i:\,sign(\tau_i)=s}w_i},\quad
        w_i\propto\|\tau_i\|^2,\quad s=sign\textstyle\sum_i\tau_i

    Returns:
        A reduction, leaf by leaf; a drawn vote counts as plus.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([2.0, 0.0])}, {'w': jnp.asarray([-1.0, 1.0])}]
        >>> print(mj.merge(mj.energy_consensus(), base, experts)['w'])
        [2. 1.]
    """
    elected = elect_sign(zero="plus").build().apply

    def apply(ds, leaf, seen):
        weights = _shares(_changes(ds, "norm"), 2.0)
        kept = elected(ds, leaf, seen)
        mass = sum(jnp.where(k != 0, w, 0.0) for w, k in zip(weights, kept, strict=True))
        above = sum(w * k for w, k in zip(weights, kept, strict=True))
        return above / jnp.where(mass == 0, 1.0, mass)

    return apply


@method
def sce(density: Fraction = 0.1):
    r"""Selects the elements that vary most, weighs experts by energy, erases minority signs.

    .. math:: \theta=\theta_0+\frac{\sum_{i:\,sign(\hat\tau_i)=s}w_i\hat\tau_i}
        {\sum_{i:\,sign(\hat\tau_i)=s}w_i},\qquad w_i\propto\|\hat\tau_i\|^2

    with :math:`\hat\tau_i` from `select_variance`, everything leaf by leaf.

    Args:
        density: fraction of the varying elements that is kept, in [0, 1].

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([-1.0, 1.0])}]
        >>> print(mj.merge(mj.sce(density=1.0), base, experts)['w'])
        [3. 1.]

    FuseChat (Wan et al., 2024, arXiv:2408.07990), as described there and in mergekit; the
    authors' code takes the weights from the selected elements but merges all of them. A single
    expert is kept whole.
    """
    return chain(select_variance(density), energy_consensus())


@method
def varm():
    r"""Averages deltas weighted, leaf by leaf, by their mean square.

    .. math:: \theta=\theta_0+\sum_i w_i\tau_i,\qquad w_i=\|\tau_i\|^2/\sum_j\|\tau_j\|^2

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([2.0, 2.0])}, {'w': jnp.asarray([0.0, 0.0])}]
        >>> print(mj.merge(mj.varm(), base, experts)['w'])
        [2. 2.]

    FuseChat-7B-VaRM (Wan et al., 2024, arXiv:2402.16107); that the variation ratio is squared is
    this library's reading, the authors publish no formula in code.
    """
    return chain(change_weighted(2.0, "norm"))


@method
def delta_guided(power: NonNegative = 1.0, by: Literal["element", "mean"] = "element"):
    r"""Averages deltas, each element or leaf weighted by how far it moved from the base.

    .. math:: \theta=\theta_0+\sum_i w_i\tau_i,\qquad w_i=|\tau_i|^p/\sum_j|\tau_j|^p

    Args:
        power: p.
        by: the magnitude of each 'element', or the 'mean' magnitude of a leaf.

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (0.0, 3.0, -1.0))
        >>> print(mj.merge(mj.delta_guided(), base, [a, b])['w'])
        [2.]

    Delta-guided fusion of CoDiEmb (2025, arXiv:2508.11442); the abstract describes it, the formula
    is this library's proposal.
    """
    return chain(change_weighted(power, by))


@method
def frobenius_weighted(power: NonNegative = 1.0):
    r"""Averages each kernel's deltas weighted by their Frobenius norms; all other leaves plainly.

    .. math:: \theta=\theta_0+\sum_i w_i\tau_i,\qquad w_i=\|\tau_i\|_F^p/\sum_j\|\tau_j\|_F^p

    Args:
        power: p; 0 gives the plain mean, a large one the expert that changed most.

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((1, 2))}
        >>> experts = [{'kernel': jnp.asarray([[3.0, 0.0]])}, {'kernel': jnp.asarray([[0.0, 1.0]])}]
        >>> print(mj.merge(mj.frobenius_weighted(), base, experts)['kernel'])
        [[2.25 0.25]]

    After FroM (2025, arXiv:2506.02478), which weighs by Frobenius norms; the formula is this
    library's proposal, hence not that name.
    """
    return chain(by_role(kernel=change_weighted(power), otherwise=mean()))
