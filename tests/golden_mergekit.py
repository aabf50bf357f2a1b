"""mergekit's methods and its configuration files, in this library's words."""

import dataclasses
import re
from typing import Any

import numpy as np
from golden_case import (
    REQUIRED,
    Case,
    Draw,
    Parameters,
    Translation,
    Untranslatable,
    exactly,
    given_masks,
    several,
)

import mergejax as mj
import mergejax.varying


def linear(case):
    """Weights of all models; where there is one more than experts, the base is the first model."""
    weights = case.parameters.take("weight")
    normalize = case.parameters.take("normalize", True)
    experts = case.experts
    if isinstance(weights, list) and len(weights) == len(experts) + 1:
        experts = [case.base, *experts]
    weights = several(weights, len(experts), "weight")
    return Translation(mj.linear(weights=weights, normalize=normalize), None, experts)


def deltas(case):
    """mergekit's methods on deltas: one pipeline, eight presets."""
    name = case.method.split("/")[-1]
    take, count = case.parameters.take, len(case.experts)
    weights = several(take("weight"), count, "weight")
    densities = several(take("density", 1.0), count, "density")
    rescale = take("rescale", name.startswith(("dare", "della")), (True, False))
    normalize = take("normalize", name in ("ties", "della"), (True, False))
    scaling = take("lambda", 1.0)
    consensus = take("consensus_method", "sum", ("sum", "count"))
    take("int8_mask", False)  # the type of an intermediate mask; no effect on the result
    elects = name.endswith("ties") or name == "della"
    mixed = _mixed(weights, normalize, consensus if elects else None)
    if isinstance(scaling, list):  # one a model, of which the peer takes the first
        scaling = scaling[0]
    host = mj.chain(*mixed, mj.scale(scaling))
    if name.startswith(("dare", "della")):
        # A density of one is no draw, so the peer has no mask for it.
        rates = [max(0.0, 1 - density) for density in densities]
        stage = None
        if name.startswith("della"):
            spreads = several(take("epsilon", 0.15), count, "epsilon")
            stage = lambda rescale: mj.drop_by_rank(densities, spreads, rescale)
        draw = Draw(rates, "norm" if rescale else "none", host, stage)
        stats = {"mask": given_masks(case, rates)}
        return Translation(draw.given(), case.base, case.experts, stats, draw=draw)
    if rescale and name != "task_arithmetic":
        raise Untranslatable(f"mergekit/{name} with rescale: no norm is restored after a trim")
    if name.startswith("breadcrumbs"):
        tops = several(take("gamma", 0.01), count, "gamma")
        densities = [min(1.0, density) for density in densities]
        band = mj.trim_band(
            densities, [t if d < 1 else 0.0 for t, d in zip(tops, densities, strict=True)], "tensor"
        )
        host = mj.chain(band, host)
    if name == "ties":
        densities = [min(1.0, density) for density in densities]
        host = mj.chain(mj.trim(density=densities, scope="tensor", cut="exact"), host)
    return Translation(host, case.base, case.experts)


def _mixed(weights, normalize, consensus):
    """How mergekit makes one delta of several."""
    if consensus is not None:
        reduction = mj.disjoint_mean(weights) if normalize else mj.total()
        by = {"sum": "mass", "count": "count"}[consensus]
        return [mj.weigh(weights), mj.elect_sign(by=by, zero="plus"), reduction]
    # Weights that sum to zero are not normalised there.
    if normalize and abs(sum(weights)) >= 1e-8:
        return [mj.mean(weights)]
    return [mj.total(weights)]


# --- mergekit's configuration files ---------------------------------------------------------------

_PRESETS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def configuration(case):
    """A configuration file: settings are numbers, gradients over the layers, or filtered lists."""
    config = Parameters(case.parameters.take("config"), f"{case.method} config")
    name = config.take("merge_method", choices=(case.method.split("/")[-1],))
    for key in ("tokenizer_source", "tokenizer", "chat_template"):
        config.take(key, None, (None, "base"))  # others may move rows of the embedding
    options = {}
    for key in ("dtype", "out_dtype"):
        if (dtype := config.take(key, None)) is not None:
            options["dtype"] = dtype
    base = config.take("base_model", None)
    shared = Parameters(config.take("parameters", {}), f"{case.method} parameters")
    models = [Parameters(model, f"{case.method} model") for model in config.take("models")]
    names = [model.take("model") for model in models]
    own = [model.take("parameters", None) or {} for model in models]
    for part in (config, *models):
        part.finish()
    if name in _PRESETS:
        own = [parameters for parameters, model in zip(own, names, strict=True) if model != base]
        names = [model for model in names if model != base]
    if unknown := [model for model in names if model not in case.tensors]:
        raise Untranslatable(f"the models {unknown} are not in the file")
    settings = _Settings(shared, own, list(case.tensors[names[0]]))
    experts = [dict(case.tensors[model]) for model in names]
    base_tree = None if base is None else dict(case.tensors[base])
    if name == "slerp":
        translated = _yaml_slerp(settings, base, names, experts)
    else:
        translated = _YAML[name](settings, case, base_tree, experts)
    settings.finish()
    return dataclasses.replace(translated, options={**options, **translated.options})


def _yaml_slerp(settings, base, names, experts):
    if sorted(names, key=lambda name: name != base) != names:
        experts = experts[::-1]
    return Translation(mj.slerp(t=settings.rule("t")), None, experts)


def _yaml_linear(settings, case, base, experts):
    weights = settings.per_model("weight")
    normalize = settings.constant("normalize", True)
    return Translation(mj.linear(weights=weights, normalize=normalize), None, experts)


def _yaml_deltas(settings, case, base, experts):
    """Presets whose settings are the same for all leaves go through the direct translation."""
    found: dict[str, Any] = {}
    for name, default in (("weight", REQUIRED), ("density", 1.0)):
        found[name] = settings.per_model(name, default)
        if isinstance(found[name], mj.varying.ByName):
            return _yaml_deltas_by_leaf(settings, case, base, experts, found)
    for name in ("normalize", "rescale", "lambda", "int8_mask"):
        if name in settings:
            found[name] = settings.constant(name)
    facts = {**case.facts, "hyperparameters": found}
    tensors = {
        "base": base,
        **{f"expert{i}": expert for i, expert in enumerate(experts)},
        **{k: v for k, v in case.tensors.items() if k.startswith("mask")},
    }
    inner = Case(facts, tensors)
    translated = deltas(inner)
    inner.parameters.finish()
    return translated


def _yaml_deltas_by_leaf(settings, case, base, experts, found):
    name = case.method.split("/")[-1]
    if name not in ("ties", "task_arithmetic") or settings.constant("rescale", False):
        raise Untranslatable(f"{case.method} with settings that differ between leaves")
    settings.constant("int8_mask", False)
    density = found.get("density", None) or settings.per_model("density", 1.0)
    normalize = settings.constant("normalize", name == "ties")
    stages = [mj.scale(settings.constant("lambda", 1.0))]
    stages = [*_mixed_by_leaf(found["weight"], normalize, name), *stages]
    if name == "ties":
        stages = [mj.trim(density=density, scope="tensor", cut="exact"), *stages]
    return Translation(mj.chain(*stages), base, experts)


def _mixed_by_leaf(weights, normalize, name):
    if name == "ties":
        return _mixed(weights, normalize, "sum")
    return [mj.mean(weights)] if normalize else [mj.total(weights)]


_YAML = {"linear": _yaml_linear, **dict.fromkeys(_PRESETS, _yaml_deltas)}


class _Settings:
    """mergekit's parameters: a model's own setting comes first, then the shared one."""

    def __init__(self, shared, own, leaves):
        self.shared, self.leaves = shared, leaves
        self.own = [Parameters(parameters, "a model's parameters") for parameters in own]

    def __contains__(self, name):
        return name in self.shared or any(name in parameters for parameters in self.own)

    def finish(self):
        for parameters in (self.shared, *self.own):
            parameters.finish()

    def constant(self, name, default=REQUIRED):
        value = self.shared.take(name, default)
        if isinstance(value, list | dict):
            raise Untranslatable(f"{name}={value} differs between leaves")
        return value

    def rule(self, name):
        """One number for all models, by name and depth, in this library's own rules."""
        value = self.shared.take(name)
        if not isinstance(value, list):
            return value
        if all(isinstance(v, int | float) for v in value):
            return mj.by_depth(value)
        values = {}
        for condition in value:
            pattern = condition.get("filter") or "*"
            pattern = ".*" if pattern == "*" else re.escape(pattern)
            if not any(re.search(pattern, leaf) for leaf in self.leaves):
                continue  # a filter that matches nothing is no error there
            inner = condition["value"]
            values.setdefault(pattern, mj.by_depth(inner) if isinstance(inner, list) else inner)
        return mj.by_name(values)

    def per_model(self, name, default=REQUIRED):
        """A number per model, or the rule that says it for each leaf."""
        shared = self.shared.take(name, None)
        settings = [(parameters.take(name, None), shared, default) for parameters in self.own]
        values = {leaf: [self._evaluate(s, name, leaf) for s in settings] for leaf in self.leaves}
        first = values[self.leaves[0]]
        if all(value == first for value in values.values()):
            return first
        return mj.by_name(dict(zip(exactly(values), values.values(), strict=True)))

    def _evaluate(self, settings, name, leaf):
        for setting in settings:
            if setting is REQUIRED:
                raise Untranslatable(f"no '{name}' for leaf '{leaf}'")
            value = self._at(setting, leaf)
            if value is not None:
                return value
        raise Untranslatable(f"no '{name}' for leaf '{leaf}'")

    def _at(self, setting, leaf):
        if not isinstance(setting, list):
            return setting
        if all(isinstance(v, int | float) for v in setting):
            return float(np.interp(self._depth(leaf), np.linspace(0, 1, len(setting)), setting))
        for condition in setting:
            pattern = condition.get("filter")
            if pattern in (None, "*") or pattern in leaf:
                return self._at(condition["value"], leaf)
        return None

    def _depth(self, leaf):
        layers = {int(m[1]) for n in self.leaves if (m := re.search(r"layers\.(\d+)\.", n))}
        if match := re.search(r"layers\.(\d+)\.", leaf):
            return int(match[1]) / max(1, max(layers))
        return 0.0 if "embed" in leaf else 1.0
