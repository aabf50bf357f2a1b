"""The forms that a leaf may have: whole, layers stacked along an axis, or too large for one piece.

Each form runs the same stages; an executor picks one by the leaf's size and description.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mergejax.chains import Placed
from mergejax.core import Array, Leaf
from mergejax.step import (
    Due,
    Seen,
    State,
    advance,
    begin,
    enter_space,
    finish,
    first_space,
    fold_experts,
    mapped_fields,
)

BLOCK = 2**18  # elements; a block of every expert stays in the processor's cache


class Form(NamedTuple):
    """The form of a leaf: as layers, or in blocks of so many elements, or else whole."""

    layered: bool = False
    block: int | None = None


def run_leaf(
    placed: Sequence[Placed],
    leaf: Leaf,
    experts: Sequence[Array],
    names: Array,
    seen: Seen,
    local: Mapping[str, Any],
    due: Due | None = None,
    part: str = "all",
) -> Any:
    """One leaf from its experts to the merged arrays, or to the measurements that are due.

    Part 'fold' stops at the fold and returns what it carries; part 'rest' starts from there.
    """
    leaf = leaf.replace(
        base=None if leaf.base is None else leaf.base.astype(jnp.float32),
    )
    seen = {
        path: (*seen.get(path, ()), *([local[path]] if path in local else []))
        for path in {*seen, *local}
    }
    start, stop = 0, len(placed)
    if part == "all":
        state = begin(placed, leaf, experts)
    else:
        turn = next(i for i, p in enumerate(placed) if p.stage.kind == "fold")
        if part == "fold":
            stop, state = turn, begin(placed, leaf, experts)
        else:
            start, state = turn + 1, _resume(placed, turn, leaf)
    measured = advance(placed[start:stop], state, leaf, names, seen, due, start)
    if due is not None:
        return measured
    if part == "fold":
        enter_space(state, placed[stop].stage.factory.space, leaf)
        return fold_experts(placed[stop].stage, state.values, leaf, names, stop)
    return finish(state, leaf)


def marked(found: Array, inputs: Sequence[Array]) -> Array:
    """What was found, with NaN where an input is not finite.

    A look at the output is so one at the inputs, which XLA reads for it anyway: a reduction of each
    takes three times as long.
    """
    if not inputs:
        return found
    zeros = [x.astype(jnp.float32) * 0 for x in inputs]  # or NaN
    finite = sum(z if z.shape == found.shape else z.sum() for z in zeros) == 0
    return jnp.where(finite, found, jnp.nan)


def _resume(placed: Sequence[Placed], turn: int, leaf: Leaf) -> State:
    """The state behind a fold whose experts are gone; `turn` is the place of the fold."""
    spaces = [first_space(placed), *(p.stage.factory.space for p in placed[: turn + 1])]
    space = [space for space in spaces if space != "either"][-1]
    merged = placed[turn].stage.build().finish(leaf.carried, leaf, ())
    return State([merged], [], space, reduced=True)


def run_layers(
    placed: Sequence[Placed],
    leaf: Leaf,
    experts: Sequence[Array],
    names: Array,
    seen: Seen,
    local: Mapping[str, Any],
    due: Due | None = None,
    part: str = "all",
) -> Any:
    """A leaf that stacks layers along its first axis: every layer is a leaf of its own.

    The stages' numbers, `local`, `depth`, `block` and `key` have the layers' axis in front.
    """
    axes = mapped_fields(leaf, "base", "depth", "block", "key", "stats", "shared", "carried")
    out = jax.vmap(
        lambda p, one, several, own: run_leaf(p, one, several, names, seen, own, due, part),
        (0, axes, 0, 0),
    )(placed, leaf, list(experts), local)
    return out if due is None else jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), out)


class Piece(NamedTuple):
    """What a program makes of a leaf, or of a block of it.

    Attributes:
        found: the merged arrays, or the measurements that are due.
        counts: whether the leaf enters sums over the model.
        largest: the largest magnitude of what is to be finite, float32.
    """

    found: Any
    counts: Array
    largest: Array


def in_blocks(
    piece: Callable[[Leaf, Sequence[Array]], Piece],
    leaf: Leaf,
    experts: Sequence[Array],
    due: Due | None,
    block: int,
) -> Piece:
    """A large leaf of an elementwise chain, block by block.

    No copy of it is made, and what is read twice comes from the processor's cache.
    """
    shape, size = experts[0].shape, experts[0].size
    arrays = (leaf.base, list(experts), leaf.stats)
    flat = jax.tree.map(lambda x: x.reshape(-1), arrays)
    count = size // block

    def run(number: Array, length: int) -> Piece:
        base, several, stats = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, number * block, length), flat
        )
        first = number.astype(jnp.uint32) * jnp.uint32(block)
        start = jnp.stack([first, jnp.uint32(0)])  # leaves in blocks have less than 2^31 elements
        return piece(leaf.replace(base=base, stats=stats, start=start), several)

    def place(number: Array, length: int, whole: Piece) -> Piece:
        now = run(number, length)
        if due is not None:
            found = jax.tree.map(jnp.add, whole.found, now.found)
        else:
            several = zip(whole.found, now.found, strict=True)
            put = jax.lax.dynamic_update_slice_in_dim
            found = [put(all_of_it, part, number * block, 0) for all_of_it, part in several]
        largest = jnp.maximum(whole.largest, now.largest)  # a NaN stays one
        return Piece(found, whole.counts | now.counts, largest)

    shapes = jax.eval_shape(lambda number: run(number, block), jnp.int32(0))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if due is None:
        start = start._replace(found=[jnp.zeros(size, x.dtype) for x in shapes.found])
    whole = jax.lax.fori_loop(0, count, lambda number, out: place(number, block, out), start)
    if rest := size - count * block:
        whole = place(jnp.int32(count), rest, whole)
    return (
        whole if due is not None else whole._replace(found=[x.reshape(shape) for x in whole.found])
    )
