"""A model of PyTorch and ours on the same inputs, layer by layer."""

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from mergejax.errors import MergeError, some
from mergejax.models import transfer

_OUTPUTS = ("logits", "logits_per_image", "image_embeds", "text_embeds", "last_hidden_state")


class Comparison(NamedTuple):
    """How far two models are apart, relative to the largest value of each layer.

    Attributes:
        layers: by PyTorch's name, in the order in which it runs them.
        output: of the logits, or the hidden states of a body.
    """

    layers: Mapping[str, float]
    output: float


def compare(
    reference: Any,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    variables: Any = None,
    tolerance: float = 1e-5,
) -> Comparison:
    r"""Runs a model of PyTorch and its Flax form on the same inputs and compares every layer.

    .. math:: error = \max|x - y| / \max|y|

    Args:
        reference: the model of PyTorch, in eval mode.
        config: config.json.
        inputs: by the argument names of both, as Flax takes them: images [n, height, width,
            channels].
        variables: of the Flax form; by default made of the reference's weights.
        tolerance: what counts as equal.

    Returns:
        The errors of every layer that the table of names has, and of the output.

    Raises:
        MergeError: naming the first layer that differs, or what does not fit.
    """
    if reference.training:
        raise MergeError("the reference is in training mode; call its .eval() first")
    state = reference.state_dict()
    if variables is None:
        _, variables = transfer.from_torch(state, config)
    how = transfer.plan_of(state, config)
    modules: dict[str, list[tuple[int, str]]] = {}
    for leaf, place in how.places.items():
        path, _, last = leaf.partition("/")[2].rpartition("/")
        if last in ("kernel", "scale", "embedding"):
            theirs = how.given[place.name].rpartition(".")[0]
            modules.setdefault(theirs, []).append((place.part, path))
    calls, wanted = _run(reference, modules, inputs)
    run = functools.partial(
        how.model.module.apply, capture_intermediates=True, mutable=["intermediates"]
    )
    # It runs once, so compiling costs more than running.
    apply = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    output, captured = apply(variables, **inputs)
    found = traverse_util.flatten_dict(captured["intermediates"], sep="/")
    layers = {}
    for name, results in calls.items():
        paths = [path for _, path in sorted(modules[name])]
        several = [found[f"{path}/__call__"] for path in paths]
        ours = [np.concatenate(parts, axis=-1) for parts in zip(*several, strict=True)]
        layers[name] = max(map(_error, ours, results))
        if not layers[name] <= tolerance:
            raise MergeError(
                f"the first layer that differs is '{name}' ({some(paths)} in Flax): by "
                f"{layers[name]:.2g} of its largest value, {tolerance:.0e} is allowed; the "
                f"{len(layers) - 1} layers before it agree"
            )
    output = output[0] if isinstance(output, tuple) else output
    error = _error(np.asarray(output), wanted)
    if not error <= tolerance:
        raise MergeError(
            f"all {len(layers)} layers agree, but the output differs by {error:.2g} of its largest "
            f"value, {tolerance:.0e} is allowed"
        )
    return Comparison(layers, error)


def _run(
    reference: Any, names: Collection[str], inputs: Mapping[str, Any]
) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """The outputs of some modules of PyTorch in the order of their first calls, and the result."""
    import torch

    calls: dict[str, list[np.ndarray]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            calls.setdefault(name, []).append(_channels_last(output))

        return hook

    modules = {name: module for name, module in reference.named_modules() if name in names}
    hooks = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(_channels_first(x)) for name, x in inputs.items()}
            result = reference(**tensors)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [getattr(result, name, None) for name in _OUTPUTS]
    return calls, _channels_last(next((x for x in outputs if x is not None), result))


def _channels_last(x: Any) -> np.ndarray:
    array = x.float().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def _channels_first(x: Any) -> np.ndarray:
    array = np.array(x)
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim == 4 else array


def _error(ours: Any, theirs: np.ndarray) -> float:
    x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if x.shape != y.shape:
        return float("inf")
    return float(np.abs(x - y).max() / max(np.abs(y).max(), np.finfo(np.float32).tiny))
