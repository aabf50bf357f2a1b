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
BLOCK = 2**18  # elements; a block of every expert stays in the processor's cache
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
        expert=jnp.asarray(index, jnp.int32),
        key=fold_key(leaf.key, name[0], name[1], jnp.uint32(position)),
        stats=jax.tree.map(lambda x: x[index], leaf.stats),
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

    Elementwise stages are unrolled, so that XLA fuses them with reading the experts; others are
    vmapped, so that their linear algebra is batched.
    """
    count = range(len(values))
    stages = [at_expert(stage, i) for i in count]
    leaves = [expert_leaf(leaf, i, names[i], position) for i in count]
    pieces = [jax.tree.map(lambda x, i=i: x[i], seen) for i in count]
    if stage.elementwise or len(values) == 1:
        several = zip(stages, values, leaves, pieces, strict=True)
        return [call(s.build(), d, one, piece) for s, d, one, piece in several]

    def stack(items: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *items)

    many = leaf.replace(
        expert=stack([one.expert for one in leaves]),
        key=stack([one.key for one in leaves]),
    )
    axes = _axes(leaf, "expert", "key", "stats")
    mapped = jax.vmap(lambda s, d, one, p: call(s.build(), d, one, p), (0, 0, axes, 0))
    out = mapped(stack(stages), jnp.stack(values), many, seen)
    return [jax.tree.map(lambda x, i=i: x[i], out) for i in count]


def _axes(leaf: Leaf, *mapped: str) -> Any:
    """What `jax.vmap` maps of a leaf: the first axis of the named fields."""
    data = ("base", "depth", "block", "expert", "key", "start", "stats", "shared")
    return leaf.replace(**{name: 0 if name in mapped else None for name in data})


def _enter_space(state: State, space: str, leaf: Leaf) -> None:
    if space in ("either", state.space) or leaf.base is None:
        return
    sign = 1 if space == "weights" else -1
    state.values = [value + sign * leaf.base for value in state.values]
    state.space = space


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
            state.values = list(parts.apply(jnp.stack(state.values), whole, seen))
        case "reduce":
            state.values = [parts.apply(jnp.stack(state.values), whole, seen)]
        case "refine":
            state.values = [parts.apply(state.values[0], jnp.stack(state.raw), whole, seen)]
        case "fold":
            carried = parts.init(whole, jnp.zeros_like(state.values[0]))
            for i, d in enumerate(state.values):
                one = expert_leaf(leaf, i, names[i], place)
                carried = at_expert(stage, i).build().apply(carried, d, one, seen)
            state.values = [parts.finish(carried, whole, seen)]
    state.reduced = state.reduced or stage.kind in ("reduce", "fold")


def _measure(
    stage: Stage, state: State, leaf: Leaf, names: Array, place: int, seen: tuple, number: int
) -> tuple[Any, Any]:
    """One round of one stage on one leaf, and the experts' part that its recall remembers."""
    current = stage.build().rounds[number]
    whole = _whole_leaf(leaf, place)
    recalled = None
    if current.recall is not None:
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
        return current.measure(state.values[0], jnp.stack(state.raw), whole, seen), recalled
    return current.measure(jnp.stack(state.values), whole, seen), recalled


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
    for place, (path, stage, role) in enumerate(((p.path, p.stage, p.role) for p in placed)):
        place += position
        if role == "enter":
            there, _ = stage.build()
            _enter_space(state, "delta", leaf)
            values, context = there(jnp.stack(state.values), leaf)
            state.outer.append((context, state.raw, leaf))
            state.values = list(values)
            state.raw, leaf = state.values, leaf.replace(base=None)
            continue
        if role == "leave":
            _, back = stage.build()
            context, state.raw, leaf = state.outer.pop()
            state.values = [back(value, context, leaf) for value in state.values]
            continue
        _enter_space(state, stage.factory.space, leaf)
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
    _enter_space(state, "weights", leaf)
    return state.values


def run_leaf(
    placed: Sequence[Placed],
    leaf: Leaf,
    experts: Sequence[Array],
    names: Array,
    seen: Seen,
    local: Mapping[str, Any],
    due: Due | None = None,
) -> Any:
    """One leaf from its experts to the merged arrays, or to the measurements that are due."""
    leaf = leaf.replace(
        base=None if leaf.base is None else leaf.base.astype(jnp.float32),
        stats={name: jnp.stack(list(values)) for name, values in leaf.stats.items()},
    )
    seen = {
        path: (*seen.get(path, ()), *([local[path]] if path in local else []))
        for path in {*seen, *local}
    }
    state = begin(placed, leaf, experts)
    measured = advance(placed, state, leaf, names, seen, due)
    return finish(state, leaf) if due is None else measured


def run_layers(
    placed: Sequence[Placed],
    leaf: Leaf,
    experts: Sequence[Array],
    names: Array,
    seen: Seen,
    local: Mapping[str, Any],
    due: Due | None = None,
) -> Any:
    """A leaf that stacks layers along its first axis: every layer is a leaf of its own.

    The stages' numbers, `local`, `depth` and `block` have the layers' axis in front.
    """
    count = experts[0].shape[0]
    keys = jax.vmap(lambda layer: fold_key(leaf.key, layer))(jnp.arange(count, dtype=jnp.uint32))
    axes = _axes(leaf, "base", "depth", "block", "key", "stats", "shared")
    out = jax.vmap(
        lambda p, one, several, own: run_leaf(p, one, several, names, seen, own, due),
        (0, axes, 0, 0),
    )(placed, leaf.replace(key=keys), list(experts), local)
    return out if due is None else jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), out)


def run_blocks(
    placed: Sequence[Placed],
    leaf: Leaf,
    experts: Sequence[Array],
    names: Array,
    seen: Seen,
    local: Mapping[str, Any],
    due: Due | None = None,
) -> Any:
    """A large leaf of an elementwise chain, block by block, so that no copy of it is made."""
    shape, size = experts[0].shape, experts[0].size
    arrays = (leaf.base, list(experts), leaf.stats)
    flat = jax.tree.map(lambda x: x.reshape(-1), arrays)
    count = size // BLOCK

    def run_block(number: Array, length: int) -> Any:
        base, several, stats = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, number * BLOCK, length), flat
        )
        word = number.astype(jnp.uint32)
        start = jnp.stack([word * jnp.uint32(BLOCK), word >> jnp.uint32(14)])
        one = leaf.replace(base=base, stats=stats, start=start)
        return run_leaf(placed, one, several, names, seen, local, due)

    def place(number: Array, out: Any) -> Any:
        block = run_block(number, BLOCK)
        if due is not None:
            return jax.tree.map(jnp.add, out, block)
        return [
            jax.lax.dynamic_update_slice_in_dim(whole, part, number * BLOCK, 0)
            for whole, part in zip(out, block, strict=True)
        ]

    shapes = jax.eval_shape(run_block, jnp.int32(0), BLOCK)
    if due is None:
        start = [jnp.zeros(size, x.dtype) for x in shapes]
    else:
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    out = jax.lax.fori_loop(0, count, place, start)
    if rest := size - count * BLOCK:
        tail = run_block(jnp.int32(count), rest)
        if due is not None:
            return jax.tree.map(jnp.add, out, tail)
        out = [
            jax.lax.dynamic_update_slice_in_dim(w, t, count * BLOCK, 0)
            for w, t in zip(out, tail, strict=True)
        ]
    return out if due is not None else [whole.reshape(shape) for whole in out]
