"""Bayesian model merging with a ridge and a scaling for each group of layers, for the launcher."""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from mergejax import api, calibration, outer, preflight, train
from mergejax.eval import predict
from mergejax.methods.bayesian import bayesian
from mergejax.varying import by_name

NAME = "bayesian_groups"
Tree = Any


def search(
    job: preflight.Job, trained: train.Trained, settings: ml_collections.ConfigDict
) -> tuple[Tree, str]:
    """Searches the outer level of Bayesian model merging on validation data.

    Gram matrices are collected once; a trial is a solve of all layers and an evaluation.

    Args:
        job: `config.search.bayesian_groups` has the `groups` (regular expressions on leaf names,
            the first that matches counts), the ranges of `ridge` (log) and `scaling` (linear),
            `anchor_scaling` and the number of `trials`.
        trained: base, experts and heads.
        settings: of the calibration.

    Returns:
        The merged body with the highest mean validation accuracy over tasks, and its chain.
    """
    asked = job.config.search[NAME]
    experts = list(trained.experts.values())
    head = predict.join_heads(trained.heads, list(job.tasks))
    stats = calibration.statistics(["gram"], settings, job.tasks, trained, job.folder, job.reporter)

    def merged(rules: Mapping[str, Any]) -> Tree:
        return api.merge(_chain(job, rules), trained.base, experts, stats=stats)

    with job.reporter.progress(f"search {NAME}", asked.trials) as advance:

        def score(rules: Mapping[str, Any]) -> float:
            right = predict.right(job.model, merged(rules), head, job.validation)
            advance(1)
            parts = predict.by_task(np.asarray(right), job.validation, list(job.tasks))
            return float(np.mean([part.mean() for part in parts.values()]))

        seed = job.config.seed
        found = outer.search_groups(score, *_space(job), trials=asked.trials, seed=seed)
    return merged(found.best), str(_chain(job, found.best))


def check(job: preflight.Job) -> None:
    """Tries one point of the search on shapes alone.

    Raises:
        MergeError: groups that match no leaf, impossible ranges, no trial.
    """
    groups, space = _space(job)
    outer.check(groups, space, job.config.search[NAME].trials)
    lowest = {name: by_name(dict.fromkeys(groups, low)) for name, (low, *_) in space.items()}
    count = len(job.tasks)
    jax.eval_shape(
        lambda base, experts, grams: api.merge(
            _chain(job, lowest), base, experts, stats={"gram": grams}
        ),
        *(job.base, count * [job.base], count * [job.stats["gram"]]),
    )


def _chain(job: preflight.Job, rules: Mapping[str, Any]) -> Any:
    return bayesian(**rules, anchor_scaling=job.config.search[NAME].anchor_scaling)


def _space(job: preflight.Job) -> tuple[list[str], dict[str, tuple[float, float, str]]]:
    asked = job.config.search[NAME]
    return list(asked.groups), {
        "ridge": (*asked.ridge, "log"),
        "scaling": (*asked.scaling, "linear"),
    }
