"""Greedy soups, and models made of the layers of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

import mergejax as mj
from mergejax.models import vit


def at(*values):
    return [{"w": np.float32(value)} for value in values]


def near(target):
    return lambda tree: -abs(float(tree["w"]) - target)


def test_a_greedy_soup_takes_what_helps_in_the_order_of_the_scores():
    soup = mj.greedy_soup(at(0.0, 9.0, 2.75, 5.0), near(3.0))
    # 2.75 is best; with 5 the mean is 3.875, with 0 it is 1.375, with 9 it is 5.875: all worse.
    assert (soup.chosen, float(soup.merged["w"]), soup.score) == ([2], 2.75, -0.25)
    # 2.5 is best; with 4 the mean is 3.25, and with another one of 0 or 9 it is worse again.
    soup = mj.greedy_soup(at(0.0, 9.0, 2.5, 4.0), near(3.0))
    assert (soup.chosen, float(soup.merged["w"]), soup.score) == ([2, 3], 3.25, -0.25)
    assert soup.scores == [-3.0, -6.0, -0.5, -1.0]


def test_a_greedy_soup_keeps_a_model_that_changes_nothing():
    assert mj.greedy_soup(at(1.0, 1.0), near(1.0)).chosen == [0, 1]


def test_known_scores_are_not_computed_again():
    asked = []

    def score(tree):
        asked.append(float(tree["w"]))
        return -abs(asked[-1] - 2.0)

    soup = mj.greedy_soup(at(1.0, 3.0), score, scores=[-0.5, -0.2])
    assert asked == [2.0]
    assert (soup.chosen, soup.score, soup.scores) == ([1, 0], 0.0, [-0.5, -0.2])


def test_bad_soups_are_refused():
    with pytest.raises(mj.MergeError, match="at least one expert"):
        mj.greedy_soup([], near(0.0))
    with pytest.raises(mj.MergeError, match="1 scores for 2 experts"):
        mj.greedy_soup(at(1.0, 2.0), near(0.0), scores=[1.0])
    with pytest.raises(mj.MergeError, match="expert 1 is not a number"):
        mj.greedy_soup(at(1.0, 2.0), lambda tree: float("nan") if tree["w"] > 1 else 0.0)


# Layers -------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).random([2, 8, 8, 1], np.float32)


def model(depth, seed=0):
    module = vit.VisionTransformer(patch=4, width=8, depth=depth, heads=2, expansion=1)
    return module, module.init(jax.random.key(seed), IMAGES)["params"]


def test_the_identical_plan_gives_the_model_back():
    _, params = model(3)
    same = mj.stack_layers([params], [(0, 0, 1), (0, 1, 3)], blocks="block_")
    trees.equal(same, params)


def test_layers_of_two_models_make_a_deeper_one_that_runs():
    (_, first), (_, second) = model(2, 0), model(3, 1)
    module, _ = model(4)
    params = mj.stack_layers([first, second], [(0, 0, 2), (1, 1, 3)], blocks="block_")
    trees.equal(params["block_1"], first["block_1"])
    trees.equal(params["block_3"], second["block_2"])
    trees.equal(params["patches"], first["patches"])
    assert module.apply({"params": params}, IMAGES).shape == (2, 8)


def test_an_inserted_block_without_outputs_does_nothing():
    module, params = model(2)
    deeper, _ = model(3)
    silent = {r"block_2/(attention/out|mlp_out)/": 0.0}
    params_deeper = mj.stack_layers([params], [(0, 0, 2), (0, 0, 1)], blocks="block_", scale=silent)
    features = [
        m.apply({"params": p}, IMAGES) for m, p in ((module, params), (deeper, params_deeper))
    ]
    np.testing.assert_array_equal(*features)


def test_flat_names_and_stacked_layers():
    flat = {
        "model.layers.0.w": jnp.ones(2),
        "model.layers.1.w": 2 * jnp.ones(2),
        "head.w": jnp.ones(1),
    }
    twice = mj.stack_layers([flat], [(0, 1, 2), (0, 0, 2)], blocks="model.layers.")
    assert list(twice) == ["head.w", *(f"model.layers.{i}.w" for i in range(3))]
    assert [float(twice[f"model.layers.{i}.w"][0]) for i in range(3)] == [2, 1, 2]
    stacked = {"layers": {"w": jnp.arange(3.0)}, "norm": jnp.ones(1)}
    chosen = mj.stack_layers([stacked], [(0, 2, 3), (0, 0, 2)], blocks="layers", scanned=True)
    assert chosen["layers"]["w"].tolist() == [2, 0, 1]
    assert chosen["norm"] is stacked["norm"]


def test_bad_plans_name_every_problem():
    _, params = model(2)
    with pytest.raises(mj.MergeError) as raised:
        mj.stack_layers([params], [(0, 0, 3), (1, 0, 1)], blocks="block_")
    assert str(raised.value).splitlines() == [
        "slice (0, 0, 3) is not within the 2 layers of model 0; choose 0 <= start < stop <= 2",
        "slice (1, 0, 1) names model 1 of 1",
    ]
    with pytest.raises(mj.MergeError, match="names no layer of model 0, whose leaves are"):
        mj.stack_layers([params], [(0, 0, 1)], blocks="layer_")
    with pytest.raises(mj.MergeError, match="pattern 'gate' matches no leaf"):
        mj.stack_layers([params], [(0, 0, 1)], blocks="block_", scale={"gate": 0.0})
    other = {**params, "block_1": {"w": jnp.ones(1)}}
    with pytest.raises(mj.MergeError, match="layer 1 of model 1 has other leaves than layer 0"):
        mj.stack_layers([params, other], [(0, 0, 1), (1, 1, 2)], blocks="block_")
