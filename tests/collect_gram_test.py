"""Gram matrices against activations computed by hand, and every way to get none."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from mergejax.collect import gram
from mergejax.leaves import as_matrix

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mean_gram(rows):
    rows = np.asarray(rows, np.float64)
    rows = rows.reshape(-1, rows.shape[-1])
    return rows.T @ rows / len(rows)


def close(value, expected):
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(value, np.swapaxes(value, -1, -2))


class Block(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width, name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(hidden)


JittedBlock = nn.jit(Block)


class Mlp(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.block(name="block")(x))


def block_inputs(params, x):
    params = jax.tree.map(np.asarray, params)
    hidden = np.maximum(x @ params["up"]["kernel"] + params["up"]["bias"], 0)
    return hidden, x + hidden @ params["down"]["kernel"] + params["down"]["bias"]


def mlp_grams(params, x):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hidden, output = block_inputs(params["block"], x)
    rows = {"block/up": x, "block/down": hidden, "head": output}
    return {f"{name}/kernel": mean_gram(value) for name, value in rows.items()}


def batched(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def randomised(params, seed=1):
    """Parameters without the zeros of fresh biases."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [normal(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    )


@pytest.mark.parametrize("block", [Block, nn.remat(Block), JittedBlock, nn.remat(JittedBlock)])
def test_mlp_plain_rematerialised_and_jitted_inside(block):
    model, x = Mlp(block), normal(22, 4)
    params = randomised(model.init(KEY, x)["params"])
    model.apply({"params": params}, x)  # whatever this compiles must not hide the layers
    for seed in (0, 1):  # and the first expert's trace must not serve the second
        params = randomised(params, seed=seed)
        grams = gram(model, params, batched(x, 8))
        expected = mlp_grams(params, x)
        assert list(grams) == list(expected)  # in the order of the calls
        for name in expected:
            close(grams[name], expected[name])


def test_masks_and_exclusions_reach_modules_that_are_jitted_inside():
    model, x = Mlp(JittedBlock), normal(8, 4)
    params = randomised(model.init(KEY, x)["params"])
    assert set(gram(model, params, [x], exclude="block")) == {"head/kernel"}
    grams = gram(model, params, [x, x[:4]], mask=lambda batch: np.arange(len(batch)) < 3)
    for name, expected in mlp_grams(params, x[:3]).items():
        close(grams[name], expected)


def test_batches_of_any_size_any_iterable_and_any_tree_give_the_same():
    model, x = Mlp(), normal(20, 4)
    params = model.init(KEY, x)["params"]
    traces = []

    def apply(params, batch):
        traces.append(batch["image"].shape)
        return model.apply({"params": params}, batch["image"])

    expected = mlp_grams(params, x)
    calls = []
    grams = gram(
        apply,
        freeze(params),
        [{"image": jnp.asarray(b)} for b in batched(x, 8)],
        progress=lambda *call: calls.append(call),
    )
    assert calls == [(1, 3, "gram"), (2, 3, "gram"), (3, 3, "gram")]
    assert sorted(set(traces)) == [(4, 4), (8, 4)]
    assert len(traces) <= 3
    generator = gram(model, params, (b for b in batched(x, 1)))
    for name in expected:
        close(grams[name], expected[name])
        close(generator[name], expected[name])


def test_leaf_names_are_places_in_params_however_the_function_uses_them():
    body, head, x = Block(), nn.Dense(3), normal(6, 4)
    params = {
        "Dense_0": head.init(KEY, x)["params"],
        "body": [body.init(KEY, x)["params"], randomised(body.init(KEY, x)["params"])],
    }

    def apply(params, batch):
        for part in params["body"]:
            batch = body.apply({"params": part}, batch)
        return head.apply({"params": params["Dense_0"]}, batch)

    first, middle = block_inputs(params["body"][0], x)
    second, last = block_inputs(params["body"][1], middle)
    expected = {
        "body/0/up/kernel": x,
        "body/0/down/kernel": first,
        "body/1/up/kernel": middle,
        "body/1/down/kernel": second,
        "Dense_0/kernel": last,
    }
    grams = gram(apply, params, [x])
    assert list(grams) == list(expected)
    for name, rows in expected.items():
        close(grams[name], mean_gram(rows))
    method = functools.partial(nn.Dense(3).apply, mutable=["batch_stats"])
    close(gram(method, {"params": params["Dense_0"]}, [x])["params/kernel"], mean_gram(x))


def test_shared_layer_sums_over_its_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4)
            return layer(layer(x))

    model, x = Twice(), normal(6, 4)
    params = randomised(model.init(KEY, x)["params"])
    once = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    close(gram(model, params, [x])["Dense_0/kernel"], mean_gram(np.concatenate([x, once])))

    def siamese(params, batch):
        return [nn.Dense(4).apply({"params": params}, side) for side in batch]

    other = normal(6, 4, seed=5)
    grams = gram(siamese, params["Dense_0"], [(x, other)])
    close(grams["kernel"], mean_gram(np.concatenate([x, other])))


def test_subclass_that_changes_the_inputs_counts_once():
    class Doubled(nn.Dense):
        def __call__(self, inputs):
            return super().__call__(2 * inputs)

    x = normal(6, 4)
    grams = gram(Doubled(3), Doubled(3).init(KEY, x)["params"], [x])
    close(grams["kernel"], mean_gram(2 * x))


class Encoder(nn.Module):
    """A ViT block on patches, with every shape different from the others."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(6, (2, 3), strides=(2, 3), padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, 6)
        y = nn.LayerNorm(name="norm_0")(x)
        y = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(y)
        x = x + y
        y = nn.LayerNorm(name="norm_1")(x)
        y = nn.Dense(7, name="up")(y)
        x = x + nn.Dense(6, name="down")(nn.gelu(y))
        return nn.Dense(3, name="head")(x.mean(1))


def test_vision_transformer():
    model, images = Encoder(), normal(5, 4, 6, 3)
    params = randomised(model.init(KEY, images)["params"])
    _, state = model.apply({"params": params}, images, capture_intermediates=True, mutable=True)
    out = jax.tree.map(np.asarray, state["intermediates"])
    seen = {name: value["__call__"][0] for name, value in out.items() if name != "__call__"}
    query, key, value = (out["attention"][n]["__call__"][0] for n in ("query", "key", "value"))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / 2.0  # √(head width)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    attended = np.einsum("bhqk,bkhd->bqhd", shares, value)
    tokens = seen["patches"].reshape(5, 4, 6) + seen["attention"]
    patches = images.reshape(5, 2, 2, 2, 3, 3).transpose(0, 1, 3, 5, 2, 4)  # b y x channel h w
    expected = {
        "patches/kernel": patches.reshape(5, 4, 18),
        "attention/query/kernel": seen["norm_0"],
        "attention/key/kernel": seen["norm_0"],
        "attention/value/kernel": seen["norm_0"],
        "attention/out/kernel": attended.reshape(5, 4, 8),
        "up/kernel": seen["norm_1"],
        "down/kernel": np.asarray(nn.gelu(seen["up"])),
        "head/kernel": (tokens + seen["down"]).mean(1),
    }
    grams = gram(model, params, batched(images, 2))
    assert set(grams) == set(expected)
    for name, rows in expected.items():
        close(grams[name], mean_gram(rows))


CONVOLUTIONS = [
    {"kernel_size": (3, 2), "strides": (2, 1), "padding": "SAME"},
    {"kernel_size": (3, 2), "strides": 2, "padding": "VALID"},
    {"kernel_size": (2, 3), "padding": ((1, 0), (2, 1)), "kernel_dilation": (2, 1)},
    {"kernel_size": (3, 3), "padding": 1, "input_dilation": 2},
    {"kernel_size": (3, 4), "padding": "CIRCULAR", "kernel_dilation": (1, 2)},
    {"kernel_size": (3, 3), "padding": "REFLECT", "strides": (1, 2)},
    {"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2},
    {"kernel_size": (3,), "padding": "SAME_LOWER", "strides": None},
]


@pytest.mark.parametrize("library", [nn, nnx])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution_gram_gives_the_second_moment_of_the_outputs(options, library):
    """For y = x W: mean yᵀy = Wᵀ G W, in the core's matrix view of the kernel."""
    rank = len(options["kernel_size"])
    x = normal(2, *(9, 7)[:rank], 3)
    if library is nn:
        model = nn.Conv(5, **options, use_bias=False)
        params = model.init(KEY, x)["params"]
        output, kernel = model.apply({"params": params}, x), params["kernel"]
    else:
        model = nnx.Conv(3, 5, **options, use_bias=False, rngs=nnx.Rngs(0))
        params, output, kernel = None, model(x), model.kernel[...]
    found = gram(model, params, [x])["kernel"]
    matrix, _ = as_matrix(kernel, "hwio" if rank == 2 else "lio")
    close(found, found)
    np.testing.assert_allclose(matrix.T @ found @ matrix, mean_gram(output), rtol=1e-4, atol=1e-5)


def test_small_convolutional_net_against_loops():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 2), strides=(2, 1), padding="SAME", name="first")(x))
            x = nn.Conv(5, (2, 2), strides=2, padding="VALID", name="second")(x)
            return nn.Dense(3, name="head")(x.reshape(*x.shape[:-3], -1))

    def patches(x, size, strides):
        rows = [
            x[:, i : i + size[0], j : j + size[1]].transpose(0, 3, 1, 2).reshape(len(x), -1)
            for i in range(0, x.shape[1] - size[0] + 1, strides[0])
            for j in range(0, x.shape[2] - size[1] + 1, strides[1])
        ]
        return np.stack(rows, 1)

    def convolve(x, layer, size, strides, shape):
        matrix = np.asarray(layer["kernel"]).transpose(2, 0, 1, 3).reshape(-1, shape[-1])
        return (patches(x, size, strides) @ matrix + layer["bias"]).reshape(len(x), *shape)

    model, x = Net(), normal(3, 5, 6, 2)
    params = randomised(model.init(KEY, x)["params"])
    padded = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))  # SAME for 5 rows by 2, 6 columns by 1
    hidden = np.maximum(convolve(padded, params["first"], (3, 2), (2, 1), (3, 6, 4)), 0)
    last = convolve(hidden, params["second"], (2, 2), (2, 2), (1, 3, 5))
    grams = gram(model, params, batched(x, 2))
    close(grams["first/kernel"], mean_gram(patches(padded, (3, 2), (2, 1))))
    close(grams["second/kernel"], mean_gram(patches(hidden, (2, 2), (2, 2))))
    close(grams["head/kernel"], mean_gram(last.reshape(3, -1)))
    single = gram(model, params, [x[0]])  # Flax convolutions also take one image without an axis
    close(single["first/kernel"], mean_gram(patches(padded[:1], (3, 2), (2, 1))))


@pytest.mark.parametrize("library", [nn, nnx])
@pytest.mark.parametrize("axis", [-1, (-2, -1), (1, -1), (3, 1)])
def test_general_dense_over_several_axes(axis, library):
    x = normal(4, 2, 3, 5)
    axes = sorted(np.atleast_1d(axis) % 4)
    size = tuple(x.shape[a] for a in axes)
    if library is nn:
        model = nn.DenseGeneral((2, 7), axis=axis, use_bias=False)
        params = model.init(KEY, x)["params"]
        output, kernel = model.apply({"params": params}, x), params["kernel"]
    else:
        model = nnx.LinearGeneral(size, (2, 7), axis=axis, use_bias=False, rngs=nnx.Rngs(0))
        params, output, kernel = None, model(x), model.kernel[...]
    found = gram(model, params, [x])["kernel"]
    matrix = kernel.reshape(-1, 14)
    assert found.shape == (np.prod(size),) * 2
    second_moment = mean_gram(output.reshape(-1, 14))
    np.testing.assert_allclose(matrix.T @ found @ matrix, second_moment, rtol=1e-4, atol=1e-5)


def test_scanned_layers_give_one_gram_each_or_say_what_to_add():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4, name="dense")(x)), None

    class Stack(nn.Module):
        axes: tuple = ("params", "intermediates")

        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                nn.remat(Layer),
                variable_axes=dict.fromkeys(self.axes, 0),
                split_rngs={"params": True},
                length=3,
            )
            return scan(name="layers")(x, None)[0]

    model, x = Stack(), normal(6, 4)
    params = randomised(model.init(KEY, x)["params"])
    grams = gram(model, params, batched(x, 4), mask=lambda batch: np.ones(len(batch)))
    kernel, bias = params["layers"]["dense"]["kernel"], params["layers"]["dense"]["bias"]
    inputs = [x]
    for layer in range(2):
        inputs.append(np.tanh(inputs[-1] @ kernel[layer] + bias[layer]))
    assert set(grams) == {"layers/dense/kernel"}
    close(grams["layers/dense/kernel"], np.stack([mean_gram(rows) for rows in inputs]))
    with pytest.raises(ValueError, match=r"'layers/dense/kernel' run inside nn\.scan.*add 'inter"):
        gram(Stack(("params",)), params, [x])


def test_padding_is_left_out_whatever_it_holds():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="token")(x)
            return nn.Dense(2, name="pooled")(jnp.nan_to_num(x).sum(1))

    model, x = Pooled(), normal(4, 5, 6)
    params = randomised(model.init(KEY, x)["params"])
    weights = np.ones((4, 5), np.float32)
    weights[1, 3:] = 0
    weights[2, 0] = 0.5
    weights[3] = 0
    x[weights == 0] = np.nan
    batch = {"x": x, "mask": weights}
    grams = gram(
        lambda p, b: model.apply({"params": p}, b["x"]),
        params,
        [batch],
        mask=lambda b: b["mask"],
    )
    rows, w = x[weights > 0], weights[weights > 0]
    close(grams["token/kernel"], np.einsum("r,ri,rj->ij", w, rows, rows) / w.sum())
    kept = np.nan_to_num(x @ params["token"]["kernel"] + params["token"]["bias"]).sum(1)[:3]
    close(grams["pooled/kernel"], mean_gram(kept))
    by_example = gram(model, params, [np.nan_to_num(x)], mask=lambda b: np.arange(4) < 2)
    close(by_example["token/kernel"], mean_gram(np.nan_to_num(x)[:2]))


def test_low_precision_activations_are_summed_in_float32():
    model, x = nn.Dense(3, dtype=jnp.bfloat16), normal(400, 4).astype(jnp.bfloat16)
    params = model.init(KEY, x)["params"]
    expected = mean_gram(np.float32(x))
    close(gram(model, params, batched(x, 7))["kernel"], expected)


def test_sharded_batches_give_the_same():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    model, x = Mlp(), normal(16, 4)
    params = model.init(KEY, x)["params"]
    grams = gram(model, params, [jax.device_put(x, sharding)])
    for name, expected in mlp_grams(params, x).items():
        close(grams[name], expected)


# NNX


class Linears(nnx.Module):
    def __init__(self, rngs, call=lambda block, x: block(x)):
        self.blocks = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)
        self.tied = self.head
        self.call = call

    def __call__(self, x):
        for block in self.blocks:
            x = self.dropout(nnx.relu(self.call(block, x)))
        return self.tied(x)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.remat, nnx.jit])
def test_nnx_mlp_plain_rematerialised_and_jitted_inside(wrap):
    model, x = Linears(nnx.Rngs(0), wrap(lambda block, x: block(x))), normal(9, 4)
    calls = [layer.__call__ for layer in (nnx.Linear, nnx.LinearGeneral, nnx.Conv)]
    model(x)
    first = np.maximum(x @ model.blocks[0].kernel[...], 0)
    second = np.maximum(first @ model.blocks[1].kernel[...], 0)
    expected = {"blocks/0/kernel": x, "blocks/1/kernel": first, "head/kernel": second}
    state = nnx.state(model, nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    for params in (None, state):
        grams = gram(model, params, batched(x, 4))
        assert list(grams) == list(expected)
        for name, rows in expected.items():
            close(grams[name], mean_gram(rows))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, state)
    close(gram(model, doubled, [x])["blocks/1/kernel"], mean_gram(2 * first))
    assert calls == [layer.__call__ for layer in (nnx.Linear, nnx.LinearGeneral, nnx.Conv)]
    after = nnx.state(model)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert not model.dropout.deterministic


def test_nnx_attention_equals_linen():
    linen = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=5)
    x = normal(3, 4, 6)
    params = randomised(linen.init(KEY, x)["params"])
    attention = nnx.MultiHeadAttention(
        2, 6, qkv_features=8, out_features=5, decode=False, rngs=nnx.Rngs(0)
    )
    state = nnx.state(attention, nnx.Param)
    for name in ("query", "key", "value", "out"):
        for leaf in ("kernel", "bias"):
            state[name][leaf].set_value(jnp.asarray(params[name][leaf]))
    expected = gram(linen, params, [x])
    grams = gram(attention, state, [x])
    assert set(grams) == set(expected)
    assert grams["out/kernel"].shape == (8, 8)
    for name in expected:
        close(grams[name], expected[name])


def test_nnx_scanned_layers_give_one_gram_each():
    @nnx.vmap(in_axes=0, out_axes=0)
    def layers(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = layers(jax.random.split(KEY, 3))

        def __call__(self, x):
            scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x, self.layers)

    model, x = Stack(), normal(6, 4)
    inputs = [x]
    for layer in range(2):
        inputs.append(inputs[-1] @ np.asarray(model.layers.kernel[...])[layer])
    grams = gram(model, None, [x])
    close(grams["layers/kernel"], np.stack([mean_gram(rows) for rows in inputs]))


def test_nnx_classes_are_restored_when_the_model_fails():
    model = Linears(nnx.Rngs(0))
    before = nnx.Linear.__call__
    with pytest.raises(
        ValueError, match=r"gram: the model does not run on batch 1 \(float32\[3,7\]"
    ):
        gram(model, None, [normal(3, 7)])
    assert nnx.Linear.__call__ is before


# Compilation


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_functions_share_a_trace_and_plain_ones_see_what_has_changed(shared):
    traces, scale = [], {"input": 1.0}

    def apply(params, batch):
        traces.append(batch.shape)
        return Mlp().apply({"params": params}, scale["input"] * batch)

    function, x = jax.jit(apply) if shared else apply, normal(6, 4)
    params = randomised(Mlp().init(KEY, x)["params"])
    first = gram(function, params, [x])
    count = len(traces)
    other = randomised(params, seed=9)
    close(gram(function, other, [x])["head/kernel"], mlp_grams(other, x)["head/kernel"])
    assert (len(traces) == count) == shared
    assert list(gram(function, params, [x], exclude="head")) == [
        "block/up/kernel",
        "block/down/kernel",
    ]
    if not shared:
        scale["input"] = 2.0
        doubled = gram(function, params, [x])
        close(doubled["block/up/kernel"], 4 * first["block/up/kernel"])


# What cannot be collected


def test_function_compiled_before_gives_its_grams_or_an_error():
    model, x = Mlp(), normal(6, 4)
    params = randomised(model.init(KEY, x)["params"])
    compiled = jax.jit(lambda params, batch: model.apply({"params": params}, batch))
    compiled(params, x)
    close(gram(compiled, params, [x])["head/kernel"], mlp_grams(params, x)["head/kernel"])
    with pytest.raises(ValueError, match=r"no Dense.*not compiled by jax\.jit before"):
        gram(lambda params, batch: compiled(params, batch), params, [x])

    inner = jax.jit(lambda params, batch: Block().apply({"params": params}, batch))
    inner(params["block"], x)

    def partly(params, batch):
        hidden = inner(params["block"], batch)
        return nn.Dense(3).apply({"params": params["head"]}, hidden)

    with pytest.raises(ValueError, match=r"nothing was seen of 'block/down/kernel', 'block/up"):
        gram(partly, params, [x])
    assert set(gram(partly, params, [x], exclude=("^block",))) == {"head/kernel"}


def apply_mlp(params, batch):
    return Mlp().apply({"params": params}, batch)


def cast(params, batch):
    return apply_mlp(jax.tree.map(lambda leaf: leaf * 2, params), batch)


def bound(params, batch):
    return Mlp().bind({"params": params})(batch)


def vmapped(params, batch):
    return jax.vmap(functools.partial(apply_mlp, params))(batch)


def nothing(params, batch):
    return batch @ params["head"]["kernel"]


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (cast, {}, "'block/down/kernel' is no leaf of params|'block/up/kernel' is no leaf"),
        (bound, {}, "is no leaf of params; hand the leaves"),
        (vmapped, {}, "inside a JAX transform"),
        (nothing, {}, "no Dense, DenseGeneral or Conv layer was seen"),
        (apply_mlp, {"exclude": "blok"}, "pattern 'blok' matches no leaf"),
        (apply_mlp, {"mask": lambda b: np.ones(5)}, r"shape \(5,\) and the rows of .* have \(6,\)"),
        (apply_mlp, {"mask": lambda b: -np.ones(6)}, "from -1.0 to -1.0, expected"),
        (apply_mlp, {"mask": lambda b: np.zeros(6)}, "every row of .* has weight 0"),
    ],
)
def test_what_cannot_be_collected_is_said(function, options, words):
    x = normal(6, 4)
    params = Mlp().init(KEY, x)["params"]
    with pytest.raises(ValueError, match=words):
        gram(function, params, [x], **options)
    assert nn.Module.apply(Mlp(), {"params": params}, x).shape == (6, 3)


def test_values_that_are_not_finite_name_the_first_layer():
    x = normal(6, 4)
    params = Mlp().init(KEY, x)["params"]
    params["block"]["up"]["kernel"] = params["block"]["up"]["kernel"].at[0, 0].set(np.nan)
    with pytest.raises(ValueError, match="2 of 3 layers are not finite, the first is 'block/down"):
        gram(apply_mlp, params, [x, x])
    with pytest.raises(ValueError, match="no batch"):
        gram(apply_mlp, params, [])


@pytest.mark.parametrize("library", [nn, nnx])
def test_layers_with_a_batch_axis_are_refused_until_excluded(library):
    x = normal(2, 5)
    if library is nn:
        model = nn.DenseGeneral(3, batch_dims=(0,))
        params = model.init(KEY, x)["params"]
    else:
        model, params = nnx.LinearGeneral(5, 3, batch_axis={0: 2}, rngs=nnx.Rngs(0)), None
    with pytest.raises(ValueError, match="'kernel' has one kernel per entry of a batch axis"):
        gram(model, params, [x])
    with pytest.raises(ValueError, match="no Dense"):
        gram(model, params, [x], exclude="kernel")


def test_no_warning_is_left_behind():
    x = normal(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram(Linears(nnx.Rngs(0)), None, [x])
        gram(Mlp(), Mlp().init(KEY, x)["params"], [x])
