"""Methods that read statistics of data: restatements, optimality, limits, deficient statistics."""

import functools

import numpy as np
import pytest
import reference_statistics as reference
import trees
from restated import made

import mergejax as mj

SHAPES = {
    "embed": {"kernel": (3, 7)},
    "block_0": {"dense": {"kernel": (5, 7), "bias": (7,)}, "norm": {"scale": (7,), "bias": (7,)}},
    "block_1": {"dense": {"kernel": (5, 7), "bias": (7,)}, "norm": {"scale": (7,), "bias": (7,)}},
}
EVERY = ("gram", "output_gram", "norm_square", "fisher", "block_fisher")


@functools.cache
def inputs(count):
    base, experts = trees.models(count, shapes=SHAPES, seed=3)
    return base, experts, trees.statistics(EVERY, experts)


CASES = [
    (3, "lot", reference.lot, {}),
    (2, "lot", reference.lot, {"scaling": 1.0, "weights": [64, 16]}),
    (3, "cat", reference.cat, {}),
    (4, "cat", reference.cat, {"directions": -1, "penalty": 2.0, "norm_penalty": 0.5}),
    (2, "cat", reference.cat, {"directions": 1, "penalty": 0.0, "norm_count": 0, "bias_count": 1}),
    (3, "mats", reference.mats, {}),
    (3, "mats", reference.mats, {"shrink": 0.5, "scaling": 0.1}),
    (2, "mats", reference.mats, {"operator": "kfac"}),
    (3, "mats", reference.mats, {"operator": "fisher"}),
    (3, "mats", reference.mats, {"operator": "block_fisher"}),
    (3, "bayesian", reference.bayesian, {}),
    (2, "bayesian", reference.bayesian, {"ridge": 0.01, "scaling": 1.7, "anchor_scaling": 0.5}),
    (3, "bayesian_data_free", functools.partial(reference.bayesian, data_free=True), {}),
]
ITERATED = {"mats": {"steps": 2000, "tolerance": 1e-7}}  # to convergence


@pytest.mark.parametrize(
    ("count", "method", "restated", "options"), CASES, ids=[f"{c[1]}{c[3]}" for c in CASES]
)
def test_equals_its_restatement(count, method, restated, options):
    base, experts, stats = inputs(count)
    chain = mj.chain(made(method, {**ITERATED.get(method, {}), **options}))
    read = {need: stats[need] for need in chain.needs}
    got = trees.flat(mj.merge(chain, base, experts, stats=read))
    flat = trees.flat(base), [trees.flat(expert) for expert in experts]
    expected = restated(*flat, stats, **options)
    # Conjugate gradients end at 1e-7 of the residual, times the condition of the Fisher's floor.
    loose = 1e-3 if options.get("operator") == "fisher" else 2e-5
    trees.close(got, expected, rtol=3e-6, atol=loose)


# What is stated as a minimum is one ---------------------------------------------------------------


def drift(w, targets, grams):
    return sum(np.trace((w - t).T @ g @ (w - t)) for t, g in zip(targets, grams, strict=True))


def layer(expert):
    return np.asarray(expert["block_0"]["dense"]["kernel"], np.float64)


@pytest.mark.parametrize("method", ["lot(scaling=1.0)", "mats(steps=500)", "regmean(shrink=1.0)"])
def test_the_result_is_a_minimum_of_the_drift(method):
    base, experts, stats = inputs(3)
    chain = mj.parse(method)
    merged = mj.merge(chain, base, experts, stats={n: stats[n] for n in chain.needs})
    w, targets = layer(merged), [layer(expert) for expert in experts]
    grams = [g["block_0/dense/kernel"].astype(np.float64) for g in stats["gram"]]
    slope = sum(g @ (w - t) for g, t in zip(grams, targets, strict=True))
    size = np.linalg.norm(sum(g @ t for g, t in zip(grams, targets, strict=True)))
    assert np.linalg.norm(slope) < 1e-5 * size
    rng = np.random.default_rng(0)
    for _ in range(10):
        other = w + 1e-2 * rng.normal(size=w.shape)
        assert drift(other, targets, grams) > drift(w, targets, grams)


@pytest.mark.parametrize(
    "method",
    ["lot(scaling=1.0)", "mats()", "regmean(shrink=1.0)", "total()|scale(0.5)|anchored_solve(0.0)"],
)
def test_few_rows_stay_finite_and_beat_the_average(method):
    base, experts, _ = inputs(2)
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=(2, 5)) for _ in experts]  # of 5 features
    grams = [np.float32(x.T @ x / 2) for x in rows]
    chain = mj.parse(f"by_stats(gram={method}, otherwise=mean())") if "|" in method else None
    chain = chain or mj.parse(method)
    stats = {"gram": [{"block_0/dense/kernel": g} for g in grams], "norm_square": [{}, {}]}
    merged = mj.merge(chain, base, experts, stats={n: stats[n] for n in chain.needs})
    w, targets = layer(merged), [layer(expert) for expert in experts]
    average = np.mean(targets, axis=0)
    assert np.isfinite(w).all()
    assert drift(w, targets, grams) < 0.5 * drift(average, targets, grams)
    assert np.linalg.norm(w - average) < 10 * np.linalg.norm(targets[0] - targets[1])


def test_bayesian_limits_are_the_regression_and_the_anchor():
    base, experts, stats = inputs(3)
    stats = {"gram": stats["gram"]}
    merge = lambda method: trees.flat(mj.merge(method, base, experts, stats=stats))
    kernel = "block_1/dense/kernel"
    unit = [{n: g / np.linalg.norm(g) for n, g in tree.items()} for tree in stats["gram"]]
    solved = mj.merge("regmean(shrink=1.0)", base, experts, stats={"gram": unit})
    free = merge("bayesian(ridge=0.0)")[kernel]
    np.testing.assert_allclose(free, trees.flat(solved)[kernel], atol=2e-5)
    anchor = trees.flat(mj.merge("task_arithmetic(0.3)", base, experts))[kernel]
    np.testing.assert_allclose(merge("bayesian(ridge=1e6)")[kernel], anchor, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_anchored_layer_is_a_minimum_of_drift_and_pull(ridge):
    base, experts, stats = inputs(3)
    merged = mj.merge(mj.bayesian(ridge=ridge), base, experts, stats={"gram": stats["gram"]})
    targets, start = [layer(expert) for expert in experts], layer(base)
    anchor = start + 0.3 * sum(w - start for w in targets)
    grams = [g["block_0/dense/kernel"].astype(np.float64) for g in stats["gram"]]
    grams = [g / np.linalg.norm(g) for g in grams]
    w = layer(merged)
    slope = sum(g @ (w - t) for g, t in zip(grams, targets, strict=True)) + ridge * (w - anchor)
    size = np.linalg.norm(sum(g @ (anchor - t) for g, t in zip(grams, targets, strict=True)))
    assert np.linalg.norm(slope) < 1e-4 * size
    pulled = lambda w: drift(w, targets, grams) + ridge * np.sum((w - anchor) ** 2)
    rng = np.random.default_rng(0)
    assert all(pulled(w + 1e-2 * rng.normal(size=w.shape)) > pulled(w) for _ in range(10))


def test_fisher_is_the_joint_optimum_of_the_experts_own_quadratics():
    """Losses Σ F_i (θ − θ_i)² / 2 with diagonal F_i: their sum is least where fisher merges."""
    base, experts, stats = inputs(3)
    merged = trees.flat(
        mj.merge("fisher(normalize=False, floor=0.0)", base, experts,
                 stats={"fisher": stats["fisher"]})
    )  # fmt: skip
    for name, x in merged.items():
        curvature = [np.asarray(f[name], np.float64) for f in stats["fisher"]]
        centers = [np.asarray(trees.flat(e)[name], np.float64) for e in experts]
        slope = sum(f * (x - c) for f, c in zip(curvature, centers, strict=True))
        assert np.abs(slope).max() < 1e-5 * max(np.abs(c).max() for c in centers)


def test_frobenius_weights_are_the_regression_with_multiples_of_the_identity():
    """FroM next to RegMean: Gram matrices |delta|^2 I."""
    base, experts, _ = inputs(3)
    deltas = [layer(expert) - layer(base) for expert in experts]
    name = "block_0/dense/kernel"
    grams = [{name: np.float32((d**2).sum() * np.eye(5))} for d in deltas]
    got = mj.merge("frobenius_weighted(power=2.0)", base, experts)
    expected = mj.merge("regmean()", base, experts, stats={"gram": grams})
    np.testing.assert_allclose(layer(got), layer(expected), atol=1e-5)


@pytest.mark.parametrize("shrink", [1.0, 0.4])
def test_joint_biases_are_the_optimum_of_kernel_and_bias_and_beat_averaged_ones(shrink):
    """The least squares over the rows themselves, a column of ones beside them; conv and dense."""
    shapes = {"dense": {"kernel": (5, 3), "bias": (3,)}, "conv": {"kernel": (3, 1, 2, 4)}}
    shapes["conv"]["bias"] = (4,)
    _, experts = trees.models(3, shapes=shapes, seed=3)
    rng = np.random.default_rng(2)
    names = {"dense/kernel": 5, "conv/kernel": 6}
    rows = [{n: rng.normal(size=(30, k)) + 1 - i for n, k in names.items()} for i in range(3)]

    def gram(x, one):
        x = np.concatenate([x, np.ones((len(x), one))], axis=1)
        return x.T @ x / len(x)

    stats = [{n: np.float32(gram(x, 1)) for n, x in several.items()} for several in rows]
    method = f"regmean(shrink={shrink}, biases='joint')"
    merged = mj.merge(method, None, experts, stats={"affine_gram": stats})
    for part, name in (("dense", "dense/kernel"), ("conv", "conv/kernel")):
        layers = [
            np.concatenate([as_matrix(m[part]["kernel"], part), m[part]["bias"][None]])
            for m in (merged, *experts)
        ]
        grams = [gram(several[name], 1) for several in rows]
        for g, several in zip(grams, rows, strict=True):  # covariances of unlike inputs shrink
            covariance = np.cov(several[name].T, bias=True)
            g[:-1, :-1] -= (1 - shrink) * (covariance - np.diag(np.diag(covariance)))
        slope = sum(g @ (layers[0] - w) for g, w in zip(grams, layers[1:], strict=True))
        size = np.linalg.norm(sum(g @ w for g, w in zip(grams, layers[1:], strict=True)))
        assert np.linalg.norm(slope) < 1e-5 * size
        if shrink == 1:
            apart = [{n: np.float32(gram(x, 0)) for n, x in several.items()} for several in rows]
            plain = mj.merge("regmean(shrink=1.0)", None, experts, stats={"gram": apart})[part]
            plain = np.concatenate([as_matrix(plain["kernel"], part), plain["bias"][None]])
            assert drift(layers[0], layers[1:], grams) < 0.95 * drift(plain, layers[1:], grams)


def as_matrix(kernel, part):
    kernel = np.asarray(kernel, np.float64)
    return kernel if part == "dense" else kernel.transpose(2, 0, 1, 3).reshape(6, 4)


def test_kfac_with_identical_output_sides_is_the_regression():
    base, experts, stats = inputs(2)
    sides = [
        {n: np.eye(len(g), dtype=np.float32) for n, g in t.items()} for t in stats["output_gram"]
    ]
    got = mj.merge(
        mj.mats(operator="kfac", steps=500),
        base,
        experts,
        stats={"gram": stats["gram"], "output_gram": sides},
    )
    expected = mj.merge("regmean(shrink=1.0)", base, experts, stats={"gram": stats["gram"]})
    np.testing.assert_allclose(layer(got), layer(expected), atol=2e-5)


def test_cat_without_trimming_is_task_arithmetic_and_trims_to_nothing_seen():
    base, experts, stats = inputs(3)
    read = {n: stats[n] for n in ("gram", "norm_square")}
    whole = mj.merge("task_arithmetic(0.4)", base, experts)
    for method in (
        "cat(directions=0, norm_count=0, bias_count=0)",
        "cat(penalty=1e6, norm_penalty=1e6, bias_count=0)",
    ):
        trees.close(mj.merge(method, base, experts, stats=read), whole, rtol=1e-6, atol=2e-6)
    # Two experts, every direction: what the second changes can no longer be seen by the first.
    zero = {"kernel": np.zeros((1, 3), np.float32)}
    taus = [{"kernel": np.float32([x])} for x in ([[0, 0, 1], [1, 2, 0]])]
    grams = [{"kernel": np.full((1, 1), g, np.float32)} for g in (9.0, 1.0)]
    statistics = {"gram": grams, "norm_square": [{}, {}]}
    merged = mj.merge("cat(scaling=1.0, directions=-1)", zero, taus, stats=statistics)
    np.testing.assert_allclose(merged["kernel"], [[0, 0, 1]], atol=1e-6)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "stats", "sentence"),
    [
        (
            "lot()",
            {},
            "needs the statistic 'norm_square', which no leaf has; .*collect.norm_square",
        ),
        ("mats(operator='kfac')", {}, "needs the statistic 'output_gram'"),
        ("cat(directions=-2)", None, "whole number of at least -1, not -2"),
        ("match_inputs(steps=-1)", None, "whole number of at least 0, not -1"),
    ],
)
def test_bad_input_is_told_in_a_sentence(method, stats, sentence):
    base, experts, _ = inputs(2)
    with pytest.raises(mj.MergeError, match=sentence):
        mj.merge(method, base, experts, stats=stats)


def test_masks_that_are_learned():
    base, experts, _ = inputs(2)
    with pytest.raises(mj.MergeError, match="there is no batch to learn from"):
        mj.collect.localize(lambda params, batch: 0.0, base, experts[0], [])
    with pytest.raises(mj.MergeError, match="the mask is empty"):
        mj.collect.localize(lambda p, b: 0.0 * p["embed"]["kernel"].sum(), base, base, [0])


def test_groups_are_searched_without_compiling_again_and_the_budget_holds():
    base, experts, stats = inputs(2)
    grams = {"gram": stats["gram"]}
    wanted = mj.bayesian(ridge=mj.by_name({"block_0": 0.01, ".*": 1.0}))
    target = layer(mj.merge(wanted, base, experts, stats=grams))
    scores = []

    def score(rules):
        merged = mj.merge(mj.bayesian(**rules), base, experts, stats=grams)
        scores.append(-np.abs(layer(merged) - target).max())
        return scores[-1]

    space = {"ridge": (1e-3, 10.0, "log")}
    found = mj.search_groups(score, ["block_0", ".*"], space, trials=24)
    assert len(scores) == len(found.trials) == 24
    assert found.score == max(scores) > np.median(scores)
    again = mj.search_groups(score, ["block_0", ".*"], space, trials=24)
    assert repr(again.best) == repr(found.best)
    with pytest.raises(mj.MergeError, match="the range of 'ridge' is"):
        mj.search_groups(score, [".*"], {"ridge": (0.0, 1.0, "log")})
