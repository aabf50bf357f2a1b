"""Eight image sets, 32x32 pixels in colour, one small vision transformer.

    python -m mergejax.main --config=configs/images.py --config.data_dir=DIR --workdir=runs/images

DIR holds data sets of TensorFlow Datasets in array_record files (TFDS_DATA_DIR says the same).
The base learns five other sets; a linear head for each task is trained on its frozen features and
stays as it is from then on, and every expert is the base's body trained on one task.

It took 47 minutes on 2 CPU cores that did other work as well. Mean test accuracy over the eight
tasks in per cent, seed 0, small copies of the sets (400 to 7,200 training images): base 39.0, plain
average 39.4, RegMean 41.3, each expert on its own task 48.5, multi-task 53.7. `docs/images.md` has
the table.

`configs/images.py:runlocal` is a short form: half the model, 425 steps of training, 2 min 47 s on 2
CPU cores. It shows that everything runs, not what the methods are worth.
"""

import ml_collections

from mergejax import config_args, search


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `methods=ties+lines` (chains, joined by +), `runlocal` (minutes instead)."""
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
        config.model.width, config.model.depth = 64, 2
        config.training.pretrain.steps = 100
        config.training.heads.steps = 25
        config.training.finetune.steps = 25
        config.training.multi_task.steps = 100
        config.data.limits = {"train": 1000, "validation": 200, "test": 400}
        config.calibration.examples = 64
        config.search = search.grids(limit=2)
    return config.lock()
