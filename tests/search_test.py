import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj
from mergejax import search

NAMES = ["a", "b", "c"]


def searched(chains, base, experts, measure, data, stats=None, advance=lambda n: None):
    programs = search.prepare(
        chains, base, experts, measure, data, names=NAMES, seed=5, stats=stats
    )
    return search.search(programs, base, experts, data, stats=stats, advance=advance)


def trees(seed=0, count=3):
    generator = np.random.default_rng(seed)

    def tree():
        draw = lambda *shape: generator.normal(size=shape).astype(np.float32)
        return {f"block_{i}": {"kernel": draw(4, 5), "bias": draw(5)} for i in range(3)}

    return tree(), [tree() for _ in range(count)]


def weights(merged, data):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(merged)]) + data


@pytest.mark.parametrize(
    ("chains", "programs"),
    [
        ([f"ties(density={d}, scaling={s})" for d in (0.2, 0.7) for s in (0.5, 1.5)], 1),
        ([f"dare(rate={r}, scaling=0.4)" for r in (0.1, 0.6, 0.9)], 1),
        (["ties(density=0.4)", "ties(density=0.4, sign='count')", "ties(density=0.9)"], 2),
        (["linear(weights=[1.0, 2.0, 3.0])", "linear(weights=[3.0, 1.0, 1.0])"], 1),
        (["average()"], 1),
        (["task_arithmetic(scaling=1.0)|lines_multi_task(beta=0.7)"], 1),
        (["tsv_merge(scaling=0.5)", "tsv_merge(scaling=1.5)"], 0),  # leaf by leaf
    ],
)
def test_search_equals_one_merge_after_the_other(chains, programs):
    base, experts = trees()
    found = searched(chains, base, experts, weights, jnp.float32(2))
    assert found.programs == programs
    for chain, row in zip(chains, found.measured, strict=True):
        alone = mj.merge(chain, base, experts, names=NAMES, seed=5)
        np.testing.assert_allclose(row, weights(alone, jnp.float32(2)), rtol=1e-5, atol=1e-5)


def test_search_traces_once_for_all_numbers_and_reports_progress():
    base, experts = trees()
    traced, steps = [], []

    def measure(merged, data):
        traced.append(1)
        return merged["block_0"]["bias"]

    chains = [f"task_arithmetic(scaling={s})" for s in np.linspace(0, 1, 40)]
    found = searched(chains, base, experts, measure, None, advance=steps.append)
    assert len(traced) == 1
    assert steps == [40]
    assert found.measured.shape == (40, 5)
    assert len(np.unique(found.measured, axis=0)) == 40


def test_search_passes_statistics():
    base, experts = trees()
    stats = {"fisher": [jax.tree.map(np.square, tree) for tree in experts]}
    chain = "fisher(floor=0.01)"
    found = searched([chain], base, experts, weights, jnp.float32(0), stats=stats)
    alone = mj.merge(chain, base, experts, names=NAMES, stats=stats)
    # Base and delta are of the order of 1: where they cancel, their own rounding is left.
    measured = weights(alone, jnp.float32(0))
    np.testing.assert_allclose(found.measured[0], measured, rtol=1e-5, atol=5e-7)


def test_ties_on_validation_go_to_the_first_setting():
    # 0.1 + 0.2 and 0.3 differ in their last bit; that must not decide.
    rows = np.array([[0.2, 0.2], [0.3, 0.3], [0.1 + 0.2, 0.3], [0.1, 0.4]])
    assert search.best(rows) == 1


def test_every_grid_makes_distinct_readable_chains():
    for name in search.RECIPES:
        chains = search.settings(name, search.grids(), experts=2)
        assert len(chains) == len(set(chains)) > 1
        for chain in chains:
            mj.parse(chain)


def test_usual_methods_apply_unless_their_number_of_experts_differs():
    names, left_out = search.applicable(5)
    assert set(names) == {*search.USUAL} - {"slerp"}
    assert left_out == ["slerp: left out, it takes 2 experts and there are 5"]
    assert "slerp" in search.applicable(2)[0]


def test_every_registered_method_is_meant_or_left_out_with_its_reason():
    names, left_out = search.applicable(5, everything=True)
    reasons = dict(sentence.split(": left out, ") for sentence in left_out)
    alone = {name for name, entry in mj.METHODS.items() if not entry.modifier}
    assert alone | set(search.RECIPES) == {*names, *reasons}
    assert reasons["tall_masks"] == "it gives one model per expert"
    assert reasons["nearswap"] == "it takes 1 experts and there are 5"


def test_emphasis_gives_each_expert_in_turn_a_weight():
    chains = search.settings("linear", {"linear": {"emphasis": (2.0,)}}, experts=3)
    assert chains == [
        "linear(weights=[2.0, 1.0, 1.0])",
        "linear(weights=[1.0, 2.0, 1.0])",
        "linear(weights=[1.0, 1.0, 2.0])",
    ]


def test_coefficients_are_a_grid_of_two_and_draws_of_more():
    grid = {"fisher_coefficients": {"coefficients": (3,)}}
    assert search.settings("fisher_coefficients", grid, experts=2) == [
        f"fisher(weights={weights})" for weights in ([0.0, 1.0], [0.5, 0.5], [1.0, 0.0])
    ]
    found = [mj.parse(chain) for chain in search.settings("fisher_coefficients", grid, experts=3)]
    assert len(found) == 3
    grid = {"fisher_coefficients": {"coefficients": (1,)}}
    with pytest.raises(mj.MergeError, match="expected at least one expert and two points"):
        search.settings("fisher_coefficients", grid, experts=3)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("tis", "config.methods: no method is called 'tis', did you mean 'ties'?"),
        ("ties(densty=0.2)", "ties() has no parameter 'densty', did you mean 'density'?"),
        ("ties(density=1.5)", "ties(density=...) must be in (0, 1], not 1.5"),
        ("dare_tie", "config.methods: no method is called 'dare_tie', did you mean 'dare_ties'?"),
    ],
)
def test_bad_methods_are_refused_in_one_sentence(method, sentence):
    with pytest.raises(mj.MergeError) as caught:
        search.settings(method, search.grids(), experts=3)
    assert str(caught.value) == sentence


def test_values_of_a_grid_are_checked():
    grid = {"ties": {"density": (0.2, 0.0), "scaling": (1.0,)}}
    with pytest.raises(mj.MergeError, match=r"must be in \(0, 1\], not 0"):
        search.settings("ties", grid, experts=3)
    with pytest.raises(mj.MergeError, match=r"config\.search\.ties: there is no value to try"):
        search.settings("ties", {"ties": {"density": (), "scaling": (1.0,)}}, experts=3)
