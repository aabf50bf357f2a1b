"""Residual networks in torchvision's layout, and those for CIFAR of He et al. 2016, section 4.2."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.rules import Architecture, Config

DEPTHS: Mapping[str, Mapping[str, Any]] = {
    "resnet18": {"blocks": (2, 2, 2, 2)},
    "resnet34": {"blocks": (3, 4, 6, 3)},
    "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
    "resnet152": {"blocks": (3, 8, 36, 3), "bottleneck": True},
    "resnext50_32x4d": {"blocks": (3, 4, 6, 3), "bottleneck": True, "groups": 32,
                        "width_per_group": 4},
    "wide_resnet50_2": {"blocks": (3, 4, 6, 3), "bottleneck": True, "width_per_group": 128},
    **{f"resnet{6 * n + 2}": {"blocks": (n, n, n), "width": 16} for n in (3, 5, 7, 9, 18, 200)},
}  # fmt: skip


def conv(features: int, size: int, stride: int, name: str, groups: int = 1) -> nn.Conv:
    """A convolution without bias, padded on both sides as PyTorch does with padding=size // 2."""
    around = (size // 2, size // 2)
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=(around, around),
        use_bias=False,
        feature_group_count=groups,
        name=name,
    )


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """Batch normalisation with PyTorch's momentum of 0.1 (0.9 in Flax's sense).

    In training PyTorch keeps the unbiased variance, Flax the biased one.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


class Block(nn.Module):
    """Two 3x3 convolutions, or a 3x3 one between two of 1x1, beside a shortcut.

    Attributes:
        width: channels of the stage.
        stride: of the first 3x3 convolution.
        config: `bottleneck`, `groups`, `width_per_group`, and `width` of the first stage.
    """

    width: int
    stride: int
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [n, height, width, channels] to [n, height/stride, width/stride, out]."""
        c, norm = self.config, functools.partial(batch_norm, train)
        inner = self.width * c.width_per_group // 64 * c.groups
        out = 4 * self.width if c.bottleneck else self.width
        steps = [(self.width, 3, self.stride, 1), (self.width, 3, 1, 1)]
        if c.bottleneck:
            steps = [(inner, 1, 1, 1), (inner, 3, self.stride, c.groups), (out, 1, 1, 1)]
        y = x
        for letter, (features, size, stride, groups) in zip("abc", steps, strict=False):
            y = nn.relu(y) if letter != "a" else y
            y = conv(features, size, stride, f"conv_{letter}", groups)(y)
            y = norm(name=f"norm_{letter}")(y)
        return nn.relu(y + self.shortcut(x, out, norm))

    def shortcut(self, x: jax.Array, out: int, norm: Any) -> jax.Array:
        """The input itself, or through a 1x1 convolution where the shape changes."""
        if self.stride == 1 and x.shape[-1] == out:
            return x
        return norm(name="shortcut_norm")(conv(out, 1, self.stride, "shortcut")(x))


class PaddedBlock(Block):
    """A block whose shortcut has no weights: every second pixel, zeros for the new channels."""

    def shortcut(self, x: jax.Array, out: int, norm: Any) -> jax.Array:
        """The input, thinned out and with channels of zeros on both sides."""
        more = out - x.shape[-1]
        thinned = x[:, :: self.stride, :: self.stride]
        return jnp.pad(thinned, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))


class Stage(nn.Module):
    """Blocks of one width; the first one halves the sides from the second stage on."""

    index: int
    config: Config
    block: type[Block]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [n, height, width, channels] to the stage's shape."""
        width = self.config.width * 2**self.index
        for i in range(self.config.blocks[self.index]):
            stride = 2 if self.index and not i else 1
            x = self.block(width, stride, self.config, name=f"block_{i}")(x, train)
        return x


class ResNet(nn.Module):
    """Images to logits: torchvision's stem of 7x7 and a pool, or CIFAR's of 3x3.

    Attributes:
        config: `blocks` of each stage, `width` of the first one, `num_labels`, and a block's.
        cifar: whether it is the form for small images.
    """

    config: Config
    cifar: bool = False

    @nn.compact
    def __call__(self, pixel_values: jax.Array, train: bool = False) -> jax.Array:
        """Maps [n, height, width, channels] to logits [n, labels]."""
        c = self.config
        size, stride = (3, 1) if self.cifar else (7, 2)
        x = conv(c.width, size, stride, "stem")(pixel_values)
        x = nn.relu(batch_norm(train, "stem_norm")(x))
        if not self.cifar:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = PaddedBlock if self.cifar else Block
        for index in range(len(c.blocks)):
            x = Stage(index, c, block, name=f"stage_{index + 1}")(x, train)
        return nn.Dense(c.num_labels, name="head")(x.mean(axis=(1, 2)))


_BLOCK = {
    **{
        f"layer{{}}.{{}}.conv{n}": f"stage_{{}}/block_{{}}/conv_{x}" for n, x in enumerate("abc", 1)
    },
    **{f"layer{{}}.{{}}.bn{n}": f"stage_{{}}/block_{{}}/norm_{x}" for n, x in enumerate("abc", 1)},
    "layer{}.{}.downsample.0": "stage_{}/block_{}/shortcut",
    "layer{}.{}.downsample.1": "stage_{}/block_{}/shortcut_norm",
}
_NAMES = {"conv1": "stem", "bn1": "stem_norm", **_BLOCK}


def _example(c: Config) -> dict[str, Any]:
    return {"pixel_values": jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)}


def _network(name: str) -> Architecture:
    cifar = len(DEPTHS[name]["blocks"]) == 3
    settings = {"bottleneck": False, "groups": 1, "width_per_group": 64, "width": 64}
    return Architecture(
        functools.partial(ResNet, cifar=cifar),
        {**_NAMES, ("linear" if cifar else "fc"): "head"},
        {**settings, **DEPTHS[name], "num_labels": 10 if cifar else 1000},
        inputs=_example,
    )


ARCHITECTURES = {name: _network(name) for name in DEPTHS}


def guess(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of a residual network by its names and shapes, for files have none.

    Example:
        >>> guess({'layer1.0.conv1.weight': (16, 16, 3, 3), 'layer2.0.bn1.bias': (32,),
        ...        'layer3.0.bn1.bias': (64,), 'linear.weight': (10, 64)}) is None
        True
    """
    head = shapes.get("fc.weight") or shapes.get("linear.weight")
    for name, architecture in ARCHITECTURES.items():
        places = ("layer1", "layer2", "layer3", "layer4")[: len(DEPTHS[name]["blocks"])]
        blocks = tuple(
            len({key.split(".")[1] for key in shapes if key.startswith(f"{place}.")})
            for place in places
        )
        settings = architecture.settings
        inner = settings["width_per_group"] * settings["groups"] * settings["width"] // 64
        first = shapes.get("layer1.0.conv2.weight")
        wanted = (inner, inner // settings["groups"], 3, 3)
        bottleneck = "layer1.0.conv3.weight" in shapes
        if head and (blocks, first, bottleneck) == (
            settings["blocks"],
            wanted,
            settings["bottleneck"],
        ):
            return {"architectures": [name], "num_labels": head[0]}
    return None
