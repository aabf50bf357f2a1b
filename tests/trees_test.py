"""All kinds of trees, JAX's transformations, sharded arrays, methods from outside."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mergejax as mj

METHOD = mj.chain(mj.ties(density=0.5), mj.lines_multi_task(beta=0.5))
SHAPES = {"block_0": {"kernel": (3, 5)}, "block_1": {"kernel": (3, 5)}, "bias": (5,)}


def inputs(count=2):
    base, experts = trees.models(count, shapes=SHAPES)
    return jax.tree.map(jnp.asarray, (base, experts))


# Kinds of trees -----------------------------------------------------------------------------------


def as_list(tree):
    return [tree["bias"], tree["block_0"]["kernel"], tree["block_1"]["kernel"]]


def as_variables(tree):
    return nnx.State(
        {
            "bias": nnx.Param(tree["bias"]),
            "block_0": {"kernel": nnx.Param(tree["block_0"]["kernel"])},
        }
    )


class Node(dict):
    """A container of the user's own."""


jax.tree_util.register_pytree_with_keys(
    Node,
    lambda node: ([(jax.tree_util.DictKey(k), node[k]) for k in sorted(node)], tuple(sorted(node))),
    lambda names, leaves: Node(zip(names, leaves, strict=True)),
)

KINDS = {
    "dict": lambda tree: tree,
    "frozen": flax.core.freeze,
    "list": as_list,
    "tuple": lambda tree: tuple(as_list(tree)),
    "nnx": as_variables,
    "own": Node,
    "array": lambda tree: tree["bias"],
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_kind_of_tree_that_comes_in_goes_out(kind):
    base, experts = inputs()
    turned = kind(base), [kind(expert) for expert in experts]
    merged = mj.merge("task_arithmetic(0.5)", *turned)
    assert jax.tree.structure(merged) == jax.tree.structure(turned[0])
    assert type(merged) is type(turned[0]) or isinstance(merged, jax.Array)
    expected = kind(mj.merge("task_arithmetic(0.5)", base, experts))
    trees.equal(merged, expected)


def test_an_nnx_model_takes_its_merged_state():
    graph, base = nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    expert = jax.tree.map(lambda x: x + 1, base)
    merged = mj.merge("task_arithmetic(0.5)", base, [expert])
    model = nnx.merge(graph, merged)
    np.testing.assert_allclose(model.kernel[...], base["kernel"][...] + 0.5, rtol=1e-6)
    assert isinstance(merged, nnx.State)
    assert model(jnp.ones((2, 3))).shape == (2, 5)


def test_a_linen_model_with_batch_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))

    model = Net()
    base = model.init(jax.random.key(0), jnp.ones((1, 3)))
    experts = [jax.tree.map(lambda x, c=c: x + c, base) for c in (1.0, 3.0)]
    merged = mj.merge("task_arithmetic(1.0)", base, experts)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    kernel = base["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(merged["params"]["Dense_0"]["kernel"], kernel + 4, rtol=1e-6)
    # Running statistics are averaged whatever the method.
    np.testing.assert_allclose(merged["batch_stats"]["BatchNorm_0"]["mean"], 2.0)
    model.apply(merged, jnp.ones((1, 3)))


def test_integers_counters_and_random_keys_are_kept():
    base, experts = inputs()
    extra = {"ids": jnp.arange(3), "used": jnp.asarray([True, False]), "rng": jax.random.key(1)}
    base = {**base, **extra, "count": jnp.int32(3)}
    experts = [{**expert, **extra, "count": jnp.int32(9)} for expert in experts]
    merged = mj.merge("average()", base, experts)
    assert merged["count"] == 3
    assert merged["rng"] == extra["rng"]
    trees.equal(merged["ids"], extra["ids"])
    trees.equal(merged["used"], extra["used"])


def test_excluded_leaves_keep_the_base_and_are_not_counted():
    base, experts = inputs()
    heads = {"head": {"kernel": jnp.zeros((3, 5))}}
    moved = {"head": {"kernel": jnp.full((3, 5), 100.0)}}
    merged = mj.merge(METHOD, {**base, **heads}, [{**e, **moved} for e in experts], exclude="head")
    trees.equal(merged["head"], heads["head"])
    trees.equal({n: merged[n] for n in base}, mj.merge(METHOD, base, experts))


def test_leaves_that_nobody_changed_may_be_left_out_of_the_count():
    base, experts = inputs()
    frozen = {"frozen": {"kernel": jnp.ones((3, 5))}}
    both = {**base, **frozen}, [{**expert, **frozen} for expert in experts]
    changed = mj.merge(METHOD, *both, count="changed")
    trees.equal({n: changed[n] for n in base}, mj.merge(METHOD, base, experts))
    everything = mj.merge(METHOD, *both)
    assert any(np.any(everything[n] != changed[n]) for n in ("bias",)) or any(
        np.any(everything[n]["kernel"] != changed[n]["kernel"]) for n in ("block_0", "block_1")
    )


def test_numpy_arrays_come_back_as_arrays_of_jax():
    merged = mj.merge("average()", None, [{"w": np.ones(2, np.float32)}] * 2)
    assert isinstance(merged["w"], jax.Array)


def test_a_chain_without_a_reduction_gives_one_model_per_expert():
    base, experts = inputs()
    singles = mj.merge(mj.trim(1.0), base, experts)
    assert len(singles) == 2
    for single, expert in zip(singles, experts, strict=True):
        trees.close(single, expert, atol=1e-6)


# Transformations ----------------------------------------------------------------------------------


def test_many_settings_in_one_compilation():
    base, experts = inputs()
    densities, scalings = jnp.asarray([0.2, 0.5, 1.0]), jnp.asarray([0.3, 1.0, 1.7])

    @jax.jit
    @jax.vmap
    def merged(density, scaling):
        return mj.merge(mj.ties(density=density, scaling=scaling), base, experts)

    many = merged(densities, scalings)
    for i in range(3):
        one = mj.merge(mj.ties(float(densities[i]), float(scalings[i])), base, experts)
        trees.close(jax.tree.map(lambda x, i=i: x[i], many), one, atol=1e-6)


def test_many_settings_per_expert():
    base, experts = inputs()
    weights = jnp.asarray([[0.5, 0.5], [1.0, 0.0], [0.2, 2.0]])
    method = lambda w: mj.task_arithmetic(scaling=1.0, weights=w)
    many = jax.vmap(lambda w: mj.merge(method(w), base, experts))(weights)
    mapped = jax.lax.map(lambda w: mj.merge(method(w), base, experts), weights)
    for i in range(3):
        one = mj.merge(method([float(w) for w in weights[i]]), base, experts)
        trees.close(jax.tree.map(lambda x, i=i: x[i], many), one, atol=1e-6)
        trees.close(jax.tree.map(lambda x, i=i: x[i], mapped), one, atol=1e-6)


def test_rules_may_hold_traced_numbers():
    base, experts = inputs()
    rule = lambda low, high: mj.by_name({"block": mj.by_depth([low, high]), ".*": low})
    merge = lambda *numbers: mj.merge(mj.task_arithmetic(rule(*numbers)), base, experts)
    trees.close(jax.jit(merge)(0.25, 0.75), merge(0.25, 0.75), atol=1e-6)


def test_experts_may_be_mapped():
    base, experts = inputs()
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *experts)
    many = jax.vmap(lambda expert: mj.merge("ties(density=0.5)", base, [expert]))(stacked)
    for i, expert in enumerate(experts):
        one = mj.merge("ties(density=0.5)", base, [expert])
        trees.close(jax.tree.map(lambda x, i=i: x[i], many), one, atol=1e-6)


def test_a_traced_seed_gives_the_same_masks():
    base, experts = inputs()
    merge = lambda seed: mj.merge("dare(rate=0.5)", base, experts, seed=seed)
    trees.close(jax.jit(merge)(7), merge(7), atol=1e-6)


def slope(function, at, step):
    return (float(function(at + step)) - float(function(at - step))) / (2 * step)


def score(tree):
    """A smooth number that depends on every element in its own way."""
    flat = [jnp.ravel(x) for x in jax.tree.leaves(tree)]
    return sum(jnp.sum(jnp.sin(x + jnp.arange(x.size, dtype=x.dtype))) for x in flat)


HYPER = {
    "task_arithmetic": lambda x: mj.task_arithmetic(scaling=x),
    "ties": lambda x: mj.ties(density=0.5, scaling=x),
    "linear": lambda x: mj.linear(weights=[x, 1 - 0.5 * x]),
    "lines": lambda x: mj.chain(mj.total(), mj.lines(alpha=x, beta=0.3)),
    "lines_multi_task": lambda x: mj.chain(mj.total(), mj.lines_multi_task(beta=x)),
    "slerp": lambda x: mj.slerp(t=x),
    "dare": lambda x: mj.dare(rate=0.5, scaling=x),
    "fisher": lambda x: mj.fisher(weights=[x, 1.0]),
    "regmean": lambda x: mj.regmean(weights=[x, 1.0]),
}


@pytest.mark.parametrize("name", HYPER)
def test_derivative_of_a_hyperparameter(name):
    base, experts = inputs()
    stats = trees.statistics(mj.chain(HYPER[name](0.6)).needs, experts)
    merged_score = jax.jit(lambda x: score(mj.merge(HYPER[name](x), base, experts, stats=stats)))
    derivative = float(jax.grad(merged_score)(0.6))
    assert abs(derivative) > 1e-3
    np.testing.assert_allclose(derivative, slope(merged_score, 0.6, 1e-2), rtol=2e-2, atol=1e-2)


# Those whose result is smooth in the weights: ranks and thresholds jump, and singular vectors have
# no derivative where singular values repeat.
SMOOTH = [
    "average",
    "linear",
    "metrics_weighted",
    "ema",
    "window_average",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "task_arithmetic",
    "ties",
    "dare",
    "varm",
    "delta_guided",
    "frobenius_weighted",
    "nan",
    "model_stock",
    "lines",
    "lines_multi_task",
    "fisher",
    "regmean",
]


@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_of_an_expert_s_weights(name):
    rng = np.random.default_rng(4)
    draw = lambda tree: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)
    base, experts = inputs()
    experts, direction = [draw(base), draw(base)], draw(base)
    # A trim jumps where an element enters or leaves.
    method = trees.chain_of(name, **({"density": 1.0} if name == "ties" else {}))
    stats = trees.statistics(method.needs, experts)

    @jax.jit
    def merged_score(step):
        first = jax.tree.map(lambda x, d: x + step * d, experts[0], direction)
        return score(mj.merge(method, base, [first, experts[1]], stats=stats))

    derivative = float(jax.grad(merged_score)(0.0))
    assert abs(derivative) > 1e-3
    np.testing.assert_allclose(derivative, slope(merged_score, 0.0, 2e-3), rtol=2e-2, atol=1e-2)


# Sharded arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["ties(density=0.3)", "dare(rate=0.5)", "total()|lines_multi_task()"]
)
def test_arrays_on_four_devices(text):
    shapes = {"block_0": {"kernel": (8, 12)}, "block_1": {"kernel": (8, 12)}, "bias": (8,)}
    base, experts = trees.models(3, shapes=shapes)
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

    def spread(x):
        spec = PartitionSpec("rows", "columns") if x.ndim == 2 else PartitionSpec("rows")
        return jax.device_put(x, NamedSharding(mesh, spec))

    placed = jax.tree.map(spread, (base, experts))
    expected = mj.merge(text, base, experts)
    for merge in (lambda b, e: mj.merge(text, b, e), jax.jit(lambda b, e: mj.merge(text, b, e))):
        merged = merge(*placed)
        trees.close(merged, expected, atol=2e-6)
        for x, given in zip(jax.tree.leaves(merged), jax.tree.leaves(placed[0]), strict=True):
            assert x.sharding.is_equivalent_to(given.sharding, x.ndim)


# From outside -------------------------------------------------------------------------------------


@pytest.fixture
def clipped():
    """A method of the user's own, from a stage of the user's own."""

    @mj.each(elementwise=True)
    def clip(limit: mj.hyper.Positive = 1.0):
        return lambda d, leaf, seen: jnp.clip(d, -limit, limit)

    @mj.method
    def clipped_sum(limit: mj.hyper.Positive = 1.0, scaling: mj.hyper.Scaling = 1.0):
        return mj.chain(clip(limit), mj.task_arithmetic(scaling=scaling))

    mj.register("clipped_sum", clipped_sum)
    yield
    del mj.METHODS["clipped_sum"]


def test_a_method_from_outside_is_like_any_other(clipped):
    base, experts = inputs()
    merged = mj.merge("drop(rate=0.0)|clipped_sum(limit=0.01, scaling=0.5)", base, experts)
    for n, x in trees.flat(merged).items():
        deltas = [np.clip(trees.flat(e)[n] - trees.flat(base)[n], -0.01, 0.01) for e in experts]
        np.testing.assert_allclose(x, trees.flat(base)[n] + 0.5 * sum(deltas), atol=1e-6)
    assert repr(mj.parse("clipped_sum(limit=0.5)")) == "clipped_sum(limit=0.5)"
    with pytest.raises(mj.MergeError, match="did you mean 'limit'"):
        mj.parse("clipped_sum(limt=0.5)")
    with pytest.raises(mj.MergeError, match=r"\(0, inf\)"):
        mj.parse("clipped_sum(limit=0)")
    with pytest.raises(mj.MergeError, match="taken"):
        mj.register("clipped_sum", mj.ties)
    assert mj.clipped_sum(limit=0.5) is not None


def test_progress_counts_up_to_all_leaves():
    base, experts = inputs()
    seen = []
    mj.merge(METHOD, base, experts, progress=lambda done, total, name: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


@pytest.mark.parametrize(
    "text",
    [
        "drop(rate=0.8)|ties(density=0.3, scope='tensor', cut='exact')|lines(beta=0.5)",
        "ties(density=[0.1, 0.2], weights=[1.0, 2.0])",
        "by_role(kernel=ties(density=0.1), otherwise=mean())|scale(scaling=0.7)",
        "task_arithmetic(scaling=by_name({'a.*b': [0.1, 0.2], '.*': 0.5}))",
        "task_arithmetic(scaling=by_name({'a.*b': by_depth([0.1, 0.2]), '.*': 0.5}))",
        "within(canonical_matrix(), mean())",
        "by_stats(gram=gram_solve(), otherwise=mean())",
        "average()",
    ],
)
def test_a_chain_s_text_is_read_back(text):
    chain = mj.parse(text)
    again = mj.parse(repr(chain))
    assert repr(again) == repr(chain)
    assert repr(chain) == text
