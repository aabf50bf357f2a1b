"""What methods with statistics claim to be best at: oracles, learned masks, directions."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mergejax as mj

RNG = np.random.default_rng(0)
BASE, TARGET, LEFT, RIGHT = (RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(4))


@pytest.mark.parametrize(
    "method", ["lot(scaling=1.0)", "mats(steps=50)", "bayesian(ridge=0.0)", "regmean(shrink=1.0)"]
)
def test_two_tasks_of_disjoint_inputs_are_both_solved(method):
    supports = [np.diag(np.float32([1, 2, 0, 0])), np.diag(np.float32([0, 0, 3, 1]))]
    stats = {"gram": [{"kernel": support} for support in supports], "norm_square": [{}, {}]}
    chain = mj.parse(method)
    read = {need: stats[need] for need in chain.needs}
    experts = [{"kernel": LEFT}, {"kernel": RIGHT}]
    merged = mj.merge(chain, {"kernel": BASE}, experts, stats=read)["kernel"]
    np.testing.assert_allclose(merged, np.concatenate([LEFT[:2], RIGHT[2:]]), atol=2e-5)


def test_cat_removes_the_direction_that_disturbs_the_other_most():
    """Two experts, one direction, only the first is protected: no other unit vector scores more."""
    penalty = 0.5
    grams = [np.float32(a.T @ a) for a in (3 * RNG.normal(size=(9, 4)), RNG.normal(size=(9, 4)))]
    taus = [np.zeros_like(LEFT), LEFT]  # what does not change disturbs nobody
    stats = {"gram": [{"kernel": g} for g in grams], "norm_square": [{}, {}]}
    method = mj.cat(scaling=1.0, directions=1, penalty=penalty)
    zero = {"kernel": np.zeros_like(LEFT)}
    left = mj.merge(method, zero, [{"kernel": t} for t in taus], stats=stats)["kernel"]
    left = np.asarray(left, np.float64)
    _, values, rows = np.linalg.svd(left)
    assert values[2] < 1e-5 * values[0]  # one direction is gone
    removed = rows[2]
    np.testing.assert_allclose(np.linalg.norm(left), np.linalg.norm(LEFT), rtol=1e-5)
    kept = LEFT - LEFT @ np.outer(removed, removed)
    np.testing.assert_allclose(left, kept * np.linalg.norm(LEFT) / np.linalg.norm(kept), atol=1e-4)
    conflict = LEFT.T @ (grams[0] - penalty * grams[1]) @ LEFT
    score = lambda b: b @ conflict @ b
    others = RNG.normal(size=(200, 3))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    assert score(removed) > 0
    assert all(score(b) <= score(removed) * (1 + 1e-5) for b in others)
    alone = mj.merge(method, zero, [{"kernel": LEFT}], stats={n: x[:1] for n, x in stats.items()})
    np.testing.assert_array_equal(alone["kernel"], LEFT)


def distance(params, target):
    return jnp.sum((params["kernel"] - target) ** 2) / 2


def test_learned_masks_follow_the_stated_update():
    rate, l1, steepness, tau = 0.5, 0.1, 1.0, LEFT.astype(np.float64)
    largest = np.abs(tau) > np.sort(np.abs(tau).ravel())[-6]
    s = np.where(largest, steepness, -steepness)
    for _ in range(3):
        sigmoid = 1 / (1 + np.exp(-s))
        slope = sigmoid * (1 - sigmoid)
        gradient = 2 * (BASE + sigmoid * tau) - TARGET - BASE  # of two batches, added up
        s = s - rate * gradient * tau * slope + l1 * np.sign(s) * slope
    mask, logits = mj.collect.localize(
        distance,
        {"kernel": BASE},
        {"kernel": BASE + LEFT},
        [TARGET, BASE],
        density=0.5,
        steepness=steepness,
        epochs=3,
        learning_rate=rate,
        l1=l1,
    )
    np.testing.assert_allclose(logits["kernel"], s, atol=1e-5)
    np.testing.assert_array_equal(mask["kernel"], s > 0)


def test_masks_learned_by_an_optimiser_keep_what_the_task_needs():
    needed = RNG.random(LEFT.shape) < 0.4
    task = BASE + np.where(needed, LEFT, 0)
    mask, _ = mj.collect.localize(
        distance,
        {"kernel": BASE},
        {"kernel": BASE + LEFT},
        [task],
        density=0.5,
        steepness=1.0,
        epochs=200,
        l1=1e-4,
        optimizer=optax.adam(0.1),
    )
    np.testing.assert_array_equal(mask["kernel"], needed)


def test_stitching_of_masks_apart_adds_and_of_equal_ones_is_the_expert():
    base, experts = {"kernel": BASE}, [{"kernel": BASE + LEFT}, {"kernel": BASE + RIGHT}]
    half = (RNG.random(LEFT.shape) < 0.5).astype(np.uint8)

    def stitched(experts, *masks):
        stats = {"mask": [{"kernel": m} for m in masks]}
        return mj.merge("localize_and_stitch_trained", base, experts, stats=stats)["kernel"]

    apart = stitched(experts, half, 1 - half)
    np.testing.assert_allclose(apart, BASE + half * LEFT + (1 - half) * RIGHT, atol=1e-6)
    same = stitched([experts[0]] * 2, half, half)
    np.testing.assert_allclose(same, BASE + half * LEFT, atol=1e-6)
    np.testing.assert_allclose(stitched(experts[:1], 1 + 0 * half), BASE + LEFT, atol=1e-6)
