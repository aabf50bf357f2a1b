"""Modifiers before and behind other methods: any of them goes with any method.

A modifier before a method is the method on modified experts, but that what refines a merged delta
always compares with the experts as they are; one behind a method that looks at nothing but the
merged delta is the modifier on the method's result. The base is zero, so that a model is its delta
and the two ways agree but for the last bits.
"""

import jax
import numpy as np
import pytest
import trees

import mergejax as mj

SHAPES = {
    "embed": {"bias": (8,)},
    "block_0": {"kernel": (4, 8), "bias": (8,)},
    "block_1": {"kernel": (4, 8), "bias": (8,)},
}
KERNELS = {f"block_{i}": {"kernel": (4, 8)} for i in range(2)}
HOSTS = ["task_arithmetic(scaling=0.4)", "ties(density=0.5)", "tsv_merge()"]
# A modifier, and values with which it does nothing (None where there are none).
BEFORE = {
    "drop(rate=0.3)": "drop(rate=0.0)",
    "drop_by_rank(density=0.7, spread=0.2)": "drop_by_rank(density=1.0, spread=0.0)",
    "trim(density=0.3)": "trim(density=1.0)",
    "lines(alpha=0.2, beta=0.8)": "lines(alpha=1.0, beta=0.0)",
    "inverse_norm()": None,
    "equal_norms()": None,
    "select_variance(density=0.5)": "select_variance(density=1.0)",
}
BEHIND = {
    "lines(alpha=0.2, beta=0.8)": "lines(alpha=1.0, beta=0.0)",
    "scale(scaling=0.5)": "scale(scaling=1.0)",
    "subspace_boosting(beta=0.3)": "subspace_boosting(beta=1.0)",
}
# These compare with the experts.
REFINING = {
    "lines_multi_task(beta=0.3)": None,
    "consensus_mask()": "consensus_mask(agreement=0)",
    "svc(alpha=0.2)": None,
    "match_norm()": None,
    "to_mean_norm()": None,
}
NEUTRAL = [text for text in {**BEHIND, **REFINING}.values() if text]


def drawn(count, shapes=SHAPES):
    base, experts = trees.models(count, shapes=shapes)
    deltas = [jax.tree.map(lambda x, b: x - b, expert, base) for expert in experts]
    return jax.tree.map(np.zeros_like, base), deltas


@pytest.fixture(scope="module")
def models():
    return drawn(3)


def merged(method, base, experts, **options):
    return trees.flat(mj.merge(method, base, experts, **options))


def moved(one, other):
    return max(np.abs(one[n] - other[n]).max() for n in one)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("modifier", BEFORE)
def test_a_modifier_goes_before_a_method(modifier, host, models):
    base, experts = models
    expected = merged(host, base, mj.merge(modifier, base, experts))
    got = merged(f"{modifier}|{host}", base, experts)
    trees.close(got, expected, rtol=2e-6, atol=1e-7)
    assert moved(got, merged(host, base, experts)) > 1e-6


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("modifier", [*BEHIND, *REFINING])
def test_a_modifier_goes_behind_a_method(modifier, host, models):
    base, experts = models
    alone = merged(host, base, experts)
    got = merged(f"{host}|{modifier}", base, experts)
    assert moved(got, alone) > 1e-6
    if modifier in BEHIND:
        expected = merged(f"total()|{modifier}", base, [mj.merge(host, base, experts)])
        trees.close(got, expected, rtol=2e-6, atol=1e-7)


def _looks_back(stage):
    """Whether a stage reads the experts' own deltas, as they were before any modifier."""
    recalls = any(current.recall is not None for current in stage.build().rounds)
    return stage.kind == "refine" or recalls


REDUCING = [n for n in mj.METHODS if mj.chains.reduces(mj.METHODS[n].make())]


@pytest.mark.parametrize("name", REDUCING)
def test_any_method_takes_modifiers_before_and_behind_it(name):
    base, experts = drawn(mj.METHODS[name].experts or 3, KERNELS)
    before, behind = "lines(alpha=0.2, beta=0.8)", "lines(alpha=0.5, beta=0.5)"
    # Random masks depend on the place in the chain.
    options = mj.METHODS[name].neutral if name in ("dare", "della") else {}
    method = trees.chain_of(name, **options)
    stats = trees.statistics(method.needs, experts)
    chain = mj.chain(mj.parse(before), method, mj.parse(behind))
    got = merged(chain, base, experts, stats=stats)
    if any(_looks_back(stage) for stage in mj.chains.walk(method)):
        assert moved(got, merged(method, base, experts, stats=stats)) > 1e-6
        return
    modified = mj.merge(before, base, experts)
    modified = modified if len(experts) > 1 else [modified]
    alone = mj.merge(method, base, modified, stats=stats)
    expected = merged(f"total()|{behind}", base, [alone])
    trees.close(got, expected, rtol=5e-6, atol=2e-7)


@pytest.mark.parametrize("neutral", [text for text in BEFORE.values() if text])
def test_a_neutral_modifier_changes_nothing_before(neutral, models):
    expected = merged(HOSTS[1], *models)
    trees.close(merged(f"{neutral}|{HOSTS[1]}", *models), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("neutral", NEUTRAL)
def test_a_neutral_modifier_changes_nothing_behind(neutral, models):
    expected = merged(HOSTS[1], *models)
    trees.close(merged(f"{HOSTS[1]}|{neutral}", *models), expected, rtol=2e-6, atol=1e-7)


def refusal(method, models):
    with pytest.raises(mj.MergeError) as raised:
        mj.merge(method, *models)
    return str(raised.value)


@pytest.mark.parametrize("modifier", ["lines_multi_task()", "match_norm()", "consensus_mask()"])
def test_what_refines_a_merged_delta_cannot_stand_before_the_reduction(modifier, models):
    told = refusal(f"{modifier}|ties()", models)
    assert f"'{modifier.split('(')[0]}' refines a merged delta" in told
    assert f"write ties()|{modifier}" in told


@pytest.mark.parametrize("modifier", ["inverse_norm()", "equal_norms()", "elect_sign()"])
def test_what_needs_all_experts_cannot_stand_behind_the_reduction(modifier, models):
    told = refusal(f"ties()|{modifier}", models)
    assert f"'{modifier.split('(')[0]}' needs all experts, but the chain" in told
    assert f"write {modifier}|ties()" in told


def test_interpolation_of_a_part_of_the_model():
    """Sub-tree merges, as between modalities: one part moves, the others stay or are another's."""
    base, (expert, *_) = trees.models(1, shapes=SHAPES)
    rule = mj.by_name({"block_1": 0.3, "block_0": 1.0, ".*": 0.0})
    got = mj.merge(mj.task_arithmetic(scaling=rule), base, [expert])
    np.testing.assert_array_equal(got["embed"]["bias"], base["embed"]["bias"])
    np.testing.assert_allclose(got["block_0"]["bias"], expert["block_0"]["bias"], rtol=1e-6)
    between = 0.7 * base["block_1"]["kernel"] + 0.3 * expert["block_1"]["kernel"]
    np.testing.assert_allclose(got["block_1"]["kernel"], between, rtol=1e-5, atol=1e-6)
