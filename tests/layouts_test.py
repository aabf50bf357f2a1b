"""One model in two layouts: the tree of PyTorch gives what its Flax twin gives."""

import dataclasses

import numpy as np
import pytest
import trees

import mergejax as mj
from mergejax.chains import expand
from mergejax.leaves import describe

# A Flax tree whose kernels all are matrices [6, 4]. The fused projection is taken apart before
# merging; the layers are stacked.
FLAX = {
    "attention/query/kernel": (6, 2, 2),
    "conv/kernel": (1, 2, 3, 4),
    "dense/kernel": (6, 4),
    "dense/bias": (4,),
    "attention/out/kernel": (2, 3, 4),
    "attention/qkv/kernel": (6, 12),
    "layers/kernel": (2, 6, 4),
}
# For every method a kernel, and a convolution where it is not averaged like any other leaf.
KERNEL, CONVOLUTION = list(FLAX)[:2]


def in_pytorch(name, x):
    """The leaf as PyTorch keeps it."""
    if name.startswith("conv"):
        return x.transpose(3, 2, 0, 1)
    if name.startswith("layers"):
        return x.swapaxes(1, 2)
    if name == "attention/out/kernel":
        return x.reshape(6, 4).T
    return x.reshape(x.shape[0], -1).T if x.ndim > 1 else x


def turned(model):
    return {name: np.ascontiguousarray(in_pytorch(name, x)) for name, x in model.items()}


def drawn(seed, names, base=None):
    """Numbers without equal magnitudes, so that no rank is a matter of rounding or of order."""
    rng = np.random.default_rng(seed)
    draw = lambda name: rng.normal(size=FLAX[name]) + (0 if base is None else 10 * base[name])
    return {name: np.float32(0.1 * draw(name)) for name in names}


def sees_layout(method, name):
    """Whether a method may do to a leaf what depends on the meaning of its axes."""
    (info,) = describe({name: (FLAX[name], np.float32)})
    info = dataclasses.replace(info, stats=method.needs if name == KERNEL else ())
    return not all(placed.stage.elementwise for placed in expand(method, info))


# Values for what is random or has an option that looks along one axis.
OPTIONS = {
    "breadcrumbs": {"density": 0.4, "top": 0.2},
    "della": {"density": 1.0, "spread": 0.0},
    "nuslerp": {"scope": "row"},
    "model_stock": {"scope": "row"},
    "iso_cts": {"common": 0.5},
    "opt_merge": {"learning_rate": 0.02},
    "wudi": {"steps": 5, "learning_rate": 0.01},
    "doge_ta": {"steps": 5, "learning_rate": 0.01},
    "dop": {"steps": 5, "learning_rate": 0.01},
}


def grams(count):
    """Of a matrix [in, out], the same in both layouts."""
    rows = np.random.default_rng(7).normal(size=(count, 20, 6))
    return [{KERNEL: np.float32(x.T @ x / 20)} for x in rows]


def merged(method, models, layout):
    count = len(models) - 1
    stats = {need: grams(count) if need == "gram" else [{}] * count for need in method.needs}
    scanned = "layers/" if "layers/kernel" in models[0] else None
    return mj.merge(method, models[0], models[1:], layout=layout, scanned=scanned, stats=stats)


def check(method, names, count=3, split=lambda model, layout: model):
    base = drawn(0, names)
    models = [base, *(drawn(seed, names, base) for seed in range(1, 1 + count))]
    flax = merged(method, [split(model, "flax") for model in models], "flax")
    pytorch = merged(method, [split(turned(model), "torch") for model in models], "torch")
    expected, got = turned(mj.fuse(flax)), mj.fuse(pytorch, layout="torch")
    trees.close(got, expected, rtol=1e-5, atol=2e-6)
    for name, x in turned(base).items():
        assert np.abs(expected[name] - x).max() > 1e-3


METHODS = {name: trees.chain_of(name, **OPTIONS.get(name, {})) for name in mj.METHODS}
DIRECTIONAL = [name for name, method in METHODS.items() if sees_layout(method, KERNEL)]


@pytest.mark.parametrize("name", DIRECTIONAL)
def test_a_pytorch_kernel_gives_the_answer_of_its_flax_twin(name):
    names = [leaf for leaf in (KERNEL, CONVOLUTION) if sees_layout(METHODS[name], leaf)]
    check(METHODS[name], names, mj.METHODS[name].experts or 3)


@pytest.mark.parametrize("text", ["iso_cts(common=0.5)", "nuslerp(scope='column')"])
def test_a_whole_tree_with_fused_projections_and_stacked_layers(text):
    split = lambda model, layout: mj.split_fused(model, {"qkv": 3}, layout=layout)
    check(mj.parse(text), FLAX, 2, split)
