"""mergekit's methods in this library's words: one row for each."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mergejax.checkpoints.mergekit_settings import Settings

Base = Literal["no expert", "an expert", "first expert", "without weight", "settings"]


class Method(NamedTuple):
    """One method of mergekit.

    Attributes:
        parameters: their names.
        base: what the base_model is to it: 'no expert', where differences to it are merged; 'an
            expert' like the others; the 'first expert'; no expert if it is 'without weight'; or
            what gives 'settings' only.
        needs_base: whether there must be one.
        text: (name, settings, base) -> the method in the string language.
    """

    parameters: set[str]
    base: Base
    needs_base: bool
    text: Callable[[str, Settings, Any], str]


def _linear(name: str, settings: Settings, base: Any) -> str:
    normalize = bool(settings.constant("normalize", True))
    return f"linear(weights={settings.per_model('weight')}, normalize={normalize})"


def _slerp(name: str, settings: Settings, base: Any) -> str:
    return f"slerp(t={settings.rule('t')})"


def _nuslerp(name: str, settings: Settings, base: Any) -> str:
    columns = settings.constant("nuslerp_row_wise", False)
    whole = settings.constant("nuslerp_flatten", True)
    scope = "tensor" if whole else "column" if columns else "row"
    of = "weights" if base is None else "deltas"
    return f"nuslerp(weights={settings.per_model('weight')}, scope='{scope}', of='{of}')"


def _multislerp(name: str, settings: Settings, base: Any) -> str:
    settings.refuse("eps", 1e-8)
    normalize = bool(settings.constant("normalize_weights", True))
    of = "weights" if base is None else "deltas"
    return f"multislerp(weights={settings.per_model('weight')}, normalize={normalize}, of='{of}')"


def _karcher(name: str, settings: Settings, base: Any) -> str:
    iterations, tolerance = settings.constant("max_iter", 10), settings.constant("tol", 1e-5)
    return f"karcher(iterations={iterations}, tolerance={tolerance})"


def _passthrough(name: str, settings: Settings, base: Any) -> str:
    return f"passthrough(scale={settings.rule('scale', 1.0, model=0)})"


def _model_stock(name: str, settings: Settings, base: Any) -> str:
    scope = "row" if settings.constant("filter_wise", False) else "tensor"
    return f"model_stock(scope='{scope}')"


def _sce(name: str, settings: Settings, base: Any) -> str:
    return f"sce(density={settings.rule('select_topk', 1.0)})"


def _nearswap(name: str, settings: Settings, base: Any) -> str:
    return f"nearswap(t={settings.rule('t')})"


def _arcee_fusion(name: str, settings: Settings, base: Any) -> str:
    return "arcee_fusion()"


def _ram(name: str, settings: Settings, base: Any) -> str:
    return f"ram(epsilon={settings.rule('epsilon', 1e-5)})"


def _ram_plus(name: str, settings: Settings, base: Any) -> str:
    numbers = {"epsilon": ("epsilon", 1e-5), "gain": ("r", 0.1), "limit": ("alpha", 0.2)}
    texts = [f"{ours}={settings.rule(*theirs)}" for ours, theirs in numbers.items()]
    return f"ram_plus({', '.join(texts)}, scope='tensor')"


def _deltas(name: str, settings: Settings, base: Any) -> str:
    """mergekit's methods on deltas: one pipeline, several presets."""
    weights = settings.per_model("weight")
    elects = name.endswith("ties") or name == "della"
    normalize = settings.constant("normalize", name in ("ties", "della"))
    stages = []
    if name == "ties":
        density = settings.per_model("density", 1.0)
        stages.append(f"trim(density={density}, scope='tensor', cut='exact')")
    elif name.startswith("breadcrumbs"):
        density, top = settings.per_model("density", 1.0), settings.per_model("gamma", 0.01)
        stages.append(f"trim_band(density={density}, top={top}, scope='tensor')")
    elif name.startswith(("dare", "della")):
        stages.append(_dropped(name, settings))
    if not name.startswith(("dare", "della")):
        settings.refuse("rescale", False)
    if elects:
        by = {"sum": "mass", "count": "count"}.get(settings.constant("consensus_method", "sum"))
        if by is None:
            settings.problems.append("'consensus_method' must be 'sum' or 'count'")
        sign = "" if by in ("mass", None) else "by='count', "
        stages += [f"weigh(weights={weights})", f"elect_sign({sign}zero='plus')"]
        stages.append(f"disjoint_mean(weights={weights})" if normalize else "total()")
    else:
        stages.append(f"{'mean' if normalize else 'total'}(weights={weights})")
    return "|".join([*stages, f"scale(scaling={settings.rule('lambda', 1.0)})"])


def _dropped(name: str, settings: Settings) -> str:
    rescale = "norm" if settings.constant("rescale", True) else "none"
    if name.startswith("dare"):
        rates = settings.per_model("density", 1.0, lambda density: max(0.0, 1 - density))
        return f"drop(rate={rates}, rescale='{rescale}')"
    density, spread = settings.per_model("density", 1.0), settings.per_model("epsilon", 0.15)
    if "by_" in density + spread:
        settings.problems.append("a 'density' that differs between layers cannot be honoured here")
    return f"drop_by_rank(density={density}, spread={spread}, rescale='{rescale}')"


_MIXED = {"weight", "normalize", "rescale", "lambda"}
_PRESETS = {
    "task_arithmetic": _MIXED,
    "ties": {*_MIXED, "density", "consensus_method"},
    "dare_linear": {*_MIXED, "density"},
    "dare_ties": {*_MIXED, "density", "consensus_method"},
    "breadcrumbs": {*_MIXED, "density", "gamma"},
    "breadcrumbs_ties": {*_MIXED, "density", "gamma"},
    "della": {*_MIXED, "density", "epsilon"},
    "della_linear": {*_MIXED, "density", "epsilon"},
}
METHODS = {
    **{name: Method(known, "no expert", True, _deltas) for name, known in _PRESETS.items()},
    "linear": Method({"weight", "normalize"}, "without weight", False, _linear),
    "slerp": Method({"t"}, "first expert", False, _slerp),
    "nuslerp": Method(
        {"weight", "nuslerp_row_wise", "nuslerp_flatten"}, "no expert", False, _nuslerp
    ),
    "multislerp": Method({"weight", "normalize_weights", "eps"}, "no expert", False, _multislerp),
    "karcher": Method({"max_iter", "tol"}, "an expert", False, _karcher),
    "passthrough": Method({"scale"}, "settings", False, _passthrough),
    "model_stock": Method({"filter_wise"}, "no expert", True, _model_stock),
    "sce": Method({"select_topk"}, "no expert", True, _sce),
    "nearswap": Method({"t"}, "no expert", True, _nearswap),
    "arcee_fusion": Method(set(), "no expert", True, _arcee_fusion),
    "ram": Method({"epsilon"}, "no expert", True, _ram),
    "ramplus_tl": Method({"r", "alpha", "epsilon"}, "no expert", True, _ram_plus),
}
