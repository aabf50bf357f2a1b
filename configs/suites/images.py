"""Eight image tasks, three seeds, every method that applies; two held-out tasks, corruptions.

    python -m mergejax.main --config=configs/suites/images.py --workdir=runs/images_suite

--config.data_dir is a folder that holds data sets of TensorFlow Datasets in array_record files
(TFDS_DATA_DIR says the same); with full official copies the same config runs on the full data. The
base learns five other sets. Linear heads for tasks and held-out tasks are trained on its frozen
features and stay as they are; every expert is the base's body trained on one task, whole or by
low-rank factors.

Arguments behind the colon, joined by commas:
    small         half the model, a quarter of the training, a dozen methods; 2 CPU cores
    model=resnet  a residual network; vit (patches, class token, pre-norm) by default
    lora          low-rank experts
    methods=A+B   some methods only

Results are JSON lines, tables in Markdown and LaTeX, pictures and one HTML page in the workdir.
docs/benchmarks.md has what was run.
"""

import ml_collections

from mergejax import config_args, search

MODELS = {
    "vit": {
        "kind": "vit",
        "patch": 2,
        "width": 128,
        "depth": 6,
        "heads": 4,
        "expansion": 2,
        "stem": (32, 64),  # with the patches, 16 tokens of 8x8 pixels
        "class_token": True,
    },
    "resnet": {"kind": "resnet", "widths": (32, 64, 128), "blocks": 2, "groups": 8},
}
SMALL = {
    "vit": {"width": 64, "depth": 3},
    "resnet": {"widths": (16, 32), "blocks": 1},
}


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: see above."""
    args = config_args.parse(argument, methods=(), small=False, model="vit", lora=False)
    config = ml_collections.ConfigDict()
    config.name = "eight image tasks"
    config.seeds = (0, 1, 2)
    config.seed = 0  # each of `seeds` in turn
    config.methods = args.methods or ("all",)
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
        "held_out": ("usps", "not_mnist"),
        "head": "",  # every task has a head of its own
        "size": 32,
        "limits": {"train": 8000, "validation": 800, "test": 4000},  # images of each task
    }
    config.model = config_args.chosen("model", args.model, MODELS)
    config.training = {
        "pretrain": {"steps": 6000, "learning_rate": 1e-3, "batch": 64, "shift": 2},
        "heads": {"steps": 500, "learning_rate": 3e-3, "batch": 256, "shift": 2},
        "finetune": {"steps": 500, "learning_rate": 1e-4, "batch": 64, "shift": 2},
        "multi_task": {"steps": 2500, "learning_rate": 6e-4, "batch": 64, "shift": 2},
    }
    if args.lora:
        config.training.finetune.rank = 8
        config.training.finetune.learning_rate = 1e-3
    config.calibration = {"examples": 256, "batch": 64, "estimator": "sampled"}
    config.robustness = {"corruptions": ("noise", "blur", "contrast", "pixelate"), "examples": 400}
    config.scaling = {
        "counts": (2, 3, 4, 5, 6, 7, 8),
        "methods": ("average", "task_arithmetic", "ties", "regmean"),
    }
    # A model for each task in fewer bytes; what they store is in the table.
    config.compressions = ("tall_masks()", "emr()", "tsv_compress()")
    config.search = search.grids(limit=4)  # the budget: values to try on validation
    if args.small:
        config.model.update(SMALL[args.model])
        config.methods = args.methods or search.FEW
        config.training.pretrain.steps = 1500
        config.training.heads.steps = 200
        config.training.finetune.update({"steps": 300, "learning_rate": 3e-4, "shift": 1})
        config.training.multi_task.steps = 750
        config.data.limits = {"train": 4000, "validation": 200, "test": 400}
        config.calibration.examples = 128
        config.robustness.examples = 100
        config.scaling.counts = (2, 4, 8)
        config.search = search.grids(limit=3)
    return config.lock()
