"""Pieces that keep of kernels' deltas the leading singular directions, for `mj.compress`."""

import functools
import re

import jax.numpy as jnp

from mergejax.core import Array, joint
from mergejax.errors import MergeError
from mergejax.hyper import Count, Fraction
from mergejax.linalg.spectral import Triplets, decompose, on_matrices
from mergejax.linalg.triplets import truncate


def kept_rank(shape: tuple[int, ...], fraction: Array, count: int) -> Array:
    """The number of singular directions that `tsv_compress` keeps of each of `count` matrices."""
    share = jnp.where(fraction > 0, fraction, 1.0 / count)
    # A little more, so that rounding takes no direction from a share that divides the rank.
    return jnp.maximum(jnp.floor(min(shape) * share + 1e-3), 1.0).astype(jnp.int32)


@joint
def tsv_compress(fraction: Fraction = 0.0):
    r"""Keeps the leading singular directions of each kernel's delta; other leaves stay.

    .. math:: \hat\tau_i = U_{i,:r}\,\Sigma_{i,:r}\,V_{i,:r}^\top,\qquad
        r=\max(1,\lfloor\phi\,\min(in,out)\rfloor)

    Args:
        fraction: :math:`\phi`; 0 stands for one over the number of experts, as published.

    Returns:
        A stage on all experts' deltas.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> expert = {'kernel': jnp.diag(jnp.asarray([3.0, 1.0]))}
        >>> print(mj.merge('tsv_compress(fraction=0.5)', base, [expert])['kernel'])
        [[3. 0.]
         [0. 0.]]

    TSV-Compress (Gargiulo et al., 2025, arXiv:2412.00081).
    """

    def apply(ds, leaf, seen):
        if leaf.role != "kernel":
            return ds

        def compress(x):
            return truncate(x, kept_rank(x.shape, fraction, len(ds)))

        return [on_matrices(compress, leaf.layout, d) for d in ds]

    return apply


def bands_of(text: str, rank: int) -> list[tuple[int, int, int]]:
    """The bands of `skill_pack` as (first direction, behind the last, bits), within a rank.

    Raises:
        MergeError: a text that is not of the form '20:8, 180:4, :2'.

    Example:
        >>> bands_of('20:8, 180:4, :2', rank=100)
        [(0, 20, 8), (20, 100, 4)]
    """
    found, start = [], 0
    parts = [re.fullmatch(r"(\d*):(\d+)", part.strip()) for part in text.split(",")]
    whole = all(part and (part[1] or part is parts[-1]) for part in parts)
    if not whole or any(int(part[2]) not in (*range(2, 9), 32) for part in parts if part):
        raise MergeError(
            f"skill_pack(bands={text!r}) must list directions and their bits, 2 to 8 or 32, the "
            "last without a number for all that remain, such as '20:8, 180:4, :2'"
        )
    for part in parts:
        stop = min(rank, start + int(part[1]) if part and part[1] else rank)
        if part and stop > start:
            found.append((start, stop, int(part[2])))
        start = stop
    return found


def quantise(x: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Columns rounded to the nearest of 2^bits - 1 levels, symmetric, of each group of rows.

    Returns:
        The levels, int8 [groups, group, columns], padded with zeros; their unit, float32
        [groups, 1, columns].
    """
    padded = jnp.pad(x, ((0, -len(x) % group), (0, 0))).reshape(-1, group, x.shape[1])
    unit = jnp.max(jnp.abs(padded), 1, keepdims=True) / (2 ** (bits - 1) - 1)
    levels = jnp.round(padded / jnp.where(unit > 0, unit, 1.0)).astype(jnp.int8)
    return levels, unit


def _rounded(x: Array, bits: int, group: int) -> Array:
    if bits == 32:
        return x
    levels, unit = quantise(x, bits, group)
    return (levels.astype(x.dtype) * unit).reshape(-1, x.shape[1])[: len(x)]


@joint
def skill_pack(rank: Count = 1000, bands: str = "20:8, 180:4, :2", group: Count = 128):
    r"""Keeps leading singular directions of kernels in few bits, fewer for the lesser ones.

    .. math:: \hat\Delta = Q(U_{:r})\,\Sigma_{:r}\,Q(V_{:r})^\top

    with Q rounding to the nearest of :math:`2^b-1` symmetric levels in every group of a singular
    vector's elements, the largest of which is the last level. Other leaves stay.

    Args:
        rank: r, or the matrix' own rank where that is less; the authors keep 1000 directions of
            attention and 1400 of feed-forward matrices of an 8 B model.
        bands: how many directions are kept in how many bits, from the largest singular value on:
            '20:8, 180:4, :2' is 20 in 8 bits, 180 in 4, the others in 2; 32 leaves them as
            they are.
        group: elements that share a unit.

    Returns:
        A stage on all experts' deltas, each by itself.

    Raises:
        MergeError: bands of another form, a rank or a group below one.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> expert = {'kernel': jnp.diag(jnp.asarray([3.0, 1.0]))}
        >>> print(mj.merge('skill_pack(rank=1, bands=":8")', base, [expert])['kernel'])
        [[3. 0.]
         [0. 0.]]

    SkillPack of GraftLLM (Du et al., 2025, arXiv:2505.18502), rounded to the nearest in place of
    the authors' calibration with text; other leaves stay in float32.
    """
    bands_of(bands, rank)

    def compress(x):
        triplets = decompose(x)
        kept = bands_of(bands, min(rank, *x.shape))
        parts = [
            Triplets(
                _rounded(triplets.left[:, start:stop], bits, group),
                triplets.values[start:stop],
                _rounded(triplets.right[:, start:stop], bits, group),
            ).compose()
            for start, stop, bits in kept
        ]
        return functools.reduce(jnp.add, parts)

    def apply(ds, leaf, seen):
        return [on_matrices(compress, leaf.layout, d) for d in ds] if leaf.role == "kernel" else ds

    return apply
