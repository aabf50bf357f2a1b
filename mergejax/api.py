"""`merge`: any trees in, the same kind of tree out; `stream`: leaf by leaf from anywhere."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import affine, hyper
from mergejax.chains import Chain, by_stats, chain
from mergejax.core import Array
from mergejax.door import (
    Tree,
    check_alike,
    check_statistics,
    leaves_by_name,
    merged_buffer,
    shared_by_leaf,
    statistics_by_leaf,
    unknown_statistics,
)
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.language import as_chain
from mergejax.leaves import BUFFER, HEAD, LeafInfo, describe, is_counter, is_floating
from mergejax.methods.combine import mean
from mergejax.methods.permute import join, take_units
from mergejax.plan import make_plan
from mergejax.registry import known_statistics
from mergejax.run import LEAFWISE, TRACED, Progress, Settings, Sink, Values, execute

COUNTS = ("all", "changed")
# What becomes of running statistics, whatever the method: units that are aligned take them along.
BUFFERS = chain(by_stats(permutation=chain(take_units(), join()), otherwise=mean()))


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
    experts = _as_list(experts)
    names = _names(names, experts)
    several, backs = [], []
    for name, expert in zip(names, experts, strict=True):
        leaves, back = leaves_by_name(expert, f"expert '{name}'")
        several.append(leaves)
        backs.append(back)
    base_leaves = None
    if base is not None:
        base_leaves, backs[0] = leaves_by_name(base, "the base")
    merged: dict[str, Sequence[Array]] = {}
    stream(
        method,
        base_leaves,
        several,
        merged.__setitem__,
        names=names,
        seed=seed,
        stats=stats,
        shared=shared,
        exclude=exclude,
        roles=roles,
        layout=layout,
        layouts=layouts,
        scanned=scanned,
        count=count,
        dtype=dtype,
        progress=progress,
    )
    width = max(len(arrays) for arrays in merged.values())
    trees = [
        backs[0]({name: arrays[min(i, len(arrays) - 1)] for name, arrays in merged.items()})
        for i in range(width)
    ]
    return trees if width > 1 else trees[0]


def stream(
    method: Any,
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]],
    sink: Sink,
    *,
    names: Sequence[str] | None = None,
    seed: Any = 0,
    stats: Mapping[str, Sequence[Tree]] | None = None,
    shared: Mapping[str, Tree] | None = None,
    exclude: str | Sequence[str] = (),
    roles: Mapping[str, str] | None = None,
    layout: str = "flax",
    layouts: Mapping[str, str] | None = None,
    scanned: str | None = None,
    count: str = "all",
    dtype: Any = None,
    progress: Progress | None = None,
) -> None:
    """Merges experts leaf by leaf, from mappings that may read each leaf when it is asked for.

    A model is a mapping from leaf names to arrays, or to anything with `shape`, `dtype` and
    `[...]` that reads an array: a memory map, a dataset in a file. No more than one leaf of every
    model is held at a time; methods that measure the whole model read each leaf once per pass.

    Args:
        method: a chain or a text, as in `merge`.
        base: the base's leaves by name, or None.
        experts: the experts' leaves by name.
        sink: called as sink(name, arrays) for every leaf once, with one merged array, or one per
            expert where the method does not reduce them.
        names, seed, stats, shared, exclude, roles, layout, layouts, scanned, count, dtype,
            progress: as in `merge`.

    Raises:
        MergeError: as `merge`. Bad input that shapes or the first pass can tell is refused before
            anything is handed to the sink.

    Example:
        >>> import numpy as np, mergejax as mj
        >>> base, expert = {'w': np.zeros(2, np.float32)}, {'w': np.ones(2, np.float32)}
        >>> mj.stream(mj.task_arithmetic(0.5), base, [expert], lambda name, x: print(name, x[0]))
        w [0.5 0.5]
    """
    method = as_chain(method)
    names = _names(names, experts)
    statistics = [*(stats or {}), *(shared or {})]
    raise_all(
        [
            *(unknown_statistics(statistics, _known(method)) if statistics else []),
            *_option_problems(seed, dtype, count),
        ]
    )
    reference = experts[0] if base is None else base
    check_alike(reference, experts, [f"expert '{name}'" for name in names])
    specs = {name: (tuple(x.shape), x.dtype) for name, x in reference.items()}
    described = describe(
        specs, style=layout, roles=roles, layouts=layouts, exclude=exclude, scanned=scanned
    )
    shapes = {name: shape for name, (shape, _) in specs.items()}
    known = statistics_by_leaf(stats or {}, shapes, len(experts))
    common = shared_by_leaf(shared or {}, shapes)
    infos, copied = _split(described, known, common)
    models = [list(model.values()) for model in (base or {}, *experts)]
    # Inside jax.jit even what is made of constants is traced.
    traced = hyper.is_traced((method, seed, stats, shared, models, jnp.zeros(())))
    check_statistics(infos, known, values=not traced)
    layers = affine.layers(infos)
    infos = affine.rows_of(layers, infos)

    def read(model: Mapping[str, Any], name: str) -> Any:
        if name not in layers:
            return _read(model[name])
        return layers[name].join(*(_read(model[part]) for part in layers[name].names))

    def load(name: str) -> Values:
        return Values(
            None if base is None else read(base, name),
            [read(expert, name) for expert in experts],
            known.get(name, {}),
            common.get(name, {}),
        )

    def put(name: str, arrays: Sequence[Array]) -> None:
        parts: Mapping[str, Sequence[Array]] = {name: arrays}
        if name in layers:
            parts = layers[name].split(arrays, reference, dtype)
        for part, found in parts.items():
            sink(part, found)

    plan = make_plan(method, BUFFERS, infos, len(experts), base is not None, statistics)
    for info in copied:
        values = [_read(reference[info.name]), *(_read(expert[info.name]) for expert in experts)]
        keep = info.role == HEAD or is_counter(info.name)
        sink(info.name, [merged_buffer(info.name, values, keep)])
    settings = Settings(names, seed, count, dtype, progress)
    execute(plan, infos, load, put, settings, TRACED if traced else LEAFWISE)


def _read(array: Any) -> Any:
    return array if isinstance(array, jax.Array | np.ndarray) else np.asarray(array[...])


def _known(method: Chain) -> list[str]:
    return [*method.needs, *known_statistics()]


def _as_list(experts: Any) -> list[Tree]:
    if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
        raise MergeError("experts must be a list of trees, one per expert, such as [a, b, c]")
    return list(experts)


def _names(names: Sequence[str] | None, experts: Sequence[Any]) -> list[str]:
    named = [str(i) for i in range(len(experts))] if names is None else list(names)
    problems = []
    if not experts:
        problems.append("there is no expert to merge; pass at least one")
    if len(named) != len(experts):
        problems.append(f"there are {len(named)} names for {len(experts)} experts; name each once")
    if not all(isinstance(name, str) for name in named):
        problems.append(f"names must be texts, not {named}; write them in quotes")
    elif len(set(named)) < len(named):
        problems.append(f"two experts have one name in {named}; name each once")
    raise_all(problems)
    return named


def _option_problems(seed: Any, dtype: Any, count: str) -> list[str]:
    problems = []
    if count not in COUNTS:
        problems.append(f"count: '{count}' is unknown, {did_you_mean(count, COUNTS)}")
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not isinstance(seed, jax.Array) and not (whole and 0 <= seed < 2**32):
        problems.append(f"seed must be an integer in [0, 2^32), not {seed!r}")
    try:
        floating = dtype is None or is_floating(np.dtype(dtype))
    except TypeError:
        floating = False
    if not floating:
        problems.append(f"dtype must be a floating-point type such as 'bfloat16', not {dtype!r}")
    return problems


def _split(
    described: Sequence[LeafInfo], known: Mapping[str, Any], common: Mapping[str, Any]
) -> tuple[list[LeafInfo], list[LeafInfo]]:
    """The leaves that are merged, with what is known about them, and those that are copied."""
    merged: list[LeafInfo] = []
    copied: list[LeafInfo] = []
    for info in described:
        own = (*known.get(info.name, {}), *common.get(info.name, {}))
        target = copied if info.role in (BUFFER, HEAD) else merged
        target.append(dataclasses.replace(info, stats=own))
    return merged, copied
