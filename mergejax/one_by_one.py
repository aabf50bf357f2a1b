"""Continual merging: experts arrive one at a time, memory stays constant, the state can be saved.

A method can do this when its reduction is a fold. Before the fold stand stages for one expert;
behind it, stages that need the merged delta and what they remember of the experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.chains import Placed, chain
from mergejax.door import Tree, check_alike, leaves_by_name, merged_buffer
from mergejax.errors import MergeError, raise_all
from mergejax.language import as_chain
from mergejax.leaves import BUFFER, HEAD, LeafInfo, describe, is_counter
from mergejax.methods.combine import mean
from mergejax.plan import Plan, make_plan, remember
from mergejax.run import Settings, Values, execute

State = dict[str, Any]


class Continual(NamedTuple):
    """Pure functions that merge experts one at a time.

    Attributes:
        init: () -> the state before any expert.
        update: (state, expert, name=None) -> the state with one more expert.
        value: (state) -> the merged tree.
    """

    init: Callable[[], State]
    update: Callable[..., State]
    value: Callable[[State], Tree]


def continual(
    method: Any, base: Tree, *, seed: int = 0, dtype: Any = None, **leaves: Any
) -> Continual:
    r"""Merges experts that arrive one by one, in memory that does not grow.

    .. math:: s_t = update(s_{t-1},\ \theta_t-\theta_0),\qquad \theta = value(s_t)

    Args:
        method: a chain or a text whose reduction is a fold: opcm, average, task_arithmetic, ...
        base: tree of arrays that the experts are fine-tuned from.
        seed: of all random numbers.
        dtype: of the merged leaves; by default each leaf's own.
        **leaves: `exclude`, `roles`, `layout`, `layouts` and `scanned`, as in `mj.merge`.

    Returns:
        Three functions; the state is a pytree of arrays that Orbax can save.

    Raises:
        MergeError: a method that needs all experts at once; an expert that differs from the base;
            a value of no experts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 3.0))
        >>> learner = mj.continual('task_arithmetic(scaling=0.5)', base)
        >>> state = learner.init()
        >>> for expert in (a, b):
        ...     state = learner.update(state, expert)
        >>> print(learner.value(state)['w'])
        [2.]
    """
    method = as_chain(method)
    base_leaves, back = leaves_by_name(base, "the base")
    if "layout" in leaves:
        leaves["style"] = leaves.pop("layout")
    specs = {name: (tuple(x.shape), x.dtype) for name, x in base_leaves.items()}
    described = describe(specs, **leaves)
    infos = [info for info in described if info.role not in (BUFFER, HEAD)]
    copied = [info for info in described if info.role in (BUFFER, HEAD)]
    plan = make_plan(method, chain(mean()), infos, 1, has_base=True)
    turns = {name: _fold_of(placed, repr(method)) for name, placed in plan.placed.items()}
    before = {p.path for name, placed in plan.placed.items() for p in placed[: turns[name]]}
    first = _part(plan, before, 1)
    rest = _part(plan, set(plan.measured) - before, 0)

    def init() -> State:
        carried = {
            info.name: _init(plan.placed[info.name][turns[info.name]], info) for info in infos
        }
        memory = {
            path: jax.tree.map(np.asarray, stage.build().rounds[-1].recall.start)
            for path, stage in plan.measured.items()
            if stage.build().rounds[-1].recall is not None
        }
        return {"carried": carried, "memory": memory, "count": np.zeros((), np.int32)}

    def update(state: State, expert: Tree, name: str | None = None) -> State:
        number = int(state["count"])
        name = str(number) if name is None else name
        arrays, _ = leaves_by_name(expert, f"expert '{name}'")
        check_alike(base_leaves, [arrays], [f"expert '{name}'"])
        for info in copied:
            keep = info.role == HEAD or is_counter(info.name)
            merged_buffer(info.name, [base_leaves[info.name], arrays[info.name]], keep)

        def load(leaf: str) -> Values:
            return Values(base_leaves[leaf], [arrays[leaf]], carried=state["carried"][leaf])

        carried: dict[str, Any] = {}
        settings = Settings([name], seed, part="fold", earlier=number)
        execute(first, infos, load, carried.__setitem__, settings)
        memory = {
            path: _recall(plan, infos, path, state["memory"][path], base_leaves, arrays)
            for path in state["memory"]
        }
        return {"carried": carried, "memory": memory, "count": np.asarray(number + 1, np.int32)}

    def value(state: State) -> Tree:
        if not int(state["count"]):
            raise MergeError("there is no expert in the state; call update(state, expert) first")

        def load(leaf: str) -> Values:
            return Values(base_leaves[leaf], [], carried=state["carried"][leaf])

        merged: dict[str, Any] = {}
        settings = Settings([], seed, dtype=dtype, part="rest", memory=state["memory"])
        execute(rest, infos, load, merged.__setitem__, settings)
        kept = {info.name: base_leaves[info.name] for info in copied}
        return back({**{name: arrays[0] for name, arrays in merged.items()}, **kept})

    return Continual(init, update, value)


def _fold_of(placed: list[Placed], shown: str) -> int:
    """The place of the fold in a leaf's stages, all of which must do with one expert at a time."""
    problems = [
        f"'{p.stage.factory.name}' in the chain {shown} needs all experts at once and cannot be "
        "merged continually; use mj.merge, or a method whose reduction is a fold, such as opcm()"
        for p in placed
        if p.stage.kind in ("joint", "reduce", "refine", "restore") or p.role != "apply"
    ]
    folds = [i for i, p in enumerate(placed) if p.stage.kind == "fold"]
    if not folds and not problems:
        problems.append(f"the chain {shown} reduces nothing; end it with total() or mean()")
    raise_all(problems)
    return folds[0]


def _part(plan: Plan, paths: set[str], experts: int) -> Plan:
    """The plan of one half of the chain: only the measurements of the given stages."""
    passes = [{n: due for n, due in dues.items() if due[0] in paths} for dues in plan.passes]
    return dataclasses.replace(plan, passes=[dues for dues in passes if dues], experts=experts)


def _init(fold: Placed, info: LeafInfo) -> Any:
    parts = fold.stage.build()
    if info.layers is None:
        return parts.init(None, jnp.zeros(info.shape, jnp.float32))
    return jax.vmap(lambda zeros: parts.init(None, zeros))(jnp.zeros(info.shape, jnp.float32))


def _recall(
    plan: Plan, infos: list[LeafInfo], path: str, memory: Any, base: dict, expert: dict
) -> Any:
    """Extends a stage's memory by one expert's totals over all leaves that go through the stage."""
    current = plan.measured[path].build().rounds[-1]
    totals = None
    for info in infos:
        if path in (p.path for p in plan.placed[info.name]):
            found = _recalled(plan.measured[path], base[info.name], expert[info.name])
            found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            totals = found if totals is None else jax.tree.map(np.add, totals, found)
    memory = remember(memory, current, jax.tree.map(lambda x: x[None], totals), 1)
    return jax.tree.map(np.asarray, memory)


@jax.jit
def _recalled(stage: Any, base: jax.Array, expert: jax.Array) -> Any:
    delta = expert.astype(jnp.float32) - base.astype(jnp.float32)
    return stage.build().rounds[-1].recall.measure(delta, None)
