"""The singular value decompositions that spectral methods share, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectral_models import deltas, near, spectrum

from mergejax.linalg import spectral, subspaces, triplets


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_polar_factor_is_orthogonal_and_turns_the_matrix_positive(shape):
    (x,) = deltas(1, seed=11, shape=shape)
    factor = np.asarray(triplets.polar(jnp.float32(x)), np.float64)
    inner = factor.T @ x if shape[0] >= shape[1] else x @ factor.T
    np.testing.assert_allclose(inner, inner.T, atol=1e-5)
    assert np.linalg.eigvalsh(inner).min() > 0
    np.testing.assert_allclose(spectrum(factor), 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (5, 5)])
def test_polar_factor_equals_that_of_a_dynamically_weighted_iteration(shape):
    x = jnp.float32(deltas(1, seed=16, shape=shape)[0])
    expected = jax.lax.linalg.qdwh(x)[0]
    np.testing.assert_allclose(triplets.polar(x), expected, atol=1e-5)


def test_nothing_is_decomposed_where_no_expert_changed_anything():
    """A decomposition of zeros would have unit vectors; its derivative is not a number."""
    assert not any(np.any(x) for x in spectral.decompose(jnp.zeros((3, 2))))
    slope = jax.grad(lambda x: triplets.truncate(x, 1).sum())(jnp.zeros((3, 2)))
    assert np.all(np.isfinite(slope))

    def never(x):
        raise_if_run = jax.pure_callback(lambda: 1 / 0, jax.ShapeDtypeStruct((), x.dtype))
        return x + raise_if_run

    np.testing.assert_array_equal(
        spectral.on_matrices(never, "io", jnp.zeros((2, 2))), np.zeros((2, 2))
    )


def test_polar_factor_of_zero_and_of_equal_columns():
    np.testing.assert_array_equal(triplets.polar(jnp.zeros((3, 2))), np.zeros((3, 2)))
    column = jnp.asarray([[3.0], [4.0]])
    both = triplets.polar(jnp.concatenate([column, column, 0 * column], axis=1))
    expected = np.array([[0.6, 0.6, 0], [0.8, 0.8, 0]]) / np.sqrt(2)
    np.testing.assert_allclose(both, expected, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_truncation_is_the_nearest_matrix_of_its_rank(rank):
    (x,) = deltas(1, seed=12, shape=(4, 5))
    got = np.asarray(triplets.truncate(jnp.float32(x), rank), np.float64)
    error = np.sqrt((spectrum(x)[rank:] ** 2).sum())
    np.testing.assert_allclose(np.linalg.norm(x - got), error, atol=1e-5)


def test_gathered_triplets_keep_their_order_and_are_padded_with_zeros():
    taus = [jnp.float32(tau) for tau in deltas(2, seed=13, shape=(4, 5))]
    gathered = subspaces.leading(taus, [jnp.int32(1), jnp.int32(2)])
    parts = [spectral.decompose(tau) for tau in taus]
    expected = [parts[0].values[0], parts[1].values[0], parts[1].values[1], 0]
    np.testing.assert_allclose(gathered.values, np.asarray(expected, np.float32), rtol=1e-5)
    cosine = gathered.left[:, 2] @ parts[1].left[:, 1]  # vectors have no sign of their own
    np.testing.assert_allclose(abs(cosine), 1, rtol=1e-5)
    np.testing.assert_array_equal(gathered.right[:, 3], np.zeros(5))


def test_gram_filter_is_a_function_of_the_matrix():
    (x,) = deltas(1, seed=14, shape=(3, 5))
    gram = x.T @ x
    got = spectral.gram_filter(jnp.float32(x), jnp.float32(gram), lambda values: values * values)
    near(np.asarray(got, np.float64), x @ gram @ gram)


def test_unit_of_tiny_and_huge_matrices():
    for factor in (1e-30, 1.0, 1e30):
        direction, norm = spectral.unit(jnp.float32(factor) * jnp.asarray([[3.0, 4.0]]))
        np.testing.assert_allclose(direction, [[0.6, 0.8]], rtol=1e-6)
        np.testing.assert_allclose(norm, 5 * factor, rtol=1e-6)


def graded(m, n, decay, seed=17):
    """A matrix with singular values 1, ..., 10^-decay."""
    left = np.linalg.qr(np.random.default_rng(seed).normal(size=(m, n)))[0]
    right = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(n, n)))[0]
    return (left * 10 ** -np.linspace(0, decay, n)) @ right.T


@pytest.mark.parametrize("decay", [0.5, 2, 4])  # the last two are beyond the Gram route
def test_the_fast_routes_are_as_near_to_float64_as_they_say(decay):
    """float32 leaves a polar factor eps times the condition number."""
    x = np.stack([graded(48, 12, decay, seed) for seed in (17, 27)])
    left, _, right = np.linalg.svd(np.float64(np.float32(x)), full_matrices=False)
    both = jax.vmap(triplets.polar)(jnp.float32(x))
    bound = max(triplets.TOLERANCE, 10**decay * np.finfo(np.float32).eps)
    for got, u, vt in zip(np.asarray(both, np.float64), left, right, strict=True):
        near(got, u @ vt, bound)
    got = jax.vmap(lambda one: triplets.truncate(one, 8))(jnp.float32(x))
    for one, expected in zip(np.asarray(got, np.float64), x, strict=True):
        u, s, vt = np.linalg.svd(expected, full_matrices=False)
        near(one, (u[:, :8] * s[:8]) @ vt[:8], triplets.TOLERANCE)


def test_two_singular_values_that_are_close_are_told_apart():
    """The Gram matrix squares their distance to the noise; the decomposition takes over."""
    left = np.linalg.qr(np.random.default_rng(3).normal(size=(40, 4)))[0]
    right = np.linalg.qr(np.random.default_rng(4).normal(size=(4, 4)))[0]
    x = jnp.float32((left * [1.0, 0.02, 0.01995, 0.001]) @ right.T)
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    near(np.asarray(triplets.truncate(x, 2)), (u[:, :2] * s[:2]) @ vt[:2], triplets.GAP_TOLERANCE)
