"""Sums of a statistic over an iterable of batches, and the models and masks collectors take."""

import contextlib
import functools
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import FlaxError

from mergejax.errors import MergeError

_LEAKS = (
    jax.errors.UnexpectedTracerError,
    flax.errors.JaxTransformError,
    flax.errors.TraceContextError,
)
Progress = Callable[[int, int, str], None]
Mask = Callable[[Any], Any]


class Function(NamedTuple):
    """What collectors run: (params, batch) -> outputs."""

    call: Callable[..., Any]
    reusable: bool  # whether a trace may serve later calls; `call` is then the same object


def total(
    make: Callable[..., Callable[[Any, Any], Any]],
    function: Function,
    options: tuple[Hashable, ...],
    params: Any,
    items: Iterator[Any],
    count: int,
    progress: tuple[Progress | None, str],
) -> Any:
    """Σ statistic(params, item) over the items, in one donated accumulator on the device.

    The statistic is make(function.call, *options). Unless the function is reusable it is traced
    anew in every call, so that effects of tracing and changed closures are never missed.
    """
    steps = _steps if function.reusable else _steps.__wrapped__
    statistic, add = steps(make, function.call, *options)
    report, caller = progress
    sums = kind = None
    for done, item in enumerate(items, start=1):
        if sums is not None and jax.tree.structure(item) != kind:
            raise MergeError(
                f"{caller}: batch {done} is {jax.tree.structure(item[0])}, but the first was of "
                "another structure; give all batches the same keys"
            )
        with running(caller, f"batch {done}", item[0]):
            if sums is None:
                kind = jax.tree.structure(item)
                shapes = jax.eval_shape(statistic, params, item)
                sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            sums = add(sums, params, item)
        if report:
            report(done, count, caller)
    if sums is None:
        raise MergeError(
            f"{caller}: there is no batch to collect from; pass an iterable of at least one batch "
            "(a generator that was read before is empty)"
        )
    return sums


@contextlib.contextmanager
def running(caller: str, name: str, batch: Any) -> Iterator[None]:
    """Says in one sentence that a model does not take a batch, whatever it raises.

    Example:
        >>> with running("gram", "batch 1", np.ones((2, 3))):
        ...     np.ones((2, 3)) @ np.ones((4, 1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        mergejax.errors.MergeError: gram: the model does not run on batch 1 (float64[2,3]): ...
    """
    try:
        yield
    except _LEAKS as error:
        raise MergeError(
            f"{caller}: a layer runs inside a JAX transform (jax.vmap, jax.checkpoint, "
            "jax.lax.scan); call the model on whole batches, with Flax's own nn.remat, nn.scan, "
            "nnx.remat, ..."
        ) from error
    except (FlaxError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, MergeError):
            raise
        shown = ", ".join(
            f"{x.dtype}[{','.join(map(str, x.shape))}]" if hasattr(x, "shape") else repr(x)[:20]
            for x in jax.tree.leaves(batch)
        )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = re.sub(r" \(https\S+\)$", "", reason).rstrip(".")
        raise MergeError(
            f"{caller}: the model does not run on {name} ({shown or 'nothing'}): {reason}; give "
            "batches of the shape that the model was trained on, and models of one structure"
        ) from error


@functools.lru_cache(maxsize=16)
def _steps(make: Callable[..., Any], *arguments: Hashable) -> tuple[Any, Any]:
    statistic = jax.jit(make(*arguments))

    def add(sums, params, item):
        return jax.tree.map(jnp.add, sums, statistic(params, item))

    return statistic, jax.jit(add, donate_argnums=0)


def length(batches: Iterable[Any], caller: str) -> int:
    """How many batches there are, 0 where the iterable does not know."""
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise MergeError(
            f"{caller}: the batches are {batches!r}, expected an iterable of them such as a list"
        )
    return len(batches) if isinstance(batches, Sized) else 0


def row_weights(mask: Mask | None, batch: Any, caller: str) -> np.ndarray | None:
    """The weights of a batch's rows as float32, checked."""
    if mask is None:
        return None
    weights = np.asarray(mask(batch), np.float32)
    if weights.ndim == 0 or not np.isfinite(weights).all() or (weights < 0).any():
        raise MergeError(
            f"{caller}: mask(batch) gave shape {weights.shape} with values from "
            f"{weights.min()} to {weights.max()}, expected an array with one weight of at least "
            "0 for every example or token"
        )
    return weights


def nnx_parts(model: nnx.Module, params: Any) -> tuple[Callable[[Any], Any], Any]:
    """(params -> a fresh model in evaluation mode, the params to use) of an NNX model."""
    graph, own, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    def build(params):
        merged = nnx.merge(graph, params, rest)
        merged.eval()
        return merged

    return build, own if params is None else params


def as_function(model: Any, params: Any) -> tuple[Function, Any]:
    """The function to run and its params, of a function, a linen or an NNX model."""
    if isinstance(model, nn.Module):
        return Function(*_linen_call(model)), params
    if isinstance(model, nnx.Module):
        build, params = nnx_parts(model, params)
        return Function(lambda params, batch: build(params)(batch), False), params
    # A function that was compiled before would be replayed without being traced, so it is
    # unwrapped; its author has promised that one trace serves all calls.
    jitted = isinstance(model, jax.stages.Wrapped) and hasattr(model, "__wrapped__")
    return Function(model.__wrapped__ if jitted else model, jitted), params


def _linen_call(model: nn.Module) -> tuple[Callable[[Any, Any], Any], bool]:
    try:
        return _shared_linen_call(model), True
    except TypeError:  # a model with an unhashable attribute
        return _shared_linen_call.__wrapped__(model), False


@functools.lru_cache(maxsize=16)
def _shared_linen_call(model: nn.Module) -> Callable[[Any, Any], Any]:
    return lambda params, batch: model.apply({"params": params}, batch)
