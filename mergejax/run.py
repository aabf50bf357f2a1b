"""The executors: one chain, driven leaf by leaf or as one pure function of whole trees.

Both make the passes that a plan lists, then one pass that applies the chain. They differ in their
arithmetic only: leafwise, every leaf is a small compiled program and the sums are exact on the
host; traced, everything is one expression of JAX, so that it may be jitted, mapped over settings
and differentiated.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import forms, hyper
from mergejax.chains import Placed
from mergejax.core import Array, Leaf
from mergejax.errors import MergeError, raise_all
from mergejax.leaves import LeafInfo
from mergejax.plan import Plan, depths_of, local_numbers, solve, with_arrays
from mergejax.randomness import fold_key, name_key
from mergejax.step import Due, Seen

AHEAD = 4  # leaves that are measured while the sums of one before them are awaited


class Values(NamedTuple):
    """The arrays of one leaf: base or None, experts, statistics by name (per expert, shared).

    `carried` is what a fold made of earlier experts; there it replaces them.
    """

    base: Any
    experts: Sequence[Any]
    stats: Mapping[str, Sequence[Any]] = {}
    shared: Mapping[str, Any] = {}
    carried: Any = None


Load = Callable[[str], Values]
Sink = Callable[[str, Sequence[Array]], None]
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an executor needs to know besides the plan.

    Attributes:
        names: names of the experts; they seed each expert's random numbers.
        seed: of all random numbers.
        count: 'all' leaves enter ranks and norms, or only those that are 'changed'.
        dtype: of the output, or None for the leaf's own.
        progress: called with (leaves done, leaves in all, name), or None.
        part: 'all', or one half of a chain with a fold: see `forms.run_leaf`.
        earlier: number of experts that a fold carries already.
        memory: by path, what rounds remember of those.
    """

    names: Sequence[str]
    seed: Any = 0
    count: str = "all"
    dtype: Any = None
    progress: Progress | None = None
    part: str = "all"
    earlier: Any = 0
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _program(
    placed: Sequence[Placed],
    leaf: Leaf,
    experts: Sequence[Array],
    local: Mapping[str, Any],
    names: Array,
    seed: Array,
    seen: Seen,
    *,
    form: forms.Form,
    due: Due | None,
    count: str,
    dtype: Any,
    part: str,
    check: bool,
) -> forms.Piece:
    """One leaf in one pass; with `check` its inputs are looked at for NaN and Inf, too."""
    leaf = leaf.replace(key=fold_key(leaf.key, seed))
    run = forms.run_layers if form.layered else forms.run_leaf

    def piece(leaf: Leaf, experts: Sequence[Array]) -> forms.Piece:
        found = run(placed, leaf, experts, names, seen, local, due, part)
        if due is None and part != "fold":
            found = [x.astype(dtype) for x in found]
        inputs = jax.tree.leaves((experts, leaf.base, leaf.stats)) if check else []
        if due is None:
            found, largest = _looked_at(found, inputs)
        else:
            _, largest = _looked_at(jnp.zeros(inputs[0].shape if inputs else ()), inputs)
        if due is None or count == "all" or leaf.base is None:
            return forms.Piece(found, jnp.bool_(True), largest)
        changed = [jnp.any(expert != leaf.base) for expert in experts]
        return forms.Piece(found, jnp.any(jnp.stack(changed)), largest)

    if form.block is None:
        whole = piece(leaf, experts)
    else:
        whole = forms.in_blocks(piece, leaf, experts, due, form.block)
    if due is None:
        return whole
    found = jax.tree.map(lambda x: jnp.where(whole.counts, x, jnp.zeros_like(x)), whole.found)
    return whole._replace(found=found)


def _looked_at(found: Any, inputs: Sequence[Array]) -> tuple[Any, Array]:
    """What was found, marked, and its largest magnitude, which is quicker than a count."""
    (first, *others), structure = jax.tree.flatten(found)
    first = forms.marked(first, inputs)
    several = [jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0) for x in (first, *others)]
    return jax.tree.unflatten(structure, [first, *others]), functools.reduce(jnp.maximum, several)


class Arithmetic(NamedTuple):
    """How an executor computes: the program of a leaf, and what sums are made of.

    With `alike`, leaves of one kind and shape whose stages are all elementwise are stacked and run
    as the layers of one leaf: inside a trace every leaf is compiled anew otherwise, and a sweep of
    TIES compiles three times as long. (XLA's batched linear algebra on the CPU is slower than one
    call a leaf, so other stages are left alone.) With `values`, these are known and looked at.
    """

    program: Callable[..., Any]
    alike: bool
    values: bool
    total: Callable[[Array], Any]
    add: Callable[[Any, Array], Any]
    size: Callable[[Array, int], Any]
    narrow: Callable[[Any], Any]


def _host_total(x: Array) -> np.ndarray:
    kind = np.int64 if jnp.issubdtype(x.dtype, jnp.integer) else np.float64
    return np.asarray(x).astype(kind)


def _host_add(total: np.ndarray, x: Array) -> np.ndarray:
    total += np.asarray(x)  # in place: a histogram is large beside a small leaf
    return total


def _narrow(x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype == np.float64:
        return x.astype(np.float32)
    return x.astype(np.int32) if x.dtype == np.int64 else x


LEAFWISE = Arithmetic(
    program=jax.jit(_program, static_argnames=("form", "due", "count", "dtype", "part", "check")),
    alike=False,
    values=True,
    total=_host_total,
    add=_host_add,
    size=lambda counts, size: size if bool(counts) else 0,
    narrow=_narrow,
)
# The program stays jitted: inside a trace, leaves of one shape then share one piece of the jaxpr.
TRACED = Arithmetic(
    program=LEAFWISE.program,
    alike=True,
    values=False,
    total=lambda x: x,
    add=lambda total, x: total + x,
    size=lambda counts, size: jnp.where(counts, size, 0),
    narrow=jnp.asarray,
)


def _leaf(info: LeafInfo, values: Values, earlier: Any) -> Leaf:
    layered = info.layers is not None
    return Leaf(
        base=values.base,
        depth=np.asarray(depths_of(info) if layered else info.depth, np.float32),  # type: ignore
        block=np.asarray(np.arange(info.layers) if layered else info.block, np.int32),  # type: ignore
        expert=earlier,
        key=_key(info),  # type: ignore[arg-type]
        start=np.zeros(2, np.uint32),  # type: ignore[arg-type]
        stats={name: list(several) for name, several in values.stats.items()},
        shared=dict(values.shared),
        carried=values.carried,
        role=info.role,
        layout=info.layout,
    )


def _is_elementwise(placed: Sequence[Placed]) -> bool:
    return all(p.role == "apply" and p.stage.elementwise for p in placed)


def _key(info: LeafInfo) -> np.ndarray:
    if info.layers is None:
        return name_key(info.name)
    return np.stack([name_key(info.name, str(layer)) for layer in range(info.layers)])


def _form(placed: Sequence[Placed], info: LeafInfo, values: Values, part: str) -> forms.Form:
    if info.layers is not None:
        return forms.Form(layered=True)
    # Places in a leaf are int32 inside the loop over its blocks.
    large = part == "all" and 2 * forms.BLOCK < info.size < 2**31
    if not large or not _is_elementwise(placed):
        return forms.Form()
    whole = [x for x in values.experts if isinstance(x, jax.Array) and not hyper.is_traced(x)]
    spread = any(len(x.sharding.device_set) > 1 for x in whole)
    return forms.Form(block=None if spread else forms.BLOCK)


def execute(
    plan: Plan,
    infos: Sequence[LeafInfo],
    load: Load,
    sink: Sink,
    settings: Settings,
    arithmetic: Arithmetic = LEAFWISE,
) -> None:
    """Makes all passes of a plan and hands every merged leaf to a sink.

    Args:
        plan: see `plan.make_plan`.
        infos: the leaves that are merged.
        load: (leaf name) -> its values; called once a pass.
        sink: (leaf name, one merged array or one per expert) -> None.
        settings: see `Settings`.
        arithmetic: `LEAFWISE` or `TRACED`.

    Raises:
        MergeError: a non-finite input, a non-finite result.
    """
    keys = np.array([name_key(name) for name in settings.names], np.uint32).reshape(-1, 2)
    names, seed = jnp.asarray(keys), jnp.asarray(settings.seed).astype(jnp.uint32)
    settings = dataclasses.replace(settings, earlier=jnp.asarray(settings.earlier, jnp.int32))
    distinct = {id(placed): placed for placed in plan.placed.values()}
    stages = {place: _as_data(placed) for place, placed in distinct.items()}
    seen: dict[str, tuple[Any, ...]] = {}
    totals: dict[str, list[Any]] = {}
    units = _units(plan, infos, arithmetic.alike and settings.count == "all")
    steps = sum(len(due) for due in plan.passes) + len(infos)
    done = 0
    if plan.passes and arithmetic is TRACED and sum(info.size for info in infos) >= 2**31:
        raise MergeError(
            "inside a trace a method that measures the whole model counts in 32 bits, and these "
            "leaves have 2^31 elements or more; call merge outside jit, vmap and grad"
        )
    for number, dues in enumerate([*plan.passes, None]):
        largest_of: dict[str, Array] = {}
        sums: dict[Due, tuple[Any, Any]] = {}
        waiting: collections.deque[tuple[Due, Any, Any, int]] = collections.deque()
        for unit in units:
            if dues is not None and unit[0].name not in dues:
                continue
            due = None if dues is None else dues[unit[0].name]
            form, *arguments = _arguments(plan, stages, unit, load, settings, arithmetic)
            try:
                found, counts, largest = arithmetic.program(
                    *arguments,
                    names,
                    seed,
                    seen,
                    form=form,
                    due=due,
                    count=settings.count,
                    dtype=jax.dtypes.canonicalize_dtype(settings.dtype or unit[0].dtype),
                    part=settings.part,
                    check=arithmetic.values and number == 0,
                )
            except MergeError as error:
                raise MergeError(f"leaf '{unit[0].name}': {error}") from None
            largest_of[unit[0].name] = largest
            if due is not None:
                waiting.append((due, found, counts, sum(info.size for info in unit)))
                if len(waiting) > AHEAD:
                    _add(sums, *waiting.popleft(), arithmetic)
            elif len(unit) == 1:
                sink(unit[0].name, found)
            else:
                for i, info in enumerate(unit):
                    sink(info.name, [x[i] for x in found])
            done += len(unit)
            if settings.progress is not None:
                settings.progress(done, steps, unit[-1].name)
        while waiting:
            _add(sums, *waiting.popleft(), arithmetic)
        if arithmetic.values and (number == 0 or dues is None):
            _refuse_non_finite(largest_of, load, settings)
        for (path, _), (size, (measured, recalled)) in sums.items():
            totals.setdefault(path, []).append(measured)
            memory = settings.memory.get(path)
            solved = solve(plan, path, totals[path], size, recalled, memory)
            seen[path] = (*seen.get(path, ()), jax.tree.map(arithmetic.narrow, solved))


def _units(plan: Plan, infos: Sequence[LeafInfo], alike: bool) -> list[list[LeafInfo]]:
    """The leaves one by one, or those together that go through one program in one shape."""
    if not alike:
        return [[info] for info in infos]
    units: dict[Any, list[LeafInfo]] = {}
    for info in infos:
        placed = plan.placed[info.name]
        kind = (info.shape, str(info.dtype), info.role, info.layout, info.stats)
        numbers = tuple(jnp.ndim(x) for x in jax.tree.leaves(_as_data(placed)))
        together = info.layers is None and _is_elementwise(placed)
        same = (kind, numbers, jax.tree.structure(placed))
        units.setdefault(same if together else info.name, []).append(info)
    return list(units.values())


def _arguments(
    plan: Plan,
    stages: Mapping[int, list[Placed]],
    unit: Sequence[LeafInfo],
    load: Load,
    settings: Settings,
    arithmetic: Arithmetic,
) -> tuple[Any, ...]:
    """The form and the arguments of a program: stages, leaf, experts, the leaf's own numbers."""
    gathered = []
    for info in unit:
        values = load(info.name)
        local = jax.tree.map(arithmetic.narrow, local_numbers(plan, info))
        leaf = _leaf(info, values, settings.earlier)
        placed = stages[id(plan.placed[info.name])]
        gathered.append((placed, leaf, list(values.experts), local))
    if len(unit) == 1:
        return _form(plan.placed[unit[0].name], unit[0], values, settings.part), *gathered[0]
    together, leaf, experts, local = jax.tree.map(lambda *xs: jnp.stack(xs), *gathered)
    first = gathered[0][1]
    layers = forms.Form(layered=True)
    return layers, together, leaf.replace(expert=first.expert, start=first.start), experts, local


def _as_data(placed: Sequence[Placed]) -> list[Placed]:
    return [dataclasses.replace(p, stage=with_arrays(p.stage)) for p in placed]


def _add(
    sums: dict, due: Due, found: Any, counts: Array, size: int, arithmetic: Arithmetic
) -> None:
    size = arithmetic.size(counts, size)
    if due not in sums:
        sums[due] = size, jax.tree.map(arithmetic.total, found)
    else:
        before, total = sums[due]
        sums[due] = before + size, jax.tree.map(arithmetic.add, total, found)


def _refuse_non_finite(largest_of: Mapping[str, Array], load: Load, settings: Settings) -> None:
    problems = []
    for name, largest in jax.device_get(dict(largest_of)).items():
        if np.isfinite(largest).all():
            continue
        values = load(name)
        owners = [f"expert '{expert}'" for expert in settings.names]
        sources = [
            (f"leaf '{name}' of {o}", x) for o, x in zip(owners, values.experts, strict=False)
        ]
        if values.base is not None:
            sources.append((f"leaf '{name}' of the base", values.base))
        for need, several in values.stats.items():
            of_leaf = f"statistic '{need}' of leaf '{name}' of"
            sources += [(f"{of_leaf} {o}", x) for o, x in zip(owners, several, strict=True)]
        bad = [(source, int((~jnp.isfinite(x)).sum())) for source, x in sources]
        problems += [
            f"{source} has {n} non-finite values (NaN or Inf); repair it or leave it out"
            for source, n in bad
            if n
        ]
        if not any(n for _, n in bad):
            problems.append(
                f"leaf '{name}' has non-finite values after merging although all inputs are "
                "finite; check for weights that sum to zero, or for a scaling that overflows"
            )
    raise_all(problems)
