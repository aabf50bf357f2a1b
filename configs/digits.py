"""Six tasks from handwritten digits, one small vision transformer each.

python -m mergejax.main --config=configs/digits.py --workdir=runs/digits
"""

import ml_collections

from mergejax import config_args


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `methods=ties+lines` (chains, joined by +), `runlocal` (seconds instead)."""
    args = config_args.parse(argument, methods=(), runlocal=False)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.methods = args.methods  # none: every method that applies
    config.data_dir = ""  # the scans ship with scikit-learn
    config.data = {
        "suite": "digits",
        "tasks": (
            "quarter_turn",
            "mirror",
            "negative",
            "quadrants",
            "checkered_parity",
            "half_turn_size",
        ),
        "train": 1000,  # scans; every task has the same ones
        "validation": 250,
        "variants": 12,  # distorted copies of each scan, for pre-training
    }
    config.model = {"patch": 4, "width": 96, "depth": 3, "heads": 4, "expansion": 2}
    config.training = {
        "pretrain": {"steps": 1200, "learning_rate": 1.5e-3, "batch": 128},
        "finetune": {"steps": 150, "learning_rate": 4e-4, "batch": 128},
        "multi_task": {"steps": 500, "learning_rate": 6e-4, "batch": 128},
    }
    config.calibration = {"examples": 256, "batch": 64}  # per task, for collected statistics
    if args.runlocal:
        config.training.pretrain.steps = 200
        config.training.finetune.steps = 50
        config.training.multi_task.steps = 100
    return config.lock()
