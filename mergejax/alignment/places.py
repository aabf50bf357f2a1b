"""Groups cut into places with maps of their own, as methods do that look at layers one by one."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from mergejax.alignment.structure import Axis, Symmetries, groups_of
from mergejax.alignment.trace import inner_program
from mergejax.door import Tree
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.leaves import name_of


def apart(symmetries: Symmetries, group: str, leaves: Iterable[str]) -> Symmetries:
    """Gives some leaves a group of their own in place of one that they share with others.

    What comes out are no symmetries of the model any more: its function changes unless both groups
    are permuted alike. Transport with a map for queries and another one for keys works with them.

    Args:
        symmetries: of a model.
        group: the one that is shared.
        leaves: names of those that get their own.

    Returns:
        `Symmetries` with one more group, called '<group>|<first leaf>', which are not verified.

    Raises:
        MergeError: an unknown group, or a leaf without it.

    Example:
        >>> from mergejax import alignment
        >>> both = alignment.Symmetries({'dim': alignment.Group(4)}, {'q': ('dim',), 'k': ('dim',)})
        >>> print(apart(both, 'dim', ['k']))
        dim: 4 units, q[0]
        dim|k: 4 units, k[0]
    """
    chosen = list(leaves)
    problems = [
        f"apart: leaf '{leaf}' has no axis of group '{group}', "
        f"{did_you_mean(leaf, symmetries.axes)}"
        for leaf in chosen
        if group not in [n for axis in symmetries.axes.get(leaf, ()) for n in groups_of(axis)]
    ]
    if group not in symmetries.groups:
        problems = [f"apart: there is no group '{group}', {did_you_mean(group, symmetries.groups)}"]
    raise_all(problems)
    new = f"{group}|{chosen[0]}"
    axes = {
        leaf: tuple(_renamed(axis, group, new) for axis in own) if leaf in chosen else own
        for leaf, own in symmetries.axes.items()
    }
    groups = {**symmetries.groups, new: symmetries.groups[group]}
    return dataclasses.replace(symmetries, groups=groups, axes=axes, model=None)


def _renamed(axis: Axis, old: str, new: str) -> Axis:
    if isinstance(axis, tuple | list):
        return type(axis)(_renamed(part, old, new) for part in axis)
    return new if axis == old else axis


def in_order(symmetries: Symmetries, params: Tree) -> list[str]:
    """The leaves of a model in the order in which its program first uses them.

    Raises:
        MergeError: symmetries that were written by hand, of which no program is known.
    """
    if symmetries.model is None:
        raise MergeError(
            "the order of the layers is read from the model's program, and these symmetries were "
            "written by hand; derive them with mj.alignment.symmetries"
        )
    apply_fn, example = symmetries.model
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    closed = jax.make_jaxpr(apply_fn)(params, example)
    owners = dict(zip(closed.jaxpr.invars, (name_of(path) for path, _ in paths), strict=False))
    return list(dict.fromkeys(_used(closed.jaxpr, owners)))


def _used(jaxpr: Any, owners: Mapping[Any, str]) -> Iterator[str]:
    for equation in jaxpr.eqns:
        variables = [None if hasattr(var, "val") else var for var in equation.invars]
        inner = inner_program(equation)
        if inner is None:
            yield from (owners[var] for var in variables if var in owners)
            continue
        pairs = zip(inner[0].invars, variables, strict=True)
        yield from _used(inner[0], {own: owners[var] for own, var in pairs if var in owners})
