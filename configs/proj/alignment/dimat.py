"""DIMAT: eight workers on a ring, a torus and a complete graph, on IID and non-IID data.

    python -m mergejax.main --config=configs/proj/alignment/dimat.py --config.data_dir=DIR \
        --workdir=runs/dimat

Perceptrons on Fashion-MNIST, 16x16 pixels, three seeds; each worker is a CPU device, and networks
travel by collectives. `docs/alignment.md` has the table and the picture.
`configs/proj/alignment/dimat.py:runlocal` is one seed and few rounds.
"""

import ml_collections

from mergejax import config_args


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `runlocal` (one seed, few rounds)."""
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
        "perceptron": {"kind": "perceptron", "task": "fashion_mnist", "widths": (128, 128)}
    }
    # Of each worker: steps before the first exchange, and in a round.
    config.training = {
        "perceptron": {"start": 200, "steps": 40, "learning_rate": 2e-3, "batch": 32}
    }
    config.alignment = {
        "study": "dimat",
        "seeds": (0, 1, 2),
        "workers": 8,
        "graphs": ("ring", "torus", "complete"),
        # A worker's examples: at random, or so many runs of examples sorted by label.
        "runs": {"IID": 0, "non-IID": 3},
        "rounds": 8,  # of an exchange and training
        "examples": 500,  # of each worker's own images, for activations
    }
    if args.runlocal:
        config.alignment.seeds = (0,)
        config.alignment.rounds = 3
    return config.lock()
