"""What combines stages: rules, branches, other coordinates, passes, and states that are saved."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import trees

import mergejax as mj


def deltas(base, merged):
    merged, base = trees.flat(merged), trees.flat(base)
    return {name: merged[name].astype(np.float64) - base[name] for name in base}


def test_by_name_takes_the_first_pattern_that_matches():
    base, experts = trees.models(2)
    scaling = mj.by_name({"block_1": 0.5, "kernel": 2.0, ".*": 1.0})
    got = deltas(base, mj.merge(mj.chain(mj.total(), mj.scale(scaling)), base, experts))
    plain = deltas(base, mj.merge(mj.total(), base, experts))
    for name, delta in plain.items():
        factor = 0.5 if "block_1" in name else 2.0 if "kernel" in name else 1.0
        np.testing.assert_allclose(got[name], factor * delta, atol=1e-6)


def test_by_depth_is_linear_between_its_values():
    base, experts = trees.models(2)
    method = mj.chain(mj.total(), mj.scale(mj.by_depth([0.0, 1.0, 4.0])))
    got = deltas(base, mj.merge(method, base, experts))
    plain = deltas(base, mj.merge(mj.total(), base, experts))
    factors = {"embed": 0.0, "block_0": 0.0, "block_1": 1.0, "block_2": 4.0, "out": 4.0}
    for name, delta in plain.items():
        np.testing.assert_allclose(got[name], factors[name.split("/")[0]] * delta, atol=1e-6)


def test_rules_may_hold_a_number_per_expert():
    base, experts = trees.models(2)
    weights = mj.by_name({"kernel": [1.0, 0.0], ".*": [0.0, 1.0]})
    got = trees.flat(mj.merge(mj.total(weights=weights), base, experts))
    first, second = trees.flat(experts[0]), trees.flat(experts[1])
    for name, x in got.items():
        np.testing.assert_array_equal(x, (first if "kernel" in name else second)[name])


def test_a_branch_measures_its_own_leaves_only():
    base, experts = trees.models(3)
    method = mj.by_role(kernel=mj.ties(density=0.3), otherwise=mj.mean())
    got = trees.flat(mj.merge(method, base, experts))

    def kernels(tree):
        return {name: x for name, x in trees.flat(tree).items() if name.endswith("kernel")}

    alone = mj.merge(mj.ties(density=0.3), kernels(base), [kernels(e) for e in experts])
    for name, x in alone.items():
        np.testing.assert_array_equal(got[name], x)
    average = trees.flat(mj.merge(mj.average(), base, experts))
    for name in set(got) - set(alone):
        np.testing.assert_allclose(got[name], average[name], atol=1e-6)


def test_branches_of_different_length_meet_in_one_measurement_behind_them():
    base, experts = trees.models(3)
    branch = mj.by_role(kernel=mj.ties(density=0.3), otherwise=mj.total())
    merged = mj.merge(mj.chain(branch, mj.to_mean_norm()), base, experts)

    def norm(tree):
        return np.sqrt(sum(np.sum(d**2) for d in deltas(base, tree).values()))

    expected = np.mean([norm(expert) for expert in experts])
    np.testing.assert_allclose(norm(merged), expected, rtol=1e-5)


def test_within_runs_a_chain_in_other_coordinates_and_comes_back():
    @mj.coordinates
    def negated():
        return lambda ds, leaf: ([-d for d in ds], None), lambda x, context, leaf: -x

    base = {"w": jnp.zeros(3)}
    experts = [{"w": jnp.asarray([1.0, 2.0, -3.0])}, {"w": jnp.asarray([-1.0, 2.0, 1.0])}]
    draw = mj.chain(mj.elect_sign(zero="plus"), mj.total())
    assert mj.merge(draw, base, experts)["w"].tolist() == [1.0, 4.0, -3.0]
    # In negated coordinates a drawn vote elects what is negative here.
    assert mj.merge(mj.within(negated(), draw), base, experts)["w"].tolist() == [-1.0, 4.0, -3.0]


def test_two_drops_in_a_chain_have_masks_of_their_own():
    base, expert = {"w": jnp.zeros(20000)}, {"w": jnp.ones(20000)}
    twice = mj.merge("drop(rate=0.5)|drop(rate=0.5)|total()", base, [expert])["w"]
    # One mask twice would keep half of the elements, two masks keep a quarter (5 sigma).
    assert abs(float((twice != 0).mean()) - 0.25) < 5 * (0.25 * 0.75 / 20000) ** 0.5


@pytest.mark.parametrize("text", ["opcm()", "average()", "drop(rate=0.3)|total()", "trim()|opcm()"])
def test_a_state_is_saved_and_continued(text, tmp_path):
    base, experts = trees.models(3)
    learner = mj.continual(text, base)
    state = learner.update(learner.init(), experts[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", learner.init())
    for expert in experts[1:]:
        restored = learner.update(restored, expert)
    trees.equal(learner.value(restored), mj.merge(text, base, experts))


def test_a_state_does_not_grow():
    base, experts = trees.models(3)
    learner = mj.continual("opcm()", base)
    sizes = []
    state = learner.init()
    for expert in experts:
        state = learner.update(state, expert)
        sizes.append(sum(np.size(x) for x in jax.tree.leaves(state)))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("text", "passes"),
    [("average()", 1), ("dare()", 1), ("ties(zero='plus')", 3), ("ties()", 4), ("opcm()", 2)],
)
def test_a_leaf_is_read_once_a_pass(text, passes):
    base, experts = trees.models(2)
    reads = {}

    class File:
        def __init__(self, name, array):
            self.name, self.array = name, array
            self.shape, self.dtype = array.shape, array.dtype

        def __getitem__(self, place):
            reads[self.name] = reads.get(self.name, 0) + 1
            return self.array[place]

    models = [{n: File(n, x) for n, x in trees.flat(m).items()} for m in (base, *experts)]
    models = [{n: File((i, n), f.array) for n, f in m.items()} for i, m in enumerate(models)]
    mj.stream(text, models[0], models[1:], lambda name, arrays: None)
    full = {reads[name] for name in reads if models[0][name[1]].array.size}
    assert full == {passes}


def test_statistics_that_no_leaf_has_are_asked_for():
    _, experts = trees.models(2)
    with pytest.raises(mj.MergeError, match="needs the statistic 'gram', which no leaf has"):
        mj.merge("regmean()", None, experts)
