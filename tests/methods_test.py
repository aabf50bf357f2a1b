"""Every method against its restatement in `reference.py`."""

import functools

import numpy as np
import pytest
import reference
import trees
from restated import ids, merged_and_restated

import mergejax as mj


def shaped(function, *facts):
    """Gives a restatement what it wants to know of the tree: its blocks or its kernels."""

    def call(tree, base, experts, stats, **options):
        known = {"blocks": trees.blocks(tree), "kernels": trees.kernels(tree), **stats}
        return function(base, experts, **{fact: known[fact] for fact in facts}, **options)

    return call


linear = shaped(reference.linear)
task_arithmetic = shaped(reference.task_arithmetic)
ties = shaped(reference.ties)
slerp = shaped(reference.slerp)
lines = shaped(reference.lines, "blocks")
multi_task = shaped(reference.lines_multi_task, "blocks")
opcm = shaped(reference.opcm, "kernels")


def fisher(tree, base, experts, stats, **options):
    return reference.fisher(base, experts, stats["fisher"], **options)


def regmean(tree, base, experts, stats, **options):
    return reference.regmean(base, experts, stats["gram"], **options)


def dare(tree, base, experts, stats, **options):
    return reference.dare(base, experts, stats["mask"], **options)


def dare_ties(tree, base, experts, stats, rate, rescale, **options):
    taus = reference.dropped(reference.deltas(base, experts), stats["mask"], rate, rescale)
    return reference.added(base, reference.ties_delta(taus, **options))


def dare_mean(tree, base, experts, stats, rate, weights):
    taus = reference.dropped(reference.deltas(base, experts), stats["mask"], rate, "inverse")
    return reference.added(base, reference.linear(None, taus, weights))


def lines_ties(tree, base, experts, stats, density, beta):
    host = functools.partial(reference.ties_delta, density=density)
    return reference.lines_multi_task(base, experts, trees.blocks(tree), beta, host)


MERGEKIT = {"scope": "tensor", "cut": "exact", "zero": "plus"}
# Experts, a method that takes the options itself or a whole chain, its restatement, the options.
CASES = [
    (3, "average", linear, {}),
    (3, "linear", linear, {"weights": [0.5, 2, -0.25]}),
    (2, "linear", linear, {"weights": [0.5, 2], "normalize": False}),
    (3, "task_arithmetic", task_arithmetic, {}),
    (1, "task_arithmetic", task_arithmetic, {"scaling": -1.5}),
    (3, "task_arithmetic", task_arithmetic, {"scaling": 0.7, "weights": [1, 0, 3]}),
    (3, "ties", ties, {}),
    (4, "ties", ties, {"density": 0.35, "scaling": 0.4, "reduction": "sum"}),
    (3, "ties", ties, {"density": 0.6, "reduction": "max"}),
    (2, "ties", ties, {"density": 1.0, "sign": "count"}),
    (3, "ties", ties, {"density": [0.1, 0.5, 1], "weights": [1, 2, 0.5]}),
    (3, "ties", ties, {"density": 0.3, "cut": "complement"}),
    (2, "ties", ties, {"density": 0.4, "scope": "tensor"}),
    (2, "ties", ties, {"density": 0.4, "scope": "tensor", "cut": "complement"}),
    (3, "ties", ties, {"density": [0.3, 0.6, 0.01], **MERGEKIT}),
    (3, "ties", ties, {"density": 0.5, "weights": [1, -2, 0.5], "sign": "count", **MERGEKIT}),
    (3, "drop_given(0.4)|task_arithmetic(0.5)", dare, {"rate": 0.4, "scaling": 0.5}),
    (
        2,
        "drop_given([0.2, 1.0], rescale='norm')|total()",
        dare,
        {"rate": [0.2, 1.0], "scaling": 1.0, "rescale": "norm"},
    ),
    (2, "drop_given(1.0)|total()", dare, {"rate": 1.0, "scaling": 1.0}),
    (
        3,
        "drop_given(0.9, rescale='none')|ties(density=0.3)",
        dare_ties,
        {"rate": 0.9, "rescale": "none", "density": 0.3},
    ),
    (3, "drop_given(0.4)|mean(weights=[1, 2, 3])", dare_mean, {"rate": 0.4, "weights": [1, 2, 3]}),
    (2, "total()|lines(alpha=0.2, beta=1.3)", lines, {"alpha": 0.2, "beta": 1.3}),
    (3, "total()|lines_multi_task(beta=0.7)", multi_task, {"beta": 0.7}),
    (
        3,
        "ties(density=0.3)|lines_multi_task(beta=0.4)",
        lines_ties,
        {"density": 0.3, "beta": 0.4},
    ),
    (2, "slerp", slerp, {}),
    (2, "slerp", slerp, {"t": -0.3}),
    (3, "fisher", fisher, {}),
    (2, "fisher", fisher, {"weights": [0.9, 0.1], "floor": 0.2, "floor_rule": "maximum"}),
    (3, "fisher", fisher, {"floor": 0.1, "floor_rule": "first", "normalize": False}),
    (2, "fisher", fisher, {"floor": 0.01, "floor_rule": "added"}),
    (2, "fisher", fisher, {"floor": 0.0, "normalize": False, "weights": [0, 1]}),
    (3, "regmean", regmean, {}),
    (2, "regmean", regmean, {"shrink": 0.0, "weights": [1, 3]}),
    (4, "opcm", opcm, {}),
    (3, "opcm", opcm, {"alpha": 0.8, "zero_diagonal": True}),
    (3, "opcm", opcm, {"alpha": 0.0}),
    (3, "opcm", opcm, {"alpha": 1.0}),
]
HALF = [
    case
    for case in CASES
    if case[1:]
    in (("task_arithmetic", task_arithmetic, {}), ("ties", ties, {}), ("regmean", regmean, {}))
]


@pytest.mark.parametrize(("count", "method", "restated", "options"), CASES, ids=ids(CASES))
def test_equals_its_restatement(count, method, restated, options):
    models = trees.models(count)
    got, expected = merged_and_restated(models, method, restated, options)
    trees.close(got, expected, rtol=3e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("count", "method", "restated", "options"), HALF, ids=ids(HALF))
def test_half_precision_is_rounded_once(count, method, restated, options, dtype):
    models = trees.models(count, dtype)
    got, expected = merged_and_restated(models, method, restated, options)
    kind = trees.TYPES[dtype]
    for name, x in expected.items():
        assert got[name].dtype == kind
        near = [(x + shift * (1e-6 + 1e-6 * abs(x))).astype(kind) for shift in (-1, 0, 1)]
        assert np.any([got[name] == y for y in near], axis=0).all(), name


def test_opcm_at_alpha_one_protects_only_directions_that_exist():
    base = {"kernel": np.zeros((2, 2), np.float32)}
    first, second = np.diag([2.0, 0.0]).astype(np.float32), np.eye(2, dtype=np.float32)
    got = mj.merge("opcm(alpha=1.0)", base, [{"kernel": first}, {"kernel": second}])["kernel"]
    assert got[1, 1] > 0
    np.testing.assert_allclose(got[0, 0] / got[1, 1], 2.0, rtol=1e-6)


def test_a_mask_per_leaf_may_be_missing():
    base, (expert,) = trees.models(1)
    given = {"out/kernel": np.zeros((5, 7), np.uint8)}
    method = mj.chain(mj.by_stats(mask=mj.drop_given(0.0), otherwise=mj.scale(1.0)), mj.total())
    got = mj.merge(method, base, [expert], stats={"mask": [given]})
    np.testing.assert_array_equal(got["out"]["kernel"], base["out"]["kernel"])
    np.testing.assert_array_equal(got["block_1"]["gate"], expert["block_1"]["gate"])
