"""Norms, moments, tokens, mixtures and devices: sums over the rows of every kind of layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from mergejax.collect import gram, gram_sums, means, norm_square

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
