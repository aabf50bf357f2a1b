"""Reads the inputs of layers while a model runs, without touching the model's code.

What a tap measures is stored in the model's own state (a sown collection in linen, a variable in
NNX), because that is what passes through `remat`, `jit` and `scan`; a Python variable would not.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from flax.core.scope import in_filter, union_filters
from flax.linen import module as linen

from mergejax.collect.rows import KERNELS, leaf_of
from mergejax.errors import MergeError, some
from mergejax.leaves import name_of

# (layer, leaf name of its parameter, inputs) -> arrays to be summed, or None to pass it over
Measure = Callable[[Any, str, jax.Array], Any]
# (layer, leaf name of its parameter, outputs) -> what the model goes on with
Probe = Callable[[Any, str, jax.Array], jax.Array]
Function = Callable[[Any, Any], Any]

KEY = "mergejax_measured"
TAP = "mergejax_tap"
LEAVES = ("kernel", "scale", "embedding")  # a layer has one of them, and is named after it
COLLECTION = "intermediates"  # the one that models list in nn.scan(variable_axes=...)
_fresh = itertools.count()


class Measured(nnx.Variable):
    """What a tap measured at an NNX layer."""


@dataclasses.dataclass
class _Run:
    """What is known while one call of a function is traced."""

    names: dict[int, str]  # identity of a leaf of params -> its name
    frames: list[dict[str, str]]  # for each open apply: leaf name inside it -> name in params
    calls: dict[str, int]  # taps of each layer, in the order of the first ones
    sums: dict[str, Any]
    lost: dict[str, None]  # measured, but the model's state did not take it


def unchanged(layer: Any, name: str, output: jax.Array) -> jax.Array:
    """The probe that does nothing."""
    return output


def tap_linen(
    function: Function,
    params: Any,
    batch: Any,
    measure: Measure,
    probe: Probe = unchanged,
    kinds: tuple[type, ...] = KERNELS,
) -> tuple[dict[str, Any], Any]:
    """Runs function(params, batch) and measures the inputs of every linen layer of these kinds.

    A layer is named after its parameter's place in `params`: the arrays that reach `Module.apply`
    are recognised by identity, so the function may hand on any part of `params`.

    Returns:
        The sums of what was measured, by leaf name, in the order of the calls; the outputs.
    """
    run = _Run({id(leaf): name_of(path) for path, leaf in _leaves(params)}, [], {}, {}, {})
    intercepted = nn.intercept_methods(_interceptor(run, measure, probe, kinds))
    with intercepted, _replaced(linen, "apply", _collecting(run, linen.apply)):
        output = function(params, batch)
    if run.lost:
        raise MergeError(
            f"{some(list(run.lost))} run inside nn.scan or nn.vmap that passes nothing out; "
            f"add '{COLLECTION}': 0 to its variable_axes, or unroll the layers"
        )
    return _ordered(run.sums, run.calls), output


def _collecting(run: _Run, original: Callable[..., Any]) -> Callable[..., Any]:
    """Flax's `apply`, which `Module.apply` calls, so that it also collects what is sown."""

    def apply(function, module, mutable=False, **options):
        # The second name is new in every call: nn.jit then never replays an older trace.
        wanted = union_filters(union_filters(mutable, COLLECTION), f"{KEY}_{next(_fresh)}")
        applied = original(function, module, mutable=wanted, **options)

        def call(variables, *args, **kwargs):
            tree = nn.meta.unbox(variables.get("params", {}))
            frame = {name_of(path): run.names.get(id(leaf), "") for path, leaf in _leaves(tree)}
            run.frames.append(frame)
            try:
                output, state = applied(variables, *args, **kwargs)
            finally:
                run.frames.pop()
            for path, value in traverse_util.flatten_dict(state.get(COLLECTION, {})).items():
                if path[-1] == KEY:
                    places = ("/".join([*path[:-1], leaf]) for leaf in LEAVES)
                    name = next(frame[place] for place in places if place in frame)
                    run.sums[name] = _add(run.sums.get(name), value)
            rest = {key: value for key, value in state.items() if in_filter(mutable, key)}
            return output if mutable is False else (output, rest)

        return call

    return apply


def _interceptor(
    run: _Run, measure: Measure, probe: Probe, kinds: tuple[type, ...]
) -> Callable[..., Any]:
    def intercept(call, args, kwargs, context):
        layer: Any = context.module
        tapped = context.method_name == "__call__" and isinstance(layer, kinds)
        leaf = leaf_of(layer) if tapped else None
        if leaf is None:
            return call(*args, **kwargs)
        local = "/".join([*layer.path, leaf])
        name = run.frames[-1].get(local, "") if run.frames else ""
        before = run.calls.get(name)
        output = call(*args, **kwargs)
        # A subclass that calls its parent's __call__ passes here twice; the inner pass counts.
        if layer.is_initializing() or run.calls.get(name) != before:
            return output
        if not name:
            raise MergeError(
                f"'{local}' is no leaf of params; hand the leaves "
                "of params unchanged to Module.apply (cast or transform them before)"
            )
        run.calls[name] = run.calls.get(name, 0) + 1
        value = measure(layer, name, _inputs(args, kwargs))
        if value is not None and not layer.sow(
            COLLECTION, KEY, value, init_fn=lambda: None, reduce_fn=_add
        ):
            run.lost[name] = None
        return probe(layer, name, output)

    return intercept


def tap_nnx(
    build: Callable[[Any], Any],
    params: Any,
    batch: Any,
    measure: Measure,
    probe: Probe = unchanged,
    kinds: tuple[type, ...] = KERNELS,
) -> tuple[dict[str, Any], Any]:
    """Runs the NNX model build(params) on the batch and measures its layers of these kinds.

    Returns:
        The sums of what was measured, by leaf name, in the order of the calls; the outputs.
    """
    model = build(params)
    calls: dict[str, None] = {}
    names: dict[Any, str] = {}
    fresh = next(_fresh)
    for path, module in nnx.iter_modules(model):
        # Static, so it survives the split and merge of nnx transforms; the number is new in
        # every call: nnx.jit then never replays an older trace.
        if isinstance(module, kinds) and leaf_of(module) is not None:
            names[path] = "/".join([*map(str, path), str(leaf_of(module))])
            setattr(module, TAP, (names[path], fresh))

    def tapped(original):
        @functools.wraps(original)
        def call(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            if hasattr(self, TAP):
                name = getattr(self, TAP)[0]
                calls[name] = None
                _store(self, measure(self, name, _inputs(args, kwargs)))
                output = probe(self, name, output)
            return output

        return call

    with contextlib.ExitStack() as stack:
        for layer in (kind for kind in kinds if issubclass(kind, nnx.Module)):
            stack.enter_context(_replaced(layer, "__call__", tapped(layer.__call__)))
        output = model(batch)
    state = nnx.to_flat_state(nnx.pop(model, Measured))
    sums = {names[path[:-1]]: value.get_value() for path, value in state}
    return _ordered(sums, calls), output


def _store(module: nnx.Module, value: Any) -> None:
    if value is not None and hasattr(module, KEY):
        variable = getattr(module, KEY)
        variable.set_value(_add(variable.get_value(), value))
    elif value is not None:
        setattr(module, KEY, Measured(value))


def _ordered(sums: dict[str, Any], calls: Iterable[str]) -> dict[str, Any]:
    return {name: sums[name] for name in (*calls, *sums) if name in sums}


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
    return jnp.asarray(args[0] if args else kwargs.get("inputs", kwargs.get("x")))


def _add(total: Any, value: Any) -> Any:
    return value if total is None else jax.tree.map(jnp.add, total, value)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)
