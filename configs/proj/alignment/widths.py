"""PLeaS: residual networks for different tasks merged at 1.0, 1.2, 1.55 and 2.0 times the cost.

    python -m mergejax.main --config=configs/proj/alignment/widths.py --config.data_dir=DIR \
        --workdir=runs/widths

Halves of the classes of Fashion-MNIST (different labels), digits of MNIST and in Bangla script (the
same labels), and MNIST and Fashion-MNIST (two sets of different labels), 16x16 pixels, three seeds.
`docs/alignment.md` has the table and the picture.
`configs/proj/alignment/widths.py:runlocal` is one seed, shortly trained.
"""

import ml_collections

from mergejax import config_args


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `runlocal` (one seed, short training)."""
    args = config_args.parse(argument, runlocal=False)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data_dir = ""  # folder of TensorFlow Datasets; TFDS_DATA_DIR counts if this is empty
    config.data = {
        "suite": "images",
        "tasks": ("fashion_mnist", "mnist", "bangla"),
        "size": 16,
        "limits": {"train": 4000, "validation": 1, "test": 1000},
    }
    config.model = {
        "residual": {"kind": "residual", "streams": (16, 32, 64), "inner": (16, 32, 64)}
    }
    config.training = {"residual": {"steps": 200, "learning_rate": 3e-3, "batch": 64}}
    config.alignment = {
        "study": "widths",
        "seeds": (0, 1, 2),
        # One task is halved by its classes.
        "pairs": {
            "halves_of_classes": ("fashion_mnist",),
            "two_scripts": ("mnist", "bangla"),
            "two_sets": ("mnist", "fashion_mnist"),
        },
        "budgets": (1.0, 1.2, 1.55, 2.0),
        "examples": 500,  # training images, without labels
    }
    if args.runlocal:
        config.alignment.seeds = (0,)
        config.training.residual.steps = 50
    return config.lock()
