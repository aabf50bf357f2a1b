"""TALL-masks, Consensus and EMR-Merging: restatements from the formulas, and their invariants."""

import numpy as np
import pytest
import reference
import trees

import mergejax as mj

SHAPES = {"kernel": (4, 6), "bias": (6,), "deep": {"kernel": (4, 6)}}


def models(count, seed=0):
    base, experts = trees.models(count, shapes=SHAPES, seed=seed)
    return trees.flat(base), [trees.flat(expert) for expert in experts]


def several(base, experts, found):
    return [reference.added(base, delta) for delta in found]


# Restatements -------------------------------------------------------------------------------------


def masks(taus, merged, threshold):
    limits = reference.spread(threshold, len(taus))
    return [
        {n: np.abs(tau[n]) > limit * np.abs(merged[n] - tau[n]) for n in tau}
        for tau, limit in zip(taus, limits, strict=True)
    ]


def summed(taus):
    return {n: sum(tau[n] for tau in taus) for n in taus[0]}


def tall_masks(base, experts, threshold=0.4):
    taus = reference.deltas(base, experts)
    merged = summed(taus)
    kept = masks(taus, merged, threshold)
    return [{n: base[n] + merged[n] * mask[n] for n in base} for mask in kept]


def consensus(base, experts, threshold=0.4, agreement=2, scaling=0.3, host=summed):
    taus = reference.deltas(base, experts)
    merged = host(taus)
    kept = masks(taus, merged, threshold)
    votes = {n: sum(mask[n].astype(int) for mask in kept) for n in base}
    return {n: base[n] + scaling * merged[n] * (votes[n] >= agreement) for n in base}


def emr(base, experts, rescale="model"):
    taus = reference.deltas(base, experts)
    sign = {n: np.where(x > 0, 1, -1) for n, x in summed(taus).items()}
    unified = {
        n: sign[n] * np.max([np.abs(tau[n]) * (tau[n] * sign[n] > 0) for tau in taus], axis=0)
        for n in base
    }
    found = []
    for tau in taus:
        masked = {n: unified[n] * (tau[n] * sign[n] > 0) for n in base}
        size = {n: base[n].size if rescale == "tensor_mean" else 1 for n in base}
        above, below = (sum(np.abs(x[n]).sum() / size[n] for n in base) for x in (tau, masked))
        factor = 1 if rescale == "none" or below == 0 else above / below
        found.append({n: base[n] + factor * masked[n] for n in base})
    return found


@pytest.mark.parametrize("threshold", [0.0, 0.4, [0.2, 0.6, 1.5]])
def test_tall_masks(threshold):
    base, experts = models(3)
    got = mj.merge(mj.tall_masks(threshold=threshold), base, experts)
    for model, expected in zip(got, tall_masks(base, experts, threshold), strict=True):
        trees.close(model, expected)


@pytest.mark.parametrize("agreement", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("threshold", [0.4, [0.2, 0.6, 1.5]])
def test_consensus(threshold, agreement):
    base, experts = models(3)
    got = mj.merge(mj.consensus(threshold, agreement, scaling=0.7), base, experts)
    trees.close(got, consensus(base, experts, threshold, agreement, 0.7))


def test_consensus_over_another_method():
    base, experts = models(3)

    def host(taus):
        return reference.ties_delta(taus, density=0.5, reduction="sum")

    got = mj.merge("ties(density=0.5, reduction='sum')|consensus_mask(0.3, 1)", base, experts)
    trees.close(got, consensus(base, experts, 0.3, 1, 1.0, host))


@pytest.mark.parametrize("threshold", [0.3, [0.2, 0.6, 1.5]])
def test_tall_masks_over_another_method(threshold, tiny_blocks):
    base, experts = models(3)
    taus = reference.deltas(base, experts)
    merged = reference.ties_delta(taus, density=0.5, reduction="sum")
    kept = masks(taus, merged, threshold)
    method = mj.chain(mj.ties(0.5, reduction="sum"), mj.task_masks(threshold))
    for model, mask in zip(mj.merge(method, base, experts), kept, strict=True):
        trees.close(model, {n: base[n] + merged[n] * mask[n] for n in base})
    plain = mj.chain(mj.total(), mj.task_masks(threshold))
    expected = mj.merge(mj.tall_masks(threshold), base, experts)
    trees.equal(mj.merge(plain, base, experts), expected)


@pytest.mark.parametrize("rescale", ["model", "tensor_mean", "none"])
def test_emr(rescale):
    base, experts = models(3)
    got = mj.merge(mj.emr(rescale=rescale), base, experts)
    for model, expected in zip(got, emr(base, experts, rescale), strict=True):
        trees.close(model, expected)


# Invariants ---------------------------------------------------------------------------------------


def test_a_larger_threshold_shrinks_every_mask():
    base, experts = models(4)
    zero = {n: np.zeros_like(x) for n, x in base.items()}
    deltas = [{n: expert[n] - base[n] for n in base} for expert in experts]
    before = None
    for threshold in (0.0, 0.2, 0.4, 0.8, 2.0):
        models_ = mj.merge(mj.tall_masks(threshold=threshold), zero, deltas)
        active = np.concatenate([model[n].ravel() != 0 for model in models_ for n in sorted(zero)])
        assert before is None or np.all(active <= before)
        before = active
    assert 0 < before.sum() < before.size


def test_threshold_zero_keeps_what_an_expert_changed():
    base, experts = models(2)
    for model, expert in zip(mj.merge(mj.tall_masks(0.0), base, experts), experts, strict=True):
        for n in base:
            total = sum(other[n] - base[n] for other in experts)
            expected = np.where(expert[n] != base[n], base[n] + total, base[n])
            np.testing.assert_allclose(model[n], expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["tall_masks()", "emr()", "emr(rescale='tensor_mean')"])
def test_one_expert_comes_back(method):
    base, experts = models(1)
    trees.close(mj.merge(method, base, experts), experts[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["tall_masks()", "emr()"])
def test_an_expert_that_equals_the_base_stays_the_base_to_the_bit(method):
    base, experts = models(2)
    got = mj.merge(method, base, [base, *experts])
    trees.equal(got[0], base)
    trees.equal(mj.merge(method, base, [base, base])[1], base)


def test_emr_never_opposes_an_expert():
    base, experts = models(3)
    for model, expert in zip(mj.merge(mj.emr(), base, experts), experts, strict=True):
        for n in base:
            assert np.all((model[n] - base[n]) * (expert[n] - base[n]) >= 0)


def test_emr_keeps_every_experts_norm():
    base, experts = models(3)
    zero = {n: np.zeros_like(x) for n, x in base.items()}
    deltas = [{n: expert[n] - base[n] for n in base} for expert in experts]
    for model, delta in zip(mj.merge(mj.emr(), zero, deltas), deltas, strict=True):
        norms = [sum(np.abs(tree[n]).sum() for n in tree) for tree in (model, delta)]
        np.testing.assert_allclose(*norms, rtol=1e-5)


def test_a_draw_elects_minus():
    base = {"w": np.zeros(1, np.float32)}
    experts = [{"w": np.float32([2])}, {"w": np.float32([-2])}]
    plus, minus = mj.merge(mj.emr(), base, experts)
    assert plus["w"] == 0
    assert minus["w"] == -2


def test_consensus_of_no_expert_is_task_arithmetic():
    base, experts = models(3)
    trees.equal(
        mj.merge(mj.consensus(agreement=0, scaling=0.4), base, experts),
        mj.merge(mj.task_arithmetic(0.4), base, experts),
    )


def test_huge_and_tiny_deltas_stay_finite():
    base = {"w": np.zeros(4, np.float32)}
    experts = [{"w": np.float32([1e30, 1e-38, 0, 1])}, {"w": np.float32([-1e30, 1e-38, 0, 2])}]
    for method in ("tall_masks()", "consensus()", "emr()"):
        for x in trees.flat(mj.merge(method, base, experts)).values():
            assert np.isfinite(x).all()


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("consensus(threshold=[0.1, 0.2])", "has 2 numbers, but there are 3 experts"),
        ("tall_masks(threshold=[0.1])", "has 1 numbers, but there are 3 experts"),
        ("consensus_mask()", "behind total(), mean() or a named method"),
        ("task_masks()|ties()", "write ties()|task_masks()"),
        ("total()|task_masks()|scale(0.5)", "gives every expert a model of its own, but the chain"),
        ("total()|tall_masks()", "write tall_masks()|total()"),
        ("total()|lines_multi_task(beta=[1, 2, 3])", "holds for all experts together"),
    ],
)
def test_is_refused_in_words(method, sentence):
    base, experts = models(3)
    with pytest.raises(mj.MergeError) as error:
        mj.merge(method, base, experts)
    assert sentence in str(error.value)
    assert str(error.value).count("\n") == 0


def test_an_impossible_threshold_is_refused():
    with pytest.raises(
        mj.MergeError, match=r"tall_masks\(threshold=\.\.\.\) must be in \[0, inf\)"
    ):
        mj.tall_masks(threshold=-0.1)
