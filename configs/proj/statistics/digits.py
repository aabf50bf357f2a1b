"""Merging with statistics of data on the digits: three seeds, 16, 64 and 256 examples per task.

    python -m mergejax.main --config=configs/proj/statistics/digits.py --workdir=runs/statistics

`docs/statistics_results.md` holds the table. `configs/proj/statistics/digits.py:runlocal` is a
short form with one seed.
"""

import importlib.util
import pathlib

import ml_collections

from mergejax import config_args


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `runlocal` (one seed, short training)."""
    args = config_args.parse(argument, runlocal=False)
    config = beside("../../digits.py").get_config("runlocal" if args.runlocal else None)
    with config.unlocked():
        config.study = study()
        if args.runlocal:
            config.study.seeds = (0,)
            config.study.examples = (16,)
    return config.lock()


def beside(path: str):
    """A config file next to this one, as a module."""
    file = pathlib.Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study() -> ml_collections.ConfigDict:
    """Seeds, numbers of examples, and the methods with the chains to choose from on validation."""

    def each(template: str, *values: float) -> tuple[str, ...]:
        return tuple(template.format(value) for value in values)

    settings = ml_collections.ConfigDict()
    settings.seeds = (0, 1, 2)
    settings.examples = (16, 64, 256)
    settings.procedures = (
        "regmean_plus_plus",
        "featcal",
        "react",
        "surgery",
        "localize_and_stitch_trained",
        "nearest_4_bits",
        "gptq_4_bits",
        "e_pmq_4_bits",
        "e_pmq_8_bits",
    )
    settings.methods = {
        "average": ("average()",),
        "task_arithmetic": each("task_arithmetic(scaling={})", 0.1, 0.15, 0.2, 0.25, 0.3, 0.4),
        "ties": each("ties(density=0.3, scaling={})", 0.6, 1.0, 1.4)
        + each("ties(density=1.0, scaling={})", 0.6, 1.0, 1.4),
        "frobenius_weighted": each("frobenius_weighted(power={})", 1.0, 2.0),
        "bayesian_data_free": each(
            "bayesian_data_free(ridge={}, anchor_scaling=0.2)", 0.01, 0.1, 1.0, 10.0
        ),
        "fisher": each("fisher(floor={})", 1e-3, 0.1, 1.0),
        "regmean": each("regmean(shrink={})", 0.1, 0.5, 0.9, 1.0),
        "regmean_joint_biases": each('regmean(shrink={}, biases="joint")', 0.1, 0.5, 0.9, 1.0),
        "mats": each("mats(scaling=0.2, steps={})", 5, 20, 100),
        "lot": ("lot()",),
        "cat": ("cat()",),
        "bayesian": each("bayesian(ridge={}, anchor_scaling=0.2)", 0.01, 0.1, 1.0, 10.0),
    }
    return settings
