"""The training loop, and the model that it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import mergejax as mj
from mergejax import fit, train
from mergejax.data.task import Split
from mergejax.models import bodies, vit

MODEL = {"patch": 4, "width": 24, "depth": 2, "heads": 2, "expansion": 2}


@pytest.mark.parametrize(
    ("names", "parts"), [("a", ("body",)), ("ab", ("body", "heads")), ("ab", ("heads",))]
)
def test_what_is_named_moves_and_the_rest_stays(names, parts):
    model = vit.VisionTransformer(**MODEL)
    body, heads = train.initial(model, np.zeros([1, 8, 8, 1], np.float32), {"a": 3, "b": 2}, seed=0)
    images = np.random.default_rng(0).random([40, 8, 8, 1], np.float32)
    splits = {
        name: Split(images, np.arange(40, dtype=np.int32) % heads[name]["bias"].size)
        for name in names
    }
    settings = fit.Settings(steps=50, learning_rate=1e-2, batch=64)
    new, found, losses = fit.fit(
        model, body, heads, splits, settings, seed=[0], classes=10, parts=parts
    )
    assert losses.shape == (50,)
    assert losses[-5:].mean() < losses[:5].mean()
    moved = np.abs(new["patches"]["kernel"] - body["patches"]["kernel"]).max() > 0
    assert moved == ("body" in parts)
    for name in names:
        assert found[name]["kernel"].shape == heads[name]["kernel"].shape
        same = np.array_equal(found[name]["kernel"], heads[name]["kernel"])
        assert same != ("heads" in parts)


def test_learning_rates_rise_and_fall():
    rates = fit.learning_rates(fit.Settings(steps=100, learning_rate=2.0, batch=1, warmup=0.2))
    assert rates.shape == (100,)
    assert rates[0] == 0
    assert rates[20] == 2.0
    assert np.all(np.diff(rates[:21]) > 0)
    assert np.all(np.diff(rates[20:]) < 0)


def test_batches_follow_the_seed_and_keep_labels_with_their_images():
    splits = [
        Split(np.full([n, 2, 2, 1], n, np.float32), np.full([n], n, np.int32)) for n in (5, 9)
    ]
    first, second = (fit.draw(splits, 4, 100, np.random.default_rng(1)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    np.testing.assert_array_equal(first.inputs[:, :, 0, 0, 0], first.labels)
    np.testing.assert_array_equal(first.labels == 9, first.problems == 1)
    assert 0.4 < np.mean(first.problems) < 0.6


def test_patches_are_cut_row_by_row():
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    patches = np.asarray(vit.cut_patches(jnp.asarray(image), 2))
    np.testing.assert_array_equal(patches[0, :2], [[0, 1, 4, 5], [2, 3, 6, 7]])
    with pytest.raises(ValueError, match="5x4 pixels"):
        vit.cut_patches(jnp.zeros([1, 5, 4, 1]), 2)


def test_a_stem_shrinks_images_before_they_are_cut():
    model = vit.VisionTransformer(patch=2, width=12, depth=1, heads=2, stem=(6, 10))
    body, _ = train.initial(model, np.zeros([1, 16, 24, 3], np.float32), {"a": 3}, seed=0)
    kernels = {name: body[name]["kernel"].shape for name in ("stem_a", "stem_b", "patches")}
    assert kernels == {"stem_a": (12, 6), "stem_b": (24, 10), "patches": (40, 12)}
    assert body["positions"].shape == (1, 2 * 3, 12)
    images = jnp.zeros([2, 16, 24, 3]).at[1, 9, 3, 0].set(1.0)
    features = model.apply({"params": body}, images)
    assert features.shape == (2, 12)
    assert np.abs(features[0] - features[1]).max() > 0


def test_logits_are_features_times_head():
    model = vit.VisionTransformer(**MODEL)
    body, heads = train.initial(model, np.zeros([1, 8, 8, 1], np.float32), {"a": 3}, seed=0)
    images = jnp.asarray(np.random.default_rng(0).random([4, 8, 8, 1], np.float32))
    features = np.asarray(model.apply({"params": body}, images), np.float64)
    head = {"kernel": heads["a"]["kernel"], "bias": jnp.asarray([1.0, 2.0, 3.0])}
    expected = features @ np.asarray(head["kernel"], np.float64) + [1, 2, 3]
    np.testing.assert_allclose(train.logits(model, body, head, images), expected, rtol=1e-5)


def test_moved_images_are_windows_of_the_padded_ones():
    images = np.arange(2 * 4 * 5, dtype=np.float32).reshape(2, 4, 5, 1)
    tiled = np.repeat(images, 200, axis=0)
    found = fit.moved(tiled, 1, np.random.default_rng(0))
    assert found.shape == tiled.shape
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    windows = {
        padded[index, row : row + 4, column : column + 5].tobytes()
        for index in range(2)
        for row in range(3)
        for column in range(3)
    }
    assert {image.tobytes() for image in np.ascontiguousarray(found)} == windows
    np.testing.assert_array_equal(fit.moved(images, 0, np.random.default_rng(0)), images)


def test_adapters_change_kernels_alone_and_by_their_rank():
    model = bodies.build({"kind": "resnet", "widths": (8,), "blocks": 1, "groups": 4})
    body, heads = train.initial(model, np.zeros([1, 8, 8, 1], np.float32), {"a": 3}, seed=0)
    rng, labels = np.random.default_rng(0), np.arange(40, dtype=np.int32) % 3
    patterns = rng.random([3, 8, 8, 1], np.float32)
    images = patterns[labels] + 0.1 * rng.random([40, 8, 8, 1], np.float32)
    heads["a"]["kernel"] = rng.normal(size=heads["a"]["kernel"].shape).astype(np.float32)
    splits = {"a": Split(images, labels)}
    settings = fit.Settings(steps=25, learning_rate=1e-2, batch=40, rank=2)
    new, found, losses = fit.fit(
        model, body, heads, splits, settings, seed=[0], classes=3, parts=("adapters",)
    )
    assert losses[-1] < 0.85 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, found["a"], heads["a"])
    before, after = (traverse_util.flatten_dict(tree) for tree in (body, new))
    assert before.keys() == after.keys()
    for name, start in before.items():
        delta = np.asarray(after[name], np.float64) - np.asarray(start, np.float64)
        if name[-1] != "kernel":
            np.testing.assert_array_equal(delta, 0.0, err_msg=str(name))
            continue
        values = np.linalg.svd(delta.reshape(-1, delta.shape[-1]), compute_uv=False)
        assert values[0] > 0, name
        # What is left is the rounding of float32 weights of size one.
        assert np.all(values[2:] < 1e-6 * delta.size**0.5), name


def test_the_class_token_is_what_comes_out():
    model = vit.VisionTransformer(**MODEL, class_token=True)
    body, _ = train.initial(model, np.zeros([1, 8, 8, 1], np.float32), {"a": 2}, seed=0)
    assert body["positions"].shape == (1, 5, 24)
    images = np.random.default_rng(0).random([3, 8, 8, 1], np.float32)
    found = model.apply({"params": body}, images)
    assert found.shape == (3, 24)
    np.testing.assert_allclose(found.mean(axis=1), 0.0, atol=1e-5)  # a normalised token, no mean
    np.testing.assert_allclose(found.std(axis=1), 1.0, atol=1e-2)


def test_an_unknown_body_is_one_sentence():
    with pytest.raises(mj.MergeError, match="no model 'resnt', did you mean 'resnet'"):
        bodies.build({"kind": "resnt"})
