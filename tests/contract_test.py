"""What every registered method promises, whatever it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import NamedSharding, PartitionSpec

import mergejax as mj

METHODS = list(mj.METHODS)
# For what does not depend on the method: one of each kind.
FEW = ["average", "ties", "dare", "regmean", "opcm", "tall_masks"]
# Few shapes, since every one is compiled for every method: the kernels and biases of three blocks,
# with one leaf in front of them and one behind.
_BLOCK = {"kernel": (4, 8), "bias": (8,)}
SHAPES = {"embed": {"bias": (8,)}, "out": {"kernel": (4, 8)}} | {
    f"block_{i}": _BLOCK for i in range(3)
}
# For what is compiled as one program, or for every type.
FEWER = {"embed": {"bias": (8,)}, "block_0": {"kernel": (4, 8)}}


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def count_of(name, fewest=False):
    entry = mj.METHODS[name]
    return entry.experts or (entry.at_least if fewest else 3)


def inputs(name, dtype="float32", count=None, shapes=SHAPES):
    """A method with its defaults, a base, experts, and statistics of whatever it needs."""
    chain = trees.chain_of(name)
    base, experts = trees.models(count or count_of(name), dtype, shapes)
    return chain, base, experts, trees.statistics(chain.needs, experts)


def numbers_of(name):
    """The numeric hyper-parameters of a method and their defaults."""
    factory = mj.METHODS[name].make.factory
    return {n: float(v) for n, v in factory.defaults.items() if n in factory.data_names}


def is_fold(chain):
    kinds = [stage.kind for stage in mj.chains.walk(chain)]
    return not {"joint", "reduce", "refine"} & set(kinds)


def gives_one(chain):
    """Whether the experts are reduced to one model; else each gets a model of its own."""
    return any(stage.kind in ("reduce", "fold") for stage in mj.chains.walk(chain))


def is_random(name):
    stages = (stage.factory.name for stage in mj.chains.walk(trees.chain_of(name)))
    return not {"drop", "drop_given", "drop_by_rank"}.isdisjoint(stages)


# Executors ----------------------------------------------------------------------------------------


def test_leafwise_equals_one_traced_function_of_models_and_numbers(name):
    chain, base, experts, stats = inputs(name, shapes=FEWER)

    @jax.jit
    def traced(numbers, base, experts):
        return mj.merge(trees.chain_of(name, **numbers), base, experts, stats=stats)

    expected = mj.merge(chain, base, experts, stats=stats)
    trees.close(traced(numbers_of(name), base, experts), expected, atol=2e-6)


@pytest.mark.parametrize("name", FEW)
def test_leafwise_equals_a_traced_function_of_the_models_alone(name):
    chain, base, experts, stats = inputs(name, shapes=FEWER)
    traced = jax.jit(lambda base, experts: mj.merge(chain, base, experts, stats=stats))
    trees.close(traced(base, experts), mj.merge(chain, base, experts, stats=stats), atol=2e-6)


def test_leafwise_equals_streamed(name):
    chain, base, experts, stats = inputs(name)
    merged = {}

    class File:
        """An array that is read when it is asked for."""

        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __getitem__(self, place):
            return self.array[place]

    models = [{n: File(x) for n, x in trees.flat(model).items()} for model in (base, *experts)]
    mj.stream(chain, models[0], models[1:], merged.__setitem__, stats=stats)
    expected = trees.flat(mj.merge(chain, base, experts, stats=stats))
    if gives_one(chain):
        merged = {n: arrays[0] for n, arrays in merged.items()}
    else:
        merged = {f"{i}/{n}": x for n, arrays in merged.items() for i, x in enumerate(arrays)}
    trees.equal(merged, expected)


def test_blocks_equal_whole_leaves(name, tiny_blocks):
    chain, base, experts, stats = inputs(name)
    in_blocks = mj.merge(chain, base, experts, stats=stats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mj.forms, "BLOCK", 2**18)
        trees.close(in_blocks, mj.merge(chain, base, experts, stats=stats), atol=2e-6)


def check_sharded(name, spec):
    chain, base, experts, stats = inputs(name)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(x):
        axes = spec if np.ndim(x) == 2 else ("d",)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    merged = mj.merge(chain, jax.tree.map(spread, base), jax.tree.map(spread, experts), stats=stats)
    trees.close(merged, mj.merge(chain, base, experts, stats=stats), atol=2e-6)
    for x in jax.tree.leaves(merged):
        assert x.sharding.is_equivalent_to(spread(x).sharding, x.ndim), x.sharding


def test_sharded_equals_unsharded_and_stays_sharded(name):
    check_sharded(name, ("d", None))


@pytest.mark.parametrize("name", FEW)
def test_sharded_by_columns_too(name):
    check_sharded(name, (None, "d"))


def test_continual_equals_all_at_once(name):
    chain, base, experts, _ = inputs(name)
    if not is_fold(chain):
        with pytest.raises(mj.MergeError):
            mj.continual(chain, base)
        return
    learner = mj.continual(chain, base)
    state = learner.init()
    for i, expert in enumerate(experts):
        state = learner.update(state, expert)
        expected = mj.merge(chain, base, experts[: i + 1])
        trees.close(learner.value(state), expected, atol=2e-6)


# Known answers ------------------------------------------------------------------------------------


def test_equal_models_give_that_model(name):
    chain, base, _, _ = inputs(name)
    experts = [base] * count_of(name)
    stats = trees.statistics(chain.needs, experts)
    expected = base if gives_one(chain) else experts
    merged = mj.merge(chain, base, experts, stats=stats)
    if mj.METHODS[name].exact:
        trees.equal(merged, expected)
    else:
        trees.close(merged, expected, rtol=1e-6, atol=1e-6)


def test_one_expert_gives_the_known_answer(name):
    entry = mj.METHODS[name]
    if count_of(name, fewest=True) > 1:
        assert entry.neutral is None
        return
    chain = trees.chain_of(name, **(entry.neutral or {}))
    base, experts = trees.models(1, shapes=SHAPES)
    stats = trees.statistics(chain.needs, experts)
    merged = mj.merge(chain, base, experts, stats=stats)
    if entry.neutral is not None:
        trees.close(merged, experts[0], rtol=1e-6, atol=1e-6)
        return
    with pytest.raises(AssertionError):  # else the row should say so
        trees.close(merged, experts[0], rtol=1e-3, atol=1e-3)


def test_order_of_the_experts_matters_only_where_the_table_says_so(name):
    ordered = mj.METHODS[name].ordered
    count = count_of(name) if mj.METHODS[name].experts or not ordered else 6
    _, base, experts, stats = inputs(name, count=count)
    chain = trees.chain_of(name, **{n: 0.95 * value for n, value in numbers_of(name).items()})
    names = list("cabfed")[: len(experts)]
    order = [*range(1, len(experts)), 0]
    merged = mj.merge(chain, base, experts, names=names, stats=stats)
    again = mj.merge(
        chain,
        base,
        [experts[i] for i in order],
        names=[names[i] for i in order],
        stats={need: [several[i] for i in order] for need, several in stats.items()},
    )
    if not gives_one(trees.chain_of(name)):
        merged = [merged[i] for i in order]
    if not ordered:
        trees.close(again, merged, rtol=1e-6, atol=2e-6)
        return
    first, second = trees.flat(merged), trees.flat(again)
    assert any(np.abs(first[n] - second[n]).max() > 1e-4 for n in first)


HOMOGENEOUS = [name for name in METHODS if mj.METHODS[name].homogeneous]


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_scaling_all_deltas_scales_the_merged_delta(name):
    chain, base, experts, stats = inputs(name)
    base = jax.tree.map(np.zeros_like, base)
    larger = jax.tree.map(lambda x: 64 * x, experts)
    merged = mj.merge(chain, base, experts, stats=stats)
    expected = jax.tree.map(lambda x: 64 * x, merged)
    trees.close(mj.merge(chain, base, larger, stats=stats), expected, atol=1e-5)


# Numbers as data ----------------------------------------------------------------------------------


@pytest.fixture
def compiled(caplog):
    """Counts the programs that a call compiles."""

    def count(call):
        caplog.clear()
        with jax.log_compiles():
            call()
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    return count


def test_neither_a_second_call_nor_another_number_compiles_again(name, compiled):
    chain, base, experts, stats = inputs(name)
    merge = lambda method: mj.merge(method, base, experts, stats=stats)
    merge(chain)
    assert compiled(lambda: merge(chain)) == 0
    for parameter, value in numbers_of(name).items():
        other = trees.chain_of(name, **{parameter: 0.9 * value + 0.01})
        assert compiled(functools.partial(merge, other)) == 0, parameter


def test_other_weights_compile_nothing(compiled):
    base, experts = trees.models(3, shapes={"kernel": (3, 9)})
    merge = lambda weights: mj.merge(mj.ties(weights=weights), base, experts)
    assert compiled(lambda: merge([1, 2, 3])) > 0
    assert compiled(lambda: merge([0.5, 2, 0])) == 0


# Types --------------------------------------------------------------------------------------------


def test_the_type_that_comes_in_goes_out_rounded_once(name):
    chain, base, experts, stats = inputs(name, "bfloat16", shapes=FEWER)
    merged = mj.merge(chain, base, experts, stats=stats)
    wide = jax.tree.map(lambda x: x.astype(np.float32), (base, experts))
    exact = mj.merge(chain, *wide, stats=stats)
    kind = trees.TYPES["bfloat16"]
    assert {x.dtype for x in jax.tree.leaves(merged)} == {np.dtype(kind)}
    trees.equal(merged, jax.tree.map(lambda x: np.asarray(x).astype(kind), exact))


@pytest.mark.parametrize("name", FEW)
def test_another_type_may_be_asked_for(name):
    chain, base, experts, stats = inputs(name)
    merged = mj.merge(chain, base, experts, stats=stats, dtype=jnp.bfloat16)
    exact = mj.merge(chain, base, experts, stats=stats)
    trees.equal(merged, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_input_is_refused(name, value):
    chain, base, experts, stats = inputs(name)
    experts[-1]["block_1"]["kernel"][2, 3:5] = value
    with pytest.raises(mj.MergeError) as error:
        mj.merge(chain, base, experts, stats=stats)
    assert "block_1/kernel" in str(error.value)
    assert f"expert '{len(experts) - 1}'" in str(error.value)
    assert "2 non-finite" in str(error.value)
    assert str(error.value).count("\n") == 0


# Random numbers -----------------------------------------------------------------------------------


def test_same_seed_same_bits_and_another_seed_others(name):
    chain, base, experts, stats = inputs(name)
    merged, again, other = (
        mj.merge(chain, base, experts, stats=stats, seed=seed) for seed in (3, 3, 4)
    )
    trees.equal(merged, again)
    first, second = trees.flat(merged), trees.flat(other)
    differs = any(np.any(first[n] != second[n]) for n in first)
    assert differs == is_random(name)


# Scanned layers -----------------------------------------------------------------------------------


def test_stacked_layers_equal_separate_layers(name):
    """[L, ...] leaves are L layers; random masks are of the stack's name and so their own."""
    chain, base, experts, stats = inputs(name)
    if is_random(name):
        chain = trees.chain_of(name, **mj.METHODS[name].neutral)
    merged = mj.merge(chain, base, experts, stats=stats)

    def stack(tree):
        blocks = [tree[f"block_{i}"] for i in range(3)]
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *blocks)
        return {"embed": tree["embed"], "blocks": stacked, "out": tree["out"]}

    def stacked_statistics(several):
        nested = {}
        for path, x in several.items():
            first, last = path.split("/")
            nested.setdefault(first, {})[last] = x
        return trees.flat(stack({"embed": {}, **nested})) if nested else {}

    together = mj.merge(
        chain,
        stack(base),
        [stack(expert) for expert in experts],
        scanned="blocks/",
        stats={need: [stacked_statistics(tree) for tree in s] for need, s in stats.items()},
    )
    expected = stack(merged) if gives_one(chain) else [stack(model) for model in merged]
    trees.close(together, expected, rtol=1e-6, atol=2e-6)
