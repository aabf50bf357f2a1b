"""The barrier on the line between two networks from different seeds, before and after alignment.

    python -m mergejax.main --config=configs/proj/alignment/barrier.py --config.data_dir=DIR \
        --workdir=runs/barrier

A perceptron on MNIST and a residual network of eight layers on Fashion-MNIST, 16x16 pixels, three
seeds; each draws two initialisations and two orders of the examples. `docs/alignment.md` has the
table and the picture. `configs/proj/alignment/barrier.py:runlocal` is one seed, shortly trained.
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
        "tasks": ("mnist", "fashion_mnist"),
        "size": 16,
        "limits": {"train": 8000, "validation": 1, "test": 2000},
    }
    config.model = {
        "perceptron": {"kind": "perceptron", "task": "mnist", "widths": (512, 512, 512)},
        "residual": {
            "kind": "residual",
            "task": "fashion_mnist",
            "streams": (16, 32, 64),
            "inner": (16, 32, 64),
        },
    }
    config.training = {
        "perceptron": {"steps": 1000, "learning_rate": 1e-3, "batch": 128},
        "residual": {"steps": 500, "learning_rate": 3e-3, "batch": 64},
    }
    config.alignment = {
        "study": "barrier",
        "seeds": (0, 1, 2),
        "points": 11,  # on the line
        "examples": 500,  # training images for activations and REPAIR
    }
    if args.runlocal:
        config.alignment.seeds = (0,)
        config.training.perceptron.steps = config.training.residual.steps = 50
    return config.lock()
