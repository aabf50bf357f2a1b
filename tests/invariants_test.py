"""Invariants of the methods' specifications, on drawn models."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
from hypothesis import settings

import mergejax as mj

SHAPES = {"kernel": (4, 6), "bias": (6,)}
# Multiples of 1/64, so that sums and differences are exact in float32.
grid = st.integers(-512, 512).map(lambda n: n / 64)
trees_of = {name: arrays.arrays(np.float32, shape, elements=grid) for name, shape in SHAPES.items()}
model = st.fixed_dictionaries(trees_of)
three = st.tuples(model, model, model)
two = st.tuples(model, model)
factor = st.floats(-2, 2, width=32)
share = st.floats(0, 1, width=32)
ZERO = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def given(*strategies):
    """Few examples: a merge takes some milliseconds."""
    return lambda test: settings(max_examples=25)(hypothesis.given(*strategies)(test))


def plus(base, *deltas):
    return {name: base[name] + sum(delta[name] for delta in deltas) for name in base}


def times(number, tree):
    return {name: np.asarray(number * x, np.float32) for name, x in tree.items()}


def equal(got, expected):
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x)


def close(got, expected, rtol=2e-5, atol=2e-5):
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, rtol=rtol, atol=atol)


def norm(tree):
    return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in tree.values()))


# Averages and task arithmetic ---------------------------------------------------------------------


@given(model, three)
def test_average_is_task_arithmetic_with_one_over_n(base, deltas):
    experts = [plus(base, delta) for delta in deltas]
    close(mj.merge(mj.average(), None, experts), mj.merge(mj.task_arithmetic(1 / 3), base, experts))


@given(three, st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_linear_does_not_depend_on_the_sum_of_its_weights(experts, weights):
    doubled = [2 * w for w in weights]
    equal(
        mj.merge(mj.linear(weights=doubled), None, experts),
        mj.merge(mj.linear(weights=weights), None, experts),
    )


@given(model, three)
def test_task_arithmetic_with_zero_scaling_is_the_base_to_the_bit(base, experts):
    equal(mj.merge(mj.task_arithmetic(0.0), base, experts), base)


@given(model, three, factor)
def test_task_arithmetic_is_linear_in_its_scaling(base, deltas, scaling):
    experts = [plus(base, delta) for delta in deltas]
    expected = plus(base, times(scaling, plus(*deltas)))
    close(mj.merge(mj.task_arithmetic(scaling), base, experts), expected)


# TIES ---------------------------------------------------------------------------------------------


@given(three, st.floats(0.05, 1))
def test_ties_takes_each_element_from_experts_of_one_sign(deltas, density):
    merged = mj.merge(mj.ties(density=density), ZERO, deltas)
    for name, x in merged.items():
        several = np.stack([delta[name] for delta in deltas])
        highest = np.where(x > 0, several.max(0), np.where(x < 0, -several.min(0), 0))
        assert np.all(np.abs(x) <= highest)


@given(three)
def test_ties_of_everything_with_equal_signs_is_the_mean_of_what_is_not_zero(deltas):
    deltas = [{name: np.abs(x) for name, x in delta.items()} for delta in deltas]
    several = {name: np.stack([delta[name] for delta in deltas]) for name in ZERO}
    counts = {name: np.maximum((x != 0).sum(0), 1) for name, x in several.items()}
    expected = {name: several[name].sum(0) / counts[name] for name in ZERO}
    close(mj.merge(mj.ties(density=1.0), ZERO, deltas), expected)


@given(three, st.sampled_from([0.25, 2.0, 32.0]), st.sampled_from(["model", "tensor"]))
def test_ties_scales_with_its_deltas(deltas, number, scope):
    method = mj.ties(density=0.3, scope=scope)
    merged = mj.merge(method, ZERO, deltas)
    equal(mj.merge(method, ZERO, [times(number, d) for d in deltas]), times(number, merged))


@given(model, st.floats(0.05, 1))
def test_ties_of_one_expert_is_its_trimmed_delta(delta, density):
    trimmed = mj.merge(mj.chain(mj.trim(density), mj.total()), ZERO, [delta])
    equal(mj.merge(mj.ties(density=density), ZERO, [delta]), trimmed)
    kept = sum(int((np.asarray(x) != 0).sum()) for x in trimmed.values())
    left = [np.abs(x[np.asarray(trimmed[n]) == 0]) for n, x in delta.items()]
    smallest = [np.abs(np.asarray(x)[np.asarray(x) != 0]) for x in trimmed.values()]
    if kept:
        assert np.concatenate(left).max(initial=0) < np.concatenate(smallest).min()


# DARE ---------------------------------------------------------------------------------------------


@given(model, three, st.integers(0, 2**31 - 1))
def test_dropping_nothing_changes_nothing_and_dropping_all_gives_the_base(base, experts, seed):
    host = mj.ties(density=0.4)
    merged = mj.merge(mj.chain(mj.drop(0.0), host), base, experts, seed=seed)
    equal(merged, mj.merge(host, base, experts))
    equal(mj.merge(mj.dare(rate=1.0), base, experts, seed=seed), base)


@given(model, st.floats(0.1, 0.9), st.integers(0, 2**31 - 1))
def test_dropped_elements_are_zero_and_others_are_rescaled(delta, rate, seed):
    dropped = mj.merge(mj.dare(rate=rate, scaling=1.0), ZERO, [delta], seed=seed)
    for name, x in dropped.items():
        kept = np.asarray(x) != 0
        np.testing.assert_allclose(np.asarray(x)[kept], delta[name][kept] / (1 - rate), rtol=1e-5)


@given(model, st.integers(0, 2**31 - 1))
def test_norm_matching_keeps_the_l1_norm_of_each_leaf(delta, seed):
    dropped = mj.merge(mj.dare(0.3, 1.0, rescale="norm"), ZERO, [delta], seed=seed)
    for name, x in dropped.items():
        if np.any(np.asarray(x)):
            np.testing.assert_allclose(np.abs(x).sum(), np.abs(delta[name]).sum(), rtol=1e-5)


# LiNeS --------------------------------------------------------------------------------------------


def deep(trees):
    return {"embed": trees[0], **{f"block_{i}": tree for i, tree in enumerate(trees)}}


DEEP_ZERO = deep([ZERO] * 3)


@given(three, share, factor)
def test_lines_scales_each_block_by_its_depth(deltas, alpha, beta):
    merged = mj.merge(mj.chain(mj.total(), mj.lines(alpha, beta)), DEEP_ZERO, [deep(deltas)])
    close(merged["embed"], times(alpha, deltas[0]), atol=1e-4)
    for i in range(3):
        close(merged[f"block_{i}"], times(alpha + beta * i / 2, deltas[i]), atol=1e-4)


@given(three)
def test_lines_with_alpha_one_and_beta_zero_is_the_identity(deltas):
    method = mj.chain(mj.total(), mj.lines(alpha=1.0, beta=0.0))
    merged = mj.merge(method, DEEP_ZERO, [deep(deltas)])
    for name, tree in deep(deltas).items():
        equal(merged[name], tree)


@given(three)
def test_lines_for_several_tasks_behind_the_sum_starts_from_one_over_n(deltas):
    experts = [deep(deltas), deep(deltas[::-1])]
    merged = mj.merge(mj.chain(mj.total(), mj.lines_multi_task(beta=0.0)), DEEP_ZERO, experts)
    mean = mj.merge(mj.average(), None, experts)
    for name in mean:
        close(merged[name], mean[name])


# SLERP --------------------------------------------------------------------------------------------


@given(two)
def test_slerp_ends_at_its_two_models(models):
    for t in (0.0, 1.0):
        merged = mj.merge(mj.slerp(t=t), None, models)
        close(merged, models[int(t)], rtol=1e-5, atol=1e-5)


@given(two, share)
def test_slerp_backwards_is_the_same_arc(models, t):
    there = mj.merge(mj.slerp(t=t), None, models)
    close(there, mj.merge(mj.slerp(t=1 - t), None, models[::-1]), rtol=1e-4, atol=1e-4)


@given(model, model, share)
def test_slerp_keeps_an_equal_norm(first, second, t):
    for name, x in first.items():
        if np.linalg.norm(x) > 0 and np.linalg.norm(second[name]) > 0:
            scaled = second[name] * (np.linalg.norm(x) / np.linalg.norm(second[name]))
            cosine = np.vdot(x, scaled) / np.linalg.norm(x) ** 2
            if abs(cosine) < 0.99:
                merged = mj.merge(mj.slerp(t=t), None, [{name: x}, {name: scaled}])
                np.testing.assert_allclose(
                    np.linalg.norm(merged[name]), np.linalg.norm(x), rtol=1e-3
                )


# Fisher -------------------------------------------------------------------------------------------

information = st.fixed_dictionaries(
    {
        name: arrays.arrays(np.float32, shape, elements=st.floats(0.015625, 8, width=32))
        for name, shape in SHAPES.items()
    }
)


@given(three, st.tuples(information, information, information))
def test_fisher_stays_between_its_experts(experts, fishers):
    merged = mj.merge(mj.fisher(), None, experts, stats={"fisher": fishers})
    for name, x in merged.items():
        several = np.stack([expert[name] for expert in experts])
        assert np.all(x <= several.max(0) + 1e-5)
        assert np.all(x >= several.min(0) - 1e-5)


@given(three, information)
def test_equal_fishers_give_the_weighted_mean(experts, fisher):
    weights = [0.5, 1.0, 3.0]
    merged = mj.merge(mj.fisher(weights=weights), None, experts, stats={"fisher": [fisher] * 3})
    close(merged, mj.merge(mj.linear(weights=weights), None, experts))


@given(two, st.tuples(information, information), st.sampled_from([2.0**-20, 2.0**12]))
def test_rescaling_all_fishers_changes_nothing(experts, fishers, number):
    scaled = [times(number, fisher) for fisher in fishers]
    for method in (mj.fisher(), mj.fisher(normalize=False)):
        merged = mj.merge(method, None, experts, stats={"fisher": fishers})
        close(mj.merge(method, None, experts, stats={"fisher": scaled}), merged)


@given(two, information)
def test_an_expert_that_knows_nothing_is_left_out(experts, fisher):
    nothing = times(0.0, fisher)
    merged = mj.merge(mj.fisher(), None, experts, stats={"fisher": [nothing, fisher]})
    close(merged, experts[1], rtol=1e-6, atol=1e-6)


# RegMean ------------------------------------------------------------------------------------------


def grams_of(seed, count, rows=20, width=4):
    inputs = np.random.default_rng(seed).normal(size=(count, rows, width))
    return [{"kernel": np.asarray(x.T @ x / rows, np.float32)} for x in inputs]


@given(three, st.integers(0, 99), share)
def test_regmean_is_where_the_gradient_of_its_objective_vanishes(experts, seed, shrink):
    grams = grams_of(seed, 3)
    merged = mj.merge(mj.regmean(shrink=shrink), None, experts, stats={"gram": grams})
    gradient, scale = 0.0, 0.0
    for gram, expert in zip(grams, experts, strict=True):
        g = gram["kernel"].astype(np.float64)
        g = shrink * g + (1 - shrink) * np.diag(np.diag(g))
        gradient = gradient + g @ (np.asarray(merged["kernel"]) - expert["kernel"])
        scale = max(scale, np.abs(g @ expert["kernel"]).max())
    assert np.abs(gradient).max() <= 1e-4 * max(scale, 1)
    close(
        {"bias": merged["bias"]},
        mj.merge(mj.average(), None, [{"bias": e["bias"]} for e in experts]),
    )


@given(two)
def test_regmean_solves_two_tasks_on_disjoint_inputs_exactly(experts):
    supports = [np.diag([1.0, 1, 0, 0]), np.diag([0.0, 0, 1, 1])]
    grams = [{"kernel": support.astype(np.float32)} for support in supports]
    merged = mj.merge(mj.regmean(shrink=1.0), None, experts, stats={"gram": grams})["kernel"]
    expected = np.concatenate([experts[0]["kernel"][:2], experts[1]["kernel"][2:]])
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)


@given(two, st.integers(0, 99))
def test_regmean_of_a_single_example_stays_finite_and_near_the_mean(experts, seed):
    grams = grams_of(seed, 2, rows=1)
    merged = mj.merge(mj.regmean(shrink=1.0), None, experts, stats={"gram": grams})["kernel"]
    several = np.stack([expert["kernel"] for expert in experts])
    spread = np.linalg.norm(several[0] - several[1])
    assert np.linalg.norm(merged - several.mean(0)) <= 10 * spread + 1e-5


# OPCM ---------------------------------------------------------------------------------------------


@given(model, three)
def test_opcm_moves_as_far_as_the_experts_do_on_average(base, deltas):
    experts = [plus(base, delta) for delta in deltas]
    for count in (1, 2, 3):
        merged = mj.merge(mj.opcm(), base, experts[:count])
        moved = norm({name: np.asarray(merged[name]) - base[name] for name in base})
        mean = np.mean([norm(delta) for delta in deltas[:count]])
        if moved > 0:
            np.testing.assert_allclose(moved, mean, rtol=1e-4)


@given(st.integers(0, 99), st.floats(0.3, 0.95))
def test_opcm_leaves_nothing_of_a_new_expert_in_the_protected_subspace(seed, alpha):
    first, second = np.random.default_rng(seed).normal(size=(2, 5, 8)).astype(np.float32)
    base = {"kernel": np.zeros((5, 8), np.float32)}
    summed = mj.chain(mj.orthogonal_total(alpha))
    merged = mj.merge(summed, base, [{"kernel": first}, {"kernel": second}])["kernel"]
    added = np.asarray(merged, np.float64) - first
    left, values, right = np.linalg.svd(first.astype(np.float64))
    rank = int(np.argmax(np.cumsum(values) / values.sum() > alpha))
    inside = left[:, :rank].T @ added @ right[:rank].T
    np.testing.assert_allclose(inside, 0, atol=2e-4)
    outside = left.T @ (second - added) @ right.T
    outside[:rank, :rank] = 0
    np.testing.assert_allclose(outside, 0, atol=2e-4)


@given(model, three)
def test_opcm_without_a_subspace_is_task_arithmetic_of_the_mean_norm(base, deltas):
    experts = [plus(base, delta) for delta in deltas]
    merged = mj.merge(mj.opcm(alpha=0.0), base, experts)
    total = plus(*deltas)
    if norm(total) > 1:
        scaling = np.mean([norm(delta) for delta in deltas]) / norm(total)
        close(merged, plus(base, times(scaling, total)), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 99))
def test_opcm_turns_with_its_deltas(seed):
    rng = np.random.default_rng(seed)
    experts = [rng.normal(size=(4, 6)) for _ in range(3)]
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 6))
    turned = [left @ x @ right for x in experts]

    def merged(kernels):
        trees = [{"kernel": np.asarray(x, np.float32)} for x in kernels]
        return np.asarray(mj.merge(mj.opcm(), {"kernel": ZERO["kernel"]}, trees)["kernel"])

    np.testing.assert_allclose(merged(turned), left @ merged(experts) @ right, atol=1e-4)
