"""Translations of methods on masks and on low-rank factors; see `golden_translation.py`."""

from collections.abc import Callable

from golden_case import Case, Translation, several

import mergejax as mj

# --- masks ----------------------------------------------------------------------------------------


def _threshold(case):
    """One number for all tasks, or one a task."""
    threshold = case.parameters.take("lam")
    one = isinstance(threshold, int | float)
    return threshold if one else several(threshold, len(case.experts), "lam")


def _tall_masks(case):
    return Translation(mj.tall_masks(threshold=_threshold(case)), case.base, case.experts)


def _consensus(case):
    take = case.parameters.take
    method = mj.consensus(threshold=_threshold(case), agreement=take("k"), scaling=take("coef"))
    return Translation(method, case.base, case.experts)


def _emr(case):
    return Translation(mj.emr(rescale="tensor_mean"), case.base, case.experts)


TRANSLATIONS: dict[str, Callable[[Case], Translation]] = {
    "consensus": _consensus,
    "fusion_bench/emr_merging": _emr,
    "tall_mask": _tall_masks,
}
