"""What other implementations call a method and its parameters, in this library's words.

`TRANSLATIONS` maps a peer's method name to a function of the case. Translations go by method and
parameter, never by case: each takes its parameters out of the case one by one, and a parameter
that nobody took, or a value that has no translation, is an error.
"""

import dataclasses
import re
from collections.abc import Callable

import golden_alignment as alignment
import golden_elementwise as elementwise
import golden_lowrank as lowrank
import golden_mergekit as mergekit
import golden_spectral as spectral
import golden_statistics as statistics
import numpy as np
from golden_case import Case, Draw, Translation, Untranslatable, exactly, given_masks, several

import mergejax as mj

# --- averages -------------------------------------------------------------------------------------


def _simple_average(case):
    return Translation(mj.average(), None, case.experts)


def _weighted_average(case):
    weights = several(case.parameters.take("weights"), len(case.experts), "weights")
    normalize = case.parameters.take("normalize", True)
    return Translation(mj.linear(weights=weights, normalize=normalize), None, case.experts)


def _task_arithmetic(case):
    scaling = case.parameters.take("scaling_factor")
    return Translation(mj.task_arithmetic(scaling=scaling), case.base, case.experts)


def _two_models(case):
    models = case.experts if len(case.experts) == 2 else [case.base, *case.experts]
    if len(models) != 2:
        raise Untranslatable(f"slerp of {len(models)} models")
    return models


def _slerp(case):
    return Translation(mj.slerp(t=case.parameters.take("t")), None, _two_models(case))


# --- TIES -----------------------------------------------------------------------------------------

_PUBLISHED_REDUCTION = {"dis-mean": "mean", "dis-sum": "sum", "dis-max": "max"}


def _published_density(threshold):
    """The authors read anything above one as percent."""
    return threshold / 100 if threshold > 1 else threshold


def _ties_global(case):
    if "param_value_mask_rate" in case.parameters:
        return _ties_masked(case, "model")
    take = case.parameters.take
    take("reset_type", "topk", ("topk",))
    take("resolve_method", "mass", ("mass",))
    method = mj.ties(
        density=_published_density(take("reset_thresh")),
        scaling=take("lambda", 1.0),
        reduction=_PUBLISHED_REDUCTION[take("merge_func", choices=tuple(_PUBLISHED_REDUCTION))],
    )
    return Translation(method, case.base, case.experts)


def _ties_masked(case, scope):
    """MergeLM and MergeLLM count what they drop."""
    rate = case.parameters.take("param_value_mask_rate")
    method = mj.ties(
        density=1 - rate,
        scaling=case.parameters.take("scaling_coefficient", 1.0),
        scope=scope,
        cut="complement",
    )
    for size in _sizes(case, scope):
        if int(size * rate) != int(size * (1 - (1 - rate))):
            raise Untranslatable(f"the mask rate {rate} has no density that is its complement")
    return Translation(method, case.base, case.experts)


def _sizes(case, scope):
    sizes = [int(np.size(value)) for value in case.experts[0].values()]
    return sizes if scope == "tensor" else [sum(sizes)]


def _fusion_ties(case):
    take = case.parameters.take
    excluded = exactly(take("remove_keys", None) or [])
    method = mj.ties(
        density=_published_density(take("threshold", 20)),
        scaling=take("scaling_factor"),
        reduction=take("merge_func", "sum", ("sum", "mean", "max")),
    )
    options = {"exclude": excluded} if excluded else {}
    return Translation(method, case.base, case.experts, options=options)


# --- DARE -----------------------------------------------------------------------------------------


def _dropped(case, host, rates, rescale):
    """A translated method with recorded masks before it."""
    draw = Draw(rates, "inverse" if rescale else "none", host.method)
    stats = {"mask": given_masks(case, rates)}
    return dataclasses.replace(host, method=draw.given(), stats=stats, draw=draw)


def _fusion_dare(case):
    take = case.parameters.take
    rate = take("sparsity_ratio")
    rescale = take("rescale", True, (True, False))
    only_linear = take("only_on_linear_weights", False, (True, False))
    host = _fusion_ties(case) if case.method.endswith("ties_merging") else _task_arithmetic(case)
    if not only_linear:
        return _dropped(case, host, [rate] * len(case.experts), rescale)
    masks = case.numbered("mask")
    if len(masks) != len(case.experts):
        raise Untranslatable("there is not one mask per expert, and the draws are random")
    masks = [{name: mask[name] for name in mask if np.ndim(mask[name]) == 2} for mask in masks]
    drop = mj.drop_given(rate=rate, rescale="inverse" if rescale else "none")
    method = mj.chain(mj.by_stats(mask=drop, otherwise=mj.scale(1.0)), host.method)
    return dataclasses.replace(host, method=method, stats={"mask": masks})


def _mergelm_dare(case):
    take = case.parameters.take
    rates = several(take("weight_mask_rates"), len(case.experts), "weight_mask_rates")
    rescale = take("use_weight_rescale", True, (True, False))
    take("mask_strategy", "random", ("random", "magnitude"))  # either way the masks are given
    take("weight_format", "delta_weight", ("delta_weight",))
    take("exclude_param_names_regex", [], ([],))
    apply = take(
        "mask_apply_method", choices=("task_arithmetic", "average_merging", "ties_merging")
    )
    if apply == "average_merging":
        take("scaling_coefficient", None)  # that method has none
        host = Translation(mj.mean(), case.base, case.experts)
    elif apply == "ties_merging":
        host = _ties_masked(case, "model")
    else:
        scaling = take("scaling_coefficient", 1.0)
        host = Translation(mj.task_arithmetic(scaling=scaling), case.base, case.experts)
    return _dropped(case, host, rates, rescale)


# --- LiNeS ----------------------------------------------------------------------------------------


def _lines(case):
    take = case.parameters.take
    merged = take("merge")
    ties = re.fullmatch(r"ties (dis-\w+) k=([\d.]+)", merged)
    if ties and ties[1] in _PUBLISHED_REDUCTION:
        reduction = _PUBLISHED_REDUCTION[ties[1]]
        host = mj.ties(density=_published_density(float(ties[2])), reduction=reduction)
    elif merged == "sum of task vectors":
        host = mj.total()
    else:
        raise Untranslatable(f"lines over '{merged}'")
    blocks = take("num_blocks")
    named = {m[1] for name in case.base if (m := re.search(r"\.(\d+)\.", name))}
    if blocks != len(named):
        raise Untranslatable(f"num_blocks={blocks}, but the leaves name {len(named)} blocks")
    beta = take("beta")
    alpha = take("alpha", None)
    stage = mj.lines_multi_task(beta=beta) if alpha is None else mj.lines(alpha=alpha, beta=beta)
    return Translation(mj.chain(host, stage), case.base, case.experts)


# --- Fisher, RegMean, OPCM ------------------------------------------------------------------------


def _fishers(case):
    fishers = case.numbered("fisher")
    if len(fishers) != len(case.experts):
        raise Untranslatable("there is not one diagonal Fisher per expert")
    return {"fisher": fishers}


def _fisher_published(case):
    take = case.parameters.take
    take("fishers", "given", ("given",))
    method = mj.fisher(
        weights=several(take("coefficients"), len(case.experts), "coefficients"),
        floor=take("fisher_floor"),
        floor_rule="first" if take("favor_target_model", True) else "maximum",
        normalize=take("normalize_fishers", True),
    )
    return Translation(method, None, case.experts, _fishers(case))


def _fisher_fusion(case):
    take = case.parameters.take
    coefficients = take("coefficients", "1/n")
    if isinstance(coefficients, str) and coefficients != "1/n":
        raise Untranslatable(f"coefficients={coefficients!r}")
    method = mj.fisher(
        weights=1.0 if coefficients == "1/n" else several(coefficients, len(case.experts), ""),
        floor=take("minimal_fisher_weight", 1e-6),
        floor_rule="added",
        normalize=take("normalize_fisher_weight", True),
    )
    return Translation(method, None, case.experts, _fishers(case))


def _regmean(name, mean):
    def translate(case):
        shrink = case.parameters.take(name)
        grams = case.numbered("gram") or [
            {n: _gram(x, mean) for n, x in inputs.items()} for inputs in case.numbered("inputs")
        ]
        if len(grams) != len(case.experts):
            raise Untranslatable("there is not one Gram matrix per expert")
        case.parameters.take("weight_transpose", True, (True,))
        case.parameters.take("exclude_param_names_regex", [], ([],))
        return Translation(mj.regmean(shrink=shrink), None, case.experts, {"gram": grams})

    return translate


def _gram(inputs, mean):
    rows = np.asarray(inputs, np.float64)
    return np.asarray(rows.T @ rows / (len(rows) if mean else 1), np.float32)


def _opcm(zero_diagonal):
    def translate(case):
        alpha = case.parameters.take("alpha")
        order = _order(case.parameters.take("order", "as numbered"), len(case.experts))
        case.parameters.take("shuffle_order", False, (False,))
        # The peers' search for the first share above alpha finds none at 1, and they take rank 0.
        method = mj.opcm(alpha=0.0 if alpha >= 1 else alpha, zero_diagonal=zero_diagonal)
        return Translation(method, case.base, [case.experts[i] for i in order])

    return translate


def _order(order, count):
    if order == "as numbered" or order == f"expert0..{count - 1}":
        return range(count)
    found = re.findall(r"\d+", order) if isinstance(order, str) else order
    found = [int(re.sub(r"\D", "", str(item))) for item in found]
    if sorted(found) != list(range(count)):
        raise Untranslatable(f"order={order!r} of {count} experts")
    return found


TRANSLATIONS: dict[str, Callable[[Case], Translation]] = {
    "dare + task arithmetic": _mergelm_dare,
    "fisher": _fisher_published,
    "fusion_bench/dare/task_arithmetic": _fusion_dare,
    "fusion_bench/dare/ties_merging": _fusion_dare,
    "fusion_bench/fisher_merging": _fisher_fusion,
    "fusion_bench/opcm": _opcm(zero_diagonal=True),
    "fusion_bench/regmean": _regmean("reduce_non_diagonal_ratio", mean=True),
    "fusion_bench/simple_average": _simple_average,
    "fusion_bench/slerp": _slerp,
    "fusion_bench/task_arithmetic": _task_arithmetic,
    "fusion_bench/ties_merging": _fusion_ties,
    "fusion_bench/weighted_average": _weighted_average,
    "lines (sum)": _lines,
    "lines (ties)": _lines,
    "mergekit/breadcrumbs": mergekit.deltas,
    "mergekit/breadcrumbs_ties": mergekit.deltas,
    "mergekit/dare_linear": mergekit.deltas,
    "mergekit/dare_ties": mergekit.deltas,
    "mergekit/della": mergekit.deltas,
    "mergekit/della_linear": mergekit.deltas,
    "mergekit/linear": mergekit.linear,
    "mergekit/slerp": _slerp,
    "mergekit/task_arithmetic": mergekit.deltas,
    "mergekit/ties": mergekit.deltas,
    "mergekit-yaml/dare_linear": mergekit.configuration,
    "mergekit-yaml/dare_ties": mergekit.configuration,
    "mergekit-yaml/linear": mergekit.configuration,
    "mergekit-yaml/slerp": mergekit.configuration,
    "mergekit-yaml/task_arithmetic": mergekit.configuration,
    "mergekit-yaml/ties": mergekit.configuration,
    "opcm (original repository)": _opcm(zero_diagonal=False),
    "regmean": _regmean("model_lambda", mean=False),
    "ties (global trim)": _ties_global,
    "ties (per tensor)": lambda case: _ties_masked(case, "tensor"),
    "mats (conjugate gradient)": statistics.mats,
    **alignment.TRANSLATIONS,
    "fusion_bench/regmean_plusplus": statistics.regmean_plus_plus,
    **elementwise.TRANSLATIONS,
    **lowrank.TRANSLATIONS,
    **spectral.TRANSLATIONS,
}
