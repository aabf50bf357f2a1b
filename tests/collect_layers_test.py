"""Norms, moments, tokens, mixtures and devices: sums over the rows of every kind of layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mergejax.collect import (
    cross_gram,
    gram,
    gram_sums,
    means,
    moments,
    norm_square,
    representations,
    token_share,
)

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found, expected):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def normalised(x, epsilon=1e-6, centred=True):
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) * centred
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon)


def mean_square(rows, weights=None):
    rows = rows.reshape(-1, rows.shape[-1])
    return np.average(rows**2, axis=0, weights=None if weights is None else weights.ravel())


# Norms --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    norm: type = nn.LayerNorm

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(5, name="dense")(self.norm(name="norm")(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "intermediates": 0}
        kind = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=2)
        return nn.LayerNorm(use_scale=False)(kind(name="layers")(x, None)[0])


def test_norms_of_scanned_and_rematerialised_layers_and_their_padding():
    x = 3 + normal(4, 6, 5)
    params = Stack().init(KEY, x)["params"]
    weights = np.ones((4, 6), np.float32)
    weights[0, 2:], weights[3] = 0, 0.5
    kernel = np.asarray(params["layers"]["dense"]["kernel"], np.float64)
    inputs = [x, x + normalised(x) @ kernel[0]]
    found = norm_square(Stack(), params, [x[:3], x[3:]])
    assert set(found) == {"layers/norm/scale"}
    close(found["layers/norm/scale"], np.stack([mean_square(normalised(y)) for y in inputs]))
    padded = np.where(weights[..., None] > 0, x, np.nan)
    masked = norm_square(Stack(), params, [(padded)], mask=lambda batch: weights)
    expected = np.stack([mean_square(normalised(y), weights) for y in inputs])
    close(masked["layers/norm/scale"], expected)
    np.testing.assert_array_equal(masked.rows["layers/norm/scale"], 2 * [weights.sum()])


class Norms(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.RMSNorm(5, rngs=rngs)
        self.last = nnx.LayerNorm(5, rngs=rngs)
        self.plain = nnx.LayerNorm(5, use_scale=False, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.plain(self.last(nnx.remat(lambda norm, x: norm(x))(self.first, x)))


def test_norms_of_nnx_small_scales_do_no_harm():
    model, x = Norms(), 3 + normal(7, 5)
    scale = np.array([1e-7, 1, 2, 3, 4], np.float32)
    model.first.scale.set_value(jnp.asarray(scale))
    first = normalised(x, centred=False)
    found = norm_square(model, None, [x])
    assert set(found) == {"first/scale", "last/scale"}
    close(found["first/scale"], mean_square(first))
    close(found["last/scale"], mean_square(normalised(first * scale)))
    assert set(norm_square(model, None, [x], exclude="last")) == {"first/scale"}


# Moments, tokens, two models ----------------------------------------------------------------------


class Text(nn.Module):
    """A tied embedding, a norm with running statistics, two layers."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 5, name="embed")
        x = nn.BatchNorm(use_running_average=True, name="norm")(embed(tokens))
        x = nn.remat(nn.Dense)(5, name="dense")(x)
        return embed.attend(nn.relu(nn.Dense(5, name="last")(x)))


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(0).integers(7, size=(6, 4))
    variables = jax.device_get(Text().init(KEY, tokens))
    variables["batch_stats"]["norm"]["mean"] = np.full(5, 0.5, np.float32)

    def apply(params, batch):
        return Text().apply({"params": params, "batch_stats": variables["batch_stats"]}, batch)

    weights = (np.arange(4) < np.array([4, 2, 3, 1, 4, 0])[:, None]).astype(np.float32)
    return apply, variables["params"], tokens, weights


def test_moments_and_shares_of_tokens_under_a_mask(text):
    apply, params, tokens, weights = text
    batches = [(tokens[:4], weights[:4]), (tokens[4:], weights[4:])]
    options = {"mask": lambda batch: batch[1]}
    of_first = lambda params, batch: apply(params, batch[0])
    kept = tokens[weights > 0]
    shares = token_share(of_first, params, batches, **options)
    close(shares["embed/embedding"], np.bincount(kept, minlength=7) / len(kept))
    mean, square = moments(of_first, params, batches, **options)
    embedded = params["embed"]["embedding"].astype(np.float64)[kept]
    dense = (embedded - 0.5) / np.sqrt(1 + 1e-5)
    last = dense @ params["dense"]["kernel"] + params["dense"]["bias"]
    rows = {"norm/scale": embedded, "dense/kernel": dense, "last/kernel": last}
    assert set(mean) == set(square) == set(rows)
    for name, x in rows.items():
        close(mean[name], x.mean(0))
        close(square[name], (x**2).mean(0))
        assert mean.rows[name] == len(kept)


def test_two_models_see_the_same_data(text):
    apply, params, tokens, weights = text
    other = jax.tree.map(lambda x: 1.5 * x, params)
    batches = [(tokens[:4], weights[:4]), (tokens[4:], weights[4:])]
    options = {"mask": lambda batch: batch[1]}
    of_first = lambda params, batch: apply(params, batch[0])
    found = cross_gram(of_first, params, other, batches, **options)
    inputs = [
        params["embed"]["embedding"].astype(np.float64)[tokens[weights > 0]] * s for s in (1, 1.5)
    ]
    x, y = ((rows - 0.5) / np.sqrt(1 + 1e-5) * s for rows, s in zip(inputs, (1, 1.5), strict=True))
    close(found["dense/kernel"], x.T @ y / len(x))
    assert not np.allclose(found["dense/kernel"], found["dense/kernel"].T)
    same = cross_gram(of_first, params, params, batches, **options)
    close(same["last/kernel"], gram(of_first, params, batches, **options)["last/kernel"])
    given = representations(apply, params, [tokens[:4], tokens[4:]])
    np.testing.assert_allclose(given, apply(params, tokens), rtol=1e-5, atol=1e-6)


def test_what_two_models_and_tokens_cannot_give_is_said(text):
    apply, params, tokens, _ = text
    twice = lambda p, x: nn.Dense(5).apply({"params": p}, nn.Dense(5).apply({"params": p}, x))
    with pytest.raises(ValueError, match="'kernel' are called more than once"):
        cross_gram(twice, params["dense"], params["dense"], [normal(3, 5)])
    with pytest.raises(ValueError, match="every row of 'embed/embedding' has weight 0"):
        token_share(apply, params, [tokens], mask=lambda batch: np.zeros(6))
    with pytest.raises(ValueError, match="outputs for batch 1 are not finite"):
        representations(lambda params, x: x / 0, None, [np.ones((2, 1), np.float32)])
    with pytest.raises(ValueError, match="there is no batch"):
        representations(apply, params, [])


# Mixtures of experts ------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Every expert gets its tokens in a buffer that is padded with zeros."""

    experts: int = 3

    @nn.compact
    def __call__(self, x):
        chosen = nn.Dense(self.experts, name="router")(x).argmax(-1)
        buffers = jnp.where((chosen[None] == jnp.arange(self.experts)[:, None])[..., None], x, 0)
        dense = nn.vmap(
            nn.Dense,
            in_axes=0,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
        )
        return dense(4, name="experts")(buffers).sum(0)


def test_experts_of_a_mixture_see_their_routed_rows_alone():
    x = normal(40, 5)
    params = jax.device_get(Mixture().init(KEY, x)["params"])
    params["router"]["bias"] = np.array([0.0, 0.5, -100.0], np.float32)  # nothing for the third
    chosen = (x @ params["router"]["kernel"] + params["router"]["bias"]).argmax(-1)
    assert set(chosen) == {0, 1}
    routed = lambda name, inputs: (inputs != 0).any(-1) if "experts" in name else None
    found = gram(Mixture(), params, [x[:25], x[25:]], row_mask=routed)
    for expert in range(3):
        rows = x[chosen == expert].astype(np.float64)
        close(found["experts/kernel"][expert], rows.T @ rows / max(len(rows), 1))
        assert found.rows["experts/kernel"][expert] == len(rows)
    close(found["router/kernel"], np.float64(x).T @ x / 40)


def test_wide_layers_are_summed_in_blocks():
    x = normal(30, 500)
    params = {"kernel": jnp.ones((500, 1)), "bias": jnp.zeros(1)}
    found = gram(nn.Dense(1), params, [x[:13], x[13:]])["kernel"]
    close(found, np.float64(x).T @ x / 30)
    np.testing.assert_array_equal(found, found.T)


def test_a_budget_takes_several_passes_and_gives_the_same():
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    batches = [normal(8, 5), normal(8, 5, seed=1)]
    params = model.init(KEY, batches[0])["params"]
    whole, calls = gram(model, params, batches), []
    size = 4 * (6 * 6 + 1)
    found = gram(model, params, batches, budget=size, progress=lambda *call: calls.append(call))
    assert calls == 2 * [(1, 2, "gram"), (2, 2, "gram")]
    assert list(found) == list(whole)
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name])
    with pytest.raises(ValueError, match="'layers_2/kernel' take 148 bytes, more than the budget"):
        gram(model, params, batches, budget=size - 1)
    with pytest.raises(ValueError, match=r"several passes over the batches.*pass a list"):
        gram(model, params, iter(batches), budget=size)
    with pytest.raises(ValueError, match="there is no batch"):
        gram(model, params, [], budget=size)


# Devices ------------------------------------------------------------------------------------------


def test_sums_over_devices_are_those_of_one():
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    x, weights = normal(16, 5), np.arange(16, dtype=np.float32) % 3
    params = model.init(KEY, x)["params"]
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))

    def device(params, x, weights):
        return jax.lax.psum(gram_sums(model, params, x, weights), "data")

    data, whole = PartitionSpec("data"), PartitionSpec()
    parts = jax.shard_map(device, mesh=mesh, in_specs=(whole, data, data), out_specs=whole)
    found = means("gram", jax.jit(parts)(params, x, weights))
    expected = gram(model, params, [x], mask=lambda batch: weights)
    for name, value in expected.items():
        close(found[name], value)
        assert found.rows[name] == weights.sum() == expected.rows[name]
