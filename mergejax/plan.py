"""What an executor has to do: which stages each leaf goes through, what is measured in which pass.

Everything here happens on the host, before any array is touched.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import hyper, varying
from mergejax.chains import Chain, Placed, expand, reduction
from mergejax.checks import check_numbers, check_order
from mergejax.core import Round, Stage
from mergejax.errors import raise_all
from mergejax.leaves import STATISTIC, LeafInfo
from mergejax.step import Due, at_expert


@dataclasses.dataclass(frozen=True)
class Plan:
    """A chain, laid out for the leaves of one model.

    Attributes:
        placed: the stages of each leaf by name, rules resolved for it.
        passes: for each pass, what every leaf has to measure in it; leaves without are left out.
        measured: the stage of each path that measures something, numbers as the user gave them.
        merged: paths of stages behind the reduction.
        experts: number of experts.
    """

    placed: dict[str, list[Placed]]
    passes: list[dict[str, Due]]
    measured: dict[str, Stage]
    merged: frozenset[str]
    experts: int


def make_plan(
    method: Chain,
    average: Chain,
    infos: Sequence[LeafInfo],
    experts: int,
    has_base: bool,
    given: Sequence[str] = (),
) -> Plan:
    """Expands a chain for every leaf, checks it and orders its measurements.

    Args:
        method: the chain.
        average: the chain for running statistics.
        infos: the leaves that are merged.
        experts: number of experts.
        has_base: whether there is a base.
        given: statistics that were passed, perhaps for no leaf: a model without norms has none
            of its norms' inputs.

    Raises:
        MergeError: stages in an impossible order, without a base that they need, with lists of
            the wrong length, with patterns that match no leaf, or without their statistics.
    """
    known = {need for info in infos for need in info.stats}
    absent = {need for need in method.needs if need not in (*known, *given)}
    problems = [
        f"{method!r} needs the statistic '{need}', which no leaf has; pass "
        f"stats={{'{need}': [...]}}, one tree per expert ({_collected(need)})"
        for need in sorted(absent)
    ]
    placed: dict[str, list[Placed]] = {}
    names_of: dict[str, list[str]] = {}
    stages: dict[str, Stage] = {}
    kinds: dict[Any, list[Placed]] = {}  # branches choose by role and statistics
    for info in infos:
        kind = info.role, info.stats
        if kind not in kinds and info.role == STATISTIC:
            averaged = expand(average, info)
            kinds[kind] = [dataclasses.replace(p, path=f"average{p.path}") for p in averaged]
        elif kind not in kinds:
            kinds[kind] = expand(method, info)
        expanded = placed[info.name] = kinds[kind]
        for p in expanded:
            stages[p.path] = p.stage
            names_of.setdefault(p.path, []).append(info.name)
            missing = [n for n in p.stage.factory.needs if n not in (*info.stats, *absent)]
            problems += [
                f"leaf '{info.name}' has no statistic '{need}', which {p.stage.factory.name} "
                f"needs; pass it with stats={{'{need}': [...]}}, one tree per expert"
                for need in missing
            ]
    distinct = {tuple(p.path for p in expanded): expanded for expanded in placed.values()}
    merged: set[str] = set()
    for expanded in distinct.values():
        problems += check_order(method, expanded)
        problems += check_numbers(method, expanded, experts, has_base)
        merged.update(p.path for p in expanded[reduction(expanded) + 1 :])
    for path, stage in stages.items():
        for value in stage.data.values():
            if isinstance(value, varying.ByName):
                problems += [
                    f"{stage.factory.name}: pattern '{pattern}' of by_name matches no leaf"
                    for pattern in value.unmatched(names_of[path])
                ]
    raise_all(problems)
    dues = {
        name: [(p.path, r) for p in expanded for r in range(_rounds(p))]
        for name, expanded in placed.items()
    }
    measured = {path: stages[path] for due in dues.values() for path, _ in due}
    resolved = {info.name: _resolve(placed[info.name], info) for info in infos}
    return Plan(resolved, _passes(dues), measured, frozenset(merged), experts)


_ALIGNED = {
    "permutation": "statistics",
    **dict.fromkeys(("aligned_gram", "aligned_residual", "aligned_owners"), "regression"),
}


def _collected(need: str) -> str:
    """How to come by a statistic."""
    if need in _ALIGNED:
        return f"mj.alignment.{_ALIGNED[need]}(...) makes it (docs/alignment.md)"
    from mergejax import collect  # Flax takes a second to import

    call = f"mj.collect.{need}(...) collects it" if need in collect.__all__ else "see mj.collect"
    return f"{call}; python -m mergejax.main does so for its own tasks"


def _rounds(placed: Placed) -> int:
    if placed.role != "apply":
        return 0
    return len(placed.stage.build().rounds)


def _resolve(placed: list[Placed], info: LeafInfo) -> list[Placed]:
    """Replaces rules by numbers; a leaf of stacked layers gets one number a layer."""

    def at(stage: Stage, depth: float) -> Stage:
        data = {n: varying.resolve(v, info.name, depth) for n, v in stage.data.items()}
        return stage.with_data(data)

    if info.layers is None:
        rules = any(isinstance(v, varying.Rule) for p in placed for v in p.stage.data.values())
        if not rules:
            return placed  # the same object for all leaves of a kind
        return [dataclasses.replace(p, stage=at(p.stage, info.depth)) for p in placed]
    layers = [[with_arrays(at(p.stage, float(d))) for d in depths_of(info)] for p in placed]
    stacked = [jax.tree.map(lambda *xs: _stack(xs), *several) for several in layers]
    return [dataclasses.replace(p, stage=s) for p, s in zip(placed, stacked, strict=True)]


def depths_of(info: LeafInfo) -> np.ndarray:
    """The depth of every layer of a leaf that stacks layers."""
    assert info.layers is not None
    return np.linspace(0, 1, info.layers) if info.layers > 1 else np.ones(1)


def with_arrays(stage: Stage) -> Stage:
    """The stage with its numbers as float32 arrays, so that another value never recompiles."""
    return stage.with_data({n: hyper.as_data(v) for n, v in stage.data.items()})


def _stack(values: Sequence[Any]) -> Any:
    return jnp.stack(values) if hyper.is_traced(values) else np.stack(values)


def _passes(dues: Mapping[str, Sequence[Due]]) -> list[dict[str, Due]]:
    """Orders measurements: one goes into the first pass in which all before it are known."""
    level: dict[Due, int] = {}
    distinct = {tuple(sequence) for sequence in dues.values()}
    for _ in range(sum(map(len, distinct)) + 1):
        before = dict(level)
        for sequence in distinct:
            last = 0
            for due in sequence:
                last = level[due] = max(level.get(due, 1), last + 1)
        if level == before:
            break
    count = max(level.values(), default=0)
    return [
        {name: due for name, sequence in dues.items() for due in sequence if level[due] == number}
        for number in range(1, count + 1)
    ]


def local_numbers(plan: Plan, info: LeafInfo) -> dict[str, Any]:
    """What stages compute from a leaf's size on the host, where integers are exact."""
    placed = plan.placed[info.name]
    if info.layers is None:
        return _local_numbers(placed, info, plan)
    layer = dataclasses.replace(info, shape=info.shape[1:], layers=None)
    layers = [
        _local_numbers(jax.tree.map(lambda x, i=i: x[i], placed), layer, plan)
        for i in range(info.layers)
    ]
    return jax.tree.map(lambda *xs: _stack(xs), *layers)


def _local_numbers(placed: Sequence[Placed], info: LeafInfo, plan: Plan) -> dict[str, Any]:
    found = {}
    for p in placed:
        if p.role != "apply" or p.stage.build().local is None:
            continue
        if p.stage.kind == "each" and p.path not in plan.merged:
            if not plan.experts:  # a continual merge that is read, its experts gone
                continue
            stages = [at_expert(p.stage, i) for i in range(plan.experts)]
            several = [stage.build().local(info) for stage in stages]
            found[p.path] = jax.tree.map(lambda *xs: _stack(xs), *several)
        else:
            found[p.path] = p.stage.build().local(info)
    return found


def remember(memory: Any, current: Round, recalled: Any, experts: int) -> Any:
    """Extends what a round remembers of earlier experts by the totals of new ones."""
    assert current.recall is not None
    memory = current.recall.start if memory is None else memory
    for i in range(experts):
        memory = current.recall.extend(memory, jax.tree.map(lambda x, i=i: x[i], recalled))
    return memory


def solve(
    plan: Plan, path: str, totals: Sequence[Any], size: Any, recalled: Any, memory: Any
) -> Any:
    """Solves one round of a stage from its sums so far."""
    many = plan.experts if path not in plan.merged else None
    if plan.measured[path].build().rounds[len(totals) - 1].recall is not None:
        current = plan.measured[path].build().rounds[len(totals) - 1]
        memory = remember(memory, current, recalled, plan.experts)
    return solve_stage(plan.measured[path], many, totals, size, memory)


def solve_stage(
    stage: Stage, experts: int | None, totals: Sequence[Any], size: Any, memory: Any = None
) -> Any:
    """Solves the last of a stage's rounds; `experts` is None behind the reduction."""
    number = len(totals) - 1
    if stage.kind == "each" and experts is not None:
        several = []
        for i in range(experts):
            current = at_expert(stage, i).build().rounds[number]
            part = jax.tree.map(lambda x, i=i: x[i], list(totals))
            several.append(current.solve(part, size, None))
        return jax.tree.map(lambda *xs: _stack(xs), *several)
    return stage.build().rounds[number].solve(list(totals), size, memory)
