"""Spectral and subspace methods of other implementations, in this library's words."""

import re

import numpy as np
from golden_case import Translation, Untranslatable, exactly, several

import mergejax as mj


def _matrices(case, excluded=()):
    """Peers take every 2-D tensor for a kernel, embeddings and heads included."""
    roles = {}
    for name, x in case.base.items():
        if np.ndim(x) == 2:
            roles[exactly([name])[0]] = "other" if name in excluded else "kernel"
    return {"roles": roles} if roles else {}


def _merged(case, method, excluded=()):
    return Translation(method, case.base, case.experts, options=_matrices(case, excluded))


def _excluded(case):
    return case.parameters.take("exclude_keys", None) or []


def _tsv(case):
    alpha = case.parameters.take("alpha", 1.0)
    if isinstance(alpha, list | tuple):
        weights = several(alpha, len(case.experts), "alpha")
        method = mj.chain(mj.weigh(weights=weights), mj.tsv_merge())
    else:
        method = mj.tsv_merge(scaling=alpha)
    return _merged(case, method, _excluded(case))


def _iso_c(case):
    method = mj.iso_c(scaling=case.parameters.take("scaling_factor", 1.0))
    return _merged(case, method, _excluded(case))


def _iso_cts(case):
    take = case.parameters.take
    common = take("common_space_fraction", 0.8)
    method = mj.iso_cts(scaling=take("scaling_factor", 1.0), common=common)
    return _merged(case, method, _excluded(case))


def _svc(case):
    take = case.parameters.take
    host = mj.task_arithmetic(scaling=take("scaling_factor"))
    return _merged(case, mj.chain(host, mj.svc(alpha=take("alpha", 1.0))))


# --- WUDI and its relatives -----------------------------------------------------------------------


def _optimizer(text, kind):
    """The numbers of 'Adam(lr=1e-5)' and the like."""
    found = re.fullmatch(rf"{kind}\((.*)\)", text)
    if not found:
        raise Untranslatable(f"the optimizer {text!r}, translated is {kind}")
    return {k.strip(): float(v) for k, v in (part.split("=") for part in found[1].split(","))}


def _wudi(case):
    take = case.parameters.take
    numbers = _optimizer(take("optimizer", "Adam(lr=1e-5)"), "Adam")
    method = mj.wudi(steps=take("iter_num", 400), learning_rate=numbers.pop("lr"))
    if numbers:
        raise Untranslatable(f"Adam with {numbers}")
    return _merged(case, method, _excluded(case))


def _language_heads(case):
    return [name for name in case.base if "lm_head" in name]


def _opt_merge(case):
    take = case.parameters.take
    numbers = _optimizer(take("optimizer", "SGD(lr=1e-4, momentum=0.9)"), "SGD")
    method = mj.opt_merge(
        scaling=take("scaling_coefficient", 1.0),
        steps=take("steps", 300),
        learning_rate=numbers.pop("lr"),
        momentum=numbers.pop("momentum", 0.0),
    )
    if numbers:
        raise Untranslatable(f"SGD with {numbers}")
    return _merged(case, method, _language_heads(case))


def _swudi(case):
    take = case.parameters.take
    take("filter_type", "exponential", ("exponential",))
    method = mj.swudi(
        scaling=take("scaling_coefficient", 1.0),
        time=take("exp_time", 300.0),
        density=take("truncate_rank_ratio", 0.65),
        start=take("init_mode", "sum", ("sum", "mean", "zero")),
    )
    return _merged(case, method, _language_heads(case))


def _aswudi(case):
    take = case.parameters.take
    take("filter_type", "none", ("none",))
    take("auto_rank_method", "participation_sqrt", ("participation_sqrt",))
    start = take("init_mode", "sum", ("sum", "mean", "zero"))
    method = mj.aswudi(scaling=take("scaling_coefficient", 1.0), start=start)
    return _merged(case, method, _language_heads(case))


# --- DOGE, DOP, DC-Merge --------------------------------------------------------------------------


def _doge(case):
    take = case.parameters.take
    method = mj.doge_ta(
        scaling=take("lamda", 0.07), density=take("K", 30) / 100, subspace=take("subspace", 6)
    )
    merged = [n for n in case.base if "encoder" in n and "weight" in n and "layer_norm" not in n]
    return _merged(case, method, set(case.base) - set(merged))


def _dop(case):
    take = case.parameters.take
    balanced, smoothed = take("mgda", True), take("ema", True)
    beta = take("ema_beta", 0.99)
    decay = beta if smoothed else 0.0
    method = mj.dop(
        alpha=take("alpha", 0.8),
        decay=decay if balanced else 1.0,
        epsilon=take("svd_epsilon", 0.99999),
        steps=take("num_steps", 200),
        learning_rate=take("lr", 1e-4),
        space={"uv": "both", "u": "outputs", "v": "inputs"}[take("svd_proj_space", "uv")],
    )
    return Translation(method, case.base, case.experts)


def _dc_merge(case):
    return _merged(case, mj.dc_merge(scaling=case.parameters.take("scale", 1.0)))


# --- without a paper's section --------------------------------------------------------------------


def _expo(case):
    """The expert plus a part of its delta: task arithmetic with more than one."""
    factor = case.parameters.take("extrapolation_factor")
    if len(case.experts) != 1:
        raise Untranslatable(f"extrapolation from {len(case.experts)} experts")
    return Translation(mj.task_arithmetic(scaling=1 + factor), case.base, case.experts)


def _trust_region(case):
    take = case.parameters.take
    take("zero_shot", True, (True,))
    scaling, quantile = take("scaling_factor"), take("threshold_quantile")
    method = mj.trust_region(scaling=scaling, quantile=quantile)
    return Translation(method, case.base, case.experts)


TRANSLATIONS = {
    "aswudi": _aswudi,
    "dc_merge (full fine-tuning)": _dc_merge,
    "fusion_bench/doge_ta": _doge,
    "fusion_bench/dop": _dop,
    "fusion_bench/expo": _expo,
    "fusion_bench/isotropic_merging (Iso-C)": _iso_c,
    "fusion_bench/isotropic_merging (Iso-CTS)": _iso_cts,
    "fusion_bench/singular_value_calibration": _svc,
    "fusion_bench/task_singular_vector": _tsv,
    "fusion_bench/trust_region": _trust_region,
    "fusion_bench/wudi": _wudi,
    "swudi": _swudi,
    "wudi2 (OptMerge)": _opt_merge,
}
