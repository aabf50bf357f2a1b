"""M-SMoE and MC-SMoE: a transformer with mixtures of eight experts merged to four a layer.

    python -m mergejax.main --config=configs/proj/alignment/moe.py --config.data_dir=DIR \
        --workdir=runs/moe

One network learns Fashion-MNIST, MNIST, letters of notMNIST and digits in Bangla script, 16x16
pixels, 40 classes, three seeds. `docs/alignment.md` has the table and the picture.
`configs/proj/alignment/moe.py:runlocal` is one seed, shortly trained.
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
        "tasks": ("fashion_mnist", "mnist", "not_mnist", "bangla"),
        "size": 16,
        "limits": {"train": 4000, "validation": 1, "test": 500},
    }
    config.model = {"transformer": {"layers": 2, "width": 48, "experts": 8, "units": 64}}
    config.training = {"transformer": {"steps": 800, "learning_rate": 3e-3, "batch": 64}}
    config.alignment = {
        "study": "moe",
        "seeds": (0, 1, 2),
        "average": 4,  # experts a layer after the merge
        "examples": 500,  # training images, without labels, for the routing
        "recovery": {"steps": 100, "learning_rate": 1e-3, "batch": 64},
        "compression": {"steps": 300, "learning_rate": 1e-3, "batch": 64},
        "rank": 8,  # of the low-rank part of a compressed expert
        "keep": 0.1,  # share of the columns of the rest that stays
    }
    if args.runlocal:
        config.alignment.seeds = (0,)
        config.training.transformer.steps = 50
        config.alignment.recovery.steps = config.alignment.compression.steps = 25
    return config.lock()
