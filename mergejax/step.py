"""What happens to one leaf: its stages, one after the other. Pure, so that any executor may run it.

An executor gives the placed stages (their numbers may be traced), the base, the experts, and what
was measured before; it gets the merged leaf, or one round of measurements.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.chains import Placed
from mergejax.core import Array, Leaf, Parts, Stage
from mergejax.randomness import fold_key

Seen = Mapping[str, tuple[Any, ...]]
Due = tuple[str, int]  # path of a stage, number of its round
_STATIC = ("role", "layout")
_MERGED = 0xFFFFFFFF  # stands for the merged delta where words of a key name an expert


@dataclasses.dataclass
class State:
    """A leaf on its way: one array per expert, or one merged array."""

    values: list[Array]
    raw: list[Array]
    space: str
    reduced: bool = False
    outer: list[tuple[Any, list[Array], Leaf]] = dataclasses.field(default_factory=list)


def first_space(placed: Sequence[Placed]) -> str:
    """The space a chain starts in: that of its first stage which has one, else weights."""
    spaces = (p.stage.factory.space for p in placed)
    return next((space for space in spaces if space != "either"), "weights")


def at_expert(stage: Stage, index: Any) -> Stage:
    """The stage with the numbers of one expert."""
    return stage.with_data(
        {n: v[index] if _is_list(v) else v for n, v in stage.data.items()},
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def expert_leaf(leaf: Leaf, index: Any, name: Array, position: int) -> Leaf:
    """The leaf as a stage sees it that works on one expert."""
    return leaf.replace(
        expert=leaf.expert + jnp.int32(index),
        key=fold_key(leaf.key, name[0], name[1], jnp.uint32(position)),
        stats={name: several[index] for name, several in leaf.stats.items()},
    )


def _whole_leaf(leaf: Leaf, position: int) -> Leaf:
    """The leaf as a stage sees it that works on all experts, or on the merged delta."""
    word = jnp.uint32(_MERGED)
    return leaf.replace(key=fold_key(leaf.key, word, word, jnp.uint32(position)))


def _each(
    stage: Stage,
    values: Sequence[Array],
    leaf: Leaf,
    names: Array,
    position: int,
    seen: tuple[Any, ...],
    call: Callable[[Parts, Array, Leaf, tuple[Any, ...]], Any],
) -> list[Any]:
    """Calls a one-expert function for every expert.

    Elementwise stages are unrolled, so that XLA fuses them with reading the experts, and those that
    count and sort, so that it runs several experts at once; others are vmapped, so that their
    linear algebra is batched.
    """
    count = range(len(values))
    stages = [at_expert(stage, i) for i in count]
    leaves = [expert_leaf(leaf, i, names[i], position) for i in count]
    pieces = [jax.tree.map(lambda x, i=i: x[i], seen) for i in count]
    if stage.elementwise or stage.factory.unrolled or len(values) == 1:
        several = zip(stages, values, leaves, pieces, strict=True)
        return [call(s.build(), d, one, piece) for s, d, one, piece in several]

    def stack(items: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *items)

    many = leaf.replace(
        expert=stack([one.expert for one in leaves]),
        key=stack([one.key for one in leaves]),
        stats=stack([one.stats for one in leaves]),
    )
    axes = mapped_fields(leaf, "expert", "key", "stats")
    mapped = jax.vmap(lambda s, d, one, p: call(s.build(), d, one, p), (0, 0, axes, 0))
    out = mapped(stack(stages), jnp.stack(values), many, seen)
    return [jax.tree.map(lambda x, i=i: x[i], out) for i in count]


def mapped_fields(leaf: Leaf, *mapped: str) -> Any:
    """What `jax.vmap` maps of a leaf: the first axis of the named fields."""
    data = [field.name for field in dataclasses.fields(leaf) if field.name not in _STATIC]
    return leaf.replace(**{name: 0 if name in mapped else None for name in data})


def enter_space(state: State, space: str, leaf: Leaf) -> None:
    if space in ("either", state.space) or leaf.base is None:
        return
    sign = 1 if space == "weights" else -1
    state.values = [value + sign * leaf.base for value in state.values]
    state.space = space


def fold_experts(
    stage: Stage, values: Sequence[Array], leaf: Leaf, names: Array, place: int
) -> Any:
    carried = leaf.carried
    if carried is None:
        carried = stage.build().init(_whole_leaf(leaf, place), jnp.zeros_like(values[0]))
    for i, d in enumerate(values):
        one = expert_leaf(leaf, i, names[i], place)
        carried = at_expert(stage, i).build().apply(carried, d, one, ())
    return carried


def _apply(stage: Stage, state: State, leaf: Leaf, names: Array, place: int, seen: tuple) -> None:
    whole = _whole_leaf(leaf, place)
    if stage.kind == "each" and not state.reduced:
        state.values = _each(
            stage, state.values, leaf, names, place, seen, lambda p, d, one, s: p.apply(d, one, s)
        )
        return
    parts = stage.build()
    match stage.kind:
        case "each":
            state.values = [parts.apply(state.values[0], whole, seen)]
        case "joint":
            state.values = list(parts.apply(state.values, whole, seen))
        case "reduce":
            state.values = [parts.apply(state.values, whole, seen)]
        case "refine":
            state.values = [parts.apply(state.values[0], state.raw, whole, seen)]
        case "restore":
            state.values = list(parts.apply(state.values[0], state.raw, whole, seen))
        case "fold":
            carried = fold_experts(stage, state.values, leaf, names, place)
            state.values = [parts.finish(carried, whole, seen)]
    state.reduced = state.reduced or stage.kind in ("reduce", "fold")


def _measure(
    stage: Stage, state: State, leaf: Leaf, names: Array, place: int, seen: tuple, number: int
) -> tuple[Any, Any]:
    """One round of one stage on one leaf, and the experts' part that its recall remembers."""
    current = stage.build().rounds[number]
    whole = _whole_leaf(leaf, place)
    recalled = None
    if current.recall is not None and state.raw:
        found = [current.recall.measure(d, leaf) for d in state.raw]
        recalled = jax.tree.map(lambda *xs: jnp.stack(xs), *found)
    if stage.kind == "each" and not state.reduced:
        found = _each(
            stage,
            state.values,
            leaf,
            names,
            place,
            seen,
            lambda p, d, one, s: p.rounds[number].measure(d, one, s),
        )
        return jax.tree.map(lambda *xs: jnp.stack(xs), *found), recalled
    if stage.kind == "each":
        return current.measure(state.values[0], whole, seen), recalled
    if stage.kind == "refine":
        return current.measure(state.values[0], state.raw, whole, seen), recalled
    return current.measure(state.values, whole, seen), recalled


def advance(
    placed: Sequence[Placed],
    state: State,
    leaf: Leaf,
    names: Array,
    seen: Seen,
    due: Due | None = None,
    position: int = 0,
) -> Any:
    """Takes a leaf through stages, in place; stops at a round that is due and returns it."""
    for place, (path, stage, role) in enumerate((p.path, p.stage, p.role) for p in placed):
        place += position
        if role == "enter":
            there, _ = stage.build()
            enter_space(state, "delta", leaf)
            values, context = there(state.values, leaf)
            state.outer.append((context, state.raw, leaf))
            state.values = list(values)
            state.raw, leaf = state.values, leaf.replace(base=None)
            continue
        if role == "leave":
            _, back = stage.build()
            context, state.raw, leaf = state.outer.pop()
            state.values = [back(value, context, leaf) for value in state.values]
            continue
        enter_space(state, stage.factory.space, leaf)
        if due is not None and due[0] == path:
            return _measure(stage, state, leaf, names, place, seen.get(path, ()), due[1])
        _apply(stage, state, leaf, names, place, seen.get(path, ()))
    return None


def begin(placed: Sequence[Placed], leaf: Leaf, experts: Sequence[Array]) -> State:
    """The state of a leaf before its first stage."""
    weights = [expert.astype(jnp.float32) for expert in experts]
    deltas = weights if leaf.base is None else [w - leaf.base for w in weights]
    space = first_space(placed)
    return State(deltas if space == "delta" else weights, deltas, space)


def finish(state: State, leaf: Leaf) -> list[Array]:
    """The merged leaf, or one per expert where nothing reduced them, as float32 weights."""
    enter_space(state, "weights", leaf)
    return state.values
