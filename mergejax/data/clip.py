"""The image sets of CLIP merging: 8, 14 and 20 tasks, with the words that describe their classes.

The templates and the names of classes are those of Radford et al. 2021 (arXiv:2103.00020) as the
field uses them; the sets of 14 and 20 tasks are those of Wang et al. 2024 (arXiv:2405.07813). A
task is called as its fine-tuned models are on the Hub. A name of a class that is not listed here is
the set's own, with spaces for what joins its words.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergejax.data.sources import Kind, Source

PHOTO = ("a photo of a {}.", "a photo of the {}.")
STATES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
CIFAR = tuple(
    f"a {state}photo of {article} {size}{{}}."
    for article in ("a", "the")
    for state, size in (*((state, "") for state in STATES), ("", "small "), ("", "big "))
)
FROM_ABOVE = tuple(
    f"{view} of {article}{{}}."
    for article in ("", "a ", "the ")
    for view in (
        *("satellite imagery", "aerial imagery", "satellite photo"),
        *("aerial photo", "satellite view", "aerial view"),
    )
)
SIGNS = tuple(
    f'a {how} photo of a "{{}}" traffic sign.' for how in ("zoomed in", "centered", "close up")
)
NUMBER = ('a photo of the number: "{}".',)

LAND = (
    "annual crop land",
    "forest",
    "brushland or shrubland",
    "highway or road",
    "industrial buildings or commercial buildings",
    "pasture land",
    "permanent crop land",
    "residential buildings or homes or apartments",
    "river",
    "lake or sea",
)
_LIMIT = "red and white circle {} kph speed limit"
_WARNING = "red and white triangle {} warning"
_NEAR = "red and white triangle with {} warning"
_TURN = "blue circle with white {} mandatory"
_ENDED = "white circle with gray strike bar {}"
TRAFFIC_SIGNS = (
    *(_LIMIT.format(speed) for speed in (20, 30, 50, 60, 70, 80)),
    "end / de-restriction of 80 kph speed limit",
    *(_LIMIT.format(speed) for speed in (100, 120)),
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    _WARNING.format("road intersection"),
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",  # spelt so in the list that is used
    _NEAR.format("exclamation mark"),
    *(_NEAR.format(f"black {way} curve approaching") for way in ("left", "right", "double")),
    _WARNING.format("rough / bumpy road"),
    _WARNING.format("car skidding / slipping"),
    _NEAR.format("merging / narrow lanes"),
    _NEAR.format("person digging / construction / road work"),
    _NEAR.format("traffic light approaching"),
    _NEAR.format("person walking"),
    _NEAR.format("child and person walking"),
    _NEAR.format("bicyle"),  # spelt so in the list that is used
    _NEAR.format("snowflake / ice"),
    _NEAR.format("deer"),
    _ENDED.format("no speed limit"),
    *(_TURN.format(f"{way} turn arrow") for way in ("right", "left")),
    _TURN.format("forward arrow"),
    *(_TURN.format(f"forward or {way} turn arrow") for way in ("right", "left")),
    *(_TURN.format(f"keep {way} arrow") for way in ("right", "left")),
    "blue circle with white arrows indicating a traffic circle",
    *(_ENDED.format(f"indicating no passing for {what} has ended") for what in ("cars", "trucks")),
)


class Described(NamedTuple):
    """A task, and what makes sentences of its classes.

    Attributes:
        source: where its images are.
        templates: sentences with a gap for the name of a class.
        classes: names of the classes in the order of the labels, where they are not the set's.
    """

    source: Source
    templates: Sequence[str]
    classes: tuple[str, ...] = ()


_TENTHS = ("train[:90%]", "train[90%:]")
TASKS: Mapping[str, Described] = {
    "sun397": Described(Source("sun397/standard-part1-120k"), PHOTO),
    "stanford-cars": Described(
        Source("cars196"),
        (
            *PHOTO,
            "a photo of my {}.",
            "i love my {}!",
            *(f"a photo of my {how} {{}}." for how in ("dirty", "clean", "new", "old")),
        ),
    ),
    "resisc45": Described(
        Source("resisc45", "train[:60%]", "train[60%:80%]", "train[80%:]"), FROM_ABOVE
    ),
    "eurosat": Described(
        Source("eurosat/rgb", "train[:80%]", "train[80%:90%]", "train[90%:]"),
        [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")],
        LAND,
    ),
    "svhn": Described(Source("svhn_cropped"), NUMBER),
    "gtsrb": Described(
        Source("gtsrb", origin="benchmark.ini.rub.de/gtsrb_news.html"), SIGNS, TRAFFIC_SIGNS
    ),
    "mnist": Described(Source("mnist"), NUMBER),
    "dtd": Described(
        Source("dtd", "train", "validation", "test"),
        [
            f"a photo of {article} {{}} {what}."
            for article in ("a", "the")
            for what in ("texture", "pattern", "thing", "object")
        ],
    ),
    # Six more make 14.
    "oxford_flowers102": Described(
        Source("oxford_flowers102", "train", "validation", "test"),
        ["a photo of a {}, a type of flower."],
    ),
    "pcam": Described(
        Source("patch_camelyon", "train", "validation", "test"),
        ["this is a photo of {}"],
        ("lymph node", "lymph node containing metastatic tumor tissue"),
    ),
    "fer2013": Described(
        Source("fer2013", origin="huggingface.co/datasets/clip-benchmark/wds_fer2013"),
        [
            "a photo of a {} looking face.",
            "a photo of a face showing the emotion: {}.",
            "a photo of a face looking {}.",
            "a face that looks {}.",
            "they look {}.",
            "look at how {} they are.",
        ],
        ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"),
    ),
    "oxford-iiit-pet": Described(Source("oxford_iiit_pet"), ["a photo of a {}, a type of pet."]),
    "stl10": Described(Source("stl10"), PHOTO),
    "cifar100": Described(Source("cifar100"), CIFAR),
    # Six more make 20.
    "cifar10": Described(Source("cifar10"), CIFAR),
    "food101": Described(
        Source("food101", *_TENTHS, "validation"), ["a photo of {}, a type of food."]
    ),
    "fashion_mnist": Described(Source("fashion_mnist"), PHOTO),
    "emnist_letters": Described(
        Source("emnist/letters", first=1),
        ['a photo of the digit character: "{}".'],
        tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    ),
    "kmnist": Described(
        Source("kmnist"), ["a photo of the character {}."], tuple("おきすつなはまやれを")
    ),
    "rendered-sst2": Described(
        Source("rendered_sst2", origin="huggingface.co/datasets/nateraw/rendered-sst2"),
        ["a {} review of a movie."],
        ("negative", "positive"),
    ),
}


def protocol(count: int) -> tuple[str, ...]:
    """The tasks of the protocol with 8, 14 or 20 of them.

    Example:
        >>> protocol(8)[-2:], len(protocol(20))
        (('mnist', 'dtd'), 20)
    """
    return tuple(TASKS)[:count]


def sentences(task: str, labels: Sequence[str]) -> list[list[str]]:
    """The sentences that describe each class of a task.

    Args:
        task: a name of `TASKS`.
        labels: the set's names of its classes.

    Example:
        >>> sentences("sun397", ["/a/apse/indoor"])
        [['a photo of a apse indoor.', 'a photo of the apse indoor.']]
        >>> len(CIFAR), CIFAR[1], sentences("eurosat", ["AnnualCrop"])[0][0]
        (18, 'a blurry photo of a {}.', 'a centered satellite photo of annual crop land.')
    """
    known = TASKS[task]
    names = known.classes[: len(labels)] or [_plain(label) for label in labels]
    return [[template.format(name) for template in known.templates] for name in names]


def _plain(label: str) -> str:
    """A label of a set as words; SUN397 puts the first letter in front, as in '/a/abbey'."""
    parts = label.split("/")
    return " ".join(parts[2:] if label.startswith("/") else parts).replace("_", " ")


def crop(image: np.ndarray, size: int) -> np.ndarray:
    """Prepares an image as CLIP does: the shorter side becomes `size`, the middle square is kept.

    Args:
        image: uint8 [height, width, 1 or 3].
        size: side of the square in pixels.

    Returns:
        uint8 [size, size, 3], resized by cubic interpolation.

    Example:
        >>> crop(np.full([20, 30, 1], 7, np.uint8), 8).shape
        (8, 8, 3)
    """
    from PIL import Image  # here, because only image sets need it

    height, width = image.shape[:2]
    colour = Image.fromarray(np.ascontiguousarray(np.broadcast_to(image, (height, width, 3))))
    short = min(height, width)
    wide, high = size * width // short, size * height // short
    resized = np.asarray(colour.resize((wide, high), Image.Resampling.BICUBIC))
    top, left = (high - size) // 2, (wide - size) // 2
    return resized[top : top + size, left : left + size]


def kind(size: int) -> Kind:
    """Images as uint8 [size, size, 3], a quarter of the memory of floats.

    Example:
        >>> list(kind(224).sources)[:3]
        ['sun397', 'stanford-cars', 'resisc45']
    """

    def decode(record: Mapping[str, Any], source: Source) -> np.ndarray:
        image = record[source.features[0]]
        # The files of EMNIST lie on their side.
        upright = image.swapaxes(0, 1) if source.builder.startswith("emnist/") else image
        return crop(upright, size)

    return Kind(
        name="image",
        extra="images",
        sources={name: task.source for name, task in TASKS.items()},
        decoder=lambda source: functools.partial(decode, source=source),
        recipe=["clip", size],
        floats=False,
    )
