"""Degenerate models: every method gives a finite answer, to the shapes and types it was given."""

import jax
import numpy as np
import pytest
import trees

import mergejax as mj

SHAPES = {"block_0": {"kernel": (4, 4), "bias": (1,)}, "block_1": {"kernel": (4, 4), "bias": (1,)}}


def drawn(scale=1.0):
    rng = np.random.default_rng(0)
    draw = lambda shape: np.float32(scale * rng.normal(size=shape))
    return jax.tree.map(draw, SHAPES, is_leaf=trees.is_shape)


def plus(base, delta):
    return jax.tree.map(lambda x, d: np.asarray(x + d, x.dtype), base, delta)


def moved(base, step, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x + step * rng.normal(size=x.shape)), base)


def one_direction(base, seed):
    """All experts move along one rank-one matrix."""
    factor = np.float32(seed)
    return jax.tree.map(lambda x: np.float32(x + 0.1 * factor * np.ones(x.shape)), base)


def some_zero(base, seed):
    return base if seed == 1 else moved(base, 0.1, seed)


def opposite(base, seed):
    delta = jax.tree.map(lambda x: np.full_like(x, 0.1 if seed % 2 else -0.1), base)
    return plus(base, delta)


ZERO = jax.tree.map(lambda shape: np.zeros(shape, np.float32), SHAPES, is_leaf=trees.is_shape)
# A base, and the expert of a number (1, 2, ...).
KINDS = {
    "zero deltas": (drawn(), lambda base, seed: base),
    "a zero base and zero experts": (ZERO, lambda base, seed: base),
    "one expert that did not move": (drawn(), some_zero),
    "equal experts": (drawn(), lambda base, seed: moved(base, 0.1, 7)),
    "opposite experts of equal magnitudes": (drawn(), opposite),
    "one direction": (drawn(), one_direction),
    "huge": (drawn(1e12), lambda base, seed: moved(base, 1e12, seed)),
    "tiny": (drawn(1e-12), lambda base, seed: moved(base, 1e-12, seed)),
}


@pytest.mark.parametrize("name", list(mj.METHODS))
def test_degenerate_models_give_finite_answers(name):
    chain = trees.chain_of(name)
    count = mj.METHODS[name].experts or 3
    for kind, (base, expert) in KINDS.items():
        experts = [expert(base, seed) for seed in range(1, count + 1)]
        stats = trees.statistics(chain.needs, experts)
        merged = mj.merge(chain, base, experts, stats=stats)  # non-finite results are refused
        for x in jax.tree.leaves(merged):
            assert np.isfinite(np.asarray(x)).all(), kind
        if kind == "zero deltas" and mj.chains.reduces(chain):
            trees.close(merged, base, rtol=1e-6, atol=0)
