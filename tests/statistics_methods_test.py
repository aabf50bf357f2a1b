"""Methods that read statistics of data: restatements, optimality, limits, deficient statistics."""

import functools

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
