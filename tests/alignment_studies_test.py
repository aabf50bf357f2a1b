"""Studies of networks from different seeds, on tiny ones."""

import jax
import ml_collections
import numpy as np
import pytest

import mergejax as mj
from mergejax import alignment, alignment_studies
from mergejax.alignment_studies import barrier, networks, rating, transformers, vit, widths
from mergejax.data.task import Split, Task

RNG = np.random.default_rng(0)
TEST = Split(RNG.random((60, 6, 6, 3), np.float32), RNG.integers(0, 3, 60).astype(np.int32))
IMAGES = RNG.random((250, 6, 6, 3), np.float32)


def drawn(model, seed):
    variables = jax.jit(model.init)(jax.random.key(seed), IMAGES[:1])
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (x + 0.1 * abs(generator.normal(size=x.shape))).astype(np.float32), variables
    )


def test_the_line_to_a_permuted_twin_is_flat_once_it_is_aligned():
    model = networks.Perceptron((12, 9), 3)
    a = drawn(model, 0)
    symmetries = alignment.symmetries(networks.function(model).__wrapped__, a, IMAGES[:2])
    twin = alignment.apply(symmetries, alignment.random(symmetries, 1), a)
    found = barrier.curves(model, [a, twin], IMAGES, TEST, points=3)
    barriers = {(r["alignment"], r["repaired"]): r["barrier"] for r in found}
    assert len(barriers) == 6
    assert max(abs(barriers[kind, False]) for kind in ("weights", "activations")) < 1e-5
    assert max(abs(barriers[kind, True]) for kind in ("weights", "activations")) < 1e-3
    line = next(r["loss"] for r in found if r["alignment"] == "none" and not r["repaired"])
    assert abs(line[1] - line[0]) > 1e-4
    text = barrier.table([{"network": "net", "seed": s, **r} for s in (0, 1) for r in found])
    assert len(text.splitlines()) == 5


def test_twins_merge_to_themselves_at_any_width():
    model = networks.Residual((4,), (5,), 3)
    a = networks.reestimated(model, drawn(model, 0), [IMAGES])
    symmetries = alignment.symmetries(networks.function(model).__wrapped__, a, IMAGES[:2])
    twin = alignment.apply(symmetries, alignment.random(symmetries, 1), a)
    task = Task("t", *[Split(IMAGES, np.zeros(250, np.int32))] * 3, ("a", "b", "c"), "t")
    wanted = networks.logits(model, a, TEST.inputs)

    def distance(several):
        found = sum(networks.logits(*one, TEST.inputs) for one in several) / len(several)
        return float(abs(found - wanted).max() / abs(wanted).max())

    found = widths.compare(model, [a, twin], [task, task], distance, 500, budgets=(1.5,))
    by_method = {r["method"]: r for r in found}
    for name in ("Re-Basin", "activation matching", "joined", "PLeaS", "ensemble"):
        assert by_method[name]["accuracy"] < 5e-3, name  # a distance here
    assert by_method["average"]["accuracy"] > 0.02
    assert 1.1 < by_method["PLeaS"]["cost"] < 1.7
    assert by_method["Re-Basin"]["cost"] == 1
    halves = widths.parts({"t": task}, ("t",))
    assert [len(half.labels) for half in halves] == [1, 1]
    with pytest.raises(mj.MergeError, match="must be one or two of"):
        widths.parts({"t": task}, ("u",))


def test_heads_and_the_stream_of_transformers_may_be_kept_apart():
    """A twin merges to itself; with all units apart two networks are their ensemble."""
    model = transformers.Transformer(3, 10, 4, (3,), (7,), 3)
    function, a, b = networks.function(model), drawn(model, 0), drawn(model, 1)
    symmetries = alignment.symmetries(function.__wrapped__, a, IMAGES[:2])
    free = vit.norms_apart(symmetries)
    twin = alignment.apply(symmetries, alignment.random(symmetries, 1), a)
    matched = alignment.weight_matching(symmetries, a, twin)
    order = alignment.identity(symmetries)
    scores = {name: np.arange(p.size).reshape(p.shape) for name, p in order.items()}
    times = rating.uses(model, a, IMAGES[:1])
    once = rating.multiplications(model, a, IMAGES[:1])
    for other, matching, ratio in (
        (twin, matched, 0.4),
        (b, alignment.Matching(order, scores, 0.0, 1), 1.0),
    ):
        orders = alignment.keep_apart(free, [matching], ratio)
        stats = alignment.statistics(free, orders, [a, other])
        merged = mj.merge("permute()|join()", None, [a, other], stats=stats)
        wide = transformers.rebuilt(model, merged)
        assert (wide.heads, wide.apart) == ((3 + int(3 * ratio),), int(10 * ratio))
        wanted = (function(a, IMAGES) + function(other, IMAGES)) / 2
        np.testing.assert_allclose(networks.function(wide)(merged, IMAGES), wanted, atol=1e-4)
        spent = rating.multiplications(wide, merged, IMAGES[:1]) / once
        assert spent == pytest.approx(alignment.cost(free, a, ratio, uses=times))


def test_an_unknown_study_is_refused():
    config = ml_collections.ConfigDict({"alignment": {"study": "barier", "seeds": (0,)}})
    with pytest.raises(mj.MergeError, match="did you mean 'barrier'"):
        alignment_studies.run(config, None, None)
