"""Singular directions of each kernel's delta, in full or in few bits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.compress.bits import pack_integers, unpack_integers
from mergejax.compress.codec import Codec, Parts, Run
from mergejax.core import Stage
from mergejax.leaves import LeafInfo, as_matrix
from mergejax.linalg.spectral import Triplets, decompose
from mergejax.methods.combine import scale
from mergejax.methods.low_rank import bands_of, kept_rank, quantise, skill_pack, tsv_compress

_decompose = jax.jit(decompose)
_quantise = jax.jit(quantise, static_argnames=("bits", "group"))


def _triplets(x: np.ndarray, info: LeafInfo) -> Triplets:
    matrix, _ = as_matrix(jnp.asarray(x), info.layout)
    return _decompose(matrix.T)


def _composed(triplets: Triplets, info: LeafInfo) -> np.ndarray:
    _, restore = as_matrix(jnp.zeros(info.shape, jnp.float32), info.layout)
    return np.asarray(restore(triplets.compose().T))


def _shape(info: LeafInfo) -> tuple[int, ...]:
    """[out, in] of a kernel."""
    view = jax.eval_shape(lambda x: as_matrix(x, info.layout)[0], jnp.zeros(info.shape))
    return view.shape[::-1]


def encode(stage: Stage, run: Run) -> dict[str, Parts]:
    """TSV-Compress: left and right singular vectors and singular values of every expert."""
    arrays: dict[str, Parts] = {}
    fraction = jnp.float32(stage.arguments["fraction"])

    def keep(info: LeafInfo, found: Sequence[np.ndarray]) -> None:
        arrays[info.name] = parts = {}
        for i, x in enumerate(found):
            if info.role != "kernel":
                parts[f"whole{i}"] = x
                continue
            triplets = _triplets(x, info)
            rank = int(kept_rank(_shape(info), fraction, len(found)))
            for part, vectors in zip(("left", "values", "right"), triplets, strict=True):
                parts[f"{part}{i}"] = np.asarray(vectors[..., :rank])

    run(scale(1.0), keep)
    return arrays


def decode(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> list[np.ndarray]:
    if "whole0" in parts:
        return [parts[f"whole{i}"] for i in range(experts)]
    several = [
        [parts[f"{part}{i}"] for part in ("left", "values", "right")] for i in range(experts)
    ]
    return [_composed(Triplets(*map(jnp.asarray, each)), info) for each in several]


def bits(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> float:
    if "whole0" in parts:
        return 32 * info.size * experts
    return 32 * experts * len(parts["values0"]) * (sum(_shape(info)) + 1)


def encode_bands(stage: Stage, run: Run) -> dict[str, Parts]:
    """SkillPack: singular values, and bands of singular vectors in levels and their units."""
    arrays: dict[str, Parts] = {}
    given = stage.arguments

    def keep(info: LeafInfo, found: Sequence[np.ndarray]) -> None:
        if info.role != "kernel":
            arrays[info.name] = {"whole0": found[0]}
            return
        left, values, right = _triplets(found[0], info)
        rank = min(given["rank"], len(values))
        arrays[info.name] = parts = {"values": np.asarray(values[:rank])}
        for start, stop, width in bands_of(given["bands"], rank):
            for side, vectors in (("left", left), ("right", right)):
                parts |= _levels(f"{side}{start}", vectors[:, start:stop], width, given["group"])

    run(scale(1.0), keep)
    return arrays


def _levels(label: str, vectors: jax.Array, width: int, group: int) -> Parts:
    if width == 32:
        return {label: np.asarray(vectors)}
    levels, unit = _quantise(vectors, bits=width, group=group)
    rows = np.asarray(levels).reshape(-1, vectors.shape[1])[: len(vectors)]
    whole = rows.astype(np.int16) + 2 ** (width - 1) - 1
    return {label: pack_integers(whole, width), f"{label}unit": np.asarray(unit)[:, 0]}


def decode_bands(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> list[np.ndarray]:
    if "whole0" in parts:
        return [parts["whole0"]]
    given, values = stage.arguments, parts["values"]
    sides: list[jax.Array] = []
    for side, rows in zip(("left", "right"), _shape(info), strict=True):
        bands = bands_of(given["bands"], len(values))
        columns = [
            _vectors(parts, f"{side}{start}", (rows, stop - start), width, given["group"])
            for start, stop, width in bands
        ]
        sides.append(jnp.asarray(np.concatenate(columns, 1)))
    return [_composed(Triplets(sides[0], jnp.asarray(values), sides[1]), info)]


def _vectors(
    parts: Parts, label: str, shape: tuple[int, int], width: int, group: int
) -> np.ndarray:
    if width == 32:
        return parts[label]
    levels = unpack_integers(parts[label], shape, width).astype(np.float32)
    unit = np.repeat(parts[f"{label}unit"], group, axis=0)[: shape[0]]
    return (levels - (2 ** (width - 1) - 1)) * unit


def bits_of_bands(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> float:
    if "whole0" in parts:
        return 32 * info.size
    given, rank = stage.arguments, len(parts["values"])
    total = 32.0 * rank
    for start, stop, width in bands_of(given["bands"], rank):
        groups = 0 if width == 32 else sum(-(-n // given["group"]) for n in _shape(info))
        total += (stop - start) * (width * sum(_shape(info)) + 32 * groups)
    return total


CODECS = {
    tsv_compress.factory.name: Codec(encode, decode, bits),
    skill_pack.factory.name: Codec(encode_bands, decode_bands, bits_of_bands, experts=1),
}
