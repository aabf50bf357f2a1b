"""KnOTS: merge adapters in coordinates that their updates share."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mergejax.hyper import NonNegative, Scaling
from mergejax.lowrank.factors import Adapter, Factors
from mergejax.lowrank.methods import adapter_method, merge_coordinates, refuse_traced
from mergejax.varying import resolve


def joint_coordinates(
    several: Sequence[Factors], shared: str, cutoff: float, relative: bool
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    r"""Coordinates of deltas in the basis of all of them together, in float64.

    With the deltas side by side, :math:`[\Delta_1;\ldots;\Delta_N]=[Z_1;\ldots;Z_N]\,U^\top`: U and
    the singular values are those of the concatenation, found by a QR of the factors and an
    eigendecomposition of size rank.

    Args:
        several: the deltas of one leaf.
        shared: the side that U belongs to, 'output' or 'input'.
        cutoff: singular values up to it are left out, but for the largest one.
        relative: whether the cutoff is a share of the largest singular value.

    Returns:
        Z, one [other side, k] per delta; U [shared side, k]; the singular values [k].
    """
    pairs = [(_wide(f.down), _wide(f.scale) * _wide(f.up).T) for f in several]
    if shared == "input":
        pairs = [(up, down) for down, up in pairs]
    basis, triangle = np.linalg.qr(np.concatenate([side for _, side in pairs], 1))
    places = np.cumsum([side.shape[1] for _, side in pairs])[:-1]
    parts = np.split(triangle, places, axis=1)
    cores = [other @ part.T for (other, _), part in zip(pairs, parts, strict=True)]
    squares, vectors = np.linalg.eigh(sum(core.T @ core for core in cores))
    values = np.sqrt(np.maximum(squares[::-1], 0))
    kept = values > cutoff * (values[0] if relative else 1)
    kept[0] = True
    vectors = vectors[:, ::-1][:, kept]
    return [core @ vectors for core in cores], basis @ vectors, values[kept]


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@adapter_method
def knots(
    adapters: Sequence[Adapter],
    host: Any = "ties(density=0.2)",
    scaling: Scaling = 0.6,
    shared: Literal["output", "input"] = "output",
    cutoff: NonNegative = 1e-6,
    relative: bool = True,
    seed: int = 0,
) -> dict[str, Factors]:
    r"""Merges adapters with any method, in coordinates that align their updates.

    .. math:: [\Delta_1;\ldots;\Delta_N]=[Z_1;\ldots;Z_N]\,U^\top,\qquad
        \Delta=\lambda\,f(Z_1,\ldots,Z_N)\,U^\top

    by an SVD of all updates of a leaf together; f is the host method on the coordinates of all
    leaves, so that its whole-model quantities are taken over those, as published.

    Args:
        adapters: one per expert; scales are folded in (the authors' code leaves them out).
        host: f, a chain or a text; one that reduces its experts. 'ties(density=0.2)' with scaling
            0.6 is KnOTS-TIES, 'drop(rate=0.1)|ties(density=1.0)' with 0.7 KnOTS-DARE-TIES.
        scaling: :math:`\lambda`.
        shared: the side of U: 'output' (as published) or 'input'.
        cutoff: singular values up to it are left out.
        relative: whether the cutoff is a share of the largest singular value; the authors' code
            has an absolute 1e-5, which erases small updates.
        seed: of the host's random numbers.

    Returns:
        An adapter; its rank is the number of coordinates.

    Raises:
        MergeError: what the host refuses, or a host that does not reduce the experts.

    Example:
        >>> adapters = [{'q': Factors(jnp.full((1, 1), x), jnp.ones((1, 1)))} for x in (1.0, 3.0)]
        >>> merged = knots(adapters, host='ties(density=1.0)', scaling=1.0)['q']
        >>> print((merged.down @ merged.up).round(4))
        [[2.]]

    KnOTS (Stoica et al., 2025, arXiv:2410.19735). It runs on the host in float64 and chooses the
    number of coordinates by their size, so not inside `jax.jit`. Where singular values repeat, the
    coordinates are defined up to a rotation, which a host that looks at elements can see.
    """
    refuse_traced("knots", adapters)
    coordinates: list[dict[str, jnp.ndarray]] = [{} for _ in adapters]
    bases = {}
    for name in adapters[0]:
        several = [adapter[name] for adapter in adapters]
        limit = float(resolve(cutoff, name, 0.0))
        found, bases[name], _ = joint_coordinates(several, shared, limit, relative)
        for own, z in zip(coordinates, found, strict=True):
            own[name] = jnp.asarray(z if shared == "output" else z.T, jnp.float32)
    merged = merge_coordinates("knots", host, coordinates, seed)
    adapter = {}
    for name, core in merged.items():
        basis = jnp.asarray(float(resolve(scaling, name, 0.0)) * bases[name].T, jnp.float32)
        down, up = (core, basis) if shared == "output" else (basis.T, core)
        adapter[name] = Factors(down, up, jnp.float32(1))
    return adapter
