"""Translations of element-wise and per-tensor methods; see `golden_translation.py`."""

from collections.abc import Callable

import golden_statistics as statistics
import numpy as np
from golden_case import Case, Translation, Untranslatable, exactly, several

import mergejax as mj


def _one_expert(case):
    if len(case.experts) != 1:
        raise Untranslatable(f"{case.method} of {len(case.experts)} models beside the base")
    return case.experts


def _magmax(case):
    scaling = case.parameters.take("scaling_factor")
    return Translation(mj.magmax(scaling=scaling), case.base, case.experts)


def _layer_wise(case):
    """One coefficient for each expert and each parameter, in the order of the module."""
    table = np.asarray(case.parameters.take("layer_wise_weight"), np.float64)
    if case.parameters.take("clamp_weights", True, (True, False)):
        table = table.clip(0, 1)
    names = case.facts["parameter_order"]
    rules = {exactly([name])[0]: list(column) for name, column in zip(names, table.T, strict=True)}
    method = mj.task_arithmetic(scaling=1.0, weights=mj.by_name(rules))
    return Translation(method, case.base, case.experts)


def _model_stock(angle):
    def translate(case):
        take = case.parameters.take
        excluded = exactly(take("ignore_keys", None) or [])
        scope = "row" if take("filter_wise", False, (True, False)) else "tensor"
        options = {"exclude": excluded} if excluded else {}
        method = mj.model_stock(scope=scope, angle=angle)
        return Translation(method, case.base, case.experts, options=options)

    return translate


def _nuslerp(case):
    take = case.parameters.take
    weights = several(take("weight"), len(case.experts), "weight")
    flatten = take("nuslerp_flatten", True, (True, False))
    by_column = take("nuslerp_row_wise", False, (True, False))
    scope = "tensor" if flatten else "column" if by_column else "row"
    if "base" in case.tensors:
        return Translation(mj.nuslerp(weights, scope), case.base, case.experts)
    return Translation(mj.nuslerp(weights, scope, of="weights"), None, case.experts)


def _multislerp(case):
    take = case.parameters.take
    weights = several(take("weight"), len(case.experts), "weight")
    method = mj.multislerp(weights, normalize=take("normalize_weights", True, (True, False)))
    take("eps", 1e-8, (1e-8,))
    # Without a base the directions are those of the weights, seen from zero.
    origin = {name: np.zeros_like(np.asarray(x)) for name, x in case.experts[0].items()}
    return Translation(method, case.tensors.get("base", origin), case.experts)


def _karcher(case):
    take = case.parameters.take
    method = mj.karcher(
        weights=several(take("weight", 1.0), len(case.experts), "weight"),
        iterations=take("max_iter", 10),
        tolerance=take("tol", 1e-5),
    )
    return Translation(method, None, case.experts)


def _nearswap(case):
    return Translation(mj.nearswap(t=case.parameters.take("t")), case.base, _one_expert(case))


def _arcee_fusion(case):
    return Translation(mj.arcee_fusion(), case.base, _one_expert(case))


def _passthrough(case):
    (scale,) = several(case.parameters.take("scale", 1.0), 1, "scale")
    return Translation(mj.passthrough(scale=scale), None, _one_expert(case))


def _ram(case):
    method = mj.ram(epsilon=case.parameters.take("epsilon", 1e-5))
    return Translation(method, case.base, case.experts)


def _ram_plus(case):
    take = case.parameters.take
    method = mj.ram_plus(
        epsilon=take("epsilon", 1e-5), gain=take("r", 0.1), limit=take("alpha", 0.2), scope="tensor"
    )
    return Translation(method, case.base, case.experts)


def _sce(case):
    case.parameters.take("int8_mask", False)  # the type of an intermediate mask
    method = mj.sce(density=case.parameters.take("select_topk", 1.0))
    return Translation(method, case.base, case.experts)


def _localize_and_stitch(case):
    take = case.parameters.take
    if "num_train_epochs" in case.parameters:
        return statistics.localized(case)
    take(
        "sigmoid_bias", None
    )  # where the masks' logits start; without training only the sign counts
    excluded = exactly(take("frozen", None) or [])
    counted = [x for name, x in case.base.items() if f"^{name}$" not in excluded]
    size = sum(int(np.size(x)) for x in counted)
    # The peer keeps what is strictly larger than the k-th magnitude: one element less.
    density = (int(take("sparsity") * size) - 0.5) / size
    options = {"exclude": excluded} if excluded else {}
    method = mj.localize_and_stitch(density=density)
    return Translation(method, case.base, case.experts, options=options)


_BETWEEN = {"readme": ("raw", 0.0001), "vision": ("normalized", 0.01), "ES": ("pairs", 0.01)}


def _pcb(case):
    take = case.parameters.take
    between, clip = _BETWEEN[take("variant", choices=tuple(_BETWEEN))]
    method = mj.pcb(
        density=take("ratio"),
        weights=several(take("lambda"), len(case.experts), "lambda"),
        between=between,
        clip=clip,
    )
    return Translation(method, case.base, case.experts)


def _widen(case):
    take = case.parameters.take
    method = mj.widen(
        ratio=take("above_average_value_ratio", 1.0), value=take("score_calibration_value", 1.0)
    )
    return Translation(method, case.base, case.experts)


TRANSLATIONS: dict[str, Callable[[Case], Translation]] = {
    "fusion_bench/adamerging (layer-wise coefficients)": _layer_wise,
    "fusion_bench/magmax": _magmax,
    "fusion_bench/model_stock": _model_stock("degrees"),
    "localize_and_stitch": _localize_and_stitch,
    "mergekit/arcee_fusion": _arcee_fusion,
    "mergekit/karcher": _karcher,
    "mergekit/model_stock": _model_stock("cosine"),
    "mergekit/multislerp": _multislerp,
    "mergekit/nearswap": _nearswap,
    "mergekit/nuslerp": _nuslerp,
    "mergekit/passthrough": _passthrough,
    "mergekit/ram": _ram,
    "mergekit/ramplus_tl": _ram_plus,
    "mergekit/sce": _sce,
    "pcb (evolutionary variant)": _pcb,
    "pcb (readme variant)": _pcb,
    "pcb (vision variant)": _pcb,
    "widen": _widen,
}
