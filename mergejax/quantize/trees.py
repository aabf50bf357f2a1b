"""Whole models in few bits."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergejax.core import Array
from mergejax.door import Tree, check_alike, check_statistics, leaves_by_name, statistics_by_leaf
from mergejax.errors import MergeError, raise_all
from mergejax.leaves import LeafInfo, as_matrix, describe
from mergejax.linalg.regression import by_groups
from mergejax.quantize.grid import Form, Range
from mergejax.quantize.solve import Codes, Settings, corrected, nearest, relaxed, values_of

KERNELS = ("kernel", "convolution")


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A model with its kernels in few bits.

    Attributes:
        kernels: codes by leaf name, in the [in, out] view.
        whole: all other leaves as they were.
        shapes: shape, dtype and layout of each kernel.
        bits: of a code.
    """

    kernels: Mapping[str, Codes]
    whole: Mapping[str, Any]
    shapes: Mapping[str, tuple[tuple[int, ...], str, str]]
    bits: int

    @property
    def size(self) -> int:
        """Bytes that the model takes, codes packed to the bit."""
        codes = sum(
            math.ceil(k.codes.size * self.bits / 8) + k.scale.size * 4 + k.zero.size * 2
            for k in self.kernels.values()
        )
        return codes + sum(np.asarray(x).nbytes for x in self.whole.values())


def round_to_nearest(
    params: Tree,
    *,
    bits: int = 4,
    group: int = 0,
    form: Form = "affine",
    span: Range = "whole",
    exclude: str | Sequence[str] = (),
    layout: str = "flax",
) -> Quantized:
    """Rounds every value of every kernel to the nearest of its output channel's grid.

    Args:
        params: a tree of arrays.
        bits: of a code, 2 to 16; files hold 4 or 8.
        group: inputs that share a scale; 0 for all of a kernel.
        form: 'affine' or 'symmetric' grids.
        span: of the grid: 'whole', or 'searched' for the least error.
        exclude: regular expressions of kernels that stay as they are.
        layout: 'flax' or 'torch'.

    Returns:
        A quantised model; `dequantize` makes arrays of it.

    Raises:
        MergeError: values out of range, a pattern that matches no leaf.

    Example:
        >>> params = {'kernel': jnp.asarray([[0.0], [1.2], [3.0]])}
        >>> print(dequantize(round_to_nearest(params, bits=2))['kernel'].ravel())
        [0. 1. 3.]
    """
    settings = _settings(bits, group, form, span)
    return _model(params, settings, exclude, layout, lambda name, w: nearest(w, settings))


def gptq(
    params: Tree,
    gram: Tree,
    *,
    bits: int = 4,
    group: int = 0,
    form: Form = "affine",
    span: Range = "whole",
    damping: float = 0.01,
    exclude: str | Sequence[str] = (),
    layout: str = "flax",
) -> Quantized:
    """Rounds row after row, moving the rows behind to make up for the error in the outputs.

    Args:
        params: a tree of arrays.
        gram: the Gram matrices of its own inputs by kernel (`mj.collect.gram`); kernels without
            are rounded to nearest.
        bits, group, form, span, exclude, layout: as in `round_to_nearest`.
        damping: of the Gram matrices, relative to their mean diagonal.

    Returns:
        A quantised model.

    Raises:
        MergeError: values out of range, Gram matrices that do not fit.

    Example:
        >>> params = {'kernel': jnp.asarray([[0.3], [0.7], [1.0]])}
        >>> gram = {'kernel': jnp.ones((3, 3))}  # inputs are all alike: only the sum matters
        >>> dequantize(gptq(params, gram, bits=2))['kernel'].sum().round(2).item()
        2.0

    GPTQ (Frantar et al., 2023, arXiv:2210.17323), without reordering of the inputs.
    """
    settings = _settings(bits, group, form, span, damping)
    grams = _grams(params, [gram], layout)

    def quantize(name: str, kernel: Array) -> Codes:
        if name not in grams:
            return nearest(kernel, settings)
        return by_groups(
            lambda ws, gs: corrected(ws[0], gs[0], settings, jnp.float32(damping)),
            [kernel],
            grams[name],
        )

    return _model(params, settings, exclude, layout, quantize)


def expert_guided(
    merged: Tree,
    experts: Sequence[Tree],
    grams: Sequence[Tree],
    *,
    anchor: float = 0.1,
    bits: int = 4,
    group: int = 0,
    form: Form = "affine",
    span: Range = "whole",
    damping: float = 0.01,
    exclude: str | Sequence[str] = (),
    layout: str = "flax",
) -> Quantized:
    r"""Quantises a merged model towards the outputs of the experts that it is made of.

    .. math:: \min_{\hat W}\ \sum_i\|X_i\hat W-X_iW_i\|^2+\mu\|\hat W-W_m\|^2,\qquad
        \mu=\rho\cdot mean\,diag\sum_iG_i

    over the grid: GPTQ of the best kernel :math:`W^*` in the metric of the objective.

    Args:
        merged: the merged model, a tree of arrays.
        experts: trees like it.
        grams: for each expert the mean Gram matrices of its layers' inputs by kernel.
        anchor: :math:`\rho`; 0 for the experts' outputs alone, a large one keeps the merged kernel
            and its rounding to nearest. Choose it on held-out data in [0.01, 10].
        bits, group, form, span, damping, exclude, layout: as in `gptq`.

    Returns:
        A quantised model; kernels without Gram matrices are rounded to nearest.

    Raises:
        MergeError: values out of range, models or Gram matrices that do not fit.

    Example:
        >>> merged = {'kernel': jnp.asarray([[0.0], [1.0]])}
        >>> experts = [{'kernel': jnp.asarray([[0.0], [x]])} for x in (2.0, 4.0)]
        >>> grams = [{'kernel': jnp.eye(2)}] * 2
        >>> found = expert_guided(merged, experts, grams, anchor=0.001, bits=8)
        >>> dequantize(found)['kernel'].round(2).ravel().tolist()
        [0.0, 3.0]

    E-PMQ (Wang et al., 2026, arXiv:2605.16882), its objective solved as the square that it is; no
    code of theirs is known, and how they set the anchor's strength is not known either.
    """
    settings = _settings(bits, group, form, span, damping)
    if not anchor >= 0:
        raise MergeError(f"expert_guided(anchor={anchor}) must be at least 0")
    leaves, _ = leaves_by_name(merged, "the merged model")
    several = [leaves_by_name(x, f"expert '{i}'")[0] for i, x in enumerate(experts)]
    check_alike(leaves, several, [f"expert '{i}'" for i in range(len(experts))])
    if not experts:
        raise MergeError("expert_guided has no expert to follow; pass at least one")
    known = _grams(merged, grams, layout, len(experts))
    layouts = {info.name: info.layout for info in _described(leaves, (), layout)}

    def guided(matrices: list[Array], grams: list[Array]) -> Codes:
        target, hessian = relaxed(matrices[0], matrices[1:], grams, jnp.float32(anchor))
        return corrected(target, hessian, settings, jnp.float32(damping))

    def quantize(name: str, kernel: Array) -> Codes:
        if name not in known:
            return nearest(kernel, settings)
        own = [as_matrix(_wide(expert[name]), layouts[name])[0] for expert in several]
        return by_groups(guided, [kernel, *own], known[name])

    return _model(merged, settings, exclude, layout, quantize)


def dequantize(model: Quantized, like: Tree | None = None) -> Any:
    """The arrays that a quantised model stands for.

    Args:
        model: of `round_to_nearest`, `gptq`, `expert_guided` or `load`.
        like: a tree of the same leaf names, in whose form to return them.

    Returns:
        Arrays by leaf name, or a tree like `like`.

    Example:
        >>> params = {'dense': {'kernel': jnp.eye(2)}}
        >>> dequantize(round_to_nearest(params), like=params)['dense']['kernel'].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    arrays = dict(model.whole)
    for name, kernel in model.kernels.items():
        shape, dtype, layout = model.shapes[name]
        _, restore = as_matrix(jnp.zeros(shape), layout)
        arrays[name] = restore(values_of(kernel)).astype(dtype)
    if like is None:
        return arrays
    leaves, back = leaves_by_name(like, "the model in `like`")
    raise_all(
        [f"dequantize: the quantised model has no leaf '{n}'" for n in leaves if n not in arrays]
    )
    return back(arrays)


def _model(
    params: Tree,
    settings: Settings,
    exclude: str | Sequence[str],
    layout: str,
    quantize: Callable[[str, Array], Codes],
) -> Quantized:
    leaves, _ = leaves_by_name(params, "the model")
    infos = {info.name: info for info in _described(leaves, exclude, layout)}
    kernels, shapes = {}, {}
    for name, info in infos.items():
        if info.role not in KERNELS or not info.layout:
            continue
        matrix, _ = as_matrix(_wide(leaves[name]), info.layout)
        if not bool(jnp.isfinite(matrix).all()):
            raise MergeError(f"leaf '{name}' has non-finite values and cannot be quantised")
        kernels[name] = quantize(name, matrix)
        shapes[name] = (info.shape, str(info.dtype), info.layout)
    if not kernels:
        raise MergeError("the model has no kernel to quantise; name roles by leaf, or exclude less")
    whole = {name: x for name, x in leaves.items() if name not in kernels}
    return Quantized(kernels, whole, shapes, settings.bits)


def _wide(x: Any) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _described(
    leaves: Mapping[str, Any], exclude: str | Sequence[str], layout: str
) -> list[LeafInfo]:
    specs = {name: (tuple(x.shape), x.dtype) for name, x in leaves.items()}
    return describe(specs, style=layout, exclude=exclude)


def _grams(
    params: Tree, grams: Sequence[Tree], layout: str, count: int = 1
) -> dict[str, list[Array]]:
    leaves, _ = leaves_by_name(params, "the model")
    shapes = {name: tuple(x.shape) for name, x in leaves.items()}
    found = statistics_by_leaf({"gram": grams}, shapes, count)
    check_statistics(_described(leaves, (), layout), found, values=True)
    return {name: [_wide(gram) for gram in known["gram"]] for name, known in found.items()}


def _settings(bits: int, group: int, form: Form, span: Range, damping: float = 0.01) -> Settings:
    problems = []
    if bits not in range(2, 17):
        problems.append(f"bits={bits} must be a whole number from 2 to 16")
    if not isinstance(group, int) or group < 0:
        problems.append(f"group={group} must be a number of inputs, or 0 for all of a kernel")
    if form not in ("affine", "symmetric"):
        problems.append(f"form='{form}' is unknown, choose 'affine' or 'symmetric'")
    if span not in ("whole", "searched"):
        problems.append(f"span='{span}' is unknown, choose 'whole' or 'searched'")
    if not damping >= 0:
        problems.append(f"damping={damping} must be at least 0")
    raise_all(problems)
    return Settings(bits, group, form, span)
