"""A transformer on images whose hidden layers are mixtures of experts, some of them merged."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.alignment.mixtures_compressed import Split

Tree = Any
ARRAYS = ("up", "up_bias", "down")  # of the experts of a layer, experts first


class Mixture(nn.Module):
    """Experts with one hidden layer, of which every token takes the best two.

    Attributes:
        experts: how many.
        units: in the hidden layer of each.
    """

    experts: int
    units: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [n, length, width] to the same shape."""
        width = x.shape[-1]
        logits = nn.Dense(self.experts, name="router")(x)
        shares = nn.softmax(logits)
        best, chosen = jax.lax.top_k(shares, 2)
        places = jax.nn.one_hot(chosen, self.experts)
        gates = (places * (best / best.sum(-1, keepdims=True))[..., None]).sum(-2)
        if not self.is_initializing():
            self.sow("intermediates", "logits", logits)
            used, wanted = places.mean((0, 1, 2)), shares.mean((0, 1))
            # The balance of Switch transformers (arXiv:2101.03961): 1 where all are used alike.
            self.sow("losses", "balance", 0.01 * self.experts * (used * wanted).sum())
        draw = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", draw, (self.experts, width, self.units))
        bias = self.param("up_bias", nn.initializers.zeros, (self.experts, self.units))
        down = self.param("down", draw, (self.experts, self.units, width))
        hidden = nn.relu(jnp.einsum("nld,edf->nlef", x, up) + bias[None, None])
        return jnp.einsum("nle,nlef,efd->nld", gates, hidden, down)


class Transformer(nn.Module):
    """Patches of four pixels by four, blocks of attention and a mixture, the mean over places.

    Attributes:
        layers: number of blocks.
        width: of the residual stream.
        experts: in each mixture.
        units: in each expert.
        classes: number of logits.
    """

    layers: int
    width: int
    experts: int
    units: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [n, height, width, channels] to logits [n, classes]."""
        x = nn.Conv(self.width, (4, 4), 4, name="patches")(2 * x - 1)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("places", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.layers):
            y = nn.LayerNorm(name=f"norm_{i}")(x)
            x = x + nn.MultiHeadDotProductAttention(4, name=f"attention_{i}")(y)
            y = nn.LayerNorm(name=f"mixture_norm_{i}")(x)
            x = x + Mixture(self.experts, self.units, name=f"mixture_{i}")(y)
        x = nn.LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(self.classes, name="head")(x)


def mixtures(params: Tree) -> list[str]:
    """The names of the mixture layers."""
    return [
        name for name, layer in params.items() if isinstance(layer, Mapping) and "router" in layer
    ]


def grown(params: Tree, groups: Mapping[str, Any]) -> Tree:
    """The parameters of a `Transformer` in which every expert is that of its group.

    Args:
        params: its parameters, the experts' arrays with one entry for each group; an array may be
            a `mj.alignment.Split`, left @ right + rest, with the groups first.
        groups: by layer the group of every expert, [experts].
    """
    found = dict(params)
    for layer, places in groups.items():
        found[layer] = {
            name: whole(x)[places] if name in ARRAYS else x for name, x in params[layer].items()
        }
    return found


def whole(array: Any) -> jax.Array:
    """left @ right + rest of a split array; any other one as it is."""
    return array.left @ array.right + array.rest if isinstance(array, Split) else array
