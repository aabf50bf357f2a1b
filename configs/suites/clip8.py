"""CLIP merged on 8, 14 or 20 image tasks, with the settings and the numbers of published tables.

    pip install 'mergejax[hub,texts]'
    python -m mergejax.main --config=configs/suites/clip8.py --workdir=runs/clip8

The base is CLIP of OpenAI, the experts are its image encoders fine-tuned on each task; both come
from the Hub, by the names that `transformers` has for them. Images are cut and normalised as CLIP's
own, heads are sentences about the classes and stay as they are. --config.data_dir as in
`configs/suites/images.py`; the test images of eight tasks take 13 GB of memory.

Arguments behind the colon, joined by commas:
    model=b32     ViT-B/32 (the default), b16 or l14
    tasks=8       8 (the default), 14 or 20
    finetune      experts are trained here, not taken from the Hub
    tiny          small random models instead, on three tasks of 32x32 pixels, without a network
    methods=A+B   some methods only; by default those of the published table

`config.cells` holds, for each cell of a published table, the model that it is of, the accuracy and
its source; the report puts ours beside them. The models of `tiny` are written by
`python benchmarks/tiny_clip.py runs/tiny_clip`, and their accuracies mean nothing.
"""

import ml_collections

from mergejax import config_args, search
from mergejax.data import clip

HUB = {
    "b32": "clip-vit-base-patch32",
    "b16": "clip-vit-base-patch16",
    "l14": "clip-vit-large-patch14",
}
SOURCE = "FusionBench, documentation of its CLIP-ViT models (Tang et al. 2024, arXiv:2406.03280)"
# By name: the chain that makes it or the mark that it is, and by model and number of tasks the
# published mean accuracy in %; of base and experts these are means over the table's tasks.
CELLS = {
    "base": (
        "base",
        {
            "b32": {8: 48.1, 14: 56.9, 20: 55.7},
            "b16": {8: 55.4, 14: 62.0, 20: 59.9},
            "l14": {8: 64.9, 14: 69.1, 20: 65.6},
        },
    ),
    "own": (
        "own",
        {
            "b32": {8: 90.4, 14: 89.3, 20: 89.8},
            "b16": {8: 92.4, 14: 91.3, 20: 91.6},
            "l14": {8: 94.3, 14: 93.4, 20: 93.5},
        },
    ),
    "ensemble": ("ensemble", {"b32": {8: 75.8}}),
    "average": ("average()", {"b32": {8: 66.5}, "b16": {8: 72.3}, "l14": {8: 80.0}}),
    "task_arithmetic": (
        "task_arithmetic(scaling=0.3)",
        {"b32": {8: 68.0}, "b16": {8: 77.1}, "l14": {8: 80.7}},
    ),
    "ties": (
        "ties(density=0.2, scaling=0.3, reduction='sum')",
        {"b32": {8: 72.2}, "b16": {8: 77.5}, "l14": {8: 84.0}},
    ),
    "fisher": ("fisher()", {"b32": {8: 70.6}, "b16": {8: 74.2}, "l14": {8: 80.3}}),
    "regmean": ("regmean(shrink=0.95)", {"b32": {8: 82.4}, "b16": {8: 86.0}, "l14": {8: 90.4}}),
    "wudi": ("wudi()", {"b32": {8: 84.5}}),
    "iso_c": ("iso_c(scaling=1.5)", {"b32": {8: 82.8}}),
    "iso_cts": ("iso_cts(scaling=1.5)", {"b32": {8: 82.7}}),
    "tsv_merge": ("tsv_merge()", {}),
}
MARKS = ("base", "own", "ensemble")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: see above."""
    args = config_args.parse(argument, methods=(), model="b32", tasks=8, finetune=False, tiny=False)
    name = HUB[config_args.chosen("model", args.model, {model: model for model in HUB})]
    count = int(config_args.chosen("tasks", str(args.tasks), {n: n for n in ("8", "14", "20")}))
    config = ml_collections.ConfigDict()
    config.name = f"CLIP {args.model}, {count} tasks"
    config.seeds = (0,)  # the experts are given; a seed draws examples and masks
    config.seed = 0  # each of `seeds` in turn
    config.methods = args.methods or tuple(c for c, _ in CELLS.values() if c not in MARKS)
    config.data_dir = ""  # folder of TensorFlow Datasets; TFDS_DATA_DIR counts if this is empty
    config.data = {
        "suite": "clip",
        "tasks": clip.protocol(count),
        "held_out": (),
        "head": "",  # every task has a head of its own
        "size": 224,
        # Of each task; the published tables are of all test images.
        "limits": {"train": 8000 if args.finetune else 1000, "validation": 500, "test": 10**6},
    }
    config.model = {
        "kind": "clip",
        "weights": f"openai/{name}",
        "experts": "" if args.finetune else f"tanganke/{name}_{{task}}",
    }
    config.training = {
        "finetune": {"steps": 4000, "learning_rate": 1e-5, "batch": 32},
        "multi_task": {"steps": 4000, "learning_rate": 1e-5, "batch": 32},
    }
    config.calibration = {"examples": 256, "batch": 32, "estimator": "sampled"}
    config.compressions = ("tall_masks()", "emr()", "tsv_compress()")
    config.search = search.grids(limit=4)  # for methods that are named without their values
    config.cells = {
        cell: {"model": row, "published": table[args.model][count], "source": SOURCE}
        for cell, (row, table) in CELLS.items()
        if count in table.get(args.model, {})
    }
    if args.tiny:
        config.name = "CLIP, tiny and random"
        config.cells = {}  # random weights compare with nothing
        config.data.tasks = ("eurosat", "gtsrb", "mnist")
        config.data.size = 32
        config.data.limits = {"train": 200, "validation": 50, "test": 100}
        config.model.weights = "runs/tiny_clip/base"
        config.model.experts = "" if args.finetune else "runs/tiny_clip/{task}"
        for phase in ("finetune", "multi_task"):
            config.training[phase].steps = 25
        config.calibration.examples = 32
    return config.lock()
