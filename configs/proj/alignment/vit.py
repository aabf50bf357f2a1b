"""Two vision transformers from different seeds: fused by optimal transport, and PLeaS at widths.

    python -m mergejax.main --config=configs/proj/alignment/vit.py --config.data_dir=DIR \
        --workdir=runs/vit

Both learn Fashion-MNIST, 16x16 pixels, three seeds. `docs/alignment.md` has the table and the
picture. `configs/proj/alignment/vit.py:runlocal` is one seed, shortly trained.
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
        "tasks": ("fashion_mnist",),
        "size": 16,
        "limits": {"train": 8000, "validation": 1, "test": 2000},
    }
    config.model = {
        "transformer": {
            "kind": "transformer",
            "task": "fashion_mnist",
            "patch": 4,
            "width": 32,
            "size": 8,
            "heads": (4, 4),
            "hidden": (64, 64),
        },
    }
    config.model.wider = {
        **config.model.transformer,
        "width": 48,
        "heads": (6, 6),
        "hidden": (96, 96),
    }
    config.training = {
        "transformer": {"steps": 600, "learning_rate": 3e-3, "batch": 64},
        "tuned": {"steps": 50, "learning_rate": 1e-3, "batch": 64},
    }
    config.alignment = {
        "study": "vit",
        "seeds": (0, 1, 2),
        "budgets": (1.0, 1.2, 1.55, 2.0),
        "examples": 500,  # training images, without labels
    }
    if args.runlocal:
        config.alignment.seeds = (0,)
        config.training.transformer.steps = 50
    return config.lock()
