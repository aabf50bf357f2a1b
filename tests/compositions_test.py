"""Modifiers before and behind other methods: any of them goes with any method."""

import numpy as np
import pytest
import trees

import mergejax as mj

SHAPES = {
    "embed": {"bias": (8,)},
    "block_0": {"kernel": (4, 8), "bias": (8,)},
    "block_1": {"kernel": (4, 8), "bias": (8,)},
}
# One method of each family; those that take a fixed number of experts or statistics of data apart.
HOSTS = [
    "task_arithmetic(scaling=0.4)",
    "ties(density=0.5)",
    "pcb(density=0.4)",
    "sce(density=0.5)",
    "consensus()",
    "model_stock()",
    "opcm()",
    "tsv_merge()",
]
FEW = HOSTS[:2]
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
    "lines_multi_task(beta=0.3)": None,
    "scale(scaling=0.5)": "scale(scaling=1.0)",
    "consensus_mask()": "consensus_mask(agreement=0)",
    "svc(alpha=0.2)": None,
    "subspace_boosting(beta=0.1)": "subspace_boosting(beta=1.0)",
    "match_norm()": None,
    "to_mean_norm()": None,
}
# These methods end with what the modifier does.
DONE_ALREADY = {
    ("consensus_mask()", "consensus()"),
    ("match_norm()", "opcm()"),
    ("to_mean_norm()", "opcm()"),
}


@pytest.fixture(scope="module")
def models():
    return trees.models(3, shapes=SHAPES)


def merged(text, models):
    return trees.flat(mj.merge(text, *models))


def moved(one, other):
    return max(np.abs(one[n] - other[n]).max() for n in one)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("modifier", BEFORE)
def test_a_modifier_goes_before_any_method(modifier, host, models):
    modified = merged(f"{modifier}|{host}", models)
    assert all(np.isfinite(x).all() for x in modified.values())
    assert moved(modified, merged(host, models)) > 1e-6


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("modifier", BEHIND)
def test_a_modifier_goes_behind_any_method(modifier, host, models):
    modified = merged(f"{host}|{modifier}", models)
    assert all(np.isfinite(x).all() for x in modified.values())
    changed = moved(modified, merged(host, models)) > 1e-6
    assert changed == ((modifier, host) not in DONE_ALREADY)


@pytest.mark.parametrize("host", FEW)
@pytest.mark.parametrize("neutral", [text for text in BEFORE.values() if text])
def test_a_neutral_modifier_changes_nothing_before(neutral, host, models):
    expected = merged(host, models)
    trees.close(merged(f"{neutral}|{host}", models), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("host", FEW)
@pytest.mark.parametrize("neutral", [text for text in BEHIND.values() if text])
def test_a_neutral_modifier_changes_nothing_behind(neutral, host, models):
    expected = merged(host, models)
    trees.close(merged(f"{host}|{neutral}", models), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("modifier", ["lines_multi_task()", "match_norm()", "consensus_mask()"])
def test_what_refines_a_merged_delta_cannot_stand_before_the_reduction(modifier, models):
    label = modifier.split("(")[0]
    with pytest.raises(mj.MergeError, match=f"'{label}' refines a merged delta") as raised:
        merged(f"{modifier}|ties()", models)
    assert "put it behind total(), mean() or a named method" in str(raised.value)


@pytest.mark.parametrize("modifier", ["inverse_norm()", "equal_norms()", "elect_sign()"])
def test_what_needs_all_experts_cannot_stand_behind_the_reduction(modifier, models):
    label = modifier.split("(")[0]
    with pytest.raises(
        mj.MergeError, match=f"'{label}' needs all experts, but the chain"
    ) as raised:
        merged(f"ties()|{modifier}", models)
    assert "put it before the reduction" in str(raised.value)


def test_interpolation_of_a_part_of_the_model(models):
    """Sub-tree merges, as between modalities: one part moves, the others stay or are another's."""
    base, (expert, *_) = models
    rule = mj.by_name({"block_1": 0.3, "block_0": 1.0, ".*": 0.0})
    got = mj.merge(mj.task_arithmetic(scaling=rule), base, [expert])
    np.testing.assert_array_equal(got["embed"]["bias"], base["embed"]["bias"])
    np.testing.assert_allclose(got["block_0"]["bias"], expert["block_0"]["bias"], rtol=1e-6)
    between = 0.7 * base["block_1"]["kernel"] + 0.3 * expert["block_1"]["kernel"]
    np.testing.assert_allclose(got["block_1"]["kernel"], between, rtol=1e-5, atol=1e-6)
