"""Handwritten digits as six tasks: the same 1797 real scans in other domains, with other labels.

The scans are scikit-learn's copy of the UCI test set of optical digits (Alpaydin and Kaynak 1998),
8x8 pixels. They are divided once into train, validation and test, and every task and the
pre-training use that division, so that nobody ever learns from a scan that others are tested on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mergejax import errors
from mergejax.data.task import Split, Task

SIDE = 8


class Labelling(NamedTuple):
    """What is asked about a digit: the names of the answers, and the answer for digits 0 to 9."""

    names: tuple[str, ...]
    answer: Callable[[np.ndarray], np.ndarray]


class Domain(NamedTuple):
    """How a task sees the scans ([n, 8, 8] to [n, 8, 8], in [0, 1]) and what it asks about them."""

    change: Callable[[np.ndarray], np.ndarray]
    labelling: str


def _checker(scans: np.ndarray) -> np.ndarray:
    """Inverts every second square of 2x2 pixels."""
    squares = (np.indices([SIDE, SIDE]) // 2).sum(axis=0) % 2
    return np.where(squares[None] == 1, 1 - scans, scans)


LABELLINGS: Mapping[str, Labelling] = {
    "digit": Labelling(tuple("0123456789"), lambda digits: digits),
    "parity": Labelling(("even", "odd"), lambda digits: digits % 2),
    "size": Labelling(("below five", "five and above"), lambda digits: digits // 5),
}

DOMAINS: Mapping[str, Domain] = {
    "quarter_turn": Domain(lambda scans: np.rot90(scans, axes=(1, 2)), "digit"),
    "mirror": Domain(lambda scans: scans[:, :, ::-1], "digit"),
    "negative": Domain(lambda scans: 1 - scans, "digit"),
    "quadrants": Domain(lambda scans: np.roll(scans, [SIDE // 2, SIDE // 2], [1, 2]), "digit"),
    "checkered_parity": Domain(_checker, "parity"),
    "half_turn_size": Domain(lambda scans: np.rot90(scans, 2, axes=(1, 2)), "size"),
}


class Scans(NamedTuple):
    """Scans float32 [n, 8, 8] in [0, 1] and the digits int32 [n] that they show."""

    pictures: np.ndarray
    digits: np.ndarray


def divide(train: int, validation: int, seed: int) -> dict[str, Scans]:
    """Divides the 1797 scans, in an order fixed by the seed; the test part is what remains.

    Args:
        train: number of scans to learn from.
        validation: number of scans to pick hyper-parameters on.
        seed: of the order.

    Returns:
        `Scans` for 'train', 'validation' and 'test', disjoint.

    Raises:
        MergeError: if nothing remains for the test.

    Example:
        >>> {name: len(scans.digits) for name, scans in divide(1000, 250, seed=0).items()}
        {'train': 1000, 'validation': 250, 'test': 547}
    """
    from sklearn import datasets  # here, because the core must not need it

    bunch = datasets.load_digits()
    if min(train, validation) < 1 or train + validation >= len(bunch.target):
        raise errors.MergeError(
            f"config.data: train={train} and validation={validation} leave no test scan of "
            f"{len(bunch.target)}: choose numbers above 0 whose sum is below that"
        )
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    parts = np.split(order, [train, train + validation])
    pictures, digits = (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int32)
    return {
        name: Scans(pictures[part], digits[part])
        for name, part in zip(("train", "validation", "test"), parts, strict=True)
    }


def _split(scans: Scans, domain: Domain) -> Split:
    images = np.ascontiguousarray(domain.change(scans.pictures)[..., None], np.float32)
    return Split(images, LABELLINGS[domain.labelling].answer(scans.digits).astype(np.int32))


def load(names: Sequence[str], train: int, validation: int, seed: int) -> dict[str, Task]:
    """Makes the tasks called `names` out of the scans.

    Args:
        names: some of `DOMAINS`.
        train: number of scans to learn from, the same ones for every task.
        validation: number of scans to pick hyper-parameters on.
        seed: of the division.

    Returns:
        The tasks by name; images float32 [n, 8, 8, 1].

    Raises:
        MergeError: for unknown names.

    Example:
        >>> tasks = load(["mirror", "checkered_parity"], train=1000, validation=250, seed=0)
        >>> tasks["mirror"].test.inputs.shape, tasks["checkered_parity"].labels
        ((547, 8, 8, 1), ('even', 'odd'))
    """
    errors.raise_all(
        [
            f"config.data.tasks: there is no digits task '{name}', "
            f"{errors.did_you_mean(name, DOMAINS)}"
            for name in names
            if name not in DOMAINS
        ]
    )
    scans = divide(train, validation, seed)
    return {
        name: Task(
            name=name,
            labels=LABELLINGS[DOMAINS[name].labelling].names,
            head=DOMAINS[name].labelling,
            **{part: _split(scans[part], DOMAINS[name]) for part in scans},
        )
        for name in names
    }


def distort(pictures: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Turns, scales, slants and shifts each picture at random, and changes its grey levels.

    Up to 30 degrees, 15 % in size, 15 % slant, one pixel, 30 % of the contrast at either end; one
    picture in five becomes dark on light; noise of standard deviation 0.05.

    Args:
        pictures: float32 [n, 8, 8] in [0, 1].
        generator: source of randomness.

    Returns:
        float32 [n, 8, 8] in [0, 1].

    Example:
        >>> distort(np.zeros([2, 8, 8], np.float32), np.random.default_rng(0)).shape
        (2, 8, 8)
    """
    from scipy import ndimage

    n = len(pictures)

    def uniform(low: float, high: float) -> np.ndarray:
        return generator.uniform(low, high, [n, 1, 1])

    angle, slant, size = uniform(-30, 30), uniform(-0.15, 0.15), np.exp(uniform(-0.15, 0.15))
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    centre = (SIDE - 1) / 2
    rows, columns = np.indices([1, SIDE, SIDE])[1:] - centre
    columns = columns + slant * rows
    rows, columns = (
        centre + size * (cosine * rows - sine * columns) + uniform(-1, 1),
        centre + size * (sine * rows + cosine * columns) + uniform(-1, 1),
    )
    which = np.broadcast_to(np.arange(n)[:, None, None], rows.shape)
    moved = ndimage.map_coordinates(pictures, [which, rows, columns], order=1)
    low, high = uniform(0, 0.3), uniform(0.7, 1)
    dark = uniform(0, 1) < 0.2
    start, end = np.where(dark, high, low), np.where(dark, low, high)
    noise = generator.normal(0, 0.05, moved.shape)
    return np.clip(start + (end - start) * moved + noise, 0, 1).astype(np.float32)


def pretraining(
    tasks: Mapping[str, Task], train: int, validation: int, seed: int, variants: int
) -> dict[str, Split]:
    """The broader problem that the base learns: distorted upright scans, every kind of question.

    Args:
        tasks: the tasks that need heads.
        train: as for `load`; only these scans are used.
        validation: as for `load`.
        seed: of the division and of the distortions.
        variants: distorted copies of each scan.

    Returns:
        One `Split` of variants * train images for each kind of label that the tasks need, by the
        name of the head; all share the images.

    Example:
        >>> tasks = load(["mirror", "checkered_parity"], 1000, 250, seed=0)
        >>> {name: len(split) for name, split in pretraining(tasks, 1000, 250, 0, 2).items()}
        {'digit': 2000, 'parity': 2000}
    """
    scans = divide(train, validation, seed)["train"]
    generator = np.random.default_rng([seed, 1])
    images = distort(np.tile(scans.pictures, [variants, 1, 1]), generator)[..., None]
    digits = np.tile(scans.digits, variants)
    needed = sorted({task.head for task in tasks.values()})
    return {name: Split(images, LABELLINGS[name].answer(digits)) for name in needed}
