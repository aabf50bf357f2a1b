"""Spectral methods in chains: which leaves they take, modifiers before and behind them."""

import functools

import jax
import numpy as np
import pytest
from reference_spectral import boosted, iso_c, svc
from spectral_models import IN, OUT, deltas, merged, near

import mergejax as mj

# Which leaves -------------------------------------------------------------------------------------

_OTHERS = {"embed": {"embedding": (OUT, IN)}, "norm": {"scale": (OUT,)}, "bias": (OUT,)}


@pytest.mark.parametrize("method", ["tsv_merge(0.5)", "iso_c(0.5)", "iso_cts(0.5)", "r_tsvm(0.5)"])
def test_other_leaves_are_averaged_and_scaled_alike(method):
    rng = np.random.default_rng(3)
    draw = lambda shape: np.asarray(rng.normal(size=shape), np.float32)
    base, *experts = (
        jax.tree.map(draw, _OTHERS, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(3)
    )
    got = mj.merge(method, base, experts)
    halfway = jax.tree.map(lambda b, x, y: b + 0.5 * ((x + y) / 2 - b), base, *experts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, halfway)


def test_an_embedding_is_merged_like_a_kernel_when_the_user_says_so():
    taus = deltas(3)
    trees = [{"embedding": np.float32(tau.T)} for tau in taus]
    base = jax.tree.map(np.zeros_like, trees[0])
    roles, layouts = {"embedding": "kernel"}, {"embedding": "io"}
    got = mj.merge("iso_c()", base, trees, roles=roles, layouts=layouts)["embedding"]
    near(np.asarray(got, np.float64).T, iso_c(taus))


def test_modifiers_leave_other_leaves_as_they_are():
    base, expert = {"bias": np.zeros(4, np.float32)}, {"bias": np.float32([1, 2, 3, 4])}
    got = mj.merge("total()|svc(2.0)|subspace_boosting(0.0)", base, [expert])
    np.testing.assert_array_equal(got["bias"], expert["bias"])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("wudi()", 0.5),
        ("wudi(others='base')", 0.0),
        ("opt_merge(0.5)", 0.25),
        ("swudi(0.5)", 0.25),
        ("aswudi(0.5)", 0.25),
        ("dc_merge(0.5)", 0.25),
        ("doge_ta()", 0.0),
    ],
)
def test_other_leaves_are_averaged_or_stay_at_the_base(method, expected):
    base = {"norm": {"scale": np.float32([1, 2])}, "embed": {"embedding": np.ones((2, 3), "f")}}
    experts = [base, {n: {k: x + 1 for k, x in leaf.items()} for n, leaf in base.items()}]
    got = mj.merge(method, base, experts)
    np.testing.assert_allclose(got["norm"]["scale"], base["norm"]["scale"] + expected)
    np.testing.assert_allclose(got["embed"]["embedding"], 1 + expected)


def test_dop_averages_other_leaves_pairwise():
    base = {"bias": np.zeros(1, np.float32)}
    experts = [{"bias": np.float32([x])} for x in (4.0, 0.0, 8.0)]
    assert float(mj.merge("dop()", base, experts)["bias"][0]) == 5.0


# Composition --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "tsv_merge(0.8)",
        "r_tsvm()",
        "cart(density=0.5)",
        "dc_merge(density=0.2)",
        "wudi(steps=20, learning_rate=0.01)",
        "opt_merge()",
        "swudi()",
        "aswudi()",
        "doge_ta(scaling=1.0, steps=20)",
        "dop(steps=20, learning_rate=0.01)",
        "ties(density=0.7)",
        "trust_region(quantile=0.8)",
    ],
)
def test_modifiers_stand_before_and_behind_any_method(host):
    """Weights change what the method sees; calibration compares with the raw deltas."""
    taus, weights = deltas(3, seed=15), (2.0, 1.0, 0.5)
    got = merged(f"weigh([2, 1, 0.5])|{host}|svc(0.5)|subspace_boosting(0.3)", taus)
    alone = merged(host, [weight * tau for weight, tau in zip(weights, taus, strict=True)])
    near(got, boosted(svc(alone, taus, 0.5), 0.3), 2e-5)


@pytest.mark.parametrize("host", ["iso_c(0.5)", "iso_cts(0.5, common=0.5)"])
def test_a_flat_spectrum_has_nothing_to_lift(host):
    taus = deltas(3, seed=15)
    weighed = merged(host, [2 * taus[0], *taus[1:]])
    near(merged(f"weigh([2, 1, 1])|{host}|subspace_boosting(0.3)", taus), weighed)
