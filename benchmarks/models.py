"""Random models shaped like vision transformers; NumPy alone, so that peers can make them too."""

from collections.abc import Iterator

import numpy as np

# Width, hidden width, blocks: a model of 10 million parameters, and ViT-B/32 of CLIP, 88 million,
# whole and of one block.
SIZES = {
    "tiny": (64, 256, 2),
    "block": (768, 3072, 1),
    "small": (256, 1024, 12),
    "vit": (768, 3072, 12),
}


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Leaf names and shapes, [in, out] kernels."""
    width, hidden, blocks = SIZES[size]
    yield "embeddings/patch/kernel", (32, 32, 3, width)
    yield "embeddings/class_token", (width,)
    yield "embeddings/position_embedding", (50, width)
    for i in range(blocks):
        for name in ("query", "key", "value", "out"):
            yield f"block_{i}/attention/{name}/kernel", (width, width)
            yield f"block_{i}/attention/{name}/bias", (width,)
        yield f"block_{i}/mlp/in/kernel", (width, hidden)
        yield f"block_{i}/mlp/in/bias", (hidden,)
        yield f"block_{i}/mlp/out/kernel", (hidden, width)
        yield f"block_{i}/mlp/out/bias", (width,)
        for name in ("norm_1", "norm_2"):
            yield f"block_{i}/{name}/scale", (width,)
            yield f"block_{i}/{name}/bias", (width,)


def model(size: str, number: int) -> dict[str, np.ndarray]:
    """Number 0 is the base, all others are experts: the base and a hundredth of noise."""
    base_draw = np.random.default_rng(0)
    own_draw = np.random.default_rng(number)
    leaves = {}
    for name, shape in shapes(size):
        leaf = base_draw.standard_normal(shape, np.float32)
        if number:
            leaf += np.float32(0.01) * own_draw.standard_normal(shape, np.float32)
        leaves[name] = leaf
    return leaves


def models(size: str, experts: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A base and its experts, float32."""
    return model(size, 0), [model(size, number) for number in range(1, experts + 1)]


def grams(size: str, number: int) -> dict[str, np.ndarray]:
    """Gram matrices of a model's kernels of two axes: full rank, features of different scales."""
    draw = np.random.default_rng(1000 + number)
    of_width: dict[int, np.ndarray] = {}
    found = {}
    for name, shape in shapes(size):
        if name.endswith("kernel") and len(shape) == 2:
            width = shape[0]
            if width not in of_width:
                rows = np.random.default_rng(width).standard_normal((width + 64, width), np.float32)
                of_width[width] = rows.T @ rows / np.float32(len(rows))
            scale = draw.uniform(0.5, 1.5, width).astype(np.float32)
            found[name] = of_width[width] * scale[:, None] * scale[None, :]
    return found
