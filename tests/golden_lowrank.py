"""Translations of methods on masks and on low-rank factors; see `golden_translation.py`."""

import re
from collections.abc import Callable

import numpy as np
from golden_case import Case, Translation, Untranslatable, exactly, several

import mergejax as mj
from mergejax.lowrank.knots import joint_coordinates

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


# --- low-rank factors -----------------------------------------------------------------------------


def _merged(case, adapters, method, **options):
    """Adapters are merged by themselves; their delta is then added to the base."""

    def result():
        merged = getattr(mj.lowrank, method)(adapters, **options)
        return {"expected": mj.lowrank.apply(case.base, merged, layout=case.layout)}

    return Translation(None, case.base, case.experts, result=result)


def _as_factors(case):
    """Deltas of whole matrices as factors, the second one the identity."""
    adapters = [{} for _ in case.experts]
    for name, base in case.base.items():
        if np.ndim(base) == 2:
            for adapter, expert in zip(adapters, case.experts, strict=True):
                delta = np.asarray(expert[name], np.float32) - np.asarray(base, np.float32)
                adapter[name] = mj.lowrank.Factors(delta.T, np.eye(len(delta), dtype=np.float32))
    return adapters


def _lora(case):
    """Recorded factors: A is [r, in], B is [out, r]."""
    take = case.parameters.take
    downs, ups = case.numbered("lora_a"), case.numbered("lora_b")
    ranks, alphas = take("ranks", None), take("lora_alpha", None)
    scales = take("scaling", None) or [a / r for a, r in zip(alphas, ranks, strict=True)]
    adapters = []
    for a, b, scale in zip(downs, ups, several(scales, len(downs), "scaling"), strict=True):
        pairs = {name: (np.asarray(a[name]).T, np.asarray(b[name]).T) for name in a}
        adapters.append({name: mj.lowrank.Factors(*pair, scale) for name, pair in pairs.items()})
    return adapters


def _lora_soups(case):
    mode = case.parameters.take("mode", re.search(r"\((\w+)\)", case.method)[1])
    if mode not in ("cat", "linear"):
        raise Untranslatable(f"lora_soups mode={mode!r}")
    logits = case.tensors.get("logits", {})
    rules = {exactly([name])[0]: list(map(float, np.asarray(v))) for name, v in logits.items()}
    learned = mj.by_name(rules) if rules else 0.0
    return _merged(case, _lora(case), mode, logits=learned)


def _knots(case):
    take = case.parameters.take
    take("merge_method", "ties", ("ties",))
    percent = take("topK")
    if not 0 < percent <= 100:
        raise Untranslatable(f"topK={percent}")
    host = mj.ties(
        density=percent / 100,
        reduction=take("merging_type", "mean", ("mean", "sum", "max")),
    )
    return _merged(
        case,
        _as_factors(case),
        "knots",
        host=host,
        scaling=take("scaling", 1.0),
        shared="output" if take("concat_across_output", True, (True, False)) else "input",
        cutoff=1e-5,
        relative=False,
    )


def _knots_alignment(case):
    """Singular values, coordinates up to their signs, and what they give back."""
    case.parameters.take("svd_dtype", "float64", ("float64",))
    cutoff = case.parameters.take("eps")
    adapters = _as_factors(case)

    def result():
        found = {"S": {}}
        for name in adapters[0]:
            several = [adapter[name] for adapter in adapters]
            coordinates, basis, values = joint_coordinates(several, "output", cutoff, False)
            found["S"][name] = values
            for i, z in enumerate(coordinates):
                found.setdefault(f"abs_sv{i}", {})[name] = abs(z.T)
                found.setdefault(f"aligned{i}", {})[name] = basis @ z.T
        return found

    return Translation(None, case.base, case.experts, result=result)


_SMOOTHING = {"avg": "mean", "mean": "mean", "linear": "linear"}


def _dc_merge(case):
    take = case.parameters.take
    scaling = take("scale", 1.0)
    smoothing = _SMOOTHING[take("smoothing_strategy", choices=tuple(_SMOOTHING))]
    ratio = take("rho", 5.0)
    adapters = _as_factors(case)
    return _merged(case, adapters, "dc_merge", smoothing=smoothing, ratio=ratio, scaling=scaling)


TRANSLATIONS: dict[str, Callable[[Case], Translation]] = {
    "consensus": _consensus,
    "dc_merge (LoRA)": _dc_merge,
    "fusion_bench/emr_merging": _emr,
    "fusion_bench/knots": _knots_alignment,
    "knots + ties": _knots,
    "lora_soups (cat)": _lora_soups,
    "lora_soups (linear)": _lora_soups,
    "tall_mask": _tall_masks,
}
