"""Isotropic merging: the sum of the deltas with all its singular values made equal."""

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Array, each, method, reduce
from mergejax.errors import MergeError
from mergejax.hyper import Scaling
from mergejax.linalg.spectral import is_real, on_matrices, unit
from mergejax.linalg.subspaces import gather, present, principals
from mergejax.linalg.triplets import polar, principal
from mergejax.methods.combine import mean, scale, total


def _mean_of_real(values: Array) -> Array:
    """The mean of the singular values that are not zero."""
    return values.sum() / jnp.maximum((values > 0).sum(), 1).astype(values.dtype)


@each
def flatten_spectrum():
    r"""Sets all singular values of a kernel's delta to their mean.

    .. math:: U\Sigma V^\top \leftarrow \bar\sigma\,UV^\top,\qquad
        \bar\sigma=\tfrac1\rho\textstyle\sum_{j\le\rho}\sigma_j

    over the :math:`\rho` singular values that are not zero.

    Returns:
        A stage for one kernel's delta, before or behind the reduction.

    Example:
        >>> import mergejax as mj
        >>> mj.chain(mj.total(), mj.flatten_spectrum())
        total()|flatten_spectrum()
    """

    def flat(x):
        q = polar(x)  # <X, Q> is the sum of the singular values, <Q, Q> their number
        return q * (jnp.sum(x * q) / jnp.maximum(jnp.sum(q * q), 1.0))

    return lambda d, leaf, seen: on_matrices(flat, leaf.layout, d)


@method
def iso_c(scaling: Scaling = 1.0):
    r"""Adds the deltas of each kernel and flattens the spectrum of the sum.

    .. math:: \theta=\theta_0+\lambda\,\bar\sigma\,UV^\top,\qquad
        U\Sigma V^\top=\textstyle\sum_i\tau_i,\quad \bar\sigma=mean(\sigma)

    All other leaves are averaged and scaled alike.

    Args:
        scaling: :math:`\lambda`, searched in (0, 3] by the authors; 1.5 in FusionBench's tables.

    Returns:
        A method; a single expert is not returned unchanged.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> expert = {'kernel': jnp.diag(jnp.asarray([3.0, 1.0]))}
        >>> print(mj.merge(mj.iso_c(), base, [expert])['kernel'].round(4))
        [[2. 0.]
         [0. 2.]]

    No task left behind: isotropic model merging (Marczak et al., 2025, arXiv:2502.04959), Iso-C.
    Where the sum has fewer than min(in, out) singular values, theirs are flattened and none is
    added; the authors' code gives the mean to arbitrary directions then.
    """
    return chain(
        by_role(kernel=chain(total(), flatten_spectrum()), otherwise=mean()), scale(scaling)
    )


@reduce
def isotropic_subspaces(common: float = 0.8):
    r"""Joins the leading subspace of the sum with what each expert has outside it.

    See `iso_cts` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.isotropic_subspaces(common=0.5)
        isotropic_subspaces(common=0.5)
    """
    if not isinstance(common, float | int) or not 0 <= common <= 1:
        raise MergeError(
            f"isotropic_subspaces(common=...) must be one number in [0, 1], not {common!r}"
        )

    def merge(*ds):
        size = min(ds[0].shape)
        place = jnp.arange(size)
        count = jnp.maximum(present(ds).sum(dtype=jnp.int32), 1)
        asked = jnp.round((size - int(common * size)) / count.astype(jnp.float32))
        own = jnp.minimum(asked.astype(jnp.int32), size // count)
        common_rank = size - own * count
        whole = principal(sum(ds), common_rank, size)
        residuals = principals([d - whole.left @ (whole.left.T @ d) for d in ds], [own] * len(ds))
        kept = [
            is_real(rest.values, ds[0].shape, unit(d)[1])
            for rest, d in zip(residuals, ds, strict=True)
        ]
        joined = gather([*residuals, whole], [*kept, place < common_rank], size)
        return _mean_of_real(joined.values) * polar(joined.left) @ polar(joined.right).T

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def iso_cts(scaling: Scaling = 1.0, common: float = 0.8):
    r"""Flattens the spectrum of a common subspace and of one for each expert.

    .. math:: \theta=\theta_0+\lambda\,\bar\sigma\,U_\perp V_\perp^\top,\qquad
        U_\perp=polar[U_1,\ldots,U_N,U_c]

    With k = min(in, out): :math:`(U_c,V_c)` are the leading c singular vectors of
    :math:`\sum_i\tau_i`, :math:`(U_i,V_i)` the leading s of
    :math:`\tau_i-U_cU_c^\top\tau_i`, with :math:`s=round((k-\lfloor common\cdot k\rfloor)/N)`,
    c = k - N s, and :math:`\bar\sigma` is the mean of all k singular values that they have.
    Kernels are taken as [out, in]. All other leaves are averaged and scaled alike.

    Args:
        scaling: :math:`\lambda`.
        common: the common subspace's share of k, in [0, 1]; 1 is Iso-C. Static.

    Returns:
        A method; a single expert is not returned unchanged.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> experts = [{'kernel': jnp.diag(jnp.asarray(x))} for x in ([3.0, 0.0], [0.0, 1.0])]
        >>> print(mj.merge(mj.iso_cts(common=0.0), base, experts)['kernel'].round(4))
        [[2. 0.]
         [0. 2.]]

    No task left behind: isotropic model merging (Marczak et al., 2025, arXiv:2502.04959), Iso-CTS.
    Experts whose delta of a leaf is zero are not counted in N there, and directions without a
    singular value are left out.
    """
    return chain(by_role(kernel=isotropic_subspaces(common), otherwise=mean()), scale(scaling))
