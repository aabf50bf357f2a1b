"""A new model out of the layers of several: passthrough merges, depth up-scaling."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from mergejax.errors import raise_all, some
from mergejax.leaves import unmatched

Tree = Any


class Slice(NamedTuple):
    """Layers `start` to `stop` (not included) of the model with index `model`."""

    model: int
    start: int
    stop: int


def stack_layers(
    models: Sequence[Mapping[str, Any]],
    slices: Sequence[Sequence[int]],
    *,
    blocks: str,
    scale: Mapping[str, float] | None = None,
    scanned: bool = False,
) -> dict[str, Any]:
    """Builds a model from layers of others, in any number and order.

    Args:
        models: nested dicts of arrays, or dicts by leaf name.
        slices: (model, start, stop) for each run of layers, in the order of the new model; stop
            is not included. A layer may be used more than once.
        blocks: what a block's name begins with, before its number: 'block_' for 'block_0',
            'model.layers.' for 'model.layers.0.mlp...'. With `scanned`, the name of the subtree
            whose arrays stack layers.
        scale: regular expressions on new leaf names and factors; 0 for the projections that end
            the blocks of an inserted slice makes these blocks do nothing at first.
        scanned: whether layers are stacked along the first axis of each array.

    Returns:
        A tree like the first model's, whose leaves outside the blocks are the first model's.

    Raises:
        MergeError: a slice beyond a model's layers, blocks that no model has, leaves that differ
            between models, or a pattern that matches nothing.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> model = {'block_0': {'w': jnp.ones(1)}, 'block_1': {'w': 2 * jnp.ones(1)}}
        >>> deeper = mj.stack_layers([model], [(0, 0, 2), (0, 1, 2)], blocks='block_')
        >>> [float(deeper[f'block_{i}']['w'][0]) for i in range(3)]
        [1.0, 2.0, 2.0]

    Frankenmerges of mergekit's passthrough; depth up-scaling (Kim et al., 2023, arXiv:2312.15166).
    """
    flats = [dict(_leaves(model)) for model in models]
    plan = [Slice(*one) for one in slices]
    raise_all(_problems(flats, plan, blocks, scanned))
    built = _stacked(flats, plan, blocks) if scanned else _renumbered(flats, plan, blocks)
    scale = scale or {}
    raise_all([f"stack_layers(scale=...): {p}" for p in unmatched(list(scale), list(built))])
    for name, x in built.items():
        factor = next((f for pattern, f in scale.items() if re.search(pattern, name)), None)
        built[name] = x if factor is None else x * jnp.asarray(factor, x.dtype)
    nested = any(isinstance(value, Mapping) for value in models[0].values())
    return _nested(built) if nested else built


def _leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _split(name: str, blocks: str) -> tuple[str, int, str] | None:
    """What stands before a block's number in a leaf's name, the number, and what follows."""
    found = re.match(rf"(.*?{re.escape(blocks)})(\d+)(?=[/.]|$)(.*)", name)
    return (found[1], int(found[2]), found[3]) if found else None


def _count(flat: Mapping[str, Any], blocks: str, scanned: bool) -> int:
    """How many layers a model has."""
    if scanned:
        return max((len(x) for name, x in flat.items() if _is_in(name, blocks)), default=0)
    places = (_split(name, blocks) for name in flat)
    return max((place[1] + 1 for place in places if place), default=0)


def _is_in(name: str, blocks: str) -> bool:
    return name.startswith(f"{blocks}/") or f"/{blocks}/" in name


def _problems(
    flats: Sequence[Mapping[str, Any]], plan: Sequence[Slice], blocks: str, scanned: bool
) -> list[str]:
    problems = [] if flats and plan else ["stack_layers needs at least one model and one slice"]
    counts = [_count(flat, blocks, scanned) for flat in flats]
    for i, (flat, count) in enumerate(zip(flats, counts, strict=True)):
        if not count:
            names = some(list(flat))
            problems.append(
                f"stack_layers(blocks='{blocks}') names no layer of model {i}, whose leaves are "
                f"{names}; give what stands before a layer's number"
            )
    for one in plan:
        if not 0 <= one.model < len(flats):
            problems.append(f"slice {tuple(one)} names model {one.model} of {len(flats)}")
        elif counts[one.model] and not 0 <= one.start < one.stop <= counts[one.model]:
            problems.append(
                f"slice {tuple(one)} is not within the {counts[one.model]} layers of model "
                f"{one.model}; choose 0 <= start < stop <= {counts[one.model]}"
            )
    return problems


def _rest(flat: Mapping[str, Any], inside: Callable[[str], Any]) -> dict[str, Any]:
    return {name: x for name, x in flat.items() if not inside(name)}


def _renumbered(
    flats: Sequence[Mapping[str, Any]], plan: Sequence[Slice], blocks: str
) -> dict[str, Any]:
    built = _rest(flats[0], lambda name: _split(name, blocks))
    layers = [(one.model, place) for one in plan for place in range(one.start, one.stop)]
    for new, (model, old) in enumerate(layers):
        for name, x in flats[model].items():
            place = _split(name, blocks)
            if place and place[1] == old:
                built[f"{place[0]}{new}{place[2]}"] = x
    found: list[set[str]] = [set() for _ in layers]
    for name in built:
        if place := _split(name, blocks):
            found[place[1]].add(place[2])
    raise_all(
        [
            f"layer {old} of model {model} has other leaves than layer {layers[0][1]} of model "
            f"{layers[0][0]}: {some(sorted(leaves ^ found[0]))}"
            for leaves, (model, old) in zip(found, layers, strict=True)
            if leaves != found[0]
        ]
    )
    return built


def _stacked(
    flats: Sequence[Mapping[str, Any]], plan: Sequence[Slice], blocks: str
) -> dict[str, Any]:
    built = dict(flats[0])
    for name in (name for name in flats[0] if _is_in(name, blocks)):
        missing = [one.model for one in plan if name not in flats[one.model]]
        raise_all([f"leaf '{name}' is not in model {model}" for model in missing])
        parts = [flats[one.model][name][one.start : one.stop] for one in plan]
        built[name] = jnp.concatenate([jnp.asarray(part) for part in parts])
    return built
