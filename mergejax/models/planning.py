"""How the names and shapes of a state dict, or of a tree, fit a model; what is wrong where not."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.leaves import unmatched
from mergejax.models.catalogue import ARCHITECTURES, Model, model_of, name_in
from mergejax.models.rules import COUNTER, Architecture, Place, Shape, grouped, places

PADDINGS = ("error", "keep", "drop")


class Plan(NamedTuple):
    """How a state dict and a Flax model fit together.

    Attributes:
        model: the Flax model.
        places: where PyTorch keeps each leaf.
        given: the state dict's own name for each of PyTorch's names in `places`.
        tied: names of the state dict that repeat others -> those.
        unused: names of buffers that are left out.
        rows: of the vocabulary to take, or None for all.
        notes: what is odd and was asked for, in sentences.
    """

    model: Model
    places: Mapping[str, Place]
    given: Mapping[str, str]
    tied: Mapping[str, str]
    unused: Sequence[str]
    rows: int | None
    notes: Sequence[str]

    def said(self) -> list[str]:
        """What was left out and what is odd, in sentences."""
        return [
            *self.notes,
            *[
                f"{len(names)} {what}: {grouped(names)}"
                for what, names in (
                    ("copies of tied tensors are stored once", list(self.tied)),
                    ("buffers that Flax does not need are left out", self.unused),
                )
                if names
            ],
        ]


def plan(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    *,
    ignore: str | Sequence[str] = (),
    padding: str = "error",
    owner: str = "the state dict",
    same: Callable[[str, str], bool] = lambda a, b: True,
) -> Plan:
    """How a state dict of these names and shapes becomes a Flax model.

    Args:
        shapes: by PyTorch's names.
        config: config.json.
        ignore: regular expressions of tensors to leave out.
        padding: what to do with rows of the vocabulary beyond `vocab_size`: 'error', 'keep' or
            'drop'.
        owner: what to call the state dict in messages.
        same: whether two tensors hold the same values; a copy of a tied tensor must.

    Raises:
        MergeError: with everything that does not fit: names that are missing or too many, all of
            them, those that differ by numbers as one; shapes; a vocabulary or a head of another
            size than the config says.
    """
    if padding not in PADDINGS:
        raise MergeError(f"padding='{padding}' is unknown, {did_you_mean(padding, PADDINGS)}")
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    raise_all([f"ignore, {owner}: {problem}" for problem in unmatched(patterns, list(shapes))])
    kept = {name: s for name, s in shapes.items() if not any(re.search(p, name) for p in patterns)}
    bare = {re.sub(r"^((module|_orig_mod)\.)+", "", name): name for name in kept}

    def model_for(config: Mapping[str, Any]) -> Model:
        return model_of(config, lambda module: _has(module, config, bare, same))

    model, problems, notes, rows = model_for(config), [], [], None
    count, size = _vocabulary(model, bare, kept)
    if count != size:
        odd = f"{owner}: its vocabulary has {count} rows, and the config says vocab_size={size}"
        model = model_for({**config, "vocab_size": count})
        if count < size:
            problems.append(f"{odd}; take the config that belongs to the weights")
        elif padding == "error":
            problems.append(
                f"{odd}; padding='keep' or padding='drop' says what to do with the rest"
            )
        elif padding == "keep":
            notes.append(f"{odd}; the rest is kept")
        else:
            model, rows = model_for(config), size
            notes.append(f"{odd}; the rest is dropped")
    how, wrong = _matched(model, bare, kept, rows, owner)
    raise_all([*problems, *wrong])
    raise_all(
        [
            f"{owner}: '{name}' is a copy of '{how.given[first]}' in {model.name}, but holds other "
            "values; correct tie_word_embeddings in the config"
            for name, first in how.tied.items()
            if not same(name, how.given[first])
        ]
    )
    return how._replace(notes=notes)


def _has(
    module: str,
    config: Mapping[str, Any],
    bare: Mapping[str, str],
    same: Callable[[str, str], bool],
) -> bool:
    """Whether a state dict has a module that is no copy of another."""
    architecture = ARCHITECTURES[name_in(config)]
    own = _spelled(f"{module}.weight", architecture.body, bare)
    first = _spelled(architecture.tied.get(f"{module}.weight", ""), architecture.body, bare)
    return bool(own) and not (first and same(bare[own], bare[first]))


def _vocabulary(
    model: Model, bare: Mapping[str, str], shapes: Mapping[str, Shape]
) -> tuple[int, int]:
    """Rows of the embedding, and those that the config names; equal where there is neither."""
    name = _spelled(model.architecture.vocabulary, model.architecture.body, bare)
    size = model.settings.get("vocab_size", 0)
    return (shapes[bare[name]][0], size) if name and shapes[bare[name]] else (size, size)


def _spelled(name: str, body: str, bare: Mapping[str, str]) -> str:
    """The spelling of one of PyTorch's names that a state dict has, or ''."""
    candidates = (name, body + name, name.removeprefix(body))
    return next((c for c in candidates if c in bare), "") if name else ""


def _matched(
    model: Model,
    bare: Mapping[str, str],
    shapes: Mapping[str, Shape],
    rows: int | None,
    owner: str,
) -> tuple[Plan, list[str]]:
    """The plan, and what is wrong with it."""
    architecture, where = model.architecture, places(model.architecture, model.leaves)
    wanted = {place.name: place.shape(model.leaves[leaf]) for leaf, place in where.items()}
    spellings = {s: p.name for p in where.values() for s in (*p.spellings, p.name)}
    given: dict[str, str] = {}
    tied: dict[str, str] = {}
    unused, extra, twice = [], [], []
    for name, own in bare.items():
        candidates = (name, architecture.body + name, name.removeprefix(architecture.body))
        known = next((spellings[c] for c in candidates if c in spellings), None)
        repeats = next((architecture.tied[c] for c in candidates if c in architecture.tied), None)
        if known in given:
            twice.append(own)
        elif known:
            given[known] = own
        elif repeats in wanted:
            tied[own] = str(repeats)
        elif _is_unused(name, architecture, wanted):
            unused.append(own)
        else:
            extra.append(own)
    missing = [name for name in wanted if name not in given]
    problems = [
        f"{owner} {verb} {len(names)} tensors {which}: {grouped(names)}; {advice}"
        for verb, names, which, advice in (
            ("lacks", missing, f"of {model.name}", "complete it, or correct the config"),
            ("has", extra, f"that {model.name} has not", "correct the config, or ignore them"),
            ("has", twice, "under two names", "ignore one of each"),
        )
        if names
    ]
    problems += _shape_problems(model, wanted, given, shapes, rows, owner)
    return Plan(model, where, given, tied, unused, rows, ()), problems


def _is_unused(name: str, architecture: Architecture, wanted: Mapping[str, Shape]) -> bool:
    if name.endswith(COUNTER):
        return any(w.endswith("running_mean") for w in wanted)
    return any(re.search(pattern, name) for pattern in architecture.unused)


def _shape_problems(
    model: Model,
    wanted: Mapping[str, Shape],
    given: Mapping[str, str],
    shapes: Mapping[str, Shape],
    rows: int | None,
    owner: str,
) -> list[str]:
    problems = []
    heads = {name for name, ours in model.architecture.names.items() if ours == "head"}
    labels = model.settings.get("num_labels")
    for name, shape in wanted.items():
        got = shapes.get(given.get(name, ""), shape)
        if rows is not None and shape and shape[0] == rows and got[:1] > (rows,):
            got = (rows, *got[1:])
        if got == shape:
            continue
        if name.rpartition(".")[0] in heads and labels == shape[0] and got[1:] == shape[1:]:
            problems.append(
                f"{owner}: the head '{given[name]}' has {got[0]} rows, and the config names "
                f"{labels} labels; take the labels that it was trained for"
            )
        else:
            problems.append(
                f"{owner}: '{given[name]}' has shape {list(got)}, and the config makes it "
                f"{list(shape)}; take the config that belongs to the weights"
            )
    return problems


def fitting(
    shapes: Mapping[str, Shape], config: Mapping[str, Any], owner: str = "the tree"
) -> tuple[Model, Mapping[str, Place]]:
    """The Flax model that leaves of these names and shapes belong to, and their places in PyTorch.

    Raises:
        MergeError: with everything that does not fit.
    """
    model = model_of(config, lambda module: _has_leaf(module, shapes, config))
    tokens = next((x for name, x in shapes.items() if name.endswith("tokens/embedding")), None)
    if tokens and tokens[0] > model.settings.get("vocab_size", tokens[0]):
        padded = {**config, "vocab_size": tokens[0]}
        model = model_of(padded, lambda module: _has_leaf(module, shapes, config))
    missing = [name for name in model.leaves if name not in shapes]
    extra = [name for name in shapes if name not in model.leaves]
    problems = [
        f"{owner} {verb} {len(names)} leaves {which} {model.name}: {grouped(names)}; take the "
        "config that belongs to the weights"
        for verb, names, which in (("lacks", missing, "of"), ("has", extra, "beyond"))
        if names
    ]
    problems += [
        f"{owner}: '{name}' has shape {list(shapes[name])}, and the config makes it {list(shape)}; "
        "take the config that belongs to the weights"
        for name, shape in model.leaves.items()
        if shapes.get(name, shape) != shape
    ]
    raise_all(problems)
    return model, places(model.architecture, model.leaves)


def _has_leaf(module: str, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> bool:
    ours = ARCHITECTURES[name_in(config)].names[module]
    return any(name.startswith(f"params/{ours}/") for name in shapes)
