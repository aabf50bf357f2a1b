"""Corrupted test examples: how much of a model's accuracy survives noise, blur, missing words."""

from collections.abc import Callable, Mapping

import numpy as np

from mergejax.data.task import Split

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _noise(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return images + generator.normal(0, 0.08, images.shape)


def _blur(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(images, [0, 1, 1, 0], mode="nearest")


def _contrast(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    middle = images.mean(axis=(1, 2, 3), keepdims=True)
    return middle + 0.4 * (images - middle)


def _pixelate(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    n, height, width, channels = images.shape
    squares = images[:, : height // 2 * 2, : width // 2 * 2].reshape(
        n, height // 2, 2, width // 2, 2, channels
    )
    means = np.broadcast_to(squares.mean(axis=(2, 4), keepdims=True), squares.shape)
    changed = images.copy()
    changed[:, : height // 2 * 2, : width // 2 * 2] = means.reshape(
        n, height // 2 * 2, width // 2 * 2, channels
    )
    return changed


def _inside(tokens: np.ndarray) -> np.ndarray:
    """Whether a token stands between the two that mark the ends of a text."""
    places = np.arange(tokens.shape[1])[None]
    return (places > 0) & (places < (tokens >= 0).sum(1, keepdims=True) - 1)


def _dropped(tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    gone = _inside(tokens) & (generator.random(tokens.shape) < 0.15)
    left = np.where(gone, -1, tokens)
    order = np.argsort(left < 0, axis=1, stable=True)  # what is left first, in its order
    return np.take_along_axis(left, order, axis=1)


def _swapped(tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    n, length = tokens.shape
    stop = 1 + (length - 1) // 2 * 2
    both = _inside(tokens)[:, 1:stop].reshape(n, -1, 2).all(2)
    swap = both & (generator.random(both.shape) < 0.3)
    pairs = tokens[:, 1:stop].reshape(n, -1, 2)
    changed = tokens.copy()
    changed[:, 1:stop] = np.where(swap[..., None], pairs[..., ::-1], pairs).reshape(n, -1)
    return changed


IMAGES: Mapping[str, Change] = {
    "noise": _noise,  # normal, standard deviation 0.08
    "blur": _blur,  # Gaussian, standard deviation one pixel
    "contrast": _contrast,  # 40 % of it left
    "pixelate": _pixelate,  # means of squares of 2x2
}
TEXTS: Mapping[str, Change] = {
    "dropped": _dropped,  # 15 % of the tokens between the ends
    "swapped": _swapped,  # 30 % of the pairs of neighbours
}


def kinds(split: Split) -> Mapping[str, Change]:
    """The corruptions that fit the examples of a split, by name.

    Example:
        >>> list(kinds(Split(np.zeros([1, 4], np.int32), np.zeros([1], np.int32))))
        ['dropped', 'swapped']
    """
    return TEXTS if split.inputs.dtype.kind == "i" else IMAGES


def corrupted(split: Split, kind: str, seed: int, limit: int | None = None) -> Split:
    """Corrupts the images or texts of a split; the labels stay.

    Args:
        split: images float32 [n, height, width, channels] in [0, 1], or tokens [n, length].
        kind: one of `kinds(split)`.
        seed: of the noise.
        limit: how many to take at most, the first ones.

    Returns:
        A split of new images in [0, 1] or tokens, of the same dtype.

    Example:
        >>> split = Split(np.ones([2, 4, 4, 1], np.float32), np.zeros([2], np.int32))
        >>> float(corrupted(split, "contrast", seed=0).inputs.min())
        1.0

    Source: the idea and some of the kinds are those of Hendrycks and Dietterich 2019,
    arXiv:1903.12261; the strengths are our own, for images of 32x32 pixels.
    """
    inputs, generator = split.inputs[:limit], np.random.default_rng([seed, len(kind)])
    changed = kinds(split)[kind](inputs, generator)
    if changed.dtype.kind == "f":
        changed = np.clip(changed, 0, 1)
    return Split(changed.astype(inputs.dtype), split.labels[:limit])
