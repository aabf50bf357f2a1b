"""Merging with statistics of data on four image sets: three seeds, 16, 64 and 256 examples.

    python -m mergejax.main --config=configs/proj/statistics/images.py --config.data_dir=DIR \
        --workdir=runs/statistics_images

As `configs/images.py`, with a smaller model and shorter training. `docs/statistics_results.md`
holds the table.
"""

import importlib.util
import pathlib

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    file = pathlib.Path(__file__).parent / "digits.py"
    spec = importlib.util.spec_from_file_location("statistics_digits", file)
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    config = digits.beside("../../images.py").get_config()
    with config.unlocked():
        config.study = digits.study()
        config.data.tasks = ("eurosat", "gtsrb", "mnist", "street_characters")
        config.data.pretraining = ("cifar10", "fashion_mnist", "bangla")
        config.data.limits = {"train": 1500, "validation": 200, "test": 500}
        config.model.update({"width": 64, "depth": 3, "stem": (16, 32)})
        config.training.pretrain.steps = 800
        config.training.heads.steps = 200
        config.training.finetune.steps = 250
        config.training.finetune.learning_rate = 3e-4
        config.training.multi_task.steps = 1  # not compared with here
    return config.lock()
