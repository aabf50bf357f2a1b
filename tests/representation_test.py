"""ReACT and Representation Surgery: known answers, optimality, limits, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj
from mergejax import representation
from mergejax.eval import front_plot

RNG = np.random.default_rng(0)
MERGED = [jnp.asarray(RNG.normal(size=(n, 6)), jnp.float32) for n in (30, 50, 20)]
EXPERTS = [z + jnp.asarray(RNG.normal(size=z.shape), jnp.float32) for z in MERGED]
TURN = jnp.asarray(np.linalg.qr(RNG.normal(size=(6, 6)))[0], jnp.float32)


@pytest.mark.parametrize("preference", [[1, 1, 1], [0.2, 0.5, 0.3], [0, 1, 0]])
def test_the_map_is_where_the_stated_objective_is_stationary(preference):
    found = representation.correction(MERGED, EXPERTS, beta=0.1, relative=False)
    got = representation.correct(found, preference)
    p = np.asarray(preference) / np.sum(preference)

    def objective(a):
        total = 0.0
        for share, z, y in zip(p, MERGED, EXPERTS, strict=True):
            r = representation.react.rotation(z.T @ y)
            total += float(share) * (((z @ a - y) ** 2).sum() + 0.1 * ((a - r) ** 2).sum())
        return total

    slope = jax.grad(objective)(got)
    scale = jnp.linalg.norm(MERGED[1].T @ EXPERTS[1])
    assert float(jnp.linalg.norm(slope)) < 1e-4 * float(scale)
    for _ in range(5):
        other = got + 1e-2 * jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)
        assert objective(other) > objective(got)


def test_one_rotation_of_all_tasks_is_found_for_every_preference():
    found = representation.correction(MERGED, [z @ TURN for z in MERGED])
    for preference in ([1, 0, 0], [1, 2, 3]):
        np.testing.assert_allclose(representation.correct(found, preference), TURN, atol=1e-4)


def test_a_strong_prior_gives_the_rotation_and_few_examples_stay_finite():
    found = representation.correction(MERGED[:1], EXPERTS[:1], beta=1e6)
    rotation = representation.react.rotation(MERGED[0].T @ EXPERTS[0])
    np.testing.assert_allclose(representation.correct(found, [1.0]), rotation, atol=1e-4)
    few = representation.correction([MERGED[0][:1]], [EXPERTS[0][:1]], beta=0.0)
    assert np.isfinite(np.asarray(representation.correct(few, [1.0]))).all()


def test_surgery_starts_at_the_merged_model_and_nears_the_expert():
    start, _ = representation.adapt(MERGED[1], EXPERTS[1], steps=0)
    np.testing.assert_array_equal(representation.operate(start, MERGED[1]), MERGED[1])
    target = MERGED[1] - jax.nn.relu(MERGED[1][:, :1])
    adapter, losses = representation.adapt(MERGED[1], target, steps=400, learning_rate=1e-2)
    assert losses[-50:].mean() < 0.3 * losses[:50].mean()
    off = jnp.abs(representation.operate(adapter, MERGED[1]) - target).mean()
    assert float(off) < 0.3 * float(jnp.abs(MERGED[1] - target).mean())


def test_bad_input_is_one_sentence_each():
    found = representation.correction(MERGED, EXPERTS)
    for preference in ([0, 0, 0], [1, 1], [1, -1, 1]):
        with pytest.raises(mj.MergeError, match="one number of at least 0 for each of the 3 tasks"):
            representation.correct(found, preference)
    with pytest.raises(mj.MergeError, match="task 1 has no examples"):
        representation.correction([MERGED[0], MERGED[1][:0]], [EXPERTS[0], EXPERTS[1][:0]])
    with pytest.raises(mj.MergeError, match="task 0: representations are not finite"):
        representation.correction([MERGED[0] * np.float32("nan")], [EXPERTS[0]])
    with pytest.raises(mj.MergeError, match="with at least one example"):
        representation.adapt(MERGED[0][:0], EXPERTS[0][:0])


def test_the_front_of_preferences_is_drawn_through_the_settings_that_no_other_beats():
    scores = np.array([[0.2, 0.9], [0.5, 0.5], [0.4, 0.4], [0.8, 0.3]])
    canvas = front_plot.draw(("a", "b"), [0, 0.3, 0.6, 1], scores, (0.3, 0.3), (0.9, 0.95))
    (axes,) = canvas.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), 100 * scores[[0, 1, 3]])
    np.testing.assert_allclose(axes.lines[2].get_xydata(), [[40, 40]])
    assert [text.get_text() for text in axes.texts] == ["0 : 100", "60 : 40", "100 : 0"]
