"""The vocabulary of merging: what a leaf is to a stage, and what a stage is.

A method is a chain of stages, each arithmetic on one parameter leaf of all experts. What a stage
needs to know about the whole model it measures: quantities that add up over leaves.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mergejax import hyper

Array = jax.Array
Space = typing.Literal["delta", "weights", "either"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "depth", "block", "expert", "key", "start", "stats", "shared", "carried"],
    meta_fields=["role", "layout"],
)
@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a stage may know about the leaf it works on.

    Attributes:
        base: the base's values, float32, or None when there is no base.
        depth: position in the network, float32 in [0, 1].
        block: index of the numbered block that the leaf belongs to, int32; -1 outside the blocks.
        expert: index of the expert, int32, in stages that see one expert at a time; the number of
            experts before these in all others.
        key: uint32[2], derived from the seed, the leaf's name, the expert's name and the place
            of the stage in its chain; `jax.random.wrap_key_data(leaf.key)` makes a JAX key of it.
        start: uint32[2], low and high half of the index of this block's first element in the leaf.
        stats: statistics of the experts by name, a list with one array per expert (the array
            itself in stages that see one expert at a time).
        shared: statistics by name that belong to no expert.
        carried: what a fold made of earlier experts, in continual merging; else None.
        role: 'kernel', 'convolution', 'embedding', 'norm', 'bias', ... (see `leaves.py`).
        layout: the meaning of the axes, for instance 'io' or 'oi' (see `leaves.py`).
    """

    base: Array | None
    depth: Array
    block: Array
    expert: Array
    key: Array
    start: Array
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    carried: Any = None
    role: str = ""
    layout: str = ""

    def replace(self, **changes: Any) -> "Leaf":
        return dataclasses.replace(self, **changes)


class Recall(NamedTuple):
    """A memory of the experts' whole-model quantities that one expert at a time can extend.

    Attributes:
        measure: (delta, leaf) -> pytree, summed over leaves, for one expert's raw delta.
        start: the memory before any expert.
        extend: (memory, total of one expert) -> memory.
    """

    measure: Callable[..., Any]
    start: Any
    extend: Callable[[Any, Any], Any]


class Round(NamedTuple):
    """One pass over the model: a pytree per leaf, summed over leaves, then solved.

    Attributes:
        measure: as the stage's `apply`, but returns a pytree of arrays; it is summed over leaves
            (integers in int64 and floats in float64 where the host adds them up).
        solve: (totals, size, memory) -> pytree that later rounds and `apply` see. `totals` are
            this stage's sums so far, `size` the number of elements that they cover, `memory` the
            recall's, or None. Written for arrays of NumPy and of JAX alike.
        recall: see `Recall`, or None.
    """

    measure: Callable[..., Any]
    solve: Callable[[Sequence[Any], Any, Any], Any] = lambda totals, size, memory: totals[-1]
    recall: Recall | None = None


class Parts(NamedTuple):
    """What a factory returns when a stage is more than one function.

    Attributes:
        apply: the stage's function; its arguments depend on the kind.
        rounds: whole-model measurements, in order.
        local: (`LeafInfo` of the leaf, or of one of its stacked layers) -> data that `apply` sees
            behind the rounds; evaluated on the host, where integers are exact.
        init: folds only: (leaf, zeros of the delta's shape) -> state before any expert.
        finish: folds only: (state, leaf, seen) -> merged.
        elementwise: whether the stage may be run on any part of a leaf, where that depends on
            its arguments; None leaves it to the factory.
        blocked: an elementwise form of a stage that needs its whole leaf: its rounds are summed
            over that leaf alone, so that leaves of any size go through memory in blocks.
    """

    apply: Callable[..., Any]
    rounds: tuple[Round, ...] = ()
    local: Callable[[Any], Any] | None = None
    init: Callable[..., Any] | None = None
    finish: Callable[..., Any] = lambda state, leaf, seen: state
    elementwise: bool | None = None
    blocked: "Parts | None" = None


@dataclasses.dataclass(frozen=True)
class Factory:
    """A function of hyper-parameters that builds stages, with what is true of all of them.

    Elementwise stages may be run on any part of a leaf. A stage for one expert that is `unrolled`
    runs expert by expert, and not on their stack.
    """

    function: Callable[..., Any]
    kind: str
    space: Space = "delta"
    elementwise: bool = False
    unrolled: bool = False
    needs: tuple[str, ...] = ()
    experts: int | None = None
    at_least: int = 1

    @property
    def name(self) -> str:
        return self.function.__name__

    @functools.cached_property
    def data_names(self) -> tuple[str, ...]:
        hints = typing.get_type_hints(self.function, include_extras=True)
        return tuple(n for n, hint in hints.items() if hyper.interval_of(hint) is not None)

    @functools.cached_property
    def per_expert(self) -> tuple[str, ...]:
        """The numbers that may be lists, with one number per expert."""
        if self.kind in ("each", "fold", "method"):  # these see one expert at a time
            return self.data_names
        hints = typing.get_type_hints(self.function, include_extras=True)
        return tuple(n for n in self.data_names if hyper.is_per_expert(hints[n]))

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        return {n: p.default for n, p in inspect.signature(self.function).parameters.items()}


@functools.cache
def _blocked(factory: Factory) -> Factory:
    """The factory of the same stages in their form for blocks."""

    @functools.wraps(factory.function)
    def function(*args: Any, **kwargs: Any) -> Parts:
        return factory.function(*args, **kwargs).blocked

    return dataclasses.replace(factory, function=function, elementwise=True)


@jax.tree_util.register_pytree_node_class
class Stage:
    """A factory with its arguments: a pytree whose leaves are the numeric hyper-parameters.

    Passing a stage through `jax.jit` or `jax.vmap` traces its numbers and keeps the rest static;
    the function is rebuilt inside the trace.
    """

    def __init__(self, factory: Factory, arguments: Mapping[str, Any]):
        self.factory = factory
        self.arguments = dict(arguments)

    @property
    def kind(self) -> str:
        return self.factory.kind

    def build(self) -> Any:
        """What the factory returns: `Parts` of a stage, or the chain that a method stands for."""
        return self._built

    @functools.cached_property
    def _built(self) -> Any:
        built = self.factory.function(**self.arguments)
        if self.kind in ("method", "coordinates") or isinstance(built, Parts):
            return built
        return Parts(apply=built)

    @property
    def elementwise(self) -> bool:
        """Whether the stage may be run on any part of a leaf."""
        own = self.build().elementwise if self.kind != "coordinates" else False
        return self.factory.elementwise if own is None else own

    @property
    def data(self) -> dict[str, Any]:
        return {name: self.arguments[name] for name in self.factory.data_names}

    def blocked(self) -> "Stage | None":
        """The stage in its form for blocks of a leaf, if it has one."""
        built = self.build() if self.kind not in ("method", "coordinates") else None
        if built is None or built.blocked is None:
            return None
        return Stage(_blocked(self.factory), self.arguments)

    def with_data(self, data: Mapping[str, Any]) -> "Stage":
        return Stage(self.factory, {**self.arguments, **data})

    def __or__(self, other: Any) -> Any:
        from mergejax.chains import chain  # chains are made of stages, so this way round

        return chain(self, other)

    def __repr__(self) -> str:
        shown = [
            f"{name}={_show(value)}"
            for name, value in self.arguments.items()
            if not _same(value, self.factory.defaults[name])
        ]
        return f"{self.factory.name}({', '.join(shown)})"

    def tree_flatten(self):
        data = self.data
        static = tuple((n, v) for n, v in self.arguments.items() if n not in data)
        return list(data.values()), (self.factory, tuple(data), static)

    @classmethod
    def tree_unflatten(cls, auxiliary, values):
        factory, names, static = auxiliary
        return cls(factory, {**dict(static), **dict(zip(names, values, strict=True))})


def _decorator(kind: str, space: Space = "delta") -> Callable[..., Any]:
    def decorate(function: Callable | None = None, /, **facts: Any) -> Any:
        if function is None:
            return functools.partial(decorate, **facts)
        factory = Factory(function, kind, **{"space": space, **facts})

        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            stage = Stage(factory, hyper.bind(function, args, kwargs))
            single = {n: v for n, v in stage.data.items() if n not in factory.per_expert}
            hyper.refuse_lists(factory.name, single)
            stage.build()  # what the function itself refuses is refused here, not while merging
            return stage

        make.factory = factory  # type: ignore[attr-defined]
        return make

    return decorate


each = _decorator("each")
joint = _decorator("joint")
reduce = _decorator("reduce")
fold = _decorator("fold")
refine = _decorator("refine")
restore = _decorator("restore")
method = _decorator("method", "either")
coordinates = _decorator("coordinates", "either")
each.__doc__ = """Declares a stage for one expert's delta: (d, leaf, seen) -> d.

Also valid behind the reduction, on the merged delta.
"""
joint.__doc__ = (
    """Declares a stage on all experts' deltas: (ds, leaf, seen) -> ds, lists of arrays."""
)
reduce.__doc__ = (
    """Declares a stage that makes one of N: (ds, leaf, seen) -> merged; ds is a list of arrays."""
)
fold.__doc__ = "Declares a reduction one expert at a time: (state, d, leaf, seen) -> state."
refine.__doc__ = "Declares a stage behind the reduction: (merged, ds, leaf, seen) -> merged."
restore.__doc__ = """Declares a stage that ends a chain with one model per expert again.

(merged, ds, leaf, seen) -> list of arrays, behind the reduction.
"""
coordinates.__doc__ = """Declares coordinates for `within`: a pair of functions, there and back.

(ds, leaf) -> (ds', context) with lists of arrays, and (x, context, leaf) -> x.
"""
method.__doc__ = "Declares a named method: a function of hyper-parameters that returns a chain."


def _show(value: Any) -> str:
    if hyper.is_traced(value):
        return "traced"
    if isinstance(value, np.ndarray | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, float):
        return f"{value:.6g}" if value != int(value) else repr(value)
    return repr(list(value) if isinstance(value, tuple) else value)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and not hyper.is_traced(value) and value == default
