"""State dicts of PyTorch to variables of Flax and back, without a doubt about a single weight."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from flax import nnx, traverse_util

from mergejax.leaves import name_of
from mergejax.models.planning import Plan, fitting, plan
from mergejax.models.rules import COUNTER, Place


def from_torch(
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    ignore: str | Sequence[str] = (),
    padding: str = "error",
) -> tuple[nn.Module, dict[str, Any]]:
    """The Flax module and its variables from a state dict of PyTorch.

    Kernels are transposed, fused projections are taken apart, tied copies are compared and left
    out, running statistics of BatchNorm go to `batch_stats`, buffers that Flax does not need are
    left out (`plan(...).unused` names them). Every value stays as it is.

    Args:
        state: tensors of PyTorch, NumPy or JAX by name, as in files of the Hub or in memory;
            prefixes 'module.' and '_orig_mod.' are passed over.
        config: config.json; for residual networks {'architectures': ['resnet50']}.
        ignore: regular expressions of tensors to leave out.
        padding: of the vocabulary beyond the config's `vocab_size`: 'error', 'keep' or 'drop'.

    Returns:
        The module, and for its `apply` {'params': ..., perhaps 'batch_stats': ...} of NumPy arrays,
        views where that is possible.

    Raises:
        MergeError: everything that does not fit, see `plan`; tied tensors that differ.

    Example:
        >>> from mergejax.models import build, to_torch
        >>> config = {'model_type': 'gpt2', 'n_embd': 4, 'n_head': 2, 'n_layer': 1, 'n_inner': 5}
        >>> variables = build(config).init(jax.random.key(0), np.array([[1, 2]]))
        >>> state = to_torch(variables, config)
        >>> state['h.0.attn.c_attn.weight'].shape  # query, key and value in one
        (4, 12)
        >>> module, again = from_torch(state, config)
        >>> again['params']['block_0']['attention']['key']['kernel'].shape
        (4, 4)
    """
    arrays = {name: as_numpy(x) for name, x in state.items()}
    how = plan_of(arrays, config, ignore=ignore, padding=padding)
    flat = {}
    for leaf, place in how.places.items():
        x = arrays[how.given[place.name]]
        if how.rows is not None and x.shape[:1] > (how.rows,) == how.model.leaves[leaf][:1]:
            x = x[: how.rows]
        if place.parts > 1:
            x = np.split(x, place.parts, axis=place.axes[-1])[place.part]
        flat[leaf] = x.transpose(place.axes)
    return how.model.module, traverse_util.unflatten_dict(flat, sep="/")


def to_torch(
    variables: Any, config: Mapping[str, Any], *, like: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """The state dict of PyTorch from variables of Flax: the exact inverse of `from_torch`.

    Args:
        variables: {'params': ..., perhaps 'batch_stats': ...}.
        config: config.json.
        like: a state dict whose names the result takes: its spelling, its tied copies, and its
            buffers as they are. By default names are those of files on the Hub, tied copies and
            buffers are left out, and BatchNorm's counters are zero.

    Returns:
        Arrays by name, C-contiguous, of the leaves' types.

    Raises:
        MergeError: leaves that are missing or too many, another shape, names of `like` that do not
            fit.
    """
    flat = {
        name_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(variables)
    }
    shapes = {name: tuple(x.shape) for name, x in flat.items()}
    _, where = fitting(shapes, config)
    state = {}
    for name, parts in by_torch(where).items():
        pieces = [flat[leaf].transpose(np.argsort(place.axes)) for leaf, place in parts]
        axis = parts[0][1].axes[-1] if len(pieces) > 1 else 0
        joined = np.concatenate(pieces, axis=axis) if len(pieces) > 1 else pieces[0]
        state[name] = np.ascontiguousarray(joined).reshape(joined.shape)
    if like is None:
        return {**state, **{name: np.zeros((), np.int64) for name in counters(state)}}
    arrays = {name: as_numpy(x) for name, x in like.items()}
    how = plan_of(arrays, config)
    own = {given: state[name] for name, given in how.given.items()}
    copies = {given: state[name] for given, name in how.tied.items()}
    return {name: {**own, **copies}.get(name, arrays[name]) for name in arrays}


def plan_of(state: Mapping[str, Any], config: Mapping[str, Any], **options: Any) -> Plan:
    """The plan of a state dict in memory, tied copies compared."""
    arrays = {name: as_numpy(x) for name, x in state.items()}
    shapes = {name: tuple(x.shape) for name, x in arrays.items()}
    return plan(shapes, config, same=lambda a, b: same_bits(arrays[a], arrays[b]), **options)


def to_nnx(module: nn.Module, variables: Any, **inputs: Any) -> nnx.Module:
    """The same model as an NNX module, through Flax's bridge.

    Args:
        module: of linen, such as `from_torch` gives.
        variables: its variables.
        inputs: any inputs that it takes, by name; their values do not matter.

    Returns:
        An NNX module whose `nnx.Param` and `nnx.BatchStat` hold the variables' values, under the
        same names.

    Example:
        >>> from mergejax.models import build
        >>> config = {'model_type': 'gpt2', 'n_embd': 4, 'n_head': 2, 'n_layer': 1, 'n_inner': 5}
        >>> module, ids = build(config), np.array([[1, 2]])
        >>> model = to_nnx(module, module.init(jax.random.key(0), ids), input_ids=ids)
        >>> model.tokens['embedding'].shape
        (50257, 4)
    """
    bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(**inputs)
    state = nnx.state(bridged)
    pure: dict[tuple[Any, ...], Any] = {}
    for tree in variables.values():  # collections are told apart by kinds of variables, not names
        pure |= traverse_util.flatten_dict(tree)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(pure))
    nnx.update(bridged, state)
    return bridged


def by_torch(where: Mapping[str, Place]) -> dict[str, list[tuple[str, Place]]]:
    """The leaves that each of PyTorch's tensors consists of, in their order."""
    found: dict[str, list[tuple[str, Place]]] = {}
    for leaf, place in where.items():
        found.setdefault(place.name, []).append((leaf, place))
    return {name: sorted(parts, key=lambda pair: pair[1].part) for name, parts in found.items()}


def counters(names: Any) -> list[str]:
    """Names of the counters that BatchNorm has in PyTorch beside its running statistics."""
    return [n.replace("running_mean", COUNTER) for n in names if n.endswith("running_mean")]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same to the last bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def as_numpy(x: Any) -> np.ndarray:
    """An array of NumPy, JAX or PyTorch as NumPy's; bfloat16 and float8 of PyTorch, too."""
    if not type(x).__module__.startswith("torch"):
        return np.asarray(x)
    torch: Any = sys.modules["torch"]
    x = x.detach().cpu()
    name = str(x.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        bits = {1: torch.uint8, 2: torch.int16}[x.element_size()]
        return x.contiguous().view(bits).numpy().view(getattr(ml_dtypes, name))
    return x.numpy()
