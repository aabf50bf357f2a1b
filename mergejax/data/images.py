"""Image sets as tasks, a small cousin of the eight-task benchmark of CLIP merging.

Every image becomes a small colour square.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax.data.sources import Kind, Source

SOURCES: Mapping[str, Source] = {
    "scene15": Source("scene15", origin="github.com/YongKyeom/cv-hw3-eurosat-detectron"),
    "cars_body": Source("cars_body", origin="github.com/fmejbah/car_dataset1"),
    "rsscn7": Source("rsscn7", origin="github.com/palewithout/RSSCN7"),
    "eurosat": Source("eurosat/rgb", "train[:70%]", "train[70%:80%]", "train[80%:]"),
    "street_characters": Source(
        "street_characters", label="label_ci", origin="github.com/zchen36/IdentifyCharacter"
    ),
    "gtsrb": Source("gtsrb", origin="benchmark.ini.rub.de/gtsrb_news.html"),
    "mnist": Source("mnist"),
    "dtd": Source("dtd", "train", "validation", "test"),
    "cifar10": Source("cifar10"),
    "fashion_mnist": Source("fashion_mnist"),
    "bangla": Source("cmaterdb/bangla"),
    "devanagari": Source("cmaterdb/devanagari"),
    "telugu": Source("cmaterdb/telugu"),
    "usps": Source("usps", origin="github.com/marionmari/Graph_stuff"),
    "not_mnist": Source("not_mnist", origin="github.com/davidflanagan/notMNIST-to-MNIST"),
}


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Makes a colour square of an image: grey is repeated, small is padded, large is averaged down.

    Args:
        image: uint8 [height, width, 1 or 3].
        size: side of the square in pixels. An image with a longer side is cut to its middle square
            and averaged down to `size`; others get a black frame.

    Returns:
        uint8 [size, size, 3].

    Example:
        >>> square(np.full([28, 28, 1], 255, np.uint8), 32)[2, :4, 0]
        array([  0,   0, 255, 255], dtype=uint8)
    """
    from PIL import Image  # here, because only image sets need it

    height, width = image.shape[:2]
    colour = np.broadcast_to(image, (height, width, 3))
    if max(height, width) > size:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        middle = Image.fromarray(np.ascontiguousarray(colour[top : top + side, left : left + side]))
        return np.asarray(middle.resize((size, size), Image.Resampling.BOX))
    top, left = (size - height) // 2, (size - width) // 2
    bottom, right = size - height - top, size - width - left
    return np.pad(colour, [(top, bottom), (left, right), (0, 0)])


def kind(size: int) -> Kind:
    """Images as uint8 [size, size, 3], from the sets in `SOURCES`.

    Example:
        >>> sorted(kind(32).sources)[:3]
        ['bangla', 'cars_body', 'cifar10']
    """

    def decode(record: Mapping[str, Any], feature: str) -> np.ndarray:
        return square(record[feature], size)

    return Kind(
        name="image",
        extra="images",
        sources=SOURCES,
        decoder=lambda source: functools.partial(decode, feature=source.features[0]),
        recipe=[size],
    )
