"""Deltas for the tests of compression, and the compressions."""

import numpy as np
import trees

import mergejax as mj

SHAPES = {"embed": {"bias": (7,)}, "block_0": {"kernel": (5, 7), "bias": (7,)}, "kernel": (4, 6)}
LOW_RANK = ["tsv_compress()", "tsv_compress(fraction=0.7)"]
PACKS = ["skill_pack(rank=3, bands='1:8, 1:4, :2', group=4)", "skill_pack(bands=':32')"]
SINGLE = ["compeft(density=0.3, alpha=2.0)", "t_switch(density=0.2)", "bit_delta()"]
JOINT = ["tall_masks(threshold=[0.2, 0.4, 0.6])", "emr()", "emr(rescale='tensor_mean')"]


def models(count=3, dtype="float32"):
    return trees.models(count, dtype, SHAPES)


def deltas(count=3):
    return mj.compress.deltas(*models(count))


def together(delta):
    return np.concatenate([np.float64(x).ravel() for x in delta.values()])


def zero(delta):
    return {name: np.zeros_like(x) for name, x in delta.items()}


def through(method, several):
    """What the method as a stage makes of deltas."""
    out = mj.merge(method, zero(several[0]), several)
    return out if isinstance(out, list) else [out]


def count_of(method):
    return 3 if method in JOINT + LOW_RANK else 1
