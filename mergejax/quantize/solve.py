"""One kernel in few bits: round to nearest, and GPTQ, which makes up for each row's error."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from mergejax.core import Array
from mergejax.linalg.regression import regress
from mergejax.linalg.spectral import highest
from mergejax.quantize.grid import Form, Grid, Range, grid_of

BLOCK = 128  # rows whose errors are gathered before the rows behind them are corrected


class Settings(NamedTuple):
    """How kernels are quantised; static.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; 0 for all of a kernel.
        form: of the grid, 'affine' or 'symmetric'.
        span: of the grid, 'whole' or 'searched'.
    """

    bits: int = 4
    group: int = 0
    form: Form = "affine"
    span: Range = "whole"


class Codes(NamedTuple):
    """A quantised kernel.

    Attributes:
        codes: uint8 or uint16 [in, out].
        scale, zero: float32 [groups, out].
    """

    codes: Array
    scale: Array
    zero: Array


def values_of(kernel: Codes) -> Array:
    """The kernel that codes stand for, float32 [in, out]."""
    rows = kernel.codes.shape[0]
    groups = kernel.scale.shape[0]
    each = -(-rows // groups)
    scale, zero = (jnp.repeat(x, each, axis=0)[:rows] for x in (kernel.scale, kernel.zero))
    return scale * (kernel.codes.astype(jnp.float32) - zero)


@functools.partial(jax.jit, static_argnames="settings")
def nearest(kernel: Array, settings: Settings) -> Codes:
    """Rounds every value to the nearest of its channel's grid."""
    return _packed(kernel, _grids(kernel, settings), None, settings)


def _group(rows: int, settings: Settings) -> int:
    return settings.group or rows


def _grids(kernel: Array, settings: Settings) -> list[Grid]:
    rows = len(kernel)
    size = _group(rows, settings)
    parts = (kernel[start : start + size] for start in range(0, rows, size))
    return [grid_of(part, settings.bits, settings.form, settings.span) for part in parts]


def _packed(kernel: Array, grids: list[Grid], codes: Array | None, settings: Settings) -> Codes:
    size = _group(len(kernel), settings)
    if codes is None:
        starts = range(0, len(kernel), size)
        parts = zip(grids, starts, strict=True)
        codes = jnp.concatenate(
            [grid.codes(kernel[i : i + size], settings.bits) for grid, i in parts]
        )
    scale, zero = (jnp.stack([grid[i] for grid in grids]) for i in range(2))
    return Codes(codes.astype(jnp.uint8 if settings.bits <= 8 else jnp.uint16), scale, zero)


@functools.partial(jax.jit, static_argnames="settings")
@highest()
def corrected(kernel: Array, hessian: Array, settings: Settings, damping: Array) -> Codes:
    r"""GPTQ: rounds the rows one after the other, and moves those behind to make up for the error.

    .. math:: e=(W_i-\hat W_i)/U_{ii},\qquad W_{j}\leftarrow W_{j}-U_{ij}e\ \ (j>i)

    with U the upper Cholesky factor of the inverse of H + damping · mean(diag H) · I. The damping
    grows tenfold until the factors are finite. Inputs that are never active become 0.

    Args:
        kernel: [in, out] float32.
        hessian: H [in, in], the Gram matrix of the inputs, or what stands for it.
        settings: see `Settings`; a group's grid is that of its rows when their turn comes.
        damping: the authors' percdamp.

    Returns:
        The codes.
    """
    dead = jnp.diagonal(hessian) <= 0
    kernel = jnp.where(dead[:, None], 0, kernel)
    upper = _upper(hessian + jnp.diag(dead.astype(hessian.dtype)), damping)
    rows = len(kernel)
    size = _group(rows, settings)
    fixed = None if settings.group else _grids(kernel, settings)[0]
    grids, codes = [], []
    for start in range(0, rows, size):
        grid = fixed or _grids(kernel[start : start + size], settings)[0]
        grids.append(grid)
        for first in range(start, min(start + size, rows), BLOCK):
            last = min(first + BLOCK, start + size, rows)
            block = upper[first:last, first:last]
            found, errors = _block(kernel[first:last], block, grid, settings.bits)
            codes.append(found)
            kernel = kernel.at[last:].add(-upper[first:last, last:].T @ errors)
    return _packed(kernel, grids, jnp.concatenate(codes), settings)


def _block(rows: Array, upper: Array, grid: Grid, bits: int) -> tuple[Array, Array]:
    """Codes and errors of the rows of one block, corrected within it."""

    def step(rows: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
        row = rows[i]
        codes = grid.codes(row, bits)
        error = (row - grid.values(codes)) / upper[i, i]
        return rows - upper[i][:, None] * error[None, :], (codes, error)

    _, found = jax.lax.scan(step, rows, jnp.arange(len(rows)))
    return found


def _upper(hessian: Array, damping: Array) -> Array:
    """The upper Cholesky factor of the inverse of a damped matrix."""
    identity = jnp.eye(len(hessian), dtype=hessian.dtype)
    size = jnp.diagonal(hessian).mean()

    def factor(share: Array) -> Array:
        lower = jnp.linalg.cholesky(hessian + share * size * identity)
        inverse = cho_solve((lower, True), identity)
        return jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        share = jnp.maximum(10 * state[0], 1e-6)
        return share, factor(share)

    start = jnp.asarray(damping, hessian.dtype)
    unfit = lambda state: ~jnp.isfinite(state[1]).all() & (state[0] < 1e6)
    return jax.lax.while_loop(unfit, again, (start, factor(start)))[1]


def relaxed(
    merged: Array, experts: list[Array], grams: list[Array], anchor: Array
) -> tuple[Array, Array]:
    r"""What E-PMQ quantises, before any rounding, and the metric it is rounded in.

    .. math:: H=\sum_iG_i+\mu I,\qquad W^*=H^{-1}\Big(\sum_iG_iW_i+\mu W_m\Big),\qquad
        \mu=\rho\cdot mean\,diag\sum_iG_i

    Completing the square, the objective :math:`\sum_i\|X_i(\hat W-W_i)\|^2+\mu\|\hat W-W_m\|^2`
    is :math:`tr((\hat W-W^*)^\top H(\hat W-W^*))` and a constant.

    Args:
        merged: W_m [in, out].
        experts: W_i.
        grams: G_i [in, in], means over rows.
        anchor: :math:`\rho`.

    Returns:
        W* and H.
    """
    whole = sum(grams)
    assert not isinstance(whole, int)
    ridge = anchor * jnp.diagonal(whole).mean()
    hessian = whole + ridge * jnp.eye(len(whole), dtype=whole.dtype)
    return regress(experts, grams, merged, ridge), hessian
