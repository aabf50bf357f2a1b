"""Hyper-parameters picked on validation images: a whole grid of settings in one compiled program.

A chain is a pytree whose leaves are its numbers. The chains of a grid that differ in numbers only
have one structure; their numbers are stacked and the settings run in a `jax.lax.map` under one
compilation. Settings that differ in words or switches have other structures: a program for each.
Methods that take leaves as matrices, as spectral ones do, are merged leaf by leaf instead: in one
program each leaf would be compiled anew, for minutes.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import api, calibration, chains, errors, language, registry
from mergejax.chains import walk
from mergejax.outer import simplex_points

Tree = Any
EMPHASIS = "emphasis"  # a weight that each expert in turn has, the others having 1
COEFFICIENTS = "coefficients"  # how many points of the simplex, as weights of the experts


class Recipe(NamedTuple):
    """A chain with gaps, and the values to try in them."""

    template: str
    grid: Mapping[str, tuple[Any, ...]]


# A value for each group of layers: no grid, see `mergejax.bayesian_groups`.
GROUPED: dict[str, dict[str, Any]] = {
    "bayesian_groups": {
        "groups": ("attention/(query|key|value)", "attention", ".*"),
        "ridge": (1e-3, 1e2),
        "scaling": (0.5, 2.5),
        "anchor_scaling": 0.3,
        "trials": 50,
    }
}
SPECTRAL = (0.3, 0.5, 0.8, 1.0, 1.3, 1.6, 2.0)  # scalings
RECIPES: dict[str, Recipe] = {
    "linear": Recipe("linear(weights={emphasis})", {EMPHASIS: (0.5, 2.0, 4.0)}),
    "task_arithmetic": Recipe(
        "task_arithmetic(scaling={scaling})",
        {"scaling": (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)},
    ),
    "ties": Recipe(
        "ties(density={density}, scaling={scaling})",
        {
            "density": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
            "scaling": (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
        },
    ),
    "dare": Recipe(
        "dare(rate={rate}, scaling={scaling})",
        {"rate": (0.1, 0.3, 0.5, 0.7, 0.9), "scaling": (0.15, 0.2, 0.25, 0.3, 0.4)},
    ),
    "dare_ties": Recipe(
        "drop(rate={rate})|ties(density={density}, scaling={scaling})",
        {"rate": (0.1, 0.3, 0.5), "density": (0.3, 0.6, 1.0), "scaling": (0.6, 1.0, 1.4)},
    ),
    "lines": Recipe(
        "task_arithmetic(scaling={scaling})|lines(alpha={alpha}, beta={beta})",
        {"scaling": (0.4, 0.8), "alpha": (0.3, 0.6, 1.0), "beta": (0.2, 0.5, 0.9, 1.3)},
    ),
    "lines_multi_task": Recipe(
        "task_arithmetic(scaling=1.0)|lines_multi_task(beta={beta})",
        {"beta": (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5)},
    ),
    "slerp": Recipe("slerp(t={t})", {"t": (0.3, 0.4, 0.5, 0.6, 0.7)}),
    "fisher": Recipe("fisher(floor={floor})", {"floor": (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)}),
    # The authors' search of the coefficients: a grid for two experts, else draws.
    "fisher_coefficients": Recipe("fisher(weights={coefficients})", {COEFFICIENTS: (51,)}),
    "regmean": Recipe("regmean(shrink={shrink})", {"shrink": (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0)}),
    "opcm": Recipe("opcm(alpha={alpha})", {"alpha": (0.3, 0.5, 0.7)}),
    "consensus": Recipe(
        "consensus(threshold={threshold}, scaling={scaling})",
        {
            "threshold": (0.2, 0.3, 0.4, 0.5, 0.6),
            "scaling": (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
        },
    ),
    **{
        name: Recipe(f"{name}(scaling={{scaling}})", {"scaling": SPECTRAL})
        for name in ("tsv_merge", "iso_c", "iso_cts")
    },
}


# What the main job runs unless it is told.
USUAL = (
    *("average", "linear", "task_arithmetic", "ties", "dare", "dare_ties", "lines"),
    *("lines_multi_task", "slerp", "fisher", "regmean", "opcm"),
)
# A few of each kind, for reduced suites: averages and sums, sparse ones, modifiers, spectral ones,
# and those that read statistics.
FEW = (
    *("average", "task_arithmetic", "ties", "dare", "consensus", "lines"),
    *("tsv_merge", "iso_c", "iso_cts", "opcm", "fisher", "regmean"),
)


def grids(limit: int | None = None) -> dict[str, dict[str, Any]]:
    """The values to try, by method and parameter; a config's `search` starts from a copy.

    Behind them stands how `GROUPED` is searched.

    Args:
        limit: how many values of each parameter to keep at most, the middles of equal parts; None
            for all.

    Example:
        >>> grids(limit=2)["opcm"], grids(limit=2)["task_arithmetic"]
        ({'alpha': (0.3, 0.7)}, {'scaling': (0.2, 0.6)})
    """

    def thinned(values: tuple[Any, ...]) -> tuple[Any, ...]:
        count = min(limit or len(values), len(values))
        places = (np.arange(count) + 0.5) * len(values) / count - 0.5
        return tuple(values[i] for i in places.round().astype(int))

    values = {
        name: {parameter: thinned(values) for parameter, values in recipe.grid.items()}
        for name, recipe in RECIPES.items()
    }
    return values | {name: dict(settings) for name, settings in GROUPED.items()}


def known() -> list[str]:
    """The methods that can be named: all that are registered, and the compositions of this file."""
    alone = [name for name, entry in registry.METHODS.items() if not entry.modifier]
    return list(dict.fromkeys([*alone, *RECIPES]))


def applicable(experts: int, everything: bool = False) -> tuple[list[str], list[str]]:
    """The methods for this many experts, and a sentence about each method that is left out.

    Args:
        experts: how many there are.
        everything: whether all registered methods are meant, with their default values where
            this file has no recipe; otherwise those of the main job.
    """
    names, left_out = [], []
    for name in known() if everything else USUAL:
        entry = registry.METHODS.get(name)
        if entry and entry.experts not in (None, experts):
            why = f"it takes {entry.experts} experts and there are {experts}"
        elif entry and name not in RECIPES and not chains.reduces(entry.make()):
            why = "it gives one model per expert"
        elif entry and (lost := set(chains.chain(entry.make()).needs) - {*calibration.COLLECTORS}):
            why = f"the launcher does not collect {errors.some(sorted(lost))} for it"
        else:
            names.append(name)
            continue
        left_out.append(f"{name}: left out, {why}")
    return names, left_out


def settings(method: str, grid: Mapping[str, Any], experts: int) -> list[str]:
    """The chains to try for a method; one chain where there is nothing to search.

    Args:
        method: a name of `known()`, or any chain in the string language.
        grid: by method and parameter the values to try, such as `grids()`.
        experts: number of experts.

    Returns:
        Chains in the string language, each once.

    Raises:
        MergeError: an unknown name, or whatever `mj.parse` refuses.

    Example:
        >>> settings("ties", {"ties": {"density": (0.1, 0.2), "scaling": (1.0,)}}, experts=2)
        ['ties(density=0.1, scaling=1.0)', 'ties(density=0.2, scaling=1.0)']
        >>> settings("drop(rate=0.5)|average()", {}, experts=2)
        ['drop(rate=0.5)|average()']
    """
    if method.isidentifier() and method not in (*known(), *registry.PIECES):
        hint = errors.did_you_mean(method, (*known(), *registry.PIECES))
        raise errors.MergeError(f"config.methods: no method is called '{method}', {hint}")
    if method not in RECIPES:
        language.parse(method)
        return [method if "(" in method else f"{method}()"]
    values = {name: _listed(name, found, experts) for name, found in grid[method].items()}
    points = itertools.product(*values.values())
    template = RECIPES[method].template
    found = [template.format(**dict(zip(values, point, strict=True))) for point in points]
    for chain in found:
        language.parse(chain)
    if not found:
        raise errors.MergeError(f"config.search.{method}: there is no value to try; give one")
    return list(dict.fromkeys(found))


def _listed(parameter: str, values: Sequence[Any], experts: int) -> tuple[Any, ...]:
    if parameter == EMPHASIS:
        return _emphasised(values, experts)
    if parameter == COEFFICIENTS:
        return tuple(point for count in values for point in simplex_points(experts, count))
    return tuple(values)


def _emphasised(values: Sequence[float], experts: int) -> tuple[list[float], ...]:
    return tuple(
        [float(value) if i == chosen else 1.0 for i in range(experts)]
        for chosen in range(experts)
        for value in values
    )


class Program(NamedTuple):
    """The compiled search of all chains that differ in numbers only.

    Attributes:
        members: positions of the chains.
        whole: whether their merges are part of the program, rather than done leaf by leaf.
        call: (base, experts, stats, data) -> what `measure` returned, [members, ...].
        seconds: to trace and compile it.
    """

    members: list[int]
    whole: bool
    call: Callable[..., jax.Array]
    seconds: float


class Search(NamedTuple):
    """What a search found.

    Attributes:
        measured: one row per chain: what `measure` returned for its merge.
        programs: number of compiled programs that took settings together.
        compile_seconds: to trace and compile them.
        seconds: to run them.
    """

    measured: np.ndarray
    programs: int
    compile_seconds: float
    seconds: float


def prepare(
    chains: Sequence[str],
    base: Tree,
    experts: Sequence[Tree],
    measure: Callable[[Tree, Any], jax.Array],
    data: Any,
    *,
    names: Sequence[str],
    seed: int,
    stats: Mapping[str, Sequence[Tree]] | None = None,
) -> list[Program]:
    """Compiles the merges and measurements of many settings; shapes alone are enough for it.

    Args:
        chains: in the string language.
        base: the base's parameters; here and below arrays or `jax.ShapeDtypeStruct`.
        experts: trees like the base.
        measure: (merged parameters, data) -> array; traced.
        data: pytree of arrays that `measure` needs.
        names: of the experts.
        seed: of random masks; the same as in the final merge gives the same masks.
        stats: statistics that the chains need.

    Returns:
        A program for all chains that differ in numbers only.
    """
    merge = functools.partial(api.merge, names=names, seed=seed)
    programs = []
    for structure, members in _groups(chains).items():
        first = language.parse(chains[min(members)])
        whole = all(stage.elementwise for stage in walk(first))
        started = time.perf_counter()
        if whole:
            arguments = (base, list(experts), dict(stats or {}), data)
            call = _together(structure, list(members.values()), merge, measure, arguments)
        else:
            measured = jax.jit(measure).lower(base, data).compile()
            call = _one_by_one([chains[i] for i in members], merge, measured)
        programs.append(Program(list(members), whole, call, time.perf_counter() - started))
    return programs


def _together(structure, settings, merge, measure, arguments):
    """Merges and measurements of all settings, [[numbers]], in one program."""
    numbers = [jnp.asarray(column, jnp.float32) for column in zip(*settings, strict=True)]

    def run(numbers, base, experts, stats, data):
        def one(values):
            method = jax.tree.unflatten(structure, values)
            return measure(merge(method, base, experts, stats=stats), data)

        return jax.lax.map(one, numbers) if numbers else one([])[None]

    return functools.partial(jax.jit(run).lower(numbers, *arguments).compile(), numbers)


def _one_by_one(chains, merge, measured):
    """Merges by the usual executor, whose programs serve all leaves of a shape and all settings."""

    def call(base, experts, stats, data):
        merges = (merge(chain, base, experts, stats=stats) for chain in chains)
        return jnp.stack([measured(merged, data) for merged in merges])

    return call


def search(
    programs: Sequence[Program],
    base: Tree,
    experts: Sequence[Tree],
    data: Any,
    *,
    stats: Mapping[str, Sequence[Tree]] | None = None,
    advance: Callable[[int], object] = lambda n: None,
) -> Search:
    """Merges and measures many settings.

    Args:
        programs: what `prepare` returned for trees and data of these shapes.
        base: the base's parameters.
        experts: trees like the base.
        data: as for `prepare`.
        stats: as for `prepare`.
        advance: told the number of settings after each program.

    Returns:
        A `Search` with a row for each chain, in their order.

    Example:
        >>> base, expert = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> chains = [f"task_arithmetic(scaling={scaling})" for scaling in (0.5, 1.0, 2.0)]
        >>> measure = lambda merged, data: merged["w"].sum() + data
        >>> programs = prepare(chains, base, [expert], measure, jnp.float32(1), names=["a"], seed=0)
        >>> search(programs, base, [expert], jnp.float32(1)).measured.tolist()
        [2.0, 3.0, 5.0]
    """
    rows: dict[int, np.ndarray] = {}
    started = time.perf_counter()
    for program in programs:
        found = program.call(base, list(experts), dict(stats or {}), data)
        rows |= dict(zip(program.members, np.asarray(found), strict=True))
        advance(len(program.members))
    return Search(
        measured=np.stack([rows[i] for i in range(len(rows))]),
        programs=sum(program.whole for program in programs),
        compile_seconds=sum(program.seconds for program in programs),
        seconds=time.perf_counter() - started,
    )


def _groups(chains: Sequence[str]) -> dict[Any, dict[int, list[float]]]:
    """The numbers of each chain by its position, chains of one structure together."""
    groups: dict[Any, dict[int, list[float]]] = {}
    for i, chain in enumerate(chains):
        numbers, structure = jax.tree.flatten(language.parse(chain))
        groups.setdefault(structure, {})[i] = numbers
    return groups


def best(accuracies: np.ndarray) -> int:
    """The row with the highest mean; the first of those that are equal but for rounding.

    Args:
        accuracies: [settings, tasks].

    Example:
        >>> best(np.array([[0.5, 0.9], [0.9, 0.5], [0.2, 0.8]]))
        0
    """
    return int(np.argmax(np.round(accuracies.mean(axis=1), 9)))
