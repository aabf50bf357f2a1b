"""One delta of a single magnitude in every leaf: bits for what is not zero, bits for the signs."""

import math

import numpy as np

from mergejax.compress.bits import pack_flags, unpack_flags
from mergejax.compress.codec import Codec, Parts, Run
from mergejax.core import Stage
from mergejax.leaves import LeafInfo
from mergejax.methods.signs import bit_delta, compeft, t_switch


def encode_leaf(x: np.ndarray) -> Parts:
    """Packs a leaf without loss: by its signs if it has one magnitude, else whole."""
    size = np.abs(x).max(initial=0)
    changed = x != 0
    if not np.all(changed <= (np.abs(x) == size)):
        return {"whole": x}
    parts = {"size": np.reshape(size, (1,)), "signs": pack_flags(x[changed] > 0)}
    return parts if changed.all() else {**parts, "changed": pack_flags(changed)}


def encode(stage: Stage, run: Run) -> dict[str, Parts]:
    arrays: dict[str, Parts] = {}
    run(stage, lambda info, found: arrays.__setitem__(info.name, encode_leaf(found[0])))
    return arrays


def decode(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> list[np.ndarray]:
    if "whole" in parts:
        return [parts["whole"]]
    changed = np.ones(info.shape, bool)
    if "changed" in parts:
        changed = unpack_flags(parts["changed"], info.shape)
    positive = unpack_flags(parts["signs"], (int(changed.sum()),))
    x = np.zeros(info.shape, np.float32)
    x[changed] = np.where(positive, parts["size"], -parts["size"])
    return [x]


def bits(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> float:
    """The entropy of independent elements with three values, and 32 for their magnitude."""
    if "whole" in parts:
        return 32 * info.size
    if "changed" not in parts:
        return info.size + 32
    p = float(unpack_flags(parts["changed"], info.shape).mean())
    entropy = (1 - p) * math.log2(1 / (1 - p)) + (p * math.log2(2 / p) if p else 0)
    return entropy * info.size + 32


SIGNS = Codec(encode, decode, bits, experts=1)
CODECS = {make.factory.name: SIGNS for make in (compeft, t_switch, bit_delta)}
