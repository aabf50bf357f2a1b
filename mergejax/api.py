"""`merge`: any trees in, the same kind of tree out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from mergejax import hyper
from mergejax.chains import chain
from mergejax.core import Array
from mergejax.door import (
    Tree,
    check_alike,
    leaves_by_name,
    merged_buffer,
    statistics_by_leaf,
)
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.leaves import BUFFER, HEAD, LeafInfo, describe, is_counter
from mergejax.methods.pieces import mean
from mergejax.plan import make_plan
from mergejax.registry import as_chain
from mergejax.run import LEAFWISE, TRACED, Progress, Settings, Values, execute


def merge(
    method: Any,
    base: Tree | None,
    experts: Sequence[Tree],
    *,
    names: Sequence[str] | None = None,
    seed: Any = 0,
    stats: Mapping[str, Sequence[Tree]] | None = None,
    shared: Mapping[str, Tree] | None = None,
    exclude: str | Sequence[str] = (),
    roles: Mapping[str, str] | None = None,
    layout: Literal["flax", "torch"] = "flax",
    layouts: Mapping[str, str] | None = None,
    scanned: str | None = None,
    count: Literal["all", "changed"] = "all",
    dtype: Any = None,
    progress: Progress | None = None,
) -> Any:
    r"""Merges experts into one model.

    .. math:: \theta = \theta_0 + f(\theta_1-\theta_0, \ldots, \theta_N-\theta_0)

    with f the method. All arithmetic is in float32. Outside `jax.jit` the work is done leaf by
    leaf and values are checked; under the user's own `jax.jit`, `jax.vmap` or `jax.grad` it is one
    pure function, hyper-parameters and the seed may be traced, and checks that need values are
    left out. Sharded arrays stay sharded.

    Args:
        method: a chain (`mj.ties(density=0.2)`) or a text ('drop(rate=0.9)|ties()').
        base: tree of arrays that the experts were fine-tuned from; None for methods on weights.
        experts: trees like the base: nested dicts, FrozenDict, NNX State, lists, ...
        names: of the experts; random masks depend on them, so that another order of the same
            names gives the same masks. By default their positions.
        seed: of all random numbers, an integer.
        stats: statistics by name, one tree per expert: {'fisher': [tree, ...]}; a tree may also
            be a dict by leaf name, {'block_0/dense/kernel': array}.
        shared: statistics by name that belong to no expert, one tree each.
        exclude: regular expressions of leaves that keep the base's values and are not counted.
        roles: regular expressions on leaf names and the role to take instead of the guessed one.
        layout: 'flax' ([in, out] kernels) or 'torch' ([out, in]).
        layouts: regular expressions on leaf names and the layout to take instead.
        scanned: regular expression of leaves whose first axis stacks layers.
        count: whether leaves that no expert changed enter whole-model ranks and norms.
        dtype: of the merged leaves; by default each leaf's own.
        progress: called with (leaves done, leaves in all, leaf name).

    Returns:
        A tree like the base; a list of such trees where the method does not reduce its experts.

    Raises:
        MergeError: (a ValueError) one sentence for each problem: no experts, leaves that differ,
            non-finite values, hyper-parameters out of range, a pattern that matches nothing, ...

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'dense': {'kernel': jnp.zeros((2, 2))}}
        >>> experts = [{'dense': {'kernel': jnp.full((2, 2), x)}} for x in (1.0, 3.0)]
        >>> print(mj.merge(mj.task_arithmetic(scaling=0.5), base, experts)['dense']['kernel'])
        [[2. 2.]
         [2. 2.]]
    """
    method = as_chain(method)
    experts = _as_list(experts)
    names = [str(i) for i in range(len(experts))] if names is None else list(names)
    _check_names(names, experts, count)
    owners = [f"expert '{name}'" for name in names]
    several, backs = zip(
        *(leaves_by_name(expert, owner) for expert, owner in zip(experts, owners, strict=True)),
        strict=True,
    )
    base_leaves, back = (None, backs[0]) if base is None else leaves_by_name(base, "the base")
    reference = several[0] if base_leaves is None else base_leaves
    check_alike(reference, several, owners)
    specs = {name: (tuple(x.shape), x.dtype) for name, x in reference.items()}
    described = describe(
        specs, style=layout, roles=roles, layouts=layouts, exclude=exclude, scanned=scanned
    )
    shapes = {name: shape for name, (shape, _) in specs.items()}
    known = statistics_by_leaf(stats or {}, shapes, len(experts))
    common = {need: leaves_by_name(tree, f"shared['{need}']")[0] for need, tree in (shared or {}).items()}
    infos, copied = _split(described, known, common)

    def load(name: str) -> Values:
        return Values(
            None if base_leaves is None else base_leaves[name],
            [expert[name] for expert in several],
            known.get(name, {}),
            {need: tree[name] for need, tree in common.items() if name in tree},
        )

    merged: dict[str, Sequence[Array]] = {}
    plan = make_plan(method, chain(mean()), infos, len(experts), base is not None)
    traced = hyper.is_traced((method, base, list(experts), seed, stats, shared))
    settings = Settings(names, seed, count, dtype, progress)
    execute(plan, infos, load, merged.__setitem__, settings, TRACED if traced else LEAFWISE)
    width = max((len(arrays) for arrays in merged.values()), default=1)
    trees = []
    for i in range(width):
        leaves = {name: arrays[min(i, len(arrays) - 1)] for name, arrays in merged.items()}
        for info in copied:
            values = [reference[info.name], *(expert[info.name] for expert in several)]
            keep = info.role == HEAD or is_counter(info.name)
            leaves[info.name] = merged_buffer(info.name, values, keep)
        trees.append(back(leaves))
    return trees if any(len(arrays) > 1 for arrays in merged.values()) else trees[0]


def _as_list(experts: Any) -> list[Tree]:
    if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
        raise MergeError("experts must be a list of trees, one per expert, such as [a, b, c]")
    return list(experts)


def _check_names(names: Sequence[str], experts: Sequence[Tree], count: str) -> None:
    problems = []
    if not experts:
        problems.append("there is no expert to merge; pass at least one")
    if len(names) != len(experts):
        problems.append(f"there are {len(names)} names for {len(experts)} experts; name each once")
    if len(set(names)) < len(names):
        problems.append(f"two experts have one name in {list(names)}; name each once")
    if count not in ("all", "changed"):
        problems.append(f"count: '{count}' is unknown, {did_you_mean(count, ['all', 'changed'])}")
    raise_all(problems)


def _split(
    described: Sequence[LeafInfo], known: Mapping[str, Any], common: Mapping[str, Any]
) -> tuple[list[LeafInfo], list[LeafInfo]]:
    """The leaves that are merged, with what is known about them, and those that are copied."""
    merged, copied = [], []
    for info in described:
        own = [*known.get(info.name, {}), *(need for need, tree in common.items() if info.name in tree)]
        target = copied if info.role in (BUFFER, HEAD) else merged
        target.append(dataclasses.replace(info, stats=tuple(own)))
    return merged, copied
