"""FeatCal against its formulas in NumPy, float64, against its objectives, and block by block."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

import mergejax as mj

SHAPES = {"dense": {"kernel": (5, 3), "bias": (3,)}, "norm": {"scale": (4,), "bias": (4,)}}
BARE = {"dense": {"kernel": (5, 3)}, "norm": {"scale": (4,)}}
OPTIONS = {"scaling": 0.4, "ridge": 0.1, "extrapolation": 1.7, "expert_share": 0.3}


def wide(tree):
    return {name: np.asarray(x, np.float64) for name, x in trees.flat(tree).items()}


def drawn(shapes, rows=30, seed=3):
    """Models, and for each expert: the merged model's inputs, the expert's, a norm's z."""
    base, experts = trees.models(3, shapes=shapes, seed=seed)
    rng = np.random.default_rng(seed)
    data = []
    for size in (1.0, 10.0, 0.3):
        x = size * (rng.normal(size=(rows, 5)) + 0.5)
        z = rng.normal(size=(rows, 4))
        data.append((x, x + 0.3 * size * rng.normal(size=x.shape), z + 0.2))
    return base, experts, data


def collected(data):
    def q(x, e):
        side = np.concatenate([x, e, np.ones((len(x), 1))], axis=1)
        return {"dense/kernel": np.float32(side.T @ side / len(x))}

    return {
        "drift": [q(x, e) for x, e, _ in data],
        "norm_moments": [
            {"norm/scale": np.float32([np.mean(z**2, 0), np.mean(z, 0)])} for *_, z in data
        ],
    }


def restated(base, experts, data, scaling, ridge, extrapolation, expert_share):
    """Section 8 of the paper's forms, from the rows themselves."""
    base, experts = wide(base), [wide(expert) for expert in experts]
    student = {n: x + scaling * sum(e[n] - x for e in experts) for n, x in base.items()}
    anchor = {n: extrapolation * student[n] + (1 - extrapolation) * x for n, x in base.items()}
    left, right = ridge * np.eye(5), ridge * anchor["dense/kernel"]
    targets = [expert_share * e + (1 - expert_share) * x for x, e, _ in data]
    sizes = [np.linalg.norm(x.T @ x / len(x)) for x, *_ in data]
    for (x, *_), t, f, e in zip(data, targets, sizes, experts, strict=True):
        left = left + x.T @ x / len(x) / f
        right = right + x.T @ t / len(x) / f @ e["dense/kernel"]
    merged = {"dense/kernel": np.linalg.solve(left, right)}
    if "dense/bias" in base:
        shift = [
            (e["dense/bias"] + t.mean(0) @ e["dense/kernel"] - x.mean(0) @ merged["dense/kernel"])
            / f
            for (x, *_), t, f, e in zip(data, targets, sizes, experts, strict=True)
        ]
        mass = sum(1 / f for f in sizes) + ridge
        merged["dense/bias"] = (sum(shift) + ridge * anchor["dense/bias"]) / mass
    both = "norm/bias" in base
    names = ["norm/scale", "norm/bias"][: 1 + both]
    for name in names:
        merged[name] = np.zeros(4)
    for d in range(4):  # least squares on the rows of every feature
        rows = [np.stack([z[:, d], np.ones(len(z))][: 1 + both], 1) for *_, z in data]
        left = sum(r.T @ r / len(r) for r in rows) + ridge * np.eye(1 + both)
        right = ridge * np.array([anchor[n][d] for n in names])
        for r, e in zip(rows, experts, strict=True):
            right = right + r.T @ r / len(r) @ np.array([e[n][d] for n in names])
        for name, value in zip(names, np.linalg.solve(left, right), strict=True):
            merged[name][d] = value
    return merged


@pytest.mark.parametrize("shapes", [SHAPES, BARE], ids=["biases", "no biases"])
def test_equals_its_restatement_with_and_without_biases(shapes):
    base, experts, data = drawn(shapes)
    merged = mj.merge(mj.featcal(**OPTIONS), base, experts, stats=collected(data))
    expected = restated(base, experts, data, **OPTIONS)
    # The ridge bounds the condition number: 4 roundings of the largest entry for each of 100.
    for name, x in expected.items():
        np.testing.assert_allclose(trees.flat(merged)[name], x, rtol=0, atol=5e-5, err_msg=name)


def test_the_layer_is_a_minimum_for_its_kernel_then_for_its_bias_and_the_norm_for_both():
    base, experts, data = drawn(SHAPES)
    merged = wide(mj.merge(mj.featcal(**OPTIONS), base, experts, stats=collected(data)))
    base, experts = wide(base), [wide(expert) for expert in experts]
    pull, rho, share = OPTIONS["ridge"], OPTIONS["extrapolation"], OPTIONS["expert_share"]
    reach = rho * OPTIONS["scaling"]
    anchor = {n: x + reach * sum(e[n] - x for e in experts) for n, x in base.items()}

    def objective(model, parts, bias):
        loss = pull * sum(np.sum((model[n] - anchor[n]) ** 2) for n in parts)
        for (x, ahead, z), e in zip(data, experts, strict=True):
            if "norm/scale" in parts:
                out = [m["norm/scale"] * z + m["norm/bias"] for m in (model, e)]
                loss += np.mean(np.sum((out[0] - out[1]) ** 2, axis=1))
                continue
            target = share * ahead + (1 - share) * x
            gap = target @ e["dense/kernel"] - x @ model["dense/kernel"]
            gap = gap + bias * (e["dense/bias"] - model["dense/bias"])
            loss += np.mean(np.sum(gap**2, axis=1)) / np.linalg.norm(x.T @ x / len(x))
        return loss

    rng = np.random.default_rng(0)
    norm = ("norm/scale", "norm/bias")
    for parts, bias in ((("dense/kernel",), 0), (("dense/bias",), 1), (norm, 0)):
        best = objective(merged, parts, bias)
        for step in (1e-2, 1e-3):
            for _ in range(5):
                moves = {n: step * rng.normal(size=merged[n].shape) for n in parts}
                ends = [
                    objective({**merged, **{n: merged[n] + sign * m for n, m in moves.items()}},
                              parts, bias) for sign in (1, -1)
                ]  # fmt: skip
                assert min(ends) > best
                # A quadratic: half the difference of both ends is the slope along the move.
                assert abs(ends[0] - ends[1]) < 1e-3 * (sum(ends) - 2 * best) + 1e-9


class Norm(nn.Module):
    """A dense layer and a norm: what one block of the models below is."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.LayerNorm(name="norm")(nn.Dense(6, name="dense")(x)))


def test_block_by_block_it_looks_at_the_calibrated_model_and_at_the_experts():
    blocks = [
        mj.Block((name,), lambda params, x, n=name: Norm().apply({"params": params[n]}, x))
        for name in ("first", "second")
    ]
    one = Norm().init(jax.random.key(0), jnp.zeros((1, 6)))["params"]
    base, *experts = (
        jax.tree.map(
            lambda x, s=seed: np.float32(x + 0.3 * np.random.default_rng(s).normal(size=x.shape)),
            {"first": one, "second": one},
        )
        for seed in range(3)
    )
    data = [np.random.default_rng(s).normal(size=(20, 6)).astype(np.float32) for s in (7, 8)]
    found = mj.sequential("featcal()", blocks, base, experts, [[x] for x in data])
    # By hand: the first block calibrated, both streams carried on, the second one calibrated.
    streams = [(x, x) for x in data]
    for block in blocks:
        (name,) = block.leaves
        cut = lambda tree, name=name: {name: tree[name]}
        parts = [cut(base), *(cut(expert) for expert in experts)]
        student = mj.merge("task_arithmetic(0.3)", parts[0], parts[1:])
        stats = {"drift": [], "norm_moments": []}
        for (x, ahead), part in zip(streams, parts[1:], strict=True):
            stats["drift"].append(mj.collect.drift(block.apply, student, part, [(x, ahead)]))
            stats["norm_moments"].append(mj.collect.norm_moments(block.apply, student, [x]))
        expected = mj.merge("featcal()", parts[0], parts[1:], stats=stats)
        trees.close(cut(found), expected, rtol=0, atol=1e-6)
        pairs = zip(streams, parts[1:], strict=True)
        streams = [(block.apply(expected, x), block.apply(p, ahead)) for (x, ahead), p in pairs]

    # What it is for: the outputs are nearer to the experts' than task arithmetic's.
    def gap(tree):
        total = 0.0
        for x, expert in zip(data, experts, strict=True):
            outputs = []
            for model in (tree, expert):
                hidden = x
                for block in blocks:
                    hidden = block.apply(model, hidden)
                outputs.append(hidden)
            total += float(jnp.mean((outputs[0] - outputs[1]) ** 2))
        return total

    assert gap(found) < 0.8 * gap(mj.merge("task_arithmetic(0.3)", base, experts))


def test_without_ridge_and_drift_its_kernels_are_the_regression_on_gram_matrices():
    base, experts, data = drawn(SHAPES)
    still = [(x, x, z) for x, _, z in data]
    merged = mj.merge("featcal(ridge=0.0)", base, experts, stats=collected(still))
    grams = [{"dense/kernel": np.float32(x.T @ x)} for x, *_ in data]
    unit = [{n: g / np.linalg.norm(g) for n, g in tree.items()} for tree in grams]
    expected = mj.merge("regmean(shrink=1.0)", None, experts, stats={"gram": unit})
    got = merged["dense"]["kernel"]
    np.testing.assert_allclose(got, expected["dense"]["kernel"], atol=2e-4)
