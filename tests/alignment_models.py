"""Small models of the kinds whose symmetries are found, each as (apply_fn, params, example)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

IDS = jnp.array([[1, 5, 3, 8, 2], [7, 0, 9, 4, 6], [2, 2, 10, 1, 3]])


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(16)(x)))
        x = nn.tanh(nn.Dense(12)(x))
        return nn.Dense(3)(x)


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (6, 8):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(5)(nn.relu(nn.Dense(10)(x.reshape(len(x), -1))))


class ResNet20(nn.Module):
    norm: str

    @nn.compact
    def __call__(self, x):
        def norm(x):
            if self.norm == "batch":
                return nn.BatchNorm(use_running_average=True)(x)
            return nn.LayerNorm()(x) if self.norm == "layer" else nn.GroupNorm(2)(x)

        x = nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False)(x)))
        for stage, width in enumerate((4, 6, 8)):
            for block in range(3):
                stride = 2 if stage and not block else 1
                y = nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)
                y = norm(nn.Conv(width, (3, 3), use_bias=False)(nn.relu(norm(y))))
                if stride == 2:
                    x = norm(nn.Conv(width, (1, 1), strides=2, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), strides=4)(x).reshape(len(x), -1, 12)
        cls = self.param("cls", nn.initializers.normal(), (1, 1, 12))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1)
        x = x + self.param("pos", nn.initializers.normal(), (1, x.shape[1], 12))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=3)(y, y)
            x = x + nn.Dense(12)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        return nn.Dense(7)(nn.LayerNorm()(x)[:, 0])


def rotated(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None]
    angles = angles * 1e2 ** (-jnp.arange(half, dtype=jnp.float32)[None] / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Llama(nn.Module):
    """Rotary embeddings, four query heads in two groups, gated MLPs."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 16)(ids)
        for _ in range(2):
            y = nn.RMSNorm()(x)
            q, k, v = (
                nn.Dense(n * 6, use_bias=False)(y).reshape(*ids.shape, n, 6) for n in (4, 2, 2)
            )
            q, k = rotated(q), rotated(k)
            k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
            scores = jnp.where(
                jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None], scores, -1e9
            )
            y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
            x = x + nn.Dense(16, use_bias=False)(y.reshape(*ids.shape, -1))
            y = nn.RMSNorm()(x)
            y = nn.silu(nn.Dense(20, use_bias=False)(y)) * nn.Dense(20, use_bias=False)(y)
            x = x + nn.Dense(16, use_bias=False)(y)
        return nn.Dense(11, use_bias=False)(nn.RMSNorm()(x))


class T5(nn.Module):
    """Encoder and decoder with one embedding, relative positions per head, cross-attention."""

    @nn.compact
    def __call__(self, ids):
        def attend(q, kv, positions):
            q, k, v = (nn.DenseGeneral((2, 3), use_bias=False)(x) for x in (q, kv, kv))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
            if positions:
                steps = jnp.arange(scores.shape[-1])[None] - jnp.arange(scores.shape[-2])[:, None]
                bias = nn.Embed(8, 2)(jnp.clip(steps + 4, 0, 7))
                scores = scores + bias.transpose(2, 0, 1)[None]
            y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
            return nn.DenseGeneral(10, axis=(-2, -1), use_bias=False)(y)

        def feed(x):
            gate = nn.gelu(nn.Dense(14, use_bias=False)(x))
            return nn.Dense(10, use_bias=False)(gate * nn.Dense(14, use_bias=False)(x))

        embed = nn.Embed(11, 10)
        x, y = embed(ids), embed(ids[:, :4])
        x = x + attend(nn.RMSNorm()(x), nn.RMSNorm()(x), True)
        x = nn.RMSNorm()(x + feed(nn.RMSNorm()(x)))
        y = y + attend(nn.RMSNorm()(y), nn.RMSNorm()(y), True)
        y = y + attend(nn.RMSNorm()(y), x, False)
        y = y + feed(nn.RMSNorm()(y))
        return embed.attend(nn.RMSNorm()(y))


class MoE(nn.Module):
    """Top-2 routing to four experts, once by a mask and once by looking experts up."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        weights, chosen = jax.lax.top_k(nn.Dense(4)(x), 2)
        weights = jax.nn.softmax(weights)
        gates = (jax.nn.one_hot(chosen, 4) * weights[..., None]).sum(-2)
        up = self.param("up", nn.initializers.lecun_normal(), (4, 8, 9))
        down = self.param("down", nn.initializers.lecun_normal(), (4, 9, 8))
        hidden = nn.gelu(jnp.einsum("bd,edf->bef", x, up))
        x = x + jnp.einsum("be,bef,efd->bd", gates, hidden, down)
        looked_up = self.param("looked_up", nn.initializers.lecun_normal(), (4, 8, 8))
        x = x + jnp.einsum("bk,bd,bkdf->bf", weights, x, looked_up[chosen])
        return nn.Dense(3)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(10)(nn.relu(nn.Dense(14)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stacked = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(4)(stacked()(nn.Dense(10)(x), None)[0])


class Joined(nn.Module):
    """A DenseNet-like concatenation, and a depthwise convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = jnp.concatenate([x, nn.relu(nn.Conv(4, (3, 3))(x))], -1)
        x = nn.relu(nn.Conv(10, (3, 3), feature_group_count=10)(nn.LayerNorm()(x)))
        return nn.Dense(3)(nn.max_pool(x, (4, 4)).reshape(len(x), -1))


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs, use_running_average=True)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1, 8)
        return self.head((x + self.attention(x)).mean(1))


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((6, 9), (9, 7), (7, 2))])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.gate, self.up = (nnx.Linear(8, 13, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(13, 8, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        y = self.norm(x)
        return self.embed.attend(x + self.down(nnx.silu(self.gate(y)) * self.up(y)))


def _images(size):
    return jax.random.normal(jax.random.key(1), (2, size, size, 3))


def _rows():
    return jax.random.normal(jax.random.key(1), (7, 6))


MAKERS = {
    "mlp": (MLP, _rows),
    "vgg": (VGG, lambda: _images(8)),
    "resnet20_batch_norm": (lambda: ResNet20("batch"), lambda: _images(8)),
    "resnet20_layer_norm": (lambda: ResNet20("layer"), lambda: _images(8)),
    "resnet20_group_norm": (lambda: ResNet20("group"), lambda: _images(8)),
    "vit": (ViT, lambda: _images(12)),
    "llama": (Llama, lambda: IDS),
    "t5": (T5, lambda: IDS),
    "moe": (MoE, _rows),
    "scanned": (Scanned, _rows),
    "joined": (Joined, lambda: _images(8)),
    "nnx_convolutional": (lambda: Convolutional(nnx.Rngs(0)), lambda: _images(5)),
    "nnx_perceptron": (lambda: Perceptron(nnx.Rngs(0)), _rows),
    "nnx_gated": (lambda: Gated(nnx.Rngs(0)), lambda: IDS),
}


def _bridged(name):
    """A maker of the linen model of that name as an NNX module."""
    build, example = MAKERS[name]

    def start():
        module = nnx.bridge.lazy_init(nnx.bridge.ToNNX(build(), rngs=nnx.Rngs(0)), example())
        module.to_nnx__rngs = None  # they would count every call, inside of a trace as well
        return module

    return start, example


MAKERS |= {
    f"nnx_{name}": _bridged(name)
    for name in (
        "mlp",
        "vgg",
        "resnet20_batch_norm",
        "resnet20_layer_norm",
        "vit",
        "llama",
        "t5",
        "moe",
    )
}


def make(name):
    """(apply_fn, params, example), with random numbers in every leaf."""
    build, example = MAKERS[name][0], MAKERS[name][1]()
    if name.startswith("nnx"):
        graph, params, rest = nnx.split(nnx.eval_shape(build), (nnx.Param, nnx.BatchStat), ...)
        return (
            lambda params, x: nnx.merge(graph, params, rest)(x),
            _filled(params),
            example,
        )
    model = build()
    params = jax.eval_shape(model.init, jax.random.key(0), example)
    return (lambda params, x: model.apply(params, x)), _filled(params), example


def _filled(shapes):
    rng = np.random.default_rng(0)

    def fill(path, x):
        values = rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]) or 1)
        name = jax.tree_util.keystr(path)
        positive = "var" in name or "scale" in name
        return np.asarray(1 + 0.5 * abs(values) if positive else values, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
