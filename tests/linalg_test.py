"""The safe solve against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergejax.linalg import safe_solve


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def tasks(rows, width, outputs, seed=0, experts=3):
    """Inputs [experts, rows, width], weights [experts, width, outputs], float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(experts, rows, width)), rng.normal(size=(experts, width, outputs))


def residual_system(inputs, weights):
    grams = np.einsum("kri,krj->kij", inputs, inputs) / inputs.shape[1]
    reference = weights.mean(0)
    return grams.sum(0), np.einsum("kij,kjo->io", grams, weights - reference), reference


def objective(inputs, weights, merged):
    return sum(np.square(x @ (w - merged)).sum() for x, w in zip(inputs, weights, strict=True))


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_full_rank_equals_float64_least_squares(spread):
    inputs, weights = tasks(200, 24, 7)
    inputs = inputs * 10 ** np.linspace(-spread, spread, 24)  # badly scaled features
    matrix, right, _ = residual_system(inputs, weights)
    expected = np.linalg.solve(matrix, right)
    solved = np.asarray(safe_solve(jnp.float32(matrix), jnp.float32(right)))
    row_norms = np.linalg.norm(expected, axis=1)
    assert (np.linalg.norm(solved - expected, axis=1) / row_norms).max() < 1e-4


def test_float64_is_solved_in_float64():
    with jax.enable_x64(True):
        matrix, right, _ = residual_system(*tasks(200, 24, 7))
        solved = safe_solve(jnp.asarray(matrix), jnp.asarray(right))
        assert solved.dtype == jnp.float64
        expected = np.linalg.solve(matrix, right)
        assert np.linalg.norm(solved - expected) / np.linalg.norm(expected) < 1e-8


def test_rank_deficient_example_of_three_tasks_with_forty_rows():
    inputs, weights = tasks(40, 256, 16)
    matrix, right, reference = residual_system(inputs, weights)
    solve = jax.jit(safe_solve)
    delta = np.asarray(solve(jnp.float32(matrix), jnp.float32(right)), np.float64)
    scale = objective(inputs, weights, reference)
    least_norm = np.linalg.lstsq(
        np.concatenate(inputs),
        np.concatenate([x @ (w - reference) for x, w in zip(inputs, weights, strict=True)]),
        rcond=None,
    )[0]
    assert objective(inputs, weights, reference + delta) < 1e-8 * scale
    assert np.linalg.norm(delta) < 1.1 * np.linalg.norm(least_norm)
    naive = np.linalg.inv(np.float32(matrix)) @ np.float32(right)
    assert objective(inputs, weights, reference + naive) > 1e3 * objective(
        inputs, weights, reference + delta
    )


def test_dead_features_stay_at_zero_and_do_not_disturb_the_others():
    matrix, right, _ = residual_system(*tasks(100, 10, 4))
    alive = np.arange(10) % 3 != 0
    matrix = matrix * np.outer(alive, alive)
    solved = np.asarray(safe_solve(jnp.float32(matrix), jnp.float32(right)))
    assert (solved[~alive] == 0).all()
    expected = np.linalg.solve(matrix[np.ix_(alive, alive)], right[alive])
    np.testing.assert_allclose(solved[alive], expected, rtol=1e-4, atol=1e-5)
    zeros = safe_solve(jnp.zeros((3, 3)), jnp.ones((3, 2)))
    assert (zeros == 0).all()


def test_failed_factorisation_takes_the_eigenvalue_route():
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    values = np.array([3.0, 2.0, 1.5, 1.0, 0.8, 0.5, 0.2, 0.0, 0.0, 0.0, 0.0, -0.02])
    matrix = np.float32(vectors * values @ vectors.T)
    right = np.float32(vectors[:, :7] @ rng.normal(size=(7, 5)))
    scale = np.sqrt(np.diag(matrix))
    unit = np.float64(matrix / np.outer(scale, scale))
    assert np.linalg.eigvalsh(unit)[0] < -1e-3  # so that no Cholesky factor exists
    solved = np.asarray(safe_solve(jnp.asarray(matrix), jnp.asarray(right)))
    eigenvalues, basis = np.linalg.eigh(unit + 1e-6 * np.eye(12))
    kept = eigenvalues > 12 * np.finfo(np.float32).eps * eigenvalues[-1]
    inverse = basis[:, kept] / eigenvalues[kept] @ basis[:, kept].T
    expected = inverse @ (right / scale[:, None]) / scale[:, None]
    assert np.isfinite(solved).all()
    np.testing.assert_allclose(solved, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())


def test_vmap_equals_a_loop_also_when_one_member_needs_the_eigenvalue_route():
    good, right, _ = residual_system(*tasks(100, 8, 3))
    bad = good - 1.1 * np.eye(8) * np.linalg.eigvalsh(good)[3]
    matrices, rights = jnp.float32(np.stack([good, bad])), jnp.float32(np.stack([right, right]))
    looped = jnp.stack([safe_solve(m, r) for m, r in zip(matrices, rights, strict=True)])
    batched = jax.jit(jax.vmap(safe_solve))(matrices, rights)
    np.testing.assert_allclose(batched, looped, rtol=1e-4, atol=1e-5)
    shared = jax.vmap(safe_solve, in_axes=(None, 0))(matrices[0], rights)
    np.testing.assert_allclose(shared[0], looped[0], rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_the_inverse():
    matrix, right, _ = residual_system(*tasks(60, 5, 2))

    def loss(shift, solve):
        grown = jnp.float32(matrix) + shift * jnp.diag(jnp.arange(1.0, 6.0))
        return jnp.square(solve(grown, jnp.float32(right))).sum()

    expected = jax.grad(loss)(0.5, jnp.linalg.solve)
    np.testing.assert_allclose(jax.grad(loss)(0.5, safe_solve), expected, rtol=1e-3)
    mapped = jax.vmap(jax.grad(lambda shift: loss(shift, safe_solve)))(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(mapped, jnp.stack([expected] * 2), rtol=1e-3)


@pytest.mark.parametrize(
    ("matrix", "right", "words"),
    [
        (jnp.ones((2, 3)), jnp.ones((2, 1)), r"\(2, 3\).*expected \[in, in\]"),
        (jnp.eye(3), jnp.ones((2, 1)), r"\(3, 3\).*\(2, 1\)"),
        (jnp.eye(3), jnp.ones(3), "right-hand side"),
        (jnp.eye(3, dtype=jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16), "bfloat16.*cast"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(matrix, right, words):
    with pytest.raises(ValueError, match=words):
        safe_solve(matrix, right)
