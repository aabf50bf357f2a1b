"""The exact k-th magnitude, one tensor's and a whole model's, against a sort."""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

import mergejax as mj
import mergejax.forms
from mergejax.summaries import (
    first_largest,
    kept_count,
    kth_key,
    kth_key_by_row,
    magnitude_key,
    magnitude_of,
    ranks_by_row,
    value_key,
    value_of,
)

TINY = np.float32(1e-45)  # the smallest denormal
SIZE = 24  # one size, one compilation

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
crowded = st.sampled_from([0.0, -0.0, TINY, -TINY, 2 * TINY, 1.0, -1.0, 1.0000001, 3e38, -3e38])
values = arrays.arrays(np.float32, SIZE, elements=st.one_of(floats, crowded))
# Arithmetic behind the threshold flushes denormals to zero on the CPU, so whole merges have none.
normal = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
whole_numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 3e38, -3e38])


def kth_magnitude(x, rank):
    return kth_key(magnitude_key(jnp.asarray(x)), rank)


jitted = jax.jit(kth_magnitude)


def keys(x):
    """Twice the magnitudes' bits, the largest first."""
    return 2 * np.sort(np.abs(np.asarray(x, np.float32)).view(np.uint32))[::-1]


@settings(max_examples=200)
@given(values, st.integers(1, SIZE))
@example(np.zeros(SIZE, np.float32), 7)
@example(np.full(SIZE, -2.5, np.float32), SIZE)
@example(np.full(SIZE, TINY, np.float32), 1)
def test_kth_magnitude_of_a_small_tensor_equals_a_sort(x, rank):
    assert int(jitted(x, jnp.int32(rank))) == keys(x)[rank - 1]


def large(kind, size, rng):
    drawn = {
        "normal": lambda: rng.normal(size=size),
        "ties": lambda: rng.integers(-3, 4, size),
        "equal": lambda: np.full(size, -0.75),
        "zeros": lambda: np.where(rng.random(size) < 1e-4, rng.normal(size=size), 0.0),
        "denormal": lambda: rng.integers(0, 9, size) * 1e-45,
        "one bucket": lambda: 1 + rng.integers(0, 2**15, size) * 2.0**-23,
    }
    return np.asarray(drawn[kind](), np.float32)


KINDS = ["normal", "ties", "equal", "zeros", "denormal", "one bucket"]


@pytest.mark.parametrize("kind", KINDS)
def test_kth_magnitude_of_a_large_tensor_equals_a_sort(kind):
    x = large(kind, 70_001, np.random.default_rng(3)).reshape(-1, 1)
    ordered = keys(x.ravel())
    for rank in (1, 2, 777, 35_000, x.size - 1, x.size):
        assert int(jitted(x, jnp.int32(rank))) == ordered[rank - 1]


def test_kth_magnitude_under_vmap_equals_one_by_one():
    rng = np.random.default_rng(0)
    many = np.stack([large(kind, 66_000, rng) for kind in KINDS])
    ranks = np.asarray([1, 5, 66_000, 40_000, 17, 300], np.int32)
    expected = [keys(x)[rank - 1] for x, rank in zip(many, ranks, strict=True)]
    np.testing.assert_array_equal(jax.jit(jax.vmap(kth_magnitude))(many, ranks), expected)


def test_magnitude_of_gives_the_float_back():
    x = np.asarray([-2.5, TINY, 0.0], np.float32)
    assert magnitude_of(kth_magnitude(x, 1)) == 2.5
    assert magnitude_of(kth_magnitude(x, 2)).view(np.uint32) == 1
    assert magnitude_of(kth_magnitude(x, 3)) == 0


@given(values)
def test_keys_of_values_order_them_and_give_them_back(x):
    found = np.asarray(value_key(jnp.asarray(x)))
    np.testing.assert_array_equal(value_of(jnp.asarray(found)), x)
    # The CPU compares denormals as zeros, so the order is asked of integers.
    bits = np.where(x == 0, 0.0, x).astype(np.float32).view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, -(bits + 2**31), bits)
    np.testing.assert_array_equal(
        np.argsort(found, kind="stable"), np.argsort(ordered, kind="stable")
    )


def test_kth_key_by_row_and_exactly_k_of_every_row_equal_a_stable_sort():
    rows = np.random.default_rng(1).integers(0, 5, [6, 40]).astype(np.uint32) * 900_000_001
    for k in (1, 7, 39, 40):
        found = kth_key_by_row(jnp.asarray(rows), jnp.int32(k))
        np.testing.assert_array_equal(found, np.sort(rows)[:, ::-1][:, k - 1])
    for k in (0, 1, 7, 40, 41):
        order = np.argsort(-rows.astype(np.int64), axis=1, kind="stable")
        expected = np.zeros(rows.shape, bool)
        np.put_along_axis(expected, order[:, :k], True, axis=1)
        np.testing.assert_array_equal(first_largest(jnp.asarray(rows), k), expected)
    crowded = np.random.default_rng(2).integers(0, 3, [1, 2**16 + 9]).astype(np.uint32) << 20
    order = np.argsort(-crowded.astype(np.int64), kind="stable")  # large enough for histograms
    marked = first_largest(jnp.asarray(crowded), 30_000)
    np.testing.assert_array_equal(np.flatnonzero(marked), np.sort(order[0, :30_000]))


def trimmed(parts, density, **options):
    base = {name: np.zeros_like(x) for name, x in parts.items()}
    return mj.merge(mj.chain(mj.trim(density, **options), mj.total()), base, [parts])


def expected_trim(parts, density):
    """TIES' published rule: the floor(n density) + 1 largest, and all that equal the last."""
    whole = np.concatenate([np.abs(x).ravel() for x in parts.values()])
    threshold = np.sort(whole)[::-1][min(int(whole.size * density), whole.size - 1)]
    return {n: np.where(np.abs(x) >= threshold, x, 0) for n, x in parts.items()}


SHAPES = {"a": (3, 4), "b": (7,), "c": ()}
model = st.fixed_dictionaries(
    {
        name: arrays.arrays(np.float32, shape, elements=st.one_of(normal, whole_numbers))
        for name, shape in SHAPES.items()
    }
)


@settings(max_examples=60)
@given(model, st.floats(0.01, 1.0))
def test_threshold_of_a_whole_model_equals_a_sort(parts, density):
    got, expected = trimmed(parts, density), expected_trim(parts, density)
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "denormal"])
def test_threshold_of_a_whole_model_in_blocks_equals_a_sort(kind, monkeypatch):
    monkeypatch.setattr(mergejax.forms, "BLOCK", 10_000)
    rng = np.random.default_rng(1)
    parts = {f"leaf_{i}": large(kind, 33_001, rng) for i in range(2)}
    for density in (0.001, 0.2, 0.77, 1.0):
        got, expected = trimmed(parts, density), expected_trim(parts, density)
        for name, x in expected.items():
            np.testing.assert_array_equal(got[name], x)


@settings(max_examples=60)
@given(arrays.arrays(np.float32, SIZE, elements=whole_numbers), st.floats(0.01, 1.0))
def test_exact_cut_of_a_tensor_keeps_as_many_and_the_first_of_equals(x, density):
    got = np.asarray(trimmed({"a": x}, density, scope="tensor", cut="exact")["a"])
    kept = max(1, int(SIZE * density))
    order = np.argsort(-np.abs(x).view(np.uint32).astype(np.int64), kind="stable")[:kept]
    expected = np.zeros_like(x)
    expected[order] = x[order]
    np.testing.assert_array_equal(got, expected)


@given(st.integers(1, 10**12), st.floats(1e-6, 1.0))
def test_kept_count_is_exact_where_the_density_is_known(size, density):
    assert kept_count(size, density) == int(size * density)


@pytest.mark.parametrize("size", [1, 7, 3072, 2**16, 2**16 + 1])
@pytest.mark.parametrize("kind", ["spread", "crowded", "lower", "upper"])
def test_ranks_are_those_of_a_stable_sort(size, kind):
    rng = np.random.default_rng(size)
    top, shift = {"spread": (32, 0), "crowded": (2, 0), "lower": (16, 0), "upper": (16, 16)}[kind]
    rows = (rng.integers(0, 2**top, [3, size], np.uint64) << np.uint64(shift)).astype(np.uint32)
    expected = np.argsort(np.argsort(rows, axis=-1, kind="stable"), axis=-1)
    np.testing.assert_array_equal(ranks_by_row(jnp.asarray(rows)), expected)
