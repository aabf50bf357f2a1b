"""Small random models for the tests, and flat views of them."""

import jax
import ml_dtypes
import numpy as np

import mergejax as mj
from mergejax.leaves import name_of

TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
GRID = {"float32": 1024, "bfloat16": 32, "float16": 128}

# Blocks, a leaf on either side of them, a scalar, a leaf without elements; as few shapes as
# possible, since every shape is compiled once per method.
_BLOCK = {"dense": {"kernel": (5, 7), "bias": (7,)}, "gate": ()}
SHAPES = {
    "embed": {"bias": (7,)},
    "block_0": _BLOCK,
    "block_1": _BLOCK,
    "block_2": _BLOCK,
    "out": {"kernel": (5, 7), "none": {"kernel": (0, 7)}},
}
BLOCKS = {"block_0": 0, "block_1": 1, "block_2": 2}


def is_shape(x):
    return isinstance(x, tuple)


def model(seed, dtype="float32", shapes=SHAPES, scale=1.0):
    """Numbers on a grid, so that the differences of two models are exact in their type."""
    rng = np.random.default_rng(seed)
    width = 128 if dtype != "float32" else 4096

    def draw(shape):
        values = rng.integers(-width, width, shape) * scale / GRID[dtype]
        return np.asarray(values, TYPES[dtype])

    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def models(count, dtype="float32", shapes=SHAPES, seed=0):
    """A base and so many experts; some elements stay as they were, some move equally far."""
    base = model(seed, dtype, shapes)
    rng = np.random.default_rng(seed + 1)
    step = 1 if dtype == "float32" else 4

    def tune(x):
        moved = rng.integers(-40, 41, x.shape) * step * (rng.random(x.shape) < 0.8)
        return np.asarray(x.astype(np.float64) + moved / GRID[dtype], x.dtype)

    return base, [jax.tree.map(tune, base) for _ in range(count)]


def flat(tree):
    """A tree as {leaf name: array}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): np.asarray(x) for path, x in leaves}


def kernels(tree):
    return {name for name in flat(tree) if name.endswith("kernel")}


def blocks(tree):
    return {name: BLOCKS.get(name.split("/")[0]) for name in flat(tree)}


def statistics(needs, experts, seed=5):
    """Synthetic statistics of every kind that a chain may need."""
    rng = np.random.default_rng(seed)
    makers = {
        "fisher": _fisher,
        "gram": _gram,
        "mask": _mask,
        "output_gram": _output_gram,
        "block_fisher": _block_fisher,
        "norm_square": _norm_square,
        "affine_gram": _affine_gram,
        "drift": _drift,
        "norm_moments": _norm_moments,
    }
    return {need: [makers[need](rng, flat(expert)) for expert in experts] for need in needs}


def _fisher(rng, expert):
    return {n: np.asarray(rng.random(x.shape) ** 4, np.float32) for n, x in expert.items()}


def _gram(rng, expert):
    kernels = {n: x.shape[-2] for n, x in expert.items() if n.endswith("kernel")}
    loudness = 10.0 ** rng.integers(0, 3)  # one expert's inputs are larger than another's
    return {n: np.float32(loudness) * _mean_square(rng, size) for n, size in kernels.items()}


def _output_gram(rng, expert):
    kernels = {n: x.shape[-1] for n, x in expert.items() if n.endswith("kernel")}
    return {n: np.float32(1e-4) * _mean_square(rng, size) for n, size in kernels.items()}


def _block_fisher(rng, expert):
    small = {n: x.size for n, x in expert.items() if n.endswith("bias")}
    return {n: np.float32(1e-4) * _mean_square(rng, size) for n, size in small.items()}


def _norm_square(rng, expert):
    scales = {n: x.shape for n, x in expert.items() if n.endswith("scale")}
    return {n: np.asarray(rng.random(shape), np.float32) for n, shape in scales.items()}


def _affine_gram(rng, expert):
    """Of inputs and a one."""
    kernels = {n: x.shape[-2] for n, x in expert.items() if n.endswith("kernel")}
    return {n: _with_one(rng.normal(size=(4 * size + 1, size))) for n, size in kernels.items()}


def _drift(rng, expert):
    """Of the merged model's inputs, the expert's, which are the same, and a one."""
    kernels = {n: x.shape[-2] for n, x in expert.items() if n.endswith("kernel")}
    rows = {n: rng.normal(size=(4 * size + 1, size)) for n, size in kernels.items()}
    return {n: _with_one(np.concatenate([x, x], axis=1)) for n, x in rows.items()}


def _with_one(rows):
    rows = np.concatenate([rows + 0.3, np.ones((len(rows), 1))], axis=1)
    return np.asarray(rows.T @ rows / len(rows), np.float32)


def _norm_moments(rng, expert):
    scales = {n: x.shape for n, x in expert.items() if n.endswith("scale")}
    return {
        n: np.float32(np.stack([1 + rng.random(shape), rng.random(shape)]))
        for n, shape in scales.items()
    }


def _mean_square(rng, size):
    rows = rng.normal(size=(4 * size, size))
    return np.asarray(rows.T @ rows / max(len(rows), 1), np.float32)


def _mask(rng, expert):
    return {n: (rng.random(x.shape) < 0.6).astype(np.uint8) for n, x in expert.items()}


def equal(got, expected):
    """Equal trees, to the bit."""
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def close(got, expected, rtol=1e-5, atol=1e-5):
    got, expected = flat(got), flat(expected)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        wide = got[name].astype(np.float64), x.astype(np.float64)
        np.testing.assert_allclose(*wide, rtol=rtol, atol=atol, err_msg=name)


def chain_of(name, **hyperparameters):
    """A registered method as a chain of its own; a modifier behind the sum of the deltas."""
    entry = mj.METHODS[name]
    made = entry.make(**hyperparameters)
    return mj.chain(mj.total(), made) if entry.modifier else mj.chain(made)
