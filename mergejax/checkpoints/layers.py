"""Models whose layers are those of others: ranges that are stacked, or merged one by one."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergejax.checkpoints.folder import Model
from mergejax.errors import MergeError, did_you_mean, raise_all, some

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_SOURCE = re.compile(r"\s*(?P<model>[^\[\]]+?)\s*\[\s*(?P<start>\d+)\s*:\s*(?P<stop>\d+)\s*\]\s*")


class Source(NamedTuple):
    """Layers `start` to `stop` (not included) of a model, by its path or name."""

    model: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.model}[{self.start}:{self.stop}]"

    @property
    def label(self) -> str:
        """The range with the last part of the model's path."""
        return str(self._replace(model=pathlib.PurePath(self.model).name))


Ranges = tuple[tuple[Source, ...], ...]


def read_layers(value: Any) -> Ranges:
    """Ranges of layers from texts: one for each range of the result, sources joined by '+'.

    Raises:
        MergeError: one sentence for each text that is no range, or an empty one.

    Example:
        >>> read_layers(["a[0:2]+b[0:2]"])
        ((Source(model='a', start=0, stop=2), Source(model='b', start=0, stop=2)),)
    """
    texts = (value,) if isinstance(value, str) else tuple(value)
    problems, found = [], []
    for text in texts:
        matches = [_SOURCE.fullmatch(part) for part in re.split(r"(?<=\])\s*\+", str(text))]
        if not all(matches):
            problems.append(f"layers: {text!r} is no range; write 'MODEL[0:8]' or 'A[0:8]+B[0:8]'")
            continue
        sources = tuple(
            Source(m["model"], int(m["start"]), int(m["stop"])) for m in matches if m is not None
        )
        problems += [
            f"layers: {source} is an empty range; the second number is not included"
            for source in sources
            if source.stop <= source.start
        ]
        if len({source.stop - source.start for source in sources}) > 1:
            problems.append(f"layers: the ranges of {text!r} differ in length; make them equal")
        found.append(sources)
    raise_all(problems)
    return tuple(found)


def blocks_prefix(model: Model) -> str:
    """What stands before the number of a layer in the names of leaves.

    Raises:
        MergeError: no leaf has a number, or layers are counted in two places.
    """
    counts: dict[str, set[str]] = {}
    for name in model.tensors:
        if match := re.match(r"(.*?(?:^|\.))(\d+)\.", name):
            counts.setdefault(match[1], set()).add(match[2])
    most = max((len(numbers) for numbers in counts.values()), default=0)
    several = [prefix for prefix, numbers in counts.items() if len(numbers) == most]
    if len(several) != 1:
        where = f"counts layers under {some(several)}" if several else "has no numbered layers"
        raise MergeError(f"'{model.name}' {where}; ranges of layers need one list of them")
    return several[0]


def stack(
    base: Model | None, experts: Sequence[Model], ranges: Ranges, given: Mapping[str, Model]
) -> tuple[Model | None, list[Model], list[str]]:
    """The models that ranges of layers make: one for each place in a range.

    Leaves before the layers are those of the first range's models, leaves behind them those of
    the last range's, as mergekit has it.

    Args:
        base: gives settings; it also stands for a place if every range names it.
        experts: the models that ranges may name, first come first.
        ranges: see `read_layers`.
        given: the models by the paths that they were given by.

    Returns:
        The base, or None if ranges do not name it; the experts; what was made, in sentences.

    Raises:
        MergeError: a name that no model has, layers that a model does not have, an expert that
            is not used, ranges of different numbers of models.
    """
    every = {model.name: model for model in (*([base] if base else []), *reversed(experts))}
    every |= given
    rows: list[list[tuple[Model, Source]]] = []
    problems = []
    for sources in ranges:
        row = []
        for source in sources:
            model = every.get(source.model)
            if model is None:
                near = did_you_mean(source.model, every)
                problems.append(f"layers: {source} names no model of this merge, {near}")
                continue
            count = _count(model)
            if source.stop > count:
                problems.append(f"layers: {source}, but '{model.name}' has {count} layers")
            row.append((model, source))
        rows.append(row)
    used = [model for row in rows for model, _ in row]
    problems += [
        f"expert '{expert.name}' is in no range of layers; leave it out"
        for expert in experts
        if not any(model is expert for model in used)
    ]
    raise_all(problems)
    own = base if base is not None and not any(base is e for e in experts) else None
    with_base = own is not None and all(any(model is own for model, _ in row) for row in rows)
    if own is not None and not with_base and any(model is own for model in used):
        raise MergeError(f"'{own.name}' is in some ranges of layers and not in others; add it")
    if with_base:
        rows = [sorted(row, key=lambda place: place[0] is not own) for row in rows]
    if len({len(row) for row in rows}) > 1:
        raise MergeError(
            "ranges of layers have different numbers of models; give each range as many, or merge "
            "twice"
        )
    columns = [_column([row[i] for row in rows]) for i in range(len(rows[0]))]
    settings = base if base is not None else columns[0]
    total = sum(row[0][1].stop - row[0][1].start for row in rows)
    config = _resized(settings.config, [row[0][1] for row in rows], total, _count(rows[0][0][0]))
    columns[0] = dataclasses.replace(
        columns[0], config=config, sides=settings.sides, texts=settings.texts
    )
    first, notes = 0, []
    for row in rows:
        last = first + row[0][1].stop - row[0][1].start
        several = " and ".join(f"{m.name}[{s.start}:{s.stop}]" for m, s in row)
        which = f"layer {first} is" if last == first + 1 else f"layers {first} to {last - 1} are"
        notes.append(f"{which} {several}")
        first = last
    return (columns[0], columns[1:], notes) if with_base else (None, columns, notes)


def _count(model: Model) -> int:
    prefix = re.escape(blocks_prefix(model))
    numbers = [re.match(rf"{prefix}(\d+)\.", name) for name in model.tensors]
    return max(int(match[1]) for match in numbers if match) + 1


def _column(places: Sequence[tuple[Model, Source]]) -> Model:
    """One model out of a range of each."""
    from mergejax.leaves import blocks_of

    first, last = places[0][0], places[-1][0]
    layers = [
        (model, number) for model, source in places for number in range(source.start, source.stop)
    ]
    tensors: dict[str, Any] = {}
    prefix = blocks_prefix(first)
    depths = blocks_of(list(first.tensors))
    behind = []
    for name, tensor in first.tensors.items():
        if not re.match(rf"{re.escape(prefix)}\d+\.", name):
            if depths[name][1] > 0 and name in last.tensors:
                behind.append(name)
            else:
                tensors[name] = tensor
    for new, (model, old) in enumerate(layers):
        before = f"{blocks_prefix(model)}{old}."
        for name, tensor in model.tensors.items():
            if name.startswith(before):
                tensors[f"{prefix}{new}.{name.removeprefix(before)}"] = tensor
    tensors |= {name: last.tensors[name] for name in behind}
    names = list(dict.fromkeys(model.name for model, _ in places))
    return Model("+".join(names), first.path, tensors, first.config, first.sides, (), first.texts)


def _resized(
    config: Mapping[str, Any], sources: Sequence[Source], total: int, count: int
) -> dict[str, Any]:
    """A configuration for other layers: their number, and lists with one entry for each."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _COUNTS:
            found[key] = total
        elif key.endswith("_config") and isinstance(value, dict):
            found[key] = _resized(value, sources, total, count)
        elif key.startswith("layer") and isinstance(value, list) and len(value) == count:
            found[key] = [entry for s in sources for entry in value[s.start : s.stop]]
        else:
            found[key] = value
    return found
