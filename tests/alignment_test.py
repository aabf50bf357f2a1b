"""Symmetries of models: derived, checked, applied; networks aligned by them."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_models import MAKERS, make

import mergejax as mj
from mergejax import alignment
from mergejax.alignment import Group, Symmetries

# name -> sizes of the groups, with those within others marked by the sizes outside
EXPECTED = {
    "mlp": ["16", "12"],
    "vgg": ["6", "8", "10"],
    "resnet20_batch_norm": ["4"] * 4 + ["6"] * 4 + ["8"] * 4,
    "resnet20_layer_norm": ["4"] * 4 + ["6"] * 4 + ["8"] * 4,
    "resnet20_group_norm": ["2"] * 12 + ["2x2"] * 4 + ["2x3"] * 4 + ["2x4"] * 4,
    "vit": ["12", "20", "20"] + ["3", "3x4", "3x4"] * 2,
    "llama": ["16", "20", "20"] + ["2", "2x2", "2x6"] * 2,
    "t5": ["10", "14", "14"] + ["2", "2x3", "2x3"] * 3,
    "moe": ["8", "4", "4x9"],
    "scanned": ["10", "3x14"],
    "joined": ["6", "4"],
    "nnx_convolutional": ["8", "2", "2x4", "2x4"],
    "nnx_perceptron": ["9", "7"],
    "nnx_gated": ["8", "13"],
}
EXPECTED |= {name: EXPECTED[name.removeprefix("nnx_")] for name in set(MAKERS) - set(EXPECTED)}


@pytest.fixture(scope="module")
def found():
    kept = {}

    def get(name):
        if name not in kept:
            apply_fn, params, example = make(name)
            kept[name] = (
                apply_fn,
                params,
                example,
                mj.alignment.symmetries(apply_fn, params, example),
            )
        return kept[name]

    return get


def movable(symmetries):
    return {name: group for name, group in symmetries.groups.items() if not group.fixed}


@pytest.mark.parametrize("name", MAKERS)
def test_groups_of_a_model(name, found):
    *_, symmetries = found(name)
    sizes = symmetries.groups
    shown = [
        "x".join(str(sizes[g].size) for g in (*group.within, own))
        for own, group in movable(symmetries).items()
    ]
    assert sorted(shown) == sorted(EXPECTED[name])


@pytest.mark.parametrize("name", MAKERS)
def test_permuted_model_computes_the_same(name, found):
    apply_fn, params, example, symmetries = found(name)
    assert mj.alignment.verify(apply_fn, params, example, symmetries) < 2e-5


@pytest.mark.parametrize("name", MAKERS)
def test_permuted_twin_is_recovered_exactly(name, found):
    _, params, _, symmetries = found(name)
    planted = alignment.random(symmetries, seed=3)
    twin = alignment.apply(symmetries, planted, params)
    assert any(not np.array_equal(a, b) for a, b in _pairs(params, twin))
    matching = alignment.weight_matching(symmetries, params, twin)
    undone = alignment.invert(symmetries, planted)
    for group, permutation in matching.permutations.items():
        np.testing.assert_array_equal(permutation, undone[group], err_msg=group)
    back = alignment.apply(symmetries, matching.permutations, twin)
    assert all(np.array_equal(a, b) for a, b in _pairs(params, back))


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.parametrize("name", ["llama", "moe", "resnet20_group_norm"])
def test_permutations_compose_and_invert(name, found):
    _, params, _, symmetries = found(name)
    first, then = (alignment.random(symmetries, seed=seed) for seed in (1, 2))
    twice = alignment.apply(symmetries, then, alignment.apply(symmetries, first, params))
    once = alignment.apply(symmetries, alignment.compose(symmetries, first, then), params)
    assert all(np.array_equal(a, b) for a, b in _pairs(twice, once))
    nothing = alignment.compose(symmetries, first, alignment.invert(symmetries, first))
    for group, permutation in alignment.identity(symmetries).items():
        np.testing.assert_array_equal(nothing[group], permutation)


def test_objective_never_falls_below_the_identity_and_scores_add_up(found):
    _, params, _, symmetries = found("mlp")
    rng = np.random.default_rng(1)
    other = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    matching = alignment.weight_matching(symmetries, params, other)
    before = sum(
        np.vdot(params["params"][layer][leaf], other["params"][layer][leaf])
        for layer, leaves in params["params"].items()
        for leaf in leaves
        if (layer, leaf) != ("Dense_2", "bias")
    )
    assert matching.objective > before
    aligned = alignment.apply(symmetries, matching.permutations, other)
    group = "params/Dense_1/kernel:1"
    a, b = ((p["params"]["Dense_1"], p["params"]["Dense_2"]) for p in (params, aligned))
    score = (a[0]["kernel"] * b[0]["kernel"]).sum(0) + a[0]["bias"] * b[0]["bias"]
    score += (a[1]["kernel"] * b[1]["kernel"]).sum(1)
    np.testing.assert_allclose(matching.scores[group], score, rtol=1e-5, atol=1e-5)


def test_a_single_group_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    a, b = (
        {
            "in": rng.normal(size=(3, 5)).astype("float32"),
            "out": rng.normal(size=(5, 2)).astype("f4"),
        }
        for _ in range(2)
    )
    symmetries = Symmetries({"h": Group(5)}, {"in": (None, "h"), "out": ("h", None)})

    def value(p):
        return (a["in"] * b["in"][:, p]).sum() + (a["out"] * b["out"][p]).sum()

    best = max(itertools.permutations(range(5)), key=lambda p: value(list(p)))
    matching = alignment.weight_matching(symmetries, a, b)
    assert tuple(matching.permutations["h"]) == best
    np.testing.assert_allclose(matching.objective, value(list(best)), rtol=1e-6)


def test_many_models_are_recovered_whatever_their_order(found):
    _, params, _, symmetries = found("vgg")
    rng = np.random.default_rng(1)
    noise = jax.tree.map(
        lambda x: x + rng.normal(scale=0.02, size=x.shape).astype(np.float32), params
    )
    planted = [alignment.random(symmetries, seed=seed) for seed in (1, 2)]
    twins = [
        alignment.apply(symmetries, p, m) for p, m in zip(planted, (params, noise), strict=True)
    ]
    for order in ([0, 1], [1, 0]):
        found_ = alignment.match_many(symmetries, [params, *(twins[i] for i in order)])
        for i, permutations in zip(order, found_[1:], strict=True):
            undone = alignment.invert(symmetries, planted[i])
            for group, permutation in permutations.items():
                np.testing.assert_array_equal(permutation, undone[group])


def test_written_by_hand_as_derived(found):
    apply_fn, params, example, derived = found("mlp")
    written = Symmetries(
        {"a": Group(16), "b": Group(12)},
        {
            "params/Dense_0/kernel": (None, "a"),
            "params/Dense_0/bias": ("a",),
            "params/LayerNorm_0/scale": ("a",),
            "params/LayerNorm_0/bias": ("a",),
            "params/Dense_1/kernel": ("a", "b"),
            "params/Dense_1/bias": ("b",),
            "params/Dense_2/kernel": ("b", None),
        },
    )
    assert alignment.verify(apply_fn, params, example, written) < 1e-5
    planted = alignment.random(written, 0)
    names = {"a": "params/Dense_0/kernel:1", "b": "params/Dense_1/kernel:1"}
    renamed = {names[k]: v for k, v in planted.items()}
    ours, theirs = (
        alignment.apply(written, planted, params),
        alignment.apply(derived, renamed, params),
    )
    assert all(np.array_equal(a, b) for a, b in _pairs(ours, theirs))


def test_flattened_image_is_permuted_by_channel():
    symmetries = Symmetries({"c": Group(3)}, {"w": ((4, "c"), None)})
    w = np.arange(12.0, dtype=np.float32)[:, None]
    moved = alignment.apply(symmetries, {"c": np.array([2, 0, 1])}, {"w": w})["w"]
    np.testing.assert_array_equal(moved[:, 0], w.reshape(4, 3)[:, [2, 0, 1]].ravel())


def test_segments_are_permuted_apart():
    symmetries = Symmetries({"a": Group(2), "b": Group(3)}, {"w": (["a", 1, "b"],)})
    moved = alignment.apply(
        symmetries, {"a": np.array([1, 0]), "b": np.array([2, 1, 0])}, {"w": np.arange(6.0)}
    )
    np.testing.assert_array_equal(moved["w"], [1, 0, 2, 5, 4, 3])


# --- what is pinned, and what is refused ----------------------------------------------------------


def test_reasons_are_given_for_what_is_pinned(found):
    *_, llama = found("llama")
    rotary = llama.pinned["params/Dense_0/kernel", 1]
    assert "rotary" in rotary
    assert "looked up" in llama.pinned["params/Embed_0/embedding", 0]
    *_, mlp = found("mlp")
    assert mlp.pinned["params/Dense_0/kernel", 0] == "it is an axis of the example"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda h: jnp.cumsum(h, axis=-1), "cumsum"),
        (lambda h: h[..., ::-1], "rev"),
        (lambda h: h * jnp.arange(8, dtype=jnp.float32), "numbers"),
        (lambda h: jnp.fft.fft(h).real, "fft"),
        (lambda h: h * np.linspace(1, 2, 8, dtype=np.float32), "constant"),
        (lambda h: h[..., ::2].repeat(2, -1), "strides|every 2"),
        (lambda h: jnp.sort(h, -1), "sort"),
    ],
)
def test_what_is_not_equivariant_is_pinned(break_it, reason):
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}

    def model(p, x):
        with jax.numpy_rank_promotion("allow"):
            return break_it(x @ p["a"]) @ p["b"]

    symmetries = alignment.symmetries(model, params, jnp.ones((5, 3)))
    assert not symmetries.groups
    assert re.search(reason, symmetries.pinned["a", 1])
    with pytest.raises(mj.MergeError, match=r"no axis of the model may be permuted.*by hand"):
        alignment.weight_matching(symmetries, params, params)


def test_wrong_symmetries_are_refused_and_named(found):
    apply_fn, params, example, derived = found("mlp")
    axes = {**derived.axes, "params/Dense_0/bias": (None,)}
    wrong = Symmetries(derived.groups, axes)
    with pytest.raises(mj.MergeError, match=r"permuting group 'params/Dense_0/kernel:1'"):
        alignment.verify(apply_fn, params, example, wrong)
    # A matcher verifies what it can before it matches.
    watched = Symmetries(derived.groups, axes, model=(apply_fn, example))
    with pytest.raises(mj.MergeError, match="permuting group"):
        alignment.weight_matching(watched, params, params)


def test_bad_input_is_answered_in_words():
    good = {"w": jnp.ones((2, 3))}
    symmetries = Symmetries({"h": Group(3)}, {"w": (None, "h")})
    cases = [
        (lambda: alignment.apply(Symmetries({"h": Group(4)}, {"w": (None, "h")}), {}, good),
         "axis 1 of leaf 'w' has length 3, but its groups 'h' have 4"),
        (lambda: alignment.apply(Symmetries({"h": Group(3)}, {"w": (None, "k")}), {}, good),
         "group 'k', which is not declared"),
        (lambda: alignment.apply(Symmetries({"h": Group(3)}, {"v": (None, "h")}), {}, good),
         "leaf 'v' that the model lacks"),
        (lambda: alignment.apply(Symmetries({"h": Group(3)}, {"w": ("h",)}), {}, good),
         r"1 axes, but its shape is \(2, 3\)"),
        (lambda: alignment.apply(symmetries, {"k": np.arange(3)}, good), "called 'k'"),
        (lambda: alignment.apply(symmetries, {"h": np.array([0, 0, 1])}, good), "occur once"),
        (lambda: alignment.apply(symmetries, {"h": np.arange(2)}, good), "expected \\(3,\\)"),
        (lambda: alignment.weight_matching(symmetries, good, {"w": jnp.ones((2, 4))}),
         r"shape \(2, 3\) in the reference and \(2, 4\) in the model"),
        (lambda: alignment.weight_matching(symmetries, good, {**good, "v": jnp.ones(1)}),
         "leaf 'v' is only in the model"),
        (lambda: alignment.weight_matching(symmetries, good, {"w": jnp.full((2, 3), jnp.nan)}),
         "leaf 'w' of the model has values that are not finite"),
        (lambda: alignment.assign(np.array([[np.nan]])), "not finite"),
        (lambda: alignment.match_many(symmetries, [good]), "at least two"),
        (lambda: alignment.symmetries(lambda p, x: x @ p["w"], good, jnp.ones(5)),
         "cannot be traced"),
        (lambda: alignment.symmetries(lambda p, x: x, {}, jnp.ones(5)), "no leaves"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(mj.MergeError, match=message):
            call()
