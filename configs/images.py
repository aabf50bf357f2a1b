"""Eight image sets.

python -m mergejax.main --config=configs/images.py --workdir=runs/images
"""

import ml_collections

from mergejax import config_args, search


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `methods=ties+lines` (chains, joined by +), `runlocal` (three minutes instead)."""
    args = config_args.parse(argument, methods=(), runlocal=False)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.methods = args.methods  # none: every method that applies
    config.data_dir = ""  # folder of TensorFlow Datasets; TFDS_DATA_DIR counts if this is empty
    config.data = {
        "suite": "images",
        "tasks": (
            "scene15",
            "cars_body",
            "rsscn7",
            "eurosat",
            "street_characters",
            "gtsrb",
            "mnist",
            "dtd",
        ),
        "size": 32,
        "limits": {"train": 8000, "validation": 800, "test": 4000},  # images of each task
    }
    config.model = {
        "patch": 2,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "expansion": 2,
        "stem": (32, 64),  # with the patches, 16 tokens of 8x8 pixels
    }
    config.training = {
        "pretrain": {"steps": 1500, "learning_rate": 1e-3, "batch": 64, "shift": 2},
        "finetune": {"steps": 500, "learning_rate": 4e-4, "batch": 64, "shift": 2},
        "multi_task": {"steps": 2500, "learning_rate": 6e-4, "batch": 64, "shift": 2},
    }
    config.calibration = {
        "examples": 256,
        "batch": 64,
        "estimator": "sampled",
    }  # per task, of statistics
    config.search = search.grids(limit=4)  # values to try on validation, by method and parameter
    if args.runlocal:
        config.training.pretrain.steps = 200
        config.training.finetune.steps = 50
        config.training.multi_task.steps = 200
        config.calibration.examples = 64
        config.search = search.grids(limit=2)
    return config.lock()
