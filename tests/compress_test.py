"""Packing: nothing is lost but what the stages lose; sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from packing import JOINT, LOW_RANK, PACKS, SINGLE, count_of, deltas, models, through, zero

import mergejax as mj

# Packing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SINGLE + JOINT + LOW_RANK + PACKS)
def test_what_is_unpacked_is_what_the_stage_returns(method):
    several = deltas(count_of(method))
    packed = mj.compress.encode(method, several)
    expected = through(method, several)
    for got, want in zip(mj.compress.decode(packed), expected, strict=True):
        if method.startswith("emr"):
            trees.close(got, want, rtol=1e-6, atol=0)
        elif method in LOW_RANK + PACKS:
            trees.close(got, want, rtol=1e-5, atol=1e-6)
        else:
            trees.equal(got, want)


@pytest.mark.parametrize("method", SINGLE)
def test_merging_after_unpacking_is_merging_what_the_stage_returns(method):
    several = deltas(3)
    unpacked = [mj.compress.decode(mj.compress.encode(method, [delta]))[0] for delta in several]
    for host in ("ties(density=0.4)", "task_arithmetic(0.3)"):
        got = mj.merge(host, zero(several[0]), unpacked)
        trees.equal(got, mj.merge(f"{method}|{host}", zero(several[0]), several))


@pytest.mark.parametrize("method", JOINT + LOW_RANK)
def test_merging_after_unpacking_joint_methods(method):
    several = deltas(3)
    unpacked = mj.compress.decode(mj.compress.encode(method, several))
    got = mj.merge("magmax()", zero(several[0]), unpacked)
    expected = mj.merge(f"{method}|magmax()", zero(several[0]), several)
    trees.close(got, expected, rtol=1e-5, atol=1e-6)


def test_restored_experts_are_the_base_plus_what_is_unpacked():
    base, experts = models(2, "bfloat16")
    packed = mj.compress.encode("emr()", mj.compress.deltas(base, experts))
    for model, delta in zip(
        mj.compress.restore(base, packed), mj.compress.decode(packed), strict=True
    ):
        wide = {n: x.astype(np.float32) + delta[n] for n, x in trees.flat(base).items()}
        trees.equal(trees.flat(model), {n: x.astype(jnp.bfloat16) for n, x in wide.items()})


def test_integers_are_the_bases_and_running_statistics_are_kept_whole():
    base = {
        "kernel": np.zeros((3, 4), np.float32),
        "batch_stats": {"mean": np.zeros(3, np.float32)},
        "count": np.int32(5),
    }
    experts = [
        {
            **base,
            "kernel": np.full((3, 4), x, np.float32),
            "batch_stats": {"mean": np.full(3, x, np.float32)},
        }
        for x in (1.0, 3.0)
    ]
    packed = mj.compress.encode("emr()", mj.compress.deltas(base, experts))
    for model, x in zip(mj.compress.restore(base, packed), (1.0, 3.0), strict=True):
        np.testing.assert_allclose(model["kernel"], x, rtol=1e-6)
        np.testing.assert_allclose(model["batch_stats"]["mean"], 2.0)  # their average
        assert model["count"] == 5


def test_packed_deltas_are_a_pytree():
    packed = mj.compress.encode("emr()", deltas(2))
    again = jax.tree.map(np.asarray, jax.device_put(packed))
    trees.equal(mj.compress.decode(again), mj.compress.decode(packed))


# Size ---------------------------------------------------------------------------------------------

SIZES = {"embed/bias": 7, "block_0/kernel": 35, "block_0/bias": 7, "kernel": 24}


def in_bytes(*bits):
    return sum(-(-int(n) // 8) for n in bits)


def test_size_of_signs():
    (delta,) = deltas(1)
    packed = mj.compress.encode("t_switch(density=0.2)", [delta])
    (got,) = mj.compress.decode(packed)
    kept = {n: int((x != 0).sum()) for n, x in got.items()}
    size = mj.compress.size(packed)
    assert size.payload == sum(4 + in_bytes(n, kept[leaf]) for leaf, n in SIZES.items())
    assert size.dense == 4 * 73
    entropy = 0.0
    for leaf, n in SIZES.items():
        p = kept[leaf] / n
        entropy += 32 + (n * (-(1 - p) * np.log2(1 - p) - p * np.log2(p / 2)) if p else 0)
    np.testing.assert_allclose(size.formula, entropy / 8)
    assert size.formula <= size.payload


def test_size_of_bit_delta():
    packed = mj.compress.encode("bit_delta()", [{"kernel": np.ones((64, 64), np.float32) * 3}])
    assert mj.compress.size(packed) == (516, 516, 4 * 4096)


@pytest.mark.parametrize(("method", "scalars"), [("tall_masks()", 0), ("emr()", 4)])
def test_size_of_masks(method, scalars):
    size = mj.compress.size(mj.compress.encode(method, deltas(3)))
    assert size.payload == 4 * 73 + 3 * (scalars + sum(in_bytes(n) for n in SIZES.values()))
    assert size.formula == 4 * 73 + 3 * (scalars + 73 / 8)
    assert size.dense == 3 * 4 * 73


def test_size_of_singular_directions():
    size = mj.compress.size(mj.compress.encode("tsv_compress()", deltas(3)))
    whole = 7 + 7
    assert size.payload == size.formula == 4 * 3 * (whole + (5 + 7 + 1) + (4 + 6 + 1))
    assert size.dense == 3 * 4 * 73


def test_size_of_skill_pack():
    size = mj.compress.size(mj.compress.encode(PACKS[0], deltas(1)))
    payload = formula = 4 * (7 + 7)
    for shape in ((5, 7), (4, 6)):
        groups = sum(-(-n // 4) for n in shape)
        payload += 4 * 3 + sum(
            in_bytes(*(width * n for n in shape)) + 4 * groups for width in (8, 4, 2)
        )
        formula += 4 * 3 + sum(width * sum(shape) / 8 + 4 * groups for width in (8, 4, 2))
    assert (size.payload, size.formula) == (payload, formula)
