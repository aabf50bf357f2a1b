"""Merging by optimisation and by filters: restatements, optima, symmetries, degenerate inputs."""

import functools

import numpy as np
import pytest
import reference_descent as reference
from spectral_models import IN, OUT, deltas, merged, near, one_of_each, rotation

import mergejax as mj


def doge(taus, density=0.3, **options):
    masks = [m["kernel"] for m in reference.doge_masks([{"kernel": t} for t in taus], density)]
    return reference.doge(taus, masks, **options)


def trust_region(taus, **options):
    return reference.trust_region([{"kernel": tau} for tau in taus], **options)["kernel"]


def fixed(taus, **options):
    return reference.dop(taus, decay=1.0, **options)


# A method, its restatement, the options of both; learning rates with which something happens.
CASES = [
    ("wudi()", reference.wudi, {}),
    ("wudi(steps=50, learning_rate=0.01)", reference.wudi, {"steps": 50, "learning_rate": 0.01}),
    (
        "wudi(steps=50, learning_rate=0.01, norm='plain')",
        reference.wudi,
        {"steps": 50, "learning_rate": 0.01, "power": 1},
    ),
    ("opt_merge()", reference.opt_merge, {}),
    (
        "opt_merge(steps=40, learning_rate=0.02, momentum=0.5)",
        reference.opt_merge,
        {"steps": 40, "learning_rate": 0.02, "momentum": 0.5},
    ),
    (
        "interference_around_mean(steps=40, learning_rate=0.01)",
        reference.around_mean,
        {"steps": 40, "learning_rate": 0.01},
    ),
    ("swudi()", reference.swudi, {}),
    ("swudi(time=2.0, density=1.0)", reference.swudi, {"time": 2.0, "density": 1.0}),
    ("swudi(density=0.3, start='mean')", reference.swudi, {"density": 0.3, "start": "mean"}),
    ("swudi(start='zero')", reference.swudi, {"start": "zero"}),
    ("aswudi()", reference.aswudi, {}),
    ("aswudi(start='mean')", reference.aswudi, {"start": "mean"}),
    ("dc_merge()", reference.dc_merge, {}),
    ("dc_merge(density=0.4)", reference.dc_merge, {"density": 0.4}),
    ("doge_ta()", doge, {}),
    (
        "doge_ta(scaling=0.5, density=0.8, subspace=2, steps=60, learning_rate=0.01)",
        doge,
        {"scaling": 0.5, "density": 0.8, "subspace": 2, "steps": 60, "learning_rate": 0.01},
    ),
]
# The order of the experts matters, and one whose delta is zero counts like any other.
ALL_COUNT = [
    ("dop()", reference.dop, {}),
    ("dop(decay=0.0, steps=30)", reference.dop, {"decay": 0.0, "steps": 30}),
    (
        "dop(alpha=0.3, decay=1.0, epsilon=0.7, learning_rate=0.01)",
        fixed,
        {"alpha": 0.3, "epsilon": 0.7, "learning_rate": 0.01},
    ),
    ("trust_region()", trust_region, {}),
    ("trust_region(scaling=1.0, quantile=0.4)", trust_region, {"scaling": 1.0, "quantile": 0.4}),
]
METHODS = [method for method, _, _ in [*CASES, *ALL_COUNT]]


@pytest.mark.parametrize(("method", "restated", "options"), [*CASES, *ALL_COUNT], ids=METHODS)
def test_equals_its_restatement(method, restated, options):
    taus = deltas(3)
    near(merged(method, taus, base=deltas(1, seed=9)[0]), restated(taus, **options), 2e-5)


@pytest.mark.parametrize(("method", "restated", "options"), CASES, ids=METHODS[: len(CASES)])
def test_an_expert_that_changes_nothing_is_left_out(method, restated, options):
    taus = [*deltas(2, seed=1), np.zeros((OUT, IN))]
    near(merged(method, taus), restated(taus, **options), 2e-5)


# Optima -------------------------------------------------------------------------------------------


def test_swudi_with_every_direction_is_the_gradient_flow():
    taus = deltas(3)
    gram, right = reference.normal_equation(taus)
    x = sum(taus)
    for _ in range(4000):
        x = x - 0.0005 * (x @ gram - right)
    near(merged("swudi(time=2.0, density=1.0)", taus), x, 2e-3)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        ("swudi(time=1e6, density=1.0)", 1e-4),
        ("wudi(steps=4000, learning_rate=0.003)", 1e-2),
    ],
)
def test_a_long_time_reaches_the_optimum(method, tolerance):
    taus = deltas(2)
    gram, right = reference.normal_equation(taus)
    near(merged(method, taus) @ gram, right, tolerance)


@pytest.mark.parametrize("method", ["wudi(learning_rate=0.01)", "swudi()", "aswudi()"])
def test_experts_that_read_other_inputs_are_added_up(method):
    one, two = deltas(2)
    taus = [one * (np.arange(IN) < 4), two * (np.arange(IN) >= 4)]
    near(merged(method, taus), sum(taus), 2e-5)


@pytest.mark.parametrize(
    "method", ["wudi(steps=50)", "swudi()", "aswudi(start='mean')", "dop()", "trust_region(1.0)"]
)
def test_one_expert_comes_back_to_the_bit(method):
    tau = deltas(1)[0]
    np.testing.assert_array_equal(merged(method, [tau]), tau)


def test_doge_returns_one_expert_where_its_factor_is_one():
    """But for rounding, which Adam makes a step of its learning rate."""
    tau = deltas(1)[0]
    method = mj.doge_ta(scaling=float(np.linalg.norm(tau)), density=1.0, learning_rate=1e-9)
    near(merged(method, [tau]), tau)


def test_opt_merge_and_dc_merge_of_one_expert_are_the_expert():
    tau = deltas(1)[0]
    near(merged("opt_merge()", [tau]), tau)
    near(merged("dc_merge(density=1.0)", [tau]), tau)


def test_doge_without_steps_is_task_arithmetic_with_a_factor_for_each_leaf():
    taus = deltas(3)
    expected = sum(0.07 * tau / np.linalg.norm(tau) for tau in taus)
    near(merged("doge_ta(steps=0, density=1.0)", taus), expected)


def test_the_masks_of_doge_are_those_of_the_whole_model():
    taus = [{"small": tau, "large": 4 * tau} for tau in deltas(2)]
    trees = [{n: {"kernel": np.float32(x.T)} for n, x in tau.items()} for tau in taus]
    base = {n: {"kernel": np.zeros((IN, OUT), np.float32)} for n in taus[0]}
    got = mj.merge("doge_ta(steps=20)", base, trees)
    masks = reference.doge_masks(taus, 0.3)
    for n in base:
        several = [tau[n] for tau in taus]
        expected = reference.doge(several, [mask[n] for mask in masks], steps=20)
        near(np.asarray(got[n]["kernel"], np.float64).T, expected, 2e-5)


def test_dop_stays_at_equal_experts():
    tau = deltas(1)[0]
    np.testing.assert_array_equal(merged("dop(learning_rate=0.1)", [tau, tau, tau]), tau)


def test_the_loss_of_dop_falls():
    taus = deltas(2)
    loss = lambda x: 0.7 * reference.dop_loss(x, taus[0]) + 0.3 * reference.dop_loss(x, taus[1])
    losses = [
        loss(merged(f"dop(alpha=0.7, decay=1.0, steps={steps}, learning_rate=0.003)", taus))
        for steps in (0, 10, 40, 160)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_a_long_descent_of_dop_reaches_the_exact_minimum():
    """P X + X Q = R, solved in the eigenvectors of P and Q."""
    taus, shares = deltas(2), (0.7, 0.3)
    weights = [reference.dop_weights(tau, 1.0 - 1e-12) for tau in taus]
    outputs = sum(s * p for s, (p, _) in zip(shares, weights, strict=True))
    inputs = sum(s * q for s, (_, q) in zip(shares, weights, strict=True))
    right = sum(
        s * (p @ tau + tau @ q) for s, (p, q), tau in zip(shares, weights, taus, strict=True)
    )
    (a, u), (b, v) = np.linalg.eigh(outputs), np.linalg.eigh(inputs)
    expected = u @ ((u.T @ right @ v) / (a[:, None] + b[None, :])) @ v.T
    method = "dop(alpha=0.7, decay=1.0, epsilon=1.0, steps=3000, learning_rate=0.003)"
    loss = lambda x: sum(
        s * reference.dop_loss(x, t, 1.0) for s, t in zip(shares, taus, strict=True)
    )
    got = merged(method, taus)
    assert loss(got) <= 1.02 * loss(expected)


def test_the_quantile_of_the_trust_region_is_that_of_the_whole_model():
    taus = [{"small": tau, "large": 4 * tau} for tau in deltas(3)]
    trees = [{n: np.float32(x) for n, x in tau.items()} for tau in taus]
    base = {n: np.zeros((OUT, IN), np.float32) for n in taus[0]}
    got = mj.merge("trust_region(quantile=0.6)", base, trees)
    for n, expected in reference.trust_region(taus, quantile=0.6).items():
        near(np.asarray(got[n], np.float64), expected)
    dropped = {n: int((np.asarray(x) == 0).sum()) for n, x in got.items()}
    assert dropped["small"] < dropped["large"]


# Symmetries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["swudi()", "aswudi()", "opt_merge()", "dc_merge(density=0.2)"])
def test_rotating_inputs_and_outputs_rotates_the_merged_delta(method):
    taus, left, right = deltas(2, seed=4), rotation(OUT, 1), rotation(IN, 2)
    rotated = merged(method, [left @ tau @ right.T for tau in taus])
    near(rotated, left @ merged(method, taus) @ right.T, 5e-5)


@pytest.mark.parametrize("method", ["dc_merge(density=0.2)", "dop()", "trust_region()"])
def test_transposed_experts_give_the_transposed_answer(method):
    taus = deltas(2, seed=5)
    near(merged(method, [tau.T for tau in taus]), merged(method, taus).T)


@pytest.mark.parametrize(
    "method",
    [
        "wudi(learning_rate=0.01)",
        "swudi()",
        "aswudi()",
        "opt_merge(learning_rate=0.01)",
        "doge_ta(scaling=1.0, learning_rate=0.01)",
    ],
)
def test_one_sided_methods_tell_inputs_from_outputs(method):
    taus = deltas(2, seed=5)
    got, turned = merged(method, taus), merged(method, [tau.T for tau in taus]).T
    assert np.linalg.norm(got - turned) > 0.01 * np.linalg.norm(got)


@pytest.mark.parametrize("factor", [1e-18, 1e-6, 1e12])
@pytest.mark.parametrize(
    "method", ["swudi()", "aswudi()", "opt_merge()", "dc_merge()", "trust_region()"]
)
def test_deltas_of_any_scale(method, factor):
    taus = deltas(2, seed=6)
    if method == "trust_region()" and factor == 1e-18:
        factor = 1e-12  # the product of two magnitudes must not underflow
    near(merged(method, [factor * tau for tau in taus]) / factor, merged(method, taus), 5e-5)


# Degenerate inputs --------------------------------------------------------------------------------

_ONE = deltas(1, seed=7)[0]
_LOW = np.outer(_ONE[:, 0], _ONE[0])


@pytest.mark.parametrize("method", one_of_each(METHODS))
@pytest.mark.parametrize(
    "taus",
    [[_ONE] * 3, [_ONE, -_ONE], [_LOW, _LOW], [_LOW, 2 * _LOW, _ONE], [0 * _ONE, _LOW]],
    ids=["equal", "opposite", "rank one", "parallel", "one zero"],
)
def test_degenerate_experts_give_a_finite_answer(method, taus):
    got = merged(method, taus)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got) <= 5 * sum(np.linalg.norm(tau) for tau in taus)


def test_more_experts_than_directions():
    taus = deltas(5, shape=(OUT, 3))
    near(merged("dc_merge()", taus), sum(taus) / 5)
    near(merged("opt_merge(learning_rate=0.1)", taus), sum(taus) / 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(mj.wudi, steps=-1), r"steps=.*at least 0, not -1"),
        (functools.partial(mj.opt_merge, steps=-1), r"steps=.*at least 0, not -1"),
        (functools.partial(mj.doge_ta, subspace=0), r"subspace=.*at least 1, not 0"),
        (functools.partial(mj.dop, steps=-2), r"steps=.*at least 0, not -2"),
        (functools.partial(mj.dop, space="rows"), r"'rows' is not a choice"),
        (functools.partial(mj.swudi, start="one"), r"'one' is not a choice"),
        (functools.partial(mj.dc_merge, density=0.0), r"density"),
        (functools.partial(mj.swudi, time=[1.0, 2.0]), r"time=\[1.0, 2.0\].*one number"),
        (functools.partial(mj.cart, density=[0.1, 0.2]), r"density=.*one number"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(mj.MergeError, match=message):
        list(mj.chains.walk(make()))
