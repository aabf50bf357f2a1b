"""Handwritten digits of five origins, one label set and one head, three seeds.

    python -m mergejax.main --config=configs/suites/digit_domains.py --workdir=runs/domains

MNIST, USPS and digits in Bangla, Devanagari and Telugu script: five domains with the labels 0 to 9.
The base learns photographs and clothes (CIFAR-10, Fashion-MNIST), the one head is trained on its
frozen features with images of all domains, and each expert on one domain. Held out: letters
(not_mnist) and street characters. Arguments and --config.data_dir as in `configs/suites/images.py`.
"""

import importlib.util
import pathlib

import ml_collections


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: see `configs/suites/images.py`, which this config starts from."""
    path = pathlib.Path(__file__).with_name("images.py")
    spec = importlib.util.spec_from_file_location("images_suite", path)
    images = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(images)
    config = images.get_config(argument).unlock()
    config.name = "digits of five origins"
    config.data.tasks = ("mnist", "usps", "bangla", "devanagari", "telugu")
    config.data.pretraining = ("cifar10", "fashion_mnist")
    config.data.held_out = ("not_mnist", "street_characters")
    config.data.head = "digit"
    config.scaling.counts = tuple(dict.fromkeys(min(n, 5) for n in config.scaling.counts))
    return config.lock()
