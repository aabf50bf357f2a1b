"""Aligned networks merged: chains behind `permute`, units kept apart, least squares, repair."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from alignment_models import make

import mergejax as mj
from mergejax import alignment


class Net(nn.Module):
    hidden: tuple = (10, 8)

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(3)(x)


class ConvNet(nn.Module):
    widths: tuple = (4, 5)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.widths[0], (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        x = nn.relu(nn.Conv(self.widths[1], (3, 3), strides=2)(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(3)(x)


def numbers(seed, shapes, scale=1.0):
    rng = np.random.default_rng(seed)

    def fill(path, x):
        values = scale * rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]) or 1)
        positive = any(word in jax.tree_util.keystr(path) for word in ("scale", "var"))
        return (1 + abs(values) if positive else values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


INPUTS = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(24, 6, 6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    """(apply, symmetries, two networks, the matching of the second, joint Gram matrices)."""
    return _case(Net(), INPUTS)


@pytest.fixture(scope="module")
def convnet():
    return _case(ConvNet(), IMAGES)


def _case(model, inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    pair = [numbers(1, shapes), numbers(2, shapes)]
    apply = jax.jit(lambda params, x: model.apply(params, x))
    symmetries = alignment.symmetries(apply.__wrapped__, pair[0], inputs)
    matching = alignment.weight_matching(symmetries, *pair)
    return apply, symmetries, pair, matching, mj.collect.joint_gram(apply, pair, [inputs])


def merge(method, symmetries, orders, experts, base=None, **options):
    stats = alignment.statistics(symmetries, orders, experts)
    return mj.merge(method, base, experts, stats=stats, **options)


def test_chains_behind_permute_merge_the_aligned_networks(net):
    _, symmetries, pair, matching, _ = net
    aligned = [pair[0], alignment.apply(symmetries, matching.permutations, pair[1])]
    orders = [{}, matching.permutations]
    base = jax.tree.map(lambda a, b: (a + b) / 3, *aligned)
    for method, needs_base in (("mean()", None), ("trim(density=0.5)|total()", base)):
        got = merge(f"permute()|{method}", symmetries, orders, pair, base=needs_base)
        same = mj.merge(method, needs_base, aligned)
        trees.close(got, same, atol=1e-6)


def test_a_permuted_twin_merges_to_the_network_itself(net):
    _, symmetries, (a, _), _, _ = net
    planted = alignment.random(symmetries, seed=4)
    twin = alignment.apply(symmetries, planted, a)
    found = alignment.weight_matching(symmetries, a, twin)
    got = merge("permute()|mean()", symmetries, [{}, found.permutations], [a, twin])
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, got)), strict=True))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.7, 1.0])
def test_units_of_a_permuted_twin_may_be_kept_apart(ratio):
    apply_fn, a, example = make("vgg")
    symmetries = alignment.symmetries(apply_fn, a, example)
    twin = alignment.apply(symmetries, alignment.random(symmetries, 5), a)
    found = alignment.weight_matching(symmetries, a, twin)
    orders = alignment.keep_apart(symmetries, [found], ratio)
    wide = merge("permute()|join()", symmetries, orders, [a, twin])
    width = wide["params"]["Conv_0"]["kernel"].shape[-1]
    assert width == 6 + int(ratio * 6 + 1e-9)
    # The wide network is another module; it computes the same.
    from alignment_models import VGG

    widths = [wide["params"][n]["kernel"].shape[-1] for n in ("Conv_0", "Conv_1", "Dense_1")]

    class Wide(VGG):
        @nn.compact
        def __call__(self, x):
            for n in widths[:2]:
                x = nn.BatchNorm(use_running_average=True)(nn.Conv(n, (3, 3))(x))
                x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
            head = nn.Dense(5)
            return head(nn.relu(nn.Dense(widths[2])(x.reshape(len(x), -1))))

    np.testing.assert_allclose(
        Wide().apply(wide, example), apply_fn(a, example), rtol=1e-4, atol=1e-5
    )


def test_all_units_apart_are_the_ensemble(net):
    apply, symmetries, pair, matching, joint = net
    mean = sum(apply(params, INPUTS) for params in pair) / 2
    for ratio, method in ((1.0, "permute()|join()"), (1.0, "pleas()")):
        orders = alignment.keep_apart(symmetries, [matching], ratio)
        stats = alignment.statistics(symmetries, orders, pair)
        shared = alignment.regression(joint, stats, pair) if method == "pleas()" else None
        wide = mj.merge(method, None, pair, stats=stats, shared=shared)
        found = Net((20, 16)).apply(wide, INPUTS)
        np.testing.assert_allclose(found, mean, atol=2e-5)
    cross = wide["params"]["Dense_1"]["kernel"]
    assert not np.any(cross[:10, 8:])
    assert not np.any(cross[10:, :8])


def regressed(z, y, start, bias, ridge):
    """The minimum of |[z 1] w - y|² + λ |w - w0|², from the normal equations in float64."""
    z1 = np.hstack([z, np.ones((len(z), 1))])
    w0 = np.vstack([start, bias])
    gram = z1.T @ z1 / len(z)
    level = ridge * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + level * np.eye(len(gram)), z1.T @ y / len(z) + level * w0)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_least_squares_solves_every_block(net, ratio):
    """Layer 1, restated from activations row by row: joined outputs read all, own outputs not."""
    _, symmetries, pair, matching, joint = net
    orders = alignment.keep_apart(symmetries, [matching], ratio)
    stats = alignment.statistics(symmetries, orders, pair)
    shared = alignment.regression(joint, stats, pair)
    got = mj.merge("permute()|least_squares(ridge=0.01)", None, pair, stats=stats, shared=shared)
    wide = [  # float64, with zeros where a network has no unit
        [np.asarray(alignment.permutations.take(np.asarray(z, np.float64), {1: order[None, :]}))
         for z, order in zip(rows, places, strict=True)]
        for rows, places in (
            ([_relu(p, 0, INPUTS) for p in pair], _of(orders, "Dense_0")),
            ([_dense(p, 1, _relu(p, 0, INPUTS)) for p in pair], _of(orders, "Dense_1")),
        )
    ]  # fmt: skip
    ins, outs = ([order >= 0 for order in _of(orders, n)] for n in ("Dense_0", "Dense_1"))
    z, y = (sum(w) / sum(o) for w, o in zip(wide, ((ins), (outs)), strict=True))
    joined = mj.merge("permute()|join()", None, pair, stats=stats)["params"]["Dense_1"]
    kernel, bias = (np.asarray(joined[n], np.float64) for n in ("kernel", "bias"))
    for k, own in ((None, outs[0] & outs[1]), (0, outs[0] & ~outs[1]), (1, outs[1] & ~outs[0])):
        read = ins[0] | ins[1] if k is None else ins[k]
        if not own.any():
            continue
        level = 0.01 * _ridge_scale(z, read)
        expected = regressed(z[:, read], y[:, own], kernel[read][:, own], bias[own], level)
        found = np.vstack(
            [
                got["params"]["Dense_1"]["kernel"][read][:, own],
                got["params"]["Dense_1"]["bias"][own],
            ]
        )
        np.testing.assert_allclose(found, expected, atol=2e-4)


def _ridge_scale(z, read):
    """One ridge for all blocks: a share of the mean diagonal of the whole Gram matrix."""
    whole = (np.mean(z**2, 0).sum() + 1) / (z.shape[1] + 1)
    return whole / ((np.mean(z[:, read] ** 2, 0).sum() + 1) / (read.sum() + 1))


def _of(orders, layer):
    return [order[f"params/{layer}/kernel:1"] for order in orders]


def _dense(params, i, x):
    layer = params["params"][f"Dense_{i}"]
    return x.astype(np.float64) @ layer["kernel"].astype(np.float64) + layer["bias"]


def _relu(params, i, x):
    return np.maximum(_dense(params, i, x), 0)


@pytest.mark.filterwarnings("ignore:regression. the inputs of")  # 24 images
def test_least_squares_lowers_the_error_of_a_convolutional_network(convnet):
    apply, symmetries, pair, matching, joint = convnet
    mean = sum(apply(params, IMAGES) for params in pair) / 2
    stats = alignment.statistics(symmetries, [{}, matching.permutations], pair)
    shared = alignment.regression(joint, stats, pair)
    joined, solved = (
        mj.merge(method, None, pair, stats=stats, shared=shared)
        for method in ("permute()|join()", "pleas(ridge=1e-4)")
    )
    errors = [float(jnp.mean((apply(p, IMAGES) - mean) ** 2)) for p in (joined, solved)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.filterwarnings("ignore:regression. the inputs of")  # 24 images
def test_least_squares_leaves_a_permuted_twin(convnet):
    apply, symmetries, (a, _), _, _ = convnet
    twin = alignment.apply(symmetries, alignment.random(symmetries, 7), a)
    found = alignment.weight_matching(symmetries, a, twin)
    stats = alignment.statistics(symmetries, [{}, found.permutations], [a, twin])
    joint = mj.collect.joint_gram(apply, [a, twin], [IMAGES])
    shared = alignment.regression(joint, stats, [a, twin])
    trees.close(mj.merge("pleas()", None, [a, twin], stats=stats, shared=shared), a, atol=1e-5)


@pytest.mark.parametrize("kind", ["correlation", "inner", "distance"])
@pytest.mark.parametrize("name", ["net", "convnet"])
def test_activations_recover_a_permuted_twin(name, kind, request):
    apply, symmetries, (a, _), _, _ = request.getfixturevalue(name)
    planted = alignment.random(symmetries, 8)
    twin = alignment.apply(symmetries, planted, a)
    joint = mj.collect.joint_gram(apply, [a, twin], [INPUTS if name == "net" else IMAGES])
    found = alignment.activation_matching(symmetries, a, twin, joint, kind=kind)
    if kind == "inner" and name == "convnet":
        return  # a loud unit may be nearer to another than to itself
    for group, undone in alignment.invert(symmetries, planted).items():
        if kind != "inner":
            np.testing.assert_array_equal(found.permutations[group], undone)


def test_activations_recover_heads(request):
    apply_fn, a, example = make("vit")
    symmetries = alignment.symmetries(apply_fn, a, example)
    planted = alignment.random(symmetries, 8)
    twin = alignment.apply(symmetries, planted, a)
    images = jax.random.normal(jax.random.key(5), (16, 12, 12, 3))
    joint = mj.collect.joint_gram(apply_fn, [a, twin], [images])
    found = alignment.activation_matching(symmetries, a, twin, joint)
    for group, undone in alignment.invert(symmetries, planted).items():
        np.testing.assert_array_equal(found.permutations[group], undone, err_msg=group)


def test_straight_through_keeps_the_best_midpoint(net):
    apply, symmetries, pair, matching, _ = net
    target = apply(pair[0], INPUTS)

    def loss(params, batch):
        return jnp.mean((apply(params, batch) - target) ** 2)

    def at_midpoint(permutations):
        moved = alignment.apply(symmetries, permutations, pair[1])
        return loss(jax.tree.map(lambda a, b: (a + b) / 2, pair[0], moved), INPUTS)

    found = alignment.straight_through(
        symmetries, *pair, loss, [INPUTS] * 12, optimizer=optax.sgd(0.3)
    )
    assert float(at_midpoint(found.permutations)) <= float(at_midpoint(matching.permutations))


def test_repair_brings_moments_back_and_leaves_equal_networks(net):
    apply, symmetries, pair, matching, _ = net
    aligned = alignment.apply(symmetries, matching.permutations, pair[1])
    middle = jax.tree.map(lambda a, b: (a + b) / 2, pair[0], aligned)
    same = alignment.repair(Net(), pair[0]["params"], [pair[0]["params"]] * 2, [INPUTS])
    trees.close(same, pair[0]["params"], atol=2e-5)
    fixed = alignment.repair(apply, middle, [pair[0], aligned], [INPUTS[:100], INPUTS[100:]])
    fixed = jax.tree.map(np.asarray, fixed)
    for i in range(3):
        rows = [INPUTS.astype(np.float64)] * 3
        for j in range(i):
            rows = [_relu(p, j, r) for p, r in zip((pair[0], aligned, fixed), rows, strict=True)]
        outs = [_dense(p, i, r) for p, r in zip((pair[0], aligned, fixed), rows, strict=True)]
        np.testing.assert_allclose(
            outs[2].mean(0), (outs[0].mean(0) + outs[1].mean(0)) / 2, atol=1e-4
        )
        np.testing.assert_allclose(outs[2].std(0), (outs[0].std(0) + outs[1].std(0)) / 2, atol=1e-4)


def test_batch_norm_is_reestimated_whatever_its_momentum(convnet):
    _, _, (a, _), _, _ = convnet
    model = ConvNet()

    def update(stats, x):
        variables = {"params": a["params"], "batch_stats": stats}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    batches = [IMAGES[:12], IMAGES[12:]]
    found = alignment.reestimate(update, a["batch_stats"], batches)["BatchNorm_0"]
    first = nn.Conv(4, (3, 3))
    outs = [np.asarray(first.apply({"params": a["params"]["Conv_0"]}, x)) for x in batches]
    mean = np.mean([x.mean((0, 1, 2)) for x in outs], axis=0)
    var = np.mean([x.var((0, 1, 2)) for x in outs], axis=0)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["var"], var, rtol=1e-4)


def test_cost_is_the_number_of_weights_that_are_not_zero(net):
    _, symmetries, pair, matching, _ = net
    for ratios in (0.5, {"params/Dense_0/kernel:1": 0.3}):
        orders = alignment.keep_apart(symmetries, [matching], ratios)
        wide = merge("permute()|join()", symmetries, orders, pair)
        kernels = [
            [np.asarray(p["params"][f"Dense_{i}"]["kernel"]) for i in range(3)]
            for p in (wide, pair[0])
        ]
        count = [sum(np.count_nonzero(k) for k in several) for several in kernels]
        assert alignment.cost(symmetries, pair[0], ratios) == pytest.approx(count[0] / count[1])


def test_kernels_count_as_often_as_they_are_applied():
    group = alignment.Symmetries({"h": alignment.Group(4)}, {"a/kernel": (None, "h")})
    params = {"a/kernel": np.ones((2, 4)), "b/kernel": np.ones((3, 5))}
    uses = {"a/kernel": 10.0, "b/kernel": 2.0}
    expected = (10 * 8 * 1.5 + 2 * 15) / (10 * 8 + 2 * 15)
    assert alignment.cost(group, params, 0.5, uses=uses) == pytest.approx(expected)
    assert alignment.ratios_for(group, params, expected, uses=uses) == {"h": 0.5}
    with pytest.raises(mj.MergeError, match="kernel 'b/kernel' is not named"):
        alignment.cost(group, params, 0.5, uses={"a/kernel": 10.0})


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.55, 2.0])
def test_a_budget_is_met(net, budget):
    _, symmetries, pair, matching, _ = net
    for scores in (None, matching.scores):
        ratios = alignment.ratios_for(symmetries, pair[0], budget, scores=scores)
        spent = alignment.cost(symmetries, pair[0], ratios)
        assert budget - 0.06 < spent <= budget + 1e-9


def test_groups_under_a_norm_do_not_widen():
    apply_fn, params, example = make("vit")
    symmetries = alignment.symmetries(apply_fn, params, example)
    assert sorted(g.size for g in symmetries.groups.values() if g.widens) == [3, 3, 20, 20]
    apply_fn, params, example = make("moe")
    symmetries = alignment.symmetries(apply_fn, params, example)
    assert [g.size for g in symmetries.groups.values() if g.widens] == [8]  # no experts
    apply_fn, params, example = make("resnet20_batch_norm")
    symmetries = alignment.symmetries(apply_fn, params, example)
    assert all(group.widens for group in symmetries.groups.values())


def test_three_networks_are_joined_by_their_owners():
    group = alignment.Symmetries({"h": alignment.Group(2)}, {"b": ("h",)})
    experts = [{"b": jnp.asarray([x, 10 * x])} for x in (1.0, 2.0, 3.0)]
    matchings = [
        alignment.Matching({"h": np.arange(2, dtype=np.int32)}, {"h": np.array([2.0, 1.0])}, 0, 1)
    ] * 2
    orders = alignment.keep_apart(group, matchings, 0.5)
    got = merge("permute()|join()", group, orders, experts)
    np.testing.assert_allclose(got["b"], [2, 10, 20, 30])


def test_bad_input_is_answered_in_words(net):
    apply, symmetries, pair, matching, joint = net
    stats = alignment.statistics(symmetries, [{}, matching.permutations], pair)
    wide = alignment.keep_apart(symmetries, [matching], 0.5)
    group = "params/Dense_0/kernel:1"
    deeper = {"params": {**pair[1]["params"], "Dense_3": pair[1]["params"]["Dense_2"]}}
    nan = jax.tree.map(lambda x: x * np.nan, pair[1])
    undefined = {name: q * np.nan for name, q in joint.items()}
    loss = lambda p, x: jnp.mean(apply(p, x))
    narrow, none = INPUTS[:, :-1], INPUTS[:0]
    cases = [
        (lambda: mj.collect.joint_gram(apply, pair, [narrow]),
         r"joint_gram: the model does not run on batch 1 \(float32.*generate shape.*give batches"),
        (lambda: mj.collect.joint_gram(apply, pair, [INPUTS, narrow]), "does not run on batch 2"),
        (lambda: mj.collect.joint_gram(apply, pair, [none]), "have no examples"),
        (lambda: alignment.verify(apply, pair[0], narrow, symmetries), "not run on the example"),
        (lambda: alignment.verify(apply, pair[0], none, symmetries), "none or not finite"),
        (lambda: alignment.straight_through(symmetries, *pair, loss, [narrow]),
         "straight_through: the model does not run on batch 1"),
        (lambda: alignment.repair(apply, pair[0], pair, [narrow]), "does not run on batch 1"),
        (lambda: alignment.repair(apply, pair[0], pair, [none]), "have no examples"),
        (lambda: alignment.repair(apply, pair[0], [pair[0], nan], [INPUTS]), "not finite"),
        (lambda: alignment.repair(apply, pair[0], [pair[0], deeper], [INPUTS]),
         "leaf 'params/Dense_3/bias' is only in the model"),
        (lambda: alignment.statistics(symmetries, [{}, {}], [pair[0], deeper]), "only in the mod"),
        (lambda: alignment.regression(joint, stats, [pair[0], deeper]), "only in the model"),
        (lambda: alignment.zip_units(symmetries, [pair[0], deeper], joint), "only in the model"),
        (lambda: alignment.zip_units(symmetries, pair, undefined), "is not finite"),
        (lambda: alignment.regression(undefined, stats, pair), "is not finite"),
        (lambda: mj.merge("permute()|mean()", None, pair), "needs the statistic 'permutation'"),
        (lambda: mj.merge("pleas()", None, pair, stats=stats), "statistic 'aligned_gram'"),
        (lambda: alignment.statistics(symmetries, [{}], pair), "1 sets of permutations for 2"),
        (lambda: alignment.statistics(symmetries, [{}, {"x": np.arange(2)}], pair), "called 'x'"),
        (lambda: alignment.statistics(symmetries, [{}, {group: np.arange(4)}], pair),
         "same number of places"),
        (lambda: merge("permute()|mean()", symmetries, wide, pair, base=pair[0]),
         "wider than the base"),
        (lambda: alignment.keep_apart(symmetries, [matching], 1.2), r"must be in \[0, 1\]"),
        (lambda: alignment.keep_apart(symmetries, [matching], {"x": 0.5}), "no group has this"),
        (lambda: alignment.ratios_for(symmetries, pair[0], 3.0), "cannot be met"),
        (lambda: alignment.ratios_for(symmetries, pair[0], 0.5), "cannot be met"),
        (lambda: alignment.regression({"x": np.eye(3)}, stats, pair), "no kernel has this name"),
        (lambda: alignment.regression(
            {"params/Dense_0/kernel": np.eye(3)}, stats, pair), "has shape.*expected"),
        (lambda: mj.collect.joint_gram(apply, pair[:1], [INPUTS]), "at least two"),
        (lambda: mj.collect.joint_gram(apply, pair, []), "no batch"),
        (lambda: mj.collect.joint_gram(apply, pair, [INPUTS * np.nan]), "not finite"),
        (lambda: alignment.activation_matching(symmetries, *pair, joint, kind="x"), "known"),
        (lambda: alignment.activation_matching(
            symmetries, *pair, {"params/Dense_1/kernel": np.eye(9)}), "collect it again"),
        (lambda: alignment.straight_through(symmetries, *pair, lambda p, x: jnp.nan, []),
         "no batch gave a loss"),
        (lambda: alignment.reestimate(lambda s, x: s, {"mean": jnp.ones(2)}, [INPUTS]),
         "training mode"),
        (lambda: alignment.reestimate(lambda s, x: s, {"mean": jnp.ones(2)}, []), "no batch"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(mj.MergeError, match=message):
            call()


def test_too_few_examples_are_regularised_and_told(net):
    apply, symmetries, pair, matching, _ = net
    stats = alignment.statistics(symmetries, [{}, matching.permutations], pair)
    joint = mj.collect.joint_gram(apply, pair, [INPUTS[:2]])
    with pytest.warns(UserWarning, match="were measured on 2 rows, fewer than inputs"):
        shared = alignment.regression(joint, stats, pair)
    got = jax.tree.map(np.asarray, mj.merge("pleas()", None, pair, stats=stats, shared=shared))
    # On the few examples the regressed layer gives the mean of the experts' outputs.
    aligned = alignment.apply(symmetries, matching.permutations, pair[1])
    wanted = sum(_dense(p, 0, INPUTS[:2]) for p in (pair[0], aligned)) / 2
    np.testing.assert_allclose(_dense(got, 0, INPUTS[:2]), wanted, atol=1e-4)
