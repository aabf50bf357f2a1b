"""Reversible merging: bases that adapters share, from which each of them is recovered."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.core import Array
from mergejax.errors import MergeError
from mergejax.lowrank.factors import (
    Adapter,
    Factors,
    check_adapters,
    concatenated,
    product_svd,
)
from mergejax.lowrank.units import stacked_units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """One leaf of several adapters in a shared basis.

    Attributes:
        down: basis of the input sides, [bases, rank, in].
        up: basis of the output sides, [bases, rank, out].
        down_mix: coefficients of the input sides, [N, rank, bases].
        up_mix: coefficients of the output sides, [N, rank, bases].
        ranks: the true rank of each adapter.
    """

    down: Array
    up: Array
    down_mix: Array
    up_mix: Array
    ranks: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.jit
def _principal(units: Array) -> tuple[Array, Array]:
    """For every rank unit the principal directions of the experts' vectors: basis, coefficients."""
    with jax.default_matmul_precision("highest"):
        grams = jnp.einsum("nrd,mrd->rnm", units, units)
        _, vectors = jnp.linalg.eigh(grams)
        vectors = vectors[..., ::-1]
        return jnp.einsum("rnp,nrd->prd", vectors, units), vectors.transpose(1, 0, 2)


def rmm(adapters: Sequence[Adapter], bases: int = 1) -> dict[str, Shared]:
    r"""Stores several adapters as a few bases with coefficients.

    .. math:: X_\rho=[x_{1\rho},\ldots,x_{N\rho}]^\top\approx C_\rho Z_\rho,\qquad
        Z_\rho\in\mathbb R^{p\times d},\ C_\rho\in\mathbb R^{N\times p}

    for every rank unit :math:`\rho` and both of its sides x, with the p principal directions of
    the N vectors: the best in the least-squares sense.

    Args:
        adapters: one per expert; ranks may differ.
        bases: p, from 1 (the storage of one adapter) to N (all are recovered exactly).

    Returns:
        The shared bases of every leaf, for `recover` and `recovery_errors`.

    Raises:
        MergeError: adapters that do not fit, or a number of bases out of range.

    Example:
        >>> adapter = {'q': Factors(jnp.eye(2), jnp.eye(2), 2.0)}
        >>> shared = rmm([adapter, adapter], bases=1)
        >>> recovered = recover(shared, 1)['q']
        >>> print((recovered.down @ recovered.up).round(4) + 0.0)
        [[2. 0.]
         [0. 2.]]

    Reversible model merging for low-rank weights (RMM, 2025), after public reviews of it: the
    paper's text was not at hand. The sides of a unit are balanced first.
    """
    check_adapters(adapters)
    count = len(adapters)
    if not isinstance(bases, int) or not 1 <= bases <= count:
        raise MergeError(
            f"rmm(bases={bases!r}) must be an integer in [1, {count}], the number of adapters"
        )
    found = {}
    for name in adapters[0]:
        several = [adapter[name] for adapter in adapters]
        downs, ups = stacked_units(several)
        (down, down_mix), (up, up_mix) = _principal(downs), _principal(ups)
        ranks = tuple(factors.rank for factors in several)
        found[name] = Shared(
            down[:bases], up[:bases], down_mix[..., :bases], up_mix[..., :bases], ranks
        )
    return found


def recover(shared: Mapping[str, Shared], expert: int) -> dict[str, Factors]:
    """One adapter of those that share a basis.

    Args:
        shared: see `rmm`.
        expert: its position among the adapters.

    Returns:
        An adapter of the expert's own ranks, scale 1.
    """
    recovered = {}
    for name, leaf in shared.items():
        down, up = _mixed(leaf, expert)
        rank = leaf.ranks[expert]
        recovered[name] = Factors(down[:, :rank], up[:rank], jnp.float32(1))
    return recovered


@jax.jit
def _mixed(leaf: Shared, expert: Any) -> tuple[Array, Array]:
    with jax.default_matmul_precision("highest"):
        down = jnp.einsum("rp,prd->dr", leaf.down_mix[expert], leaf.down)
        return down, jnp.einsum("rp,prd->rd", leaf.up_mix[expert], leaf.up)


def recovery_errors(
    shared: Mapping[str, Shared], adapters: Sequence[Adapter]
) -> dict[str, list[float]]:
    r"""How far recovered deltas are from the adapters', relatively.

    .. math:: \|\hat\Delta_i-\Delta_i\|_F \,/\, \|\Delta_i\|_F

    Args:
        shared: see `rmm`.
        adapters: those that it was made of.

    Returns:
        One number per adapter, by leaf name; 0 for a zero delta.

    Example:
        >>> adapters = [{'q': Factors(jnp.full((1, 1), x), jnp.ones((1, 1)))} for x in (1.0, 3.0)]
        >>> recovery_errors(rmm(adapters, bases=2), adapters)['q'][0] < 1e-6
        True
    """
    errors: dict[str, list[float]] = {}
    for i, adapter in enumerate(adapters):
        for name, found in recover(shared, i).items():
            apart = _norm(concatenated([found, adapter[name]], (1, -1)))
            whole = _norm(adapter[name])
            errors.setdefault(name, []).append(apart / whole if whole > 0 else 0.0)
    return errors


def _norm(factors: Factors) -> float:
    return float(jnp.linalg.norm(product_svd(factors)[1]))
