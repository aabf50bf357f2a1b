"""One delta for all tasks, and for each task the bits that say where it takes it."""

import functools
from collections.abc import Sequence

import numpy as np

from mergejax.compress.bits import pack_flags, unpack_flags
from mergejax.compress.codec import Codec, Parts, Run
from mergejax.core import Stage
from mergejax.leaves import LeafInfo
from mergejax.methods.emr import emr
from mergejax.methods.tall_masks import tall_masks


def encode_leaf(found: Sequence[np.ndarray]) -> Parts:
    """Packs arrays that are each zero or, where they are not, equal."""
    # Each element is stored as some task has it; where none does, it is of no use.
    shared = functools.reduce(lambda x, y: np.where(x != 0, x, y), found)
    return {"shared": shared, **{f"mask{i}": pack_flags(x != 0) for i, x in enumerate(found)}}


def encode(stage: Stage, run: Run) -> dict[str, Parts]:
    arrays: dict[str, Parts] = {}
    run(stage, lambda info, found: arrays.__setitem__(info.name, encode_leaf(found)))
    return arrays


def decode(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> list[np.ndarray]:
    factors = parts.get("factors", np.ones(experts, np.float32))
    masks = [unpack_flags(parts[f"mask{i}"], info.shape) for i in range(experts)]
    return [
        np.where(mask, factor * parts["shared"], np.float32(0))
        for mask, factor in zip(masks, factors, strict=True)
    ]


def bits(parts: Parts, info: LeafInfo, stage: Stage, experts: int) -> float:
    return (32 + experts) * info.size


def encode_scaled(stage: Stage, run: Run) -> dict[str, Parts]:
    """Masks of EMR-Merging, and each task's factor from the largest magnitudes with and without."""
    arrays: dict[str, Parts] = {}
    largest: list[list[np.ndarray]] = [[], []]

    def note(found: Sequence[np.ndarray], whole: list[np.ndarray]) -> None:
        whole.append(np.array([np.abs(x).max(initial=0) for x in found]))

    def keep(info: LeafInfo, found: Sequence[np.ndarray]) -> None:
        arrays[info.name] = encode_leaf(found)
        note(found, largest[0])

    run(emr(rescale="none"), keep)
    run(stage, lambda info, found: note(found, largest[1]))
    plain, scaled = (np.max(several, axis=0) for several in largest)
    factors = np.where(plain > 0, scaled / np.where(plain > 0, plain, 1), 1)
    arrays[""] = {"factors": factors.astype(np.float32)}
    return arrays


CODECS = {
    tall_masks.factory.name: Codec(encode, decode, bits),
    emr.factory.name: Codec(encode_scaled, decode, bits),
}
