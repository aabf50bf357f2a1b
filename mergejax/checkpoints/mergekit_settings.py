"""mergekit's parameters: numbers, gradients over layers and filters, as texts of this library."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mergejax.errors import did_you_mean

Change = Callable[[float], float]


class Place(NamedTuple):
    """Layers that are merged with the same settings.

    Attributes:
        layers: of the result; empty where all layers are meant.
        own: settings of each model.
        shared: settings of all models; the first that has one counts.
    """

    layers: range
    own: Sequence[Mapping[str, Any]]
    shared: Sequence[Mapping[str, Any]]

    def value(self, name: str, model: int | None) -> Any:
        """A setting of one model, or of the merge; None if nobody sets it."""
        scopes = [*([] if model is None else [self.own[model]]), *self.shared]
        return next((scope[name] for scope in scopes if name in scope), None)


class Settings:
    """The parameters of one configuration; what is wrong with them gathers in `problems`.

    Args:
        method: mergekit's name.
        known: its parameters.
        places: whose settings hold where.
        sliced: whether the places are slices rather than all layers.
    """

    def __init__(self, method: str, known: Iterable[str], places: Sequence[Place], sliced: bool):
        self.places, self.sliced = places, sliced
        scopes = [part for place in places for part in (*place.own, *place.shared)]
        names = dict.fromkeys(key for part in scopes for key in part)
        self.problems = [
            f"mergekit's {method} has no parameter '{key}', {did_you_mean(str(key), known)}"
            for key in names
            if key not in {*known, "int8_mask"}
        ]
        if any(part.get("int8_mask") for part in scopes):
            self.problems.append("'int8_mask' is not needed here and cannot be honoured; remove it")

    def constant(self, name: str, default: Any) -> Any:
        """A setting that is one for the whole merge."""
        values = [place.value(name, None) for place in self.places]
        if isinstance(values[0], list | dict) or any(value != values[0] for value in values):
            self.problems.append(f"'{name}' must be one value for the whole merge")
            return default
        return default if values[0] is None else values[0]

    def refuse(self, name: str, honoured: Any) -> None:
        """Refuses a setting that has another value than the one that means nothing."""
        if self.constant(name, honoured) != honoured:
            self.problems.append(f"'{name}' cannot be honoured here; remove it")

    def rule(self, name: str, default: float | None = None, model: int | None = None) -> str:
        """One number for all models, or for a single one, by depth or by name, as a text."""
        if self.sliced:
            return self._by_layer(name, default, [model], lambda row: repr(float(row[0])))
        value = self.places[0].value(name, model)
        if value is None and default is None:
            self.problems.append(f"the parameter '{name}' is missing")
            return "0"
        return self._text(name, default if value is None else value, default, float)

    def per_model(self, name: str, default: float | None = None, change: Change = float) -> str:
        """A number for each model, by depth or by name, as a text."""
        place = self.places[0]
        models = range(len(place.own))
        if self.sliced:
            return self._by_layer(name, default, models, lambda row: _list(row, change))
        several = [place.value(name, i) for i in models]
        several = [default if value is None else value for value in several]
        if any(value is None for value in several):
            self.problems.append(f"the parameter '{name}' is missing for a model")
            return "[]"
        if all(_is_number(value) for value in several):
            return _list(several, change)
        if all(value == several[0] for value in several):
            return self._text(name, several[0], default, change)
        if all(_is_gradient(v) or _is_number(v) for v in several):
            return self._gradients(several, change)
        self.problems.append(
            f"'{name}' has filters that differ between the models, which cannot be honoured"
        )
        return "[]"

    def _gradients(self, several: Sequence[Any], change: Change) -> str:
        """Gradients of one length, or numbers, as one gradient of lists."""
        length = max(len(v) for v in several if isinstance(v, list))
        if any(isinstance(v, list) and len(v) != length for v in several):
            self.problems.append("gradients of different lengths cannot be honoured")
            return "[]"
        columns = [v if isinstance(v, list) else [v] * length for v in several]
        return _by_depth([_list(row, change) for row in zip(*columns, strict=True)])

    def _text(self, name: str, value: Any, default: float | None, change: Change) -> str:
        if _is_number(value):
            return repr(float(change(value)))
        if _is_gradient(value):
            return _by_depth([repr(float(change(v))) for v in value])
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            self.problems.append(f"'{name}' must be a number, a gradient or filters, not {value!r}")
            return "0"
        rules: dict[str, str] = {}
        for condition in value:
            if unknown := set(condition) - {"filter", "value"}:
                self.problems.append(f"a filter of '{name}' has no key '{min(unknown)}'")
            pattern = condition.get("filter") or "*"
            pattern = ".*" if pattern == "*" else re.escape(str(pattern))
            rules.setdefault(pattern, self._text(name, condition.get("value"), default, change))
        if default is not None:
            rules.setdefault(".*", repr(float(change(default))))
        return _by_name(rules)

    def _by_layer(
        self,
        name: str,
        default: float | None,
        models: Sequence[int | None],
        show: Callable[[list[float]], str],
    ) -> str:
        """Values layer by layer, for slices have settings and gradients of their own.

        A gradient runs from the first layer of its slice to the last; what lies outside the layers
        takes its first value, from the first slice or the last.
        """
        rules: dict[str, list[int]] = {}
        ends = []
        for place in self.places:
            values = [place.value(name, model) for model in models]
            values = [default if value is None else value for value in values]
            if not all(_is_number(v) or _is_gradient(v) for v in values):
                missing = any(value is None for value in values)
                what = "is missing" if missing else "has filters, which slices cannot honour"
                self.problems.append(f"the parameter '{name}' {what} in slices")
                return "0"
            steps = (0.0, *_steps(len(place.layers)))
            texts = [show([_at(value, step) for value in values]) for step in steps]
            ends.append(texts[0])
            for layer, text in zip(place.layers, texts[1:], strict=True):
                rules.setdefault(text, []).append(layer)
        if len({*rules, *ends}) == 1:
            return ends[0]
        by_name = {rf"^\D*\.({'|'.join(map(str, n))})\.": text for text, n in rules.items()}
        before = {"embed|wte|wpe": ends[0]} if ends[0] != ends[-1] else {}
        return _by_name({**by_name, **before, ".*": ends[-1]})


def _steps(count: int) -> list[float]:
    """Where the layers of a slice stand between its ends; a single one stands at the last."""
    return [i / (count - 1) for i in range(count)] if count > 1 else [1.0] * count


def _at(value: Any, step: float) -> float:
    """A number, or a gradient at a place from 0 to 1."""
    if _is_number(value):
        return float(value)
    place = step * (len(value) - 1)
    low = min(int(place), max(len(value) - 2, 0))
    share = place - low
    return (1 - share) * value[low] + (share * value[low + 1] if share else 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_gradient(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _list(numbers: Iterable[float], change: Change) -> str:
    return f"[{', '.join(repr(float(change(x))) for x in numbers)}]"


def _by_depth(texts: Sequence[str]) -> str:
    """A gradient over the layers; everything outside them takes its first value, as there."""
    if len(set(texts)) == 1:
        return texts[0]
    return _by_name({r"\.\d+\.": f"by_depth([{', '.join(texts)}])", ".*": texts[0]})


def _by_name(rules: Mapping[str, str]) -> str:
    inner = ", ".join(f"{pattern!r}: {text}" for pattern, text in rules.items())
    return f"by_name({{{inner}}})"
