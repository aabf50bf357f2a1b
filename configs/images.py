"""Eight image sets, 32x32 pixels in colour, one small vision transformer.

    python -m mergejax.main --config=configs/images.py --config.data_dir=DIR --workdir=runs/images

DIR holds data sets of TensorFlow Datasets in array_record files (TFDS_DATA_DIR says the same).
Base and heads are trained together on the training images of all tasks; the heads, one per task,
stay as they are from then on, and every expert is the base's body trained on one task.

Training took 24 minutes on 2 CPU cores that did other work as well. Mean test accuracy over the
eight tasks in per cent, seed 0, subsets of the sets (400 to 7,200 training images): base 44.3,
plain average 43.4, each expert on its own task 51.9, multi-task 50.4. So the average does not beat
the base. Training longer does not help: with 2,500 and 800 steps for base and experts the three
numbers are 48.5, 47.7 and 56.0. `docs/images.md` has the table.

`configs/images.py:runlocal` is a short form, with 800 steps of training in all.
"""

import ml_collections

from mergejax import config_args, search


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `methods=ties+lines` (chains, joined by +), `runlocal` (three minutes instead)."""
    args = config_args.parse(argument, methods=(), runlocal=False)
    config = ml_collections.ConfigDict()
    config.seed = 0
    # None: those of `search.RECIPES`, whose values are searched; ("all",): every registered one.
    config.methods = args.methods
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
        # What the base learns; none of it belongs to a task.
        "pretraining": ("cifar10", "fashion_mnist", "bangla", "devanagari", "telugu"),
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
        "pretrain": {"steps": 3000, "learning_rate": 1e-3, "batch": 64, "shift": 2},
        "heads": {"steps": 500, "learning_rate": 3e-3, "batch": 256, "shift": 2},
        "finetune": {"steps": 500, "learning_rate": 1e-4, "batch": 64, "shift": 2},
        "multi_task": {"steps": 2500, "learning_rate": 6e-4, "batch": 64, "shift": 2},
    }
    # Per task, for collected statistics.
    config.calibration = {"examples": 256, "batch": 64, "estimator": "sampled"}
    config.search = search.grids(limit=4)  # values to try on validation, by method and parameter
    if args.runlocal:
        config.training.pretrain.steps = 200
        config.training.heads.steps = 50
        config.training.finetune.steps = 50
        config.training.multi_task.steps = 200
        config.calibration.examples = 64
        config.search = search.grids(limit=2)
    return config.lock()
