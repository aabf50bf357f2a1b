"""Corrupted test images: how much of a model's accuracy survives noise, blur and weak contrast."""

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


CORRUPTIONS: Mapping[str, Change] = {
    "noise": _noise,  # normal, standard deviation 0.08
    "blur": _blur,  # Gaussian, standard deviation one pixel
    "contrast": _contrast,  # 40 % of it left
    "pixelate": _pixelate,  # means of squares of 2x2
}


def corrupted(split: Split, kind: str, seed: int, limit: int | None = None) -> Split:
    """Corrupts the images of a split; the labels stay.

    Args:
        split: images float32 [n, height, width, channels] in [0, 1].
        kind: one of `CORRUPTIONS`.
        seed: of the noise.
        limit: how many images to take at most, the first ones.

    Returns:
        A split of new images, float32 in [0, 1].

    Example:
        >>> split = Split(np.ones([2, 4, 4, 1], np.float32), np.zeros([2], np.int32))
        >>> float(corrupted(split, "contrast", seed=0).images.min())
        1.0

    Source: the idea and some of the kinds are those of Hendrycks and Dietterich 2019,
    arXiv:1903.12261; the strengths are our own, for images of 32x32 pixels.
    """
    images = CORRUPTIONS[kind](split.images[:limit], np.random.default_rng([seed, len(kind)]))
    return Split(np.clip(images, 0, 1).astype(np.float32), split.labels[:limit])
