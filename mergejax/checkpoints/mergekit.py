"""mergekit's configuration files, in this library's words.

What means the same is translated; what does not, or cannot be honoured, is refused by name. The
facts are those of mergekit 0.1.5: methods, parameters, their defaults, how gradients and filters
are evaluated.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mergejax.checkpoints.mergekit_methods import METHODS
from mergejax.checkpoints.mergekit_settings import Place, Settings
from mergejax.errors import MergeError, did_you_mean, raise_all

_KEYS = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
         "tokenizer_source", "name"}  # fmt: skip
_REFUSED = ("modules", "tokenizer", "chat_template")


def read_mergekit(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a configuration file of mergekit.

    Args:
        path: of the YAML file; relative model paths count from the working directory, as there.

    Returns:
        The options of `merge_checkpoints`: method (a text), base, experts, dtype, layers.

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
        raise MergeError(
            f"{path} holds no mergekit configuration; it needs merge_method and models"
        )
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
    raise_all(_problems(config))
    name, base = config["merge_method"], config.get("base_model")
    shared = config.get("parameters") or {}
    rows = [_ordered(row, name, base, shared) for row in _rows(config)]
    raise_all(_row_problems(rows))
    places, first = [], 0
    for row, own in zip(rows, config.get("slices") or [{}], strict=True):
        count = row[0]["layer_range"][1] - row[0]["layer_range"][0] if "slices" in config else 0
        parameters = [source.get("parameters") or {} for source in row]
        scopes = [own.get("parameters") or {}, shared]
        places.append(Place(range(first, first + count), parameters, scopes))
        first += count
    method = METHODS[name]
    settings = Settings(name, method.parameters, places, "slices" in config)
    found = method.text(name, settings, base)
    raise_all(settings.problems)
    dtype = config.get("out_dtype") or config.get("dtype")
    experts = dict.fromkeys(source["model"] for row in rows for source in row)
    return {
        "method": found,
        "base": None if base == next(iter(experts)) else base,  # it gives settings all the same
        "experts": list(experts),
        **({"dtype": dtype} if dtype else {}),
        **({"layers": _layers(config, rows, method.base, base)} if "slices" in config else {}),
    }


def _rows(config: Mapping[str, Any]) -> list[list[dict]]:
    """What is merged with each other: all models, or the sources of each slice."""
    if "slices" in config:
        return [[dict(source) for source in row["sources"]] for row in config["slices"]]
    return [[dict(model) for model in config["models"]]]


def _ordered(row: list[dict], name: str, base: Any, shared: Mapping[str, Any]) -> list[dict]:
    """The models that are experts here, in the order in which the method takes them."""
    listed = base in [source["model"] for source in row]
    whole = "layer_range" not in row[0]
    match METHODS[name].base:
        case "no expert":
            return [source for source in row if source["model"] != base]
        case "first expert":
            if base is not None and not listed and whole:
                row = [{"model": base}, *row]
            return sorted(row, key=lambda source: source["model"] != base)
        case "an expert" if base is not None and not listed and whole:
            return [*row, {"model": base}]
        case "without weight" if base is not None and _without_weight(row, base, shared):
            return [source for source in row if source["model"] != base]
    return row


def _without_weight(row: Sequence[Mapping], base: str, shared: Mapping) -> bool:
    """Whether the base stands among the models of a linear merge and has no weight."""
    own = [source.get("parameters") or {} for source in row if source["model"] == base]
    return any("weight" not in parameters for parameters in own) and "weight" not in shared


def _layers(
    config: Mapping[str, Any], rows: Sequence[Sequence[Mapping]], kind: str, base: Any
) -> list[str]:
    """The ranges of layers, the base's among them where the method takes differences to it."""
    texts = []
    for row, own in zip(rows, config["slices"], strict=True):
        sources = [s for s in own["sources"] if s["model"] == base and kind == "no expert"]
        texts.append("+".join(_range(source) for source in [*sources, *row]))
    return texts


def _range(source: Mapping[str, Any]) -> str:
    start, stop = source["layer_range"]
    return f"{source['model']}[{start}:{stop}]"


def _row_problems(rows: Sequence[Sequence[Mapping]]) -> list[str]:
    if not all(rows):
        return ["a merge needs a model beside the base_model; add one"]
    if len({len(row) for row in rows}) > 1:
        return ["'slices' with different numbers of sources cannot be honoured; merge twice"]
    return []


def _problems(config: Mapping[str, Any]) -> list[str]:
    """What is unknown, missing or cannot be honoured."""
    problems = [
        f"'{key}' of mergekit cannot be honoured; remove it"
        for key in _REFUSED
        if config.get(key) is not None
    ]
    if config.get("tokenizer_source") not in (None, "base"):
        problems.append(
            "'tokenizer_source' can only be 'base' here; --vocabulary union adds other tokens"
        )
    problems += [
        f"a mergekit configuration has no key '{key}', {did_you_mean(str(key), _KEYS)}"
        for key in config
        if key not in {*_KEYS, *_REFUSED}
    ]
    name, base = config.get("merge_method"), config.get("base_model")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        problems.append(
            f"merge_method '{name}' is not translated, {did_you_mean(str(name), METHODS)}"
        )
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model must be a path, not {str(base)[:60]!r}")
    if config.get("parameters") is not None and not isinstance(config["parameters"], dict):
        problems.append("'parameters' must be a table of values by name")
    if method is not None and method.needs_base and base is None:
        problems.append(f"merge_method '{name}' needs a base_model")
    if "slices" in config and "models" in config:
        problems.append("a configuration has 'models' or 'slices', not both; remove one")
    if "slices" in config:
        return problems + _slice_problems(config["slices"], base)
    return problems + _source_problems(config.get("models"), "models", {"model", "parameters"})


def _slice_problems(slices: Any, base: Any) -> list[str]:
    if not isinstance(slices, list) or not slices:
        return ["'slices' must be a list of slices with 'sources'"]
    problems = []
    for i, one in enumerate(slices):
        label = f"slice {i}"
        if not isinstance(one, dict):
            problems.append(f"{label} must be a table with 'sources', not {str(one)[:60]!r}")
            continue
        for key in sorted(set(one) - {"sources", "parameters", "base_model"}):
            hint = did_you_mean(str(key), {"sources", "parameters"})
            problems.append(f"{label} has '{key}', which cannot be honoured, {hint}")
        if one.get("base_model") not in (None, base):
            problems.append(f"{label} has a base_model of its own, which cannot be honoured")
        known = {"model", "parameters", "layer_range"}
        problems += _source_problems(one.get("sources"), f"the sources of {label}", known)
        if not problems:
            problems += _range_problems(label, one["sources"])
    return problems


def _range_problems(label: str, sources: Sequence[Mapping]) -> list[str]:
    problems, lengths = [], set()
    for source in sources:
        given = source.get("layer_range")
        if not isinstance(given, list) or len(given) != 2 or not all(map(_is_layer, given)):
            problems.append(
                f"{label}: layer_range of '{source['model']}' must be two layers, such as "
                f"[0, 8], not {given!r}"
            )
        elif given[0] >= given[1]:
            problems.append(
                f"{label}: layer_range {given} of '{source['model']}' is empty; the second number "
                "is not included"
            )
        else:
            lengths.add(given[1] - given[0])
    if len(lengths) > 1:
        problems.append(f"{label}: its sources have different numbers of layers; make them equal")
    return problems


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _source_problems(sources: Any, label: str, known: set[str]) -> list[str]:
    if not isinstance(sources, list) or not sources:
        return [f"the configuration has no list of models; name them under '{label}'"]
    problems = []
    for source in sources:
        if not isinstance(source, dict) or not isinstance(source.get("model"), str):
            text = str(source)[:60]
            problems.append(f"each of {label} needs a path under 'model', not {text!r}")
            continue
        for key in sorted(set(source) - known):
            hint = did_you_mean(str(key), known)
            problems.append(f"model '{source['model']}' has the unknown key '{key}', {hint}")
        if not isinstance(source.get("parameters") or {}, dict):
            problems.append(f"'parameters' of model '{source['model']}' must be a table of values")
    return problems
