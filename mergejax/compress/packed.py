"""Deltas packed and unpacked, leaf by leaf, and their size."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mergejax.api import stream
from mergejax.compress import masks, signs, spectra
from mergejax.compress.codec import Codec, Parts, Sink
from mergejax.core import Stage
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.language import as_chain
from mergejax.leaves import STATISTIC, LeafInfo, describe, is_floating, unmatched

CODECS: dict[str, Codec] = {**signs.CODECS, **masks.CODECS, **spectra.CODECS}
WHOLE = "whole"  # the part of a leaf that is stored as it is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Deltas of one or several experts, packed.

    Attributes:
        arrays: by leaf and part; under the leaf "" what belongs to none.
        method: the method with its parameters, as text.
        experts: how many deltas.
        leaves: name, shape and layout of each leaf; one of stacked layers is 'LAYER/NAME'.
        stacks: name and number of layers of leaves that stack them.
    """

    arrays: dict[str, dict[str, Any]]
    method: str = dataclasses.field(metadata={"static": True})
    experts: int = dataclasses.field(metadata={"static": True})
    leaves: tuple[tuple[str, tuple[int, ...], str], ...] = dataclasses.field(
        metadata={"static": True}
    )
    stacks: tuple[tuple[str, int], ...] = dataclasses.field(default=(), metadata={"static": True})


class Size(NamedTuple):
    """Bytes that packed deltas take.

    Attributes:
        payload: of the arrays that are stored.
        formula: by the method's own accounting: entropy where it counts that, bits elsewhere.
        dense: of the deltas in float32.
    """

    payload: int
    formula: float
    dense: int


def float32(x: Any) -> np.ndarray:
    """The array in float32, itself if it is."""
    return np.asarray(x).astype(np.float32, copy=False)


def encode(
    method: Any,
    deltas: Sequence[Tree],
    *,
    layout: str = "flax",
    roles: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    scanned: str | None = None,
) -> Packed:
    """Compresses deltas and packs them.

    Args:
        method: a compression as stage or text: 'compeft(density=0.1)', 't_switch()',
            'bit_delta()' or 'skill_pack()' for one delta at a time, 'tall_masks()', 'emr()' or
            'tsv_compress()' for several together.
        deltas: trees of floating-point arrays, one per expert (see `deltas`).
        layout, roles, layouts: of the leaves, as in `mj.merge`.
        scanned: regular expression of leaves whose first axis stacks layers; each layer is
            packed by itself, for patterns as 'LAYER/NAME'.

    Returns:
        Packed deltas. What they decode to is what the method makes of the deltas as a stage.

    Raises:
        MergeError: no compression, another number of deltas than it takes, leaves that differ or
            are not finite.

    Example:
        >>> packed = encode('compeft(density=0.5)', [{'w': np.float32([3, -2, 0.1, 0])}])
        >>> decode(packed)[0]['w'], size(packed).payload
        (array([ 2.058114, -2.058114,  0.      ,  0.      ], dtype=float32), 6)
    """
    stage, codec = _parsed(method)
    named = _checked(deltas, stage, codec.experts)
    stacks = _stacks(named[0], scanned)
    named = [_by_layer(leaves, stacks) for leaves in named]
    zero = {n: np.broadcast_to(np.float32(0), x.shape) for n, x in named[0].items()}
    kinds: dict[str, Any] = {"layout": layout, "roles": roles, "layouts": layouts}
    infos = {info.name: info for info in _described(zero, **kinds)}
    whole: dict[str, Parts] = {}

    def run(stage: Stage, sink: Sink) -> None:
        def keep(name: str, found: Sequence[Any]) -> None:
            if infos[name].role == STATISTIC:  # which no method touches
                whole[name] = {WHOLE: np.asarray(found[0])}
            else:
                sink(infos[name], [np.asarray(x) for x in found])

        stream(stage, zero, named, keep, **kinds)

    arrays = {**codec.encode(stage, run), **whole}
    leaves = tuple((info.name, info.shape, info.layout) for info in infos.values())
    return Packed(arrays, repr(stage), len(named), leaves, tuple(stacks.items()))


def _checked(deltas: Any, stage: Stage, experts: int | None) -> list[dict[str, np.ndarray]]:
    """The deltas in float32 by leaf name, if they can be packed."""
    if not isinstance(deltas, Sequence) or not deltas:
        raise MergeError("deltas must be a list of trees, one per expert, such as [delta]")
    if experts not in (None, len(deltas)):
        raise MergeError(
            f"{stage.factory.name} packs one delta at a time, not {len(deltas)}; call encode for "
            "each"
        )
    named = [leaves_by_name(tree, f"delta {i}")[0] for i, tree in enumerate(deltas)]
    raise_all(
        [
            f"leaf '{name}' of delta {i} has dtype {x.dtype}, but deltas are floating-point; leave "
            "it out, as mj.compress.deltas does"
            for i, leaves in enumerate(named)
            for name, x in leaves.items()
            if not is_floating(x.dtype) or 0 in x.shape
        ]
    )
    return [{name: float32(x) for name, x in leaves.items()} for leaves in named]


def _stacks(leaves: Mapping[str, np.ndarray], scanned: str | None) -> dict[str, int]:
    """The leaves that stack layers, and how many."""
    if scanned is None:
        return {}
    raise_all(unmatched([scanned], list(leaves)))
    return {name: len(x) for name, x in leaves.items() if re.search(scanned, name)}


def _by_layer(leaves: Mapping[str, np.ndarray], stacks: Mapping[str, int]) -> dict[str, np.ndarray]:
    layers = {f"{i}/{name}": leaves[name][i] for name, n in stacks.items() for i in range(n)}
    return {name: x for name, x in leaves.items() if name not in stacks} | layers


def _described(
    arrays: Mapping[str, Any], layout: str, roles: Any = None, layouts: Any = None
) -> list[LeafInfo]:
    specs = {name: (tuple(x.shape), x.dtype) for name, x in arrays.items()}
    return describe(specs, style=layout, roles=roles, layouts=layouts)


def _parsed(method: Any) -> tuple[Stage, Codec]:
    items = as_chain(method).items
    if len(items) != 1 or not isinstance(items[0], Stage) or items[0].factory.name not in CODECS:
        name = items[0].factory.name if isinstance(items[0], Stage) else repr(items[0])
        raise MergeError(
            f"'{method}' is not one compression, {did_you_mean(name, CODECS)}"
            if name not in CODECS
            else f"'{method}' is more than one compression; encode '{items[0]!r}' alone"
        )
    stage = items[0]
    return stage, CODECS[stage.factory.name]


def _leaves(packed: Packed) -> list[tuple[LeafInfo, Parts]]:
    common = packed.arrays.get("", {})
    return [
        (
            LeafInfo(name, shape, np.dtype(np.float32), "", layout, 0.0, -1),
            {part: np.asarray(x) for part, x in (packed.arrays[name] | common).items()},
        )
        for name, shape, layout in packed.leaves
    ]


def decode(packed: Packed) -> list[dict[str, np.ndarray]]:
    """The deltas that were packed.

    Args:
        packed: see `encode`.

    Returns:
        float32 by leaf name, one mapping per expert.

    Example:
        >>> packed = encode('emr()', [{'w': np.float32([4, 2])}, {'w': np.float32([2, -4])}])
        >>> [delta['w'].tolist() for delta in decode(packed)]
        [[6.0, 0.0], [3.0, -3.0]]
    """
    stage, codec = _parsed(packed.method)
    found: list[dict[str, np.ndarray]] = [{} for _ in range(packed.experts)]
    for info, parts in _leaves(packed):
        if WHOLE in parts:
            several = [parts[WHOLE]] * packed.experts
        else:
            several = codec.decode(parts, info, stage, packed.experts)
        for own, x in zip(found, several, strict=True):
            own[info.name] = x
    for own in found:
        for name, count in packed.stacks:
            own[name] = np.stack([own.pop(f"{i}/{name}") for i in range(count)])
    return found


def size(packed: Packed) -> Size:
    """How many bytes packed deltas take.

    Args:
        packed: see `encode`.

    Returns:
        Bytes stored, bytes by the method's formula, bytes of the deltas in float32.

    Example:
        >>> size(encode('bit_delta()', [{'kernel': np.ones((16, 16), np.float32)}]))
        Size(payload=36, formula=36.0, dense=1024)
    """
    stage, codec = _parsed(packed.method)
    payload = sum(np.asarray(x).nbytes for parts in packed.arrays.values() for x in parts.values())
    # What belongs to no leaf is a scalar for each expert.
    bits = 8.0 * sum(np.asarray(x).nbytes for x in packed.arrays.get("", {}).values())
    dense = 0
    for info, parts in _leaves(packed):
        whole = WHOLE in parts
        bits += 32 * info.size if whole else codec.bits(parts, info, stage, packed.experts)
        dense += 4 * packed.experts * info.size
    return Size(payload, bits / 8, dense)
