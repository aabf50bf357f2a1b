"""Merging of adapters: restatements in float64 from the dense deltas, invariants, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from adapters import RANKS, SHAPES, close, drawn, summed, wide

import mergejax as mj
from mergejax.lowrank import Factors


def truncated(matrix, rank):
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * values[:rank] @ vt[:rank]


# Dense deltas and bases ---------------------------------------------------------------------------


def test_the_dense_deltas_go_through_any_method():
    adapters = drawn()
    base = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    got = mj.merge("ties(density=0.4)", base, [mj.lowrank.dense(a) for a in adapters])
    close(got, reference.ties(base, [wide(a) for a in adapters], density=0.4))


@pytest.mark.parametrize("layout", ["flax", "torch"])
def test_an_adapter_is_added_to_a_base_of_either_layout(layout):
    rng = np.random.default_rng(1)
    base = {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    adapter = drawn()[1]
    turned = {n: x.T for n, x in base.items()} if layout == "torch" else base
    turned = {**turned, "bias": np.ones(3, np.float32)}
    got = mj.lowrank.apply(turned, adapter, layout=layout)
    np.testing.assert_array_equal(got.pop("bias"), 1)
    expected = {n: base[n] + delta for n, delta in wide(adapter).items()}
    close({n: np.asarray(x).T if layout == "torch" else x for n, x in got.items()}, expected)


def test_a_kernel_of_three_axes_is_its_matrix():
    base = {"query": {"kernel": np.zeros((6, 2, 4), np.float32)}}
    rng = np.random.default_rng(1)
    factors = Factors(*(np.float32(rng.normal(size=s)) for s in ((6, 2), (2, 8))))
    got = mj.lowrank.apply(base, {"query/kernel": factors})["query"]["kernel"]
    np.testing.assert_allclose(got.reshape(6, 8), factors.down @ factors.up, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_base_is_rounded_once():
    adapter = drawn()[0]
    base = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    got = mj.lowrank.apply(base, adapter)
    for name, delta in mj.lowrank.dense(adapter).items():
        np.testing.assert_array_equal(got[name], (1 + delta).astype(jnp.bfloat16))


# Sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [0.5, [1.0, -2.0, 0.25]])
def test_concatenation_is_the_weighted_sum(weights):
    adapters = drawn()
    got = mj.lowrank.concatenate(adapters, weights=weights)
    close(got, summed(adapters, np.broadcast_to(weights, 3)))
    assert {f.rank for f in got.values()} == {sum(RANKS)}


def test_weights_may_differ_from_leaf_to_leaf():
    adapters = drawn()
    rule = mj.by_name({"^a": [1, 0, 0], ".*": 2.0})
    got = mj.lowrank.concatenate(adapters, weights=rule)
    expected = summed(adapters, [2, 2, 2]) | {"a/kernel": wide(adapters[0])["a/kernel"]}
    close(got, expected)


def test_averages_of_products_are_not_products_of_averages():
    adapters = drawn((2, 2), (1.0, 1.0))
    got = wide(mj.lowrank.cat(adapters))
    for name in SHAPES:
        mean = sum(np.float64(a[name].down) for a in adapters) / 2
        apart = mean @ sum(np.float64(a[name].up) for a in adapters) / 2
        assert np.abs(got[name] - apart).max() > 0.1


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_best_of_its_rank(rank):
    adapters = drawn()
    got = mj.lowrank.svd(adapters, rank=rank, weights=[1, 2, 3], scaling=0.5)
    dense = summed(adapters, [1, 2, 3])
    close(got, {name: 0.5 * truncated(x, rank) for name, x in dense.items()})
    assert {f.rank for f in got.values()} == {rank}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_refactoring_reports_what_it_loses(rank):
    adapter = mj.lowrank.concatenate(drawn())
    got, errors = mj.lowrank.refactor(adapter, rank)
    for name, x in wide(adapter).items():
        lost = np.linalg.norm(x - wide(got)[name]) / np.linalg.norm(x)
        np.testing.assert_allclose(errors[name], lost, atol=1e-6)
        np.testing.assert_allclose(
            lost, np.linalg.norm(x - truncated(x, rank)) / np.linalg.norm(x), atol=1e-6
        )


def test_refactoring_at_the_true_rank_is_exact_and_above_it_pads_with_zeros():
    adapter = drawn()[0]
    got, errors = mj.lowrank.refactor(adapter, 4)
    close(got, wide(adapter))
    assert max(errors.values()) < 1e-6
    np.testing.assert_array_equal(got["a/kernel"].up[2:], 0)


def test_cat_is_task_arithmetic_with_one_over_n():
    adapters = drawn()
    close(mj.lowrank.cat(adapters), summed(adapters, [1 / 3] * 3))


def test_learned_weights_of_cat_are_a_softmax():
    adapters, logits = drawn(), np.array([0.3, -1.0, 2.0])
    weights = np.exp(logits) / np.exp(logits).sum()
    close(mj.lowrank.cat(adapters, logits=list(logits)), summed(adapters, weights))


def test_linear_has_cross_terms():
    adapters, logits = drawn((2, 2), (1.0, 0.5)), [0.3, -1.0]
    weights = np.exp(logits) / np.exp(logits).sum()
    expected = {}
    for name in SHAPES:
        several = [a[name] for a in adapters]
        down = sum(np.float64(f.down) for f in several)
        up = sum(w * f.scale * np.float64(f.up) for w, f in zip(weights, several, strict=True))
        expected[name] = down @ up
    close(mj.lowrank.linear(adapters, logits=logits), expected)


def test_linear_refuses_different_ranks():
    with pytest.raises(mj.MergeError, match=r"leaf 'a/kernel' has ranks \[2, 3, 1\], but factors"):
        mj.lowrank.linear(drawn())


# All methods --------------------------------------------------------------------------------------

TEXTS = [
    "concatenate(weights=[1, 2, 3])",
    "svd(rank=2, weights=0.5)",
    "cat()",
    "knots(host='ties(density=0.3)', scaling=0.6)",
    "knots(host=drop(rate=0.5)|ties(density=0.5), seed=3)",
]


def turned(adapters):
    return [{n: Factors(f.up.T, f.down.T, f.scale) for n, f in a.items()} for a in adapters]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_the_call(text):
    adapters = drawn()
    name, _, options = mj.language.read_call(text)
    expected = wide(getattr(mj.lowrank, name)(adapters, **options))
    close(mj.lowrank.merge(text, adapters), expected, 0)


@pytest.mark.parametrize("text", TEXTS)
def test_a_scale_is_the_same_as_scaled_factors(text):
    folded = [{n: Factors(f.down, f.scale * f.up) for n, f in a.items()} for a in drawn()]
    close(mj.lowrank.merge(text, folded), wide(mj.lowrank.merge(text, drawn())))


@pytest.mark.parametrize("text", TEXTS)
def test_bfloat16_factors_are_merged_in_float32(text):
    small = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), drawn(), is_leaf=np.isscalar)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), small)
    got = mj.lowrank.merge(text, small)
    assert {f.up.dtype for f in got.values()} == {np.dtype("float32")}
    close(got, wide(mj.lowrank.merge(text, exact)), 1e-6)


@pytest.mark.parametrize("text", ["concatenate()", "svd(rank=2)", "cat()"])
def test_transposed_factors_give_the_transposed_delta(text):
    got = wide(mj.lowrank.merge(text, turned(drawn())))
    close({n: x.T for n, x in got.items()}, wide(mj.lowrank.merge(text, drawn())))


def test_knots_transposed_shares_the_other_side():
    got = wide(mj.lowrank.knots(turned(drawn()), shared="input"))
    close({n: x.T for n, x in got.items()}, wide(mj.lowrank.knots(drawn(), shared="output")))


def test_others_than_knots_and_lego_may_be_jitted():
    adapters = drawn()
    for text in ("concatenate()", "svd(rank=2)", "cat()", "do_merging()", "dc_merge(rank=2)"):
        got = jax.jit(lambda several, text=text: mj.lowrank.merge(text, several))(adapters)
        close(got, wide(mj.lowrank.merge(text, adapters)))


EVERY = [*TEXTS, "lego(rank=2)", "do_merging()", "dc_merge(rank=2)"]


@pytest.mark.parametrize("text", EVERY)
def test_ranks_above_the_matrix_single_elements_and_extreme_scales_stay_finite(text):
    rng = np.random.default_rng(0)
    for shape, rank, scale in (((4, 3), 7, 1.0), ((2, 2), 2, 1e-18), ((2, 2), 2, 1e15)):
        draw = lambda *size: np.float32(rng.normal(size=size))
        several = [
            {"q": Factors(draw(shape[0], rank), draw(rank, shape[1]), scale)} for _ in range(3)
        ]
        for x in mj.lowrank.dense(mj.lowrank.merge(text, several)).values():
            assert np.isfinite(x).all()
            assert x.shape == shape
            assert np.abs(x).max() > 0


@pytest.mark.parametrize("text", ["knots()", "lego(rank=2)"])
def test_what_looks_at_values_is_refused_under_a_trace(text):
    with pytest.raises(mj.MergeError, match="looks at values; call it outside jit, vmap and grad"):
        jax.jit(lambda several: mj.lowrank.merge(text, several))(drawn())


# Refusals -----------------------------------------------------------------------------------------


def broken(change):
    adapters = drawn()
    change(adapters)
    return adapters


def without_a_leaf(adapters):
    del adapters[1]["b/kernel"]


def unchained(adapters):
    adapters[2]["a/kernel"] = Factors(np.ones((6, 2), np.float32), np.ones((3, 5), np.float32))


def another_shape(adapters):
    adapters[2]["a/kernel"] = Factors(np.ones((7, 2), np.float32), np.ones((2, 5), np.float32))


def infinite(adapters):
    adapters[0]["a/kernel"].down[1, 0] = np.inf


def dense_leaf(adapters):
    adapters[0]["a/kernel"] = np.ones((6, 5), np.float32)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_a_leaf, "adapter 1 has no leaf 'b/kernel', which another has; merge adapters of"),
        (unchained, "leaf 'a/kernel' of adapter 2 has factors of shapes (6, 2) and (3, 5), which"),
        (another_shape, "leaf 'a/kernel' of adapter 2 is (7, 5) [in, out], expected (6, 5) as in"),
        (infinite, "leaf 'a/kernel' of adapter 0 has 1 non-finite values (NaN or Inf); repair it"),
        (dense_leaf, "leaf 'a/kernel' of adapter 0 is ndarray, not Factors; wrap it in Factors("),
    ],
)
def test_bad_adapters_are_refused_in_words(change, sentence):
    with pytest.raises(mj.MergeError) as error:
        mj.lowrank.cat(broken(change))
    assert str(error.value).startswith(sentence)
    assert str(error.value).count("\n") == 0


def test_all_problems_are_reported():
    adapters = broken(unchained)
    without_a_leaf(adapters)
    with pytest.raises(mj.MergeError) as error:
        mj.lowrank.knots(adapters)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("svd(rank=5)", "svd(rank=5) is above the rank 4 that leaf 'b/kernel' of shape (4, 8) can"),
        ("svd(rank=0)", "svd(rank=...) must be an integer of at least 1, not 0"),
        ("svd()", "svd(adapters, rank, weights, scaling) is called wrongly: missing"),
        ("concatenate(weights=[1, 2])", "concatenate(weights=...) has 2 numbers, but there are 3"),
        ("cat(logits=by_name({'x': 1.0}))", "cat(logits=...): pattern 'x' of by_name matches no"),
        ("cat(logits=by_depth([0, 1]))", "cat(logits=...) cannot depend on the depth of an"),
        ("knots(scaling='a')", "knots(scaling=...) must be a number in (-inf, inf), not 'a'"),
        ("knots(scaling=[1, 2, 3])", "knots(scaling=...) has 3 numbers, but it takes one"),
        ("knots(hosts='ties()')", "knots() has no parameter 'hosts', did you mean 'host'?"),
        ("knots(host='tis()')", "no method is called 'tis', did you mean 'ties'?"),
        ("knots(host='tall_masks()')", "knots(host='tall_masks()') gives one model per expert;"),
        ("knot()", "no method for adapters is called 'knot', did you mean 'knots'?"),
        ("cat()|cat()", "'cat()|cat()' is not one name with its parameters; write it as"),
        ("cat(", "method 'cat(' cannot be read"),
    ],
)
def test_bad_parameters_are_refused_in_words(text, sentence):
    with pytest.raises(mj.MergeError) as error:
        mj.lowrank.merge(text, drawn())
    assert str(error.value).startswith(sentence)
    assert str(error.value).count("\n") == 0


def test_a_single_adapter_is_no_list():
    with pytest.raises(mj.MergeError, match=r"adapters must be a list of mappings"):
        mj.lowrank.cat(drawn()[0])


def test_a_base_without_the_leaf_or_of_another_shape_is_refused():
    adapter = drawn()[0]
    with pytest.raises(mj.MergeError, match="has no leaf 'b/kernel'"):
        mj.lowrank.apply({"a/kernel": np.zeros((6, 5), np.float32)}, adapter)
    base = {n: np.zeros(shape[::-1], np.float32) for n, shape in SHAPES.items()}
    with pytest.raises(mj.MergeError, match=r"is \(6, 5\) \[in, out\], but the base's is \(5, 6\)"):
        mj.lowrank.apply(base, adapter)
    embedding = {"embed": {"embedding": np.zeros((3, 4), np.float32)}}
    factors = Factors(np.ones((3, 1), np.float32), np.ones((1, 4), np.float32))
    with pytest.raises(
        mj.MergeError, match=r"leaf 'embed/embedding': .* name its layout by pattern"
    ):
        mj.lowrank.apply(embedding, {"embed/embedding": factors})
    got = mj.lowrank.apply(embedding, {"embed/embedding": factors}, layouts={"embed": "io"})
    np.testing.assert_array_equal(got["embed"]["embedding"], 1)
