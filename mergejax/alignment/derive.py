"""The permutation symmetries of a model, derived from its jaxpr."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mergejax.alignment.dims import (
    Dim,
    Expression,
    Join,
    Product,
    atoms,
    fixed,
    free,
    pin,
    resolve,
)
from mergejax.alignment.rules import State, Value, pin_value
from mergejax.alignment.structure import Axis, Group, Symmetries
from mergejax.alignment.trace import follow
from mergejax.door import Tree
from mergejax.errors import MergeError
from mergejax.leaves import name_of, role_of


def symmetries(apply_fn: Callable[[Tree, Any], Any], params: Tree, example: Any) -> Symmetries:
    """Finds which units of a model may be permuted, from the program that JAX traces of it.

    Every axis of every array in the program is followed: what is contracted, added or multiplied
    with each other must be permuted alike; axes that are split, flattened or concatenated are
    followed into their parts. Axes of the inputs and outputs are pinned, and so is whatever goes
    through an operation whose symmetry is not known. A group lies within another (head dimensions
    within heads, hidden units within experts) where it never occurs without it.

    Only the programs of operations are looked at, so that any model works: linen, NNX, Haiku, plain
    functions. Nothing is run, except what depends neither on the parameters nor on the example.

    Args:
        apply_fn: (params, example) -> outputs, any tree; in inference mode.
        params: every array of the model that may move: also running statistics, if it has some
            (`{'params': ..., 'batch_stats': ...}`). Shapes suffice.
        example: what the model is called on, any tree; shapes suffice (`jax.ShapeDtypeStruct`).
            Take sizes that differ from those of the model, and at least two of everything.

    Returns:
        The groups, the axes they act on, and for every axis that is pinned the reason.

    Raises:
        MergeError: the model cannot be traced, or has no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {'a': jnp.ones((3, 8)), 'b': jnp.ones((8, 2))}
        >>> print(symmetries(lambda p, x: jnp.tanh(x @ p['a']) @ p['b'], params, jnp.ones((5, 3))))
        a:1: 8 units, a[1], b[0]
        pinned a[0]: it is an axis of the example
        pinned b[1]: it is an axis of the output
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [name_of(path) for path, _ in paths]
    if not names:
        raise MergeError("symmetries: params has no leaves; pass the model's parameters")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in paths]
    closed = _traced(apply_fn, jax.tree.unflatten(structure, shapes), example)
    state = State()
    own = [Value(tuple(free(n) for n in x.shape)) for x in shapes]
    given = [
        Value(tuple(fixed(n, "it is an axis of the example") for n in var.aval.shape))
        for var in closed.jaxpr.invars[len(own) :]
    ]
    for value in (*own, *given):
        state.note(value)
    outputs = follow(state, closed.jaxpr, closed.consts, [*own, *given])
    for value in outputs:
        pin_value(value, "it is an axis of the output")
    used = {var for equation in closed.jaxpr.eqns for var in equation.invars if _is_var(var)}
    for var, value in zip(closed.jaxpr.invars, own, strict=False):
        if var not in used:
            pin_value(value, "the model does not use the leaf")
    found = _collect(dict(zip(names, (value.axes for value in own), strict=True)), state)
    return dataclasses.replace(found, model=(apply_fn, example))


def _is_var(var: Any) -> bool:
    return not hasattr(var, "val")


def _traced(apply_fn: Callable[..., Any], params: Tree, example: Any) -> Any:
    try:
        return jax.make_jaxpr(apply_fn)(params, example)
    except MergeError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise MergeError(
            f"symmetries: the model cannot be traced on the example ({type(error).__name__}: "
            f"{first}); check that apply_fn(params, example) runs under jax.jit"
        ) from error


def _collect(leaves: dict[str, tuple[Expression, ...]], state: State) -> Symmetries:
    """The groups of what is not pinned, named after the first leaf they act on."""
    _pin_single(leaves)
    within = _within(leaves, state)
    names: dict[Dim, str] = {}
    for leaf, axes in _by_rank(leaves):
        for i, axis in enumerate(axes):
            parts = [dim for dim in atoms(axis) if not dim.pinned or _is_outer(dim, within)]
            for part, dim in enumerate(parts):
                label = f"{leaf}:{i}" if len(parts) == 1 else f"{leaf}:{i}.{part}"
                names.setdefault(dim, label)
    order = list(names)
    factors = {dim for axes in leaves.values() for axis in axes for dim in _factors(axis)}
    # Heads and the like are not among them: one that is kept apart brings what lies within it.
    single = factors - {outer for dim in order for outer in within.get(dim, ())}
    single |= {dim for axis in state.reduced for dim in atoms(axis)}
    single |= {dim for dim in order if within.get(dim)}
    groups = {
        name: Group(
            dim.size,
            tuple(names[outer] for outer in order if outer in within.get(dim, ())),
            bool(dim.pinned),
            dim not in single,
        )
        for dim, name in names.items()
    }
    axes = {
        leaf: tuple(_notation(axis, names) for axis in own)
        for leaf, own in leaves.items()
        if any(dim in names for axis in own for dim in atoms(axis))
    }
    return Symmetries(groups, axes, _reasons(leaves))


def _by_rank(leaves: dict[str, tuple[Expression, ...]]) -> list[tuple[str, Any]]:
    """Kernels first, so that groups have their names rather than those of biases."""

    def order(item: tuple[str, Any]) -> bool:
        name, axes = item
        shape = tuple(axis.size for axis in axes)
        return role_of(name, shape, np.float32) not in ("kernel", "convolution", "embedding")

    return sorted(leaves.items(), key=order)


def _pin_single(leaves: dict[str, tuple[Expression, ...]]) -> None:
    """Pins what acts on one axis alone: permuting it aligns nothing with anything."""
    seen: dict[Dim, int] = {}
    for axes in leaves.values():
        for axis in axes:
            for dim in atoms(axis):
                seen[dim] = seen.get(dim, 0) + 1
    for dim, count in seen.items():
        if count == 1:
            pin(dim, "no other axis goes with it")


def _is_outer(dim: Dim, within: dict[Dim, set[Dim]]) -> bool:
    return any(dim in outer for inner, outer in within.items() if not inner.pinned)


def _factors(axis: Expression) -> list[Dim]:
    """The dimensions of an axis that stand beside other free ones, as groups of a norm do."""
    dims = list(atoms(axis))
    several = sum(not dim.pinned for dim in dims) > 1 and isinstance(resolve(axis), Product)
    return dims if several else []


def _notation(axis: Expression, names: dict[Dim, str]) -> Axis:
    axis = resolve(axis)
    if isinstance(axis, Dim):
        return names.get(axis)
    if not any(dim in names for dim in atoms(axis)):
        return None
    kind = tuple if isinstance(axis, Product) else list
    parts: list[Axis] = []
    for part in axis.parts:
        shown = _notation(part, names)
        parts.append(resolve(part).size if shown is None else shown)
    return kind(parts)


def _reasons(leaves: dict[str, tuple[Expression, ...]]) -> dict[tuple[str, int], str]:
    """Why an axis is pinned, of axes with any pinned dimension of more than one entry."""
    return {
        (leaf, i): next(reasons)
        for leaf, axes in leaves.items()
        for i, axis in enumerate(axes)
        if (reasons := (dim.pinned for dim in atoms(axis) if dim.pinned)) and _any_pinned(axis)
    }


def _any_pinned(axis: Expression) -> bool:
    return any(dim.pinned for dim in atoms(axis))


# --- which groups lie within which ----------------------------------------------------------------


def _companions(axes: Sequence[Expression]) -> Iterator[tuple[Dim, list[Dim]]]:
    """Every dimension of an array with those that each of its entries also has a place in."""
    whole = [list(_always(axis)) for axis in axes]
    for i, axis in enumerate(axes):
        others = [dim for j, dims in enumerate(whole) if j != i for dim in dims]
        yield from _inside(resolve(axis), others)


def _always(axis: Expression) -> Iterator[Dim]:
    axis = resolve(axis)
    if isinstance(axis, Dim):
        yield axis
    elif isinstance(axis, Product):
        for part in axis.parts:
            yield from _always(part)


def _inside(axis: Expression, others: list[Dim]) -> Iterator[tuple[Dim, list[Dim]]]:
    if isinstance(axis, Dim):
        yield axis, others
        return
    for i, part in enumerate(axis.parts):
        beside: list[Dim] = []
        if not isinstance(axis, Join):
            beside = [d for j, p in enumerate(axis.parts) if j != i for d in _always(p)]
        yield from _inside(resolve(part), [*others, *beside])


def _within(leaves: dict[str, tuple[Expression, ...]], state: State) -> dict[Dim, set[Dim]]:
    """The dimensions that each one never occurs without, exactly once in each array."""
    common: dict[Dim, set[Dim]] = {}
    for axes in (*leaves.values(), *state.arrays):
        for dim, others in _companions(axes):
            once = {other for other in others if others.count(other) == 1 and other is not dim}
            common[dim] = once if dim not in common else common[dim] & once
    for contracted, left, right in state.unpaired:
        apart = {dim for axis in left for dim in atoms(axis)}
        apart &= {dim for axis in right for dim in atoms(axis)}
        for dim in atoms(contracted):
            common.get(dim, set()).difference_update(apart)
    place = {dim: i for i, dim in enumerate(_in_order(leaves))}
    return {
        dim: {other for other in outer if _is_outside(dim, other, common, place)}
        for dim, outer in common.items()
        if dim in place
    }


def _in_order(leaves: dict[str, tuple[Expression, ...]]) -> list[Dim]:
    found = (dim for _, axes in _by_rank(leaves) for axis in axes for dim in atoms(axis))
    return list(dict.fromkeys(found))


def _is_outside(dim: Dim, other: Dim, common: dict[Dim, set[Dim]], place: dict[Dim, int]) -> bool:
    if other not in place or (other.pinned and not _stacks(other)):
        return False
    return dim not in common.get(other, ()) or place[other] < place[dim]


def _stacks(dim: Dim) -> bool:
    """Whether a pinned dimension numbers copies of a layer, so that each has its own units."""
    return bool(re.search("in a scan", dim.pinned))
