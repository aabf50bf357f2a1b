"""mergekit's configuration files, in this library's words.

What means the same is translated; what does not, or cannot be honoured, is refused by name. The
facts are those of mergekit 0.1.5: methods, parameters, their defaults, how gradients and filters
are evaluated.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergejax.errors import MergeError, did_you_mean, raise_all

_DELTAS = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
           "della", "della_linear")  # fmt: skip
_METHODS = ("linear", "slerp", *_DELTAS)
_KEYS = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype",
         "tokenizer_source", "name"}  # fmt: skip
_KNOWN = {
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    "ties": {"weight", "density", "normalize", "lambda", "consensus_method"},
    "dare_linear": {"weight", "density", "normalize", "lambda", "rescale"},
    "dare_ties": {"weight", "density", "normalize", "lambda", "rescale", "consensus_method"},
    "breadcrumbs": {"weight", "density", "gamma", "normalize", "lambda"},
    "breadcrumbs_ties": {"weight", "density", "gamma", "normalize", "lambda"},
    "della": {"weight", "density", "epsilon", "normalize", "lambda", "rescale"},
    "della_linear": {"weight", "density", "epsilon", "normalize", "lambda", "rescale"},
}


def read_mergekit(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a configuration file of mergekit.

    Args:
        path: of the YAML file; relative model paths count from the working directory, as there.

    Returns:
        The options of `merge_checkpoints`: method (a text), base, experts, dtype.

    Raises:
        MergeError: one sentence for everything that is unknown or cannot be honoured.
    """
    import yaml

    try:
        content = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MergeError(f"{path} is no YAML ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise MergeError(f"{path} holds no mergekit configuration; it needs merge_method, models")
    return translate(content)


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed configuration in this library's words.

    Raises:
        MergeError: as `read_mergekit`.

    Example:
        >>> found = translate({'merge_method': 'task_arithmetic', 'base_model': 'base',
        ...     'models': [{'model': 'a', 'parameters': {'weight': 0.5}}]})
        >>> found['method']
        'total(weights=[0.5])|scale(scaling=1.0)'
    """
    problems = _problems(config)
    raise_all(problems)
    name, base = config["merge_method"], config.get("base_model")
    models = [dict(model) for model in config["models"]]
    shared = config.get("parameters") or {}
    if name != "linear":
        models = [m for m in models if m["model"] != base] if name != "slerp" else models
    elif base is not None and _without_weight(models, base, shared):
        models = [m for m in models if m["model"] != base]
    if name == "slerp":
        models = _slerp_order(models, base)
    own = [model.get("parameters") or {} for model in models]
    settings = _Settings(name, shared, own)
    found = {"linear": _linear, "slerp": _slerp}.get(name, _deltas)(name, settings)
    raise_all(settings.problems)
    dtype = config.get("out_dtype") or config.get("dtype")
    return {
        "method": found,
        "base": base,
        "experts": [model["model"] for model in models],
        **({"dtype": dtype} if dtype else {}),
    }


def _problems(config: Mapping[str, Any]) -> list[str]:
    """What is unknown, missing or cannot be honoured."""
    problems = []
    for key in ("slices", "modules"):
        if key in config:
            problems.append(f"'{key}' of mergekit cannot be honoured; merge whole models here")
    for key in ("tokenizer", "chat_template"):
        if config.get(key) is not None:
            problems.append(f"'{key}' of mergekit cannot be honoured; remove it")
    if config.get("tokenizer_source") not in (None, "base"):
        problems.append("'tokenizer_source' can only be 'base' here: the base's tokenizer is kept")
    known = {*_KEYS, "slices", "modules", "tokenizer", "chat_template"}
    problems += [
        f"a mergekit configuration has no key '{key}', {did_you_mean(str(key), _KEYS)}"
        for key in config
        if key not in known
    ]
    name = config.get("merge_method")
    if name not in _METHODS:
        problems.append(
            f"merge_method '{name}' is not translated, {did_you_mean(str(name), _METHODS)}"
        )
    models = config.get("models")
    if "slices" not in config and (not isinstance(models, list) or not models):
        problems.append("the configuration has no list of models; name them under 'models'")
        models = []
    for model in models or []:
        if not isinstance(model, dict) or not isinstance(model.get("model"), str):
            problems.append(f"each of models needs a path under 'model', not {str(model)[:60]!r}")
        elif extra := sorted(set(model) - {"model", "parameters"}):
            problems.append(f"model '{model['model']}' has the unknown key '{extra[0]}'")
    if name in _DELTAS and config.get("base_model") is None:
        problems.append(f"merge_method '{name}' needs a base_model")
    return problems


def _without_weight(models: Sequence[Mapping], base: str, shared: Mapping) -> bool:
    """Whether the base stands among the models of a linear merge and has no weight."""
    own = [m.get("parameters") or {} for m in models if m["model"] == base]
    return any("weight" not in parameters for parameters in own) and "weight" not in shared


def _slerp_order(models: list[dict], base: Any) -> list[dict]:
    """The base comes first; one model alone is interpolated with the base."""
    if base is not None and base not in [model["model"] for model in models]:
        models = [{"model": base}, *models]
    return sorted(models, key=lambda model: model["model"] != base)


class _Settings:
    """mergekit's parameters: a model's own setting comes first, then the shared one."""

    def __init__(self, method: str, shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]):
        self.shared, self.own = shared, own
        self.problems = [
            f"mergekit's {method} has no parameter '{key}', "
            + did_you_mean(str(key), _KNOWN[method])
            for key in dict.fromkeys(key for part in (shared, *own) for key in part)
            if key not in {*_KNOWN[method], "int8_mask"}
        ]
        if any(part.get("int8_mask") for part in (shared, *own)):
            self.problems.append("'int8_mask' is not needed here and cannot be honoured; remove it")

    def constant(self, name: str, default: Any) -> Any:
        """A setting that is one for the whole merge."""
        value = self.shared.get(name, default)
        if isinstance(value, list | dict):
            self.problems.append(f"'{name}' must be one value, not {value!r}")
            return default
        return value

    def rule(self, name: str, default: float | None = None) -> str:
        """One number for all models, by depth or by name, as a text."""
        if name not in self.shared and default is None:
            self.problems.append(f"the parameter '{name}' is missing")
            return "0"
        return self._text(name, self.shared.get(name, default), default)

    def per_model(self, name: str, default: float | None = None) -> str:
        """A number for each model, by depth or by name, as a text."""
        several = [part.get(name, self.shared.get(name, default)) for part in self.own]
        if any(value is None for value in several):
            self.problems.append(f"the parameter '{name}' is missing for a model")
            return "[]"
        if all(_is_number(value) for value in several):
            return f"[{', '.join(repr(float(value)) for value in several)}]"
        if all(value == several[0] for value in several):
            return self._text(name, several[0], default)
        if all(_is_gradient(v) or _is_number(v) for v in several):
            return self._gradients(several)
        self.problems.append(
            f"'{name}' has filters that differ between the models, which cannot be honoured"
        )
        return "[]"

    def _gradients(self, several: Sequence[Any]) -> str:
        """Gradients of one length, or numbers, as one gradient of lists."""
        length = max(len(v) for v in several if isinstance(v, list))
        if any(isinstance(v, list) and len(v) != length for v in several):
            self.problems.append("gradients of different lengths cannot be honoured")
            return "[]"
        columns = [v if isinstance(v, list) else [v] * length for v in several]
        rows = [", ".join(repr(float(x)) for x in row) for row in zip(*columns, strict=True)]
        return "by_depth([" + ", ".join(f"[{row}]" for row in rows) + "])"

    def _text(self, name: str, value: Any, default: float | None) -> str:
        if _is_number(value):
            return repr(float(value))
        if _is_gradient(value):
            return f"by_depth([{', '.join(repr(float(v)) for v in value)}])"
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            self.problems.append(f"'{name}' must be a number, a gradient or filters, not {value!r}")
            return "0"
        rules: dict[str, str] = {}
        for condition in value:
            pattern = condition.get("filter") or "*"
            pattern = ".*" if pattern == "*" else re.escape(str(pattern))
            rules.setdefault(pattern, self._text(name, condition.get("value"), default))
        if default is not None:
            rules.setdefault(".*", repr(default))
        inner = ", ".join(f"{pattern!r}: {text}" for pattern, text in rules.items())
        return f"by_name({{{inner}}})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_gradient(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _linear(name: str, settings: _Settings) -> str:
    normalize = bool(settings.constant("normalize", True))
    return f"linear(weights={settings.per_model('weight')}, normalize={normalize})"


def _slerp(name: str, settings: _Settings) -> str:
    return f"slerp(t={settings.rule('t')})"


def _deltas(name: str, settings: _Settings) -> str:
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
        rescale = "norm" if settings.constant("rescale", True) else "none"
        density = settings.per_model("density", 1.0)
        stages.append(_dropped(name, density, rescale, settings))
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


def _dropped(name: str, density: str, rescale: str, settings: _Settings) -> str:
    if "by_" in density:
        settings.problems.append("a 'density' that differs between layers cannot be honoured here")
        density = "[]"
    rates = [max(0.0, 1 - float(x)) for x in density.strip("[]").split(",") if x.strip()]
    if name.startswith("dare"):
        return f"drop(rate={rates}, rescale='{rescale}')"
    spread = settings.per_model("epsilon", 0.15)
    return f"drop_by_rank(density={density}, spread={spread}, rescale='{rescale}')"
