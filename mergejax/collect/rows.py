"""The input rows that multiply the canonical [in, out] matrix of a layer's kernel."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

KERNELS = (nn.Dense, nn.DenseGeneral, nn.Conv, nnx.Linear, nnx.LinearGeneral, nnx.Conv)
NORMS = (nn.LayerNorm, nn.RMSNorm, nnx.LayerNorm, nnx.RMSNorm)
BATCH_NORMS = (nn.BatchNorm, nnx.BatchNorm)
EMBEDDINGS = (nn.Embed, nnx.Embed)
GENERAL = (nn.DenseGeneral, nnx.LinearGeneral)
CONVOLUTION = (nn.Conv, nnx.Conv)


def leaf_of(layer: Any) -> str | None:
    """The parameter that a layer is named after; None for a norm without a scale."""
    if isinstance(layer, NORMS + BATCH_NORMS):
        return "scale" if layer.use_scale else None
    return "embedding" if isinstance(layer, EMBEDDINGS) else "kernel"


def groups_of(layer: Any) -> int:
    """The groups of a convolution, whose rows are the inputs of the groups one after the other."""
    return layer.feature_group_count if isinstance(layer, CONVOLUTION) else 1


def refusal(layer: Any) -> str | None:
    """Why one matrix cannot stand for the layer, if it cannot."""
    if groups_of(layer) != 1:
        return f"is a grouped convolution ({groups_of(layer)} groups)"
    return several_kernels(layer)


def several_kernels(layer: Any) -> str | None:
    """Why not even one matrix for each group can stand for the layer, if it cannot."""
    batch_axes = getattr(layer, "batch_dims", None) or getattr(layer, "batch_axis", None)
    if isinstance(layer, GENERAL) and batch_axes:
        return "has one kernel per entry of a batch axis"
    return None


def input_rows(layer: Any, inputs: jax.Array) -> jax.Array:
    """Rows [..., in] so that rows @ kernel-as-matrix is the layer's output without bias.

    Those of a grouped convolution are [..., groups · in].

    Dense: the inputs. DenseGeneral: the contracted axes, flattened in order. Conv: the patches
    under the kernel, channel first, the order of `mergejax.leaves.as_matrix`.
    """
    if isinstance(layer, CONVOLUTION):
        return _patches(layer, inputs)
    if isinstance(layer, GENERAL):
        axes = sorted(axis % inputs.ndim for axis in np.atleast_1d(layer.axis).tolist())
        moved = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
        return moved.reshape(*moved.shape[: -len(axes)], -1)
    return inputs


def _patches(layer: Any, inputs: jax.Array) -> jax.Array:
    size = tuple(np.atleast_1d(layer.kernel_size).tolist())
    rank = len(size)
    batch = inputs.shape[: -rank - 1]
    x = inputs.reshape(-1, *inputs.shape[-rank - 1 :])
    strides, input_dilation, kernel_dilation = (
        (value or 1,) * rank if value is None or isinstance(value, int) else tuple(value)
        for value in (layer.strides, layer.input_dilation, layer.kernel_dilation)
    )
    extent = [(k - 1) * d + 1 for k, d in zip(size, kernel_dilation, strict=True)]
    x, padding = _pad(x, layer.padding, extent)
    patches = lax.conv_general_dilated_patches(
        jnp.moveaxis(x, -1, 1),
        size,
        strides,
        padding,
        lhs_dilation=input_dilation,
        rhs_dilation=kernel_dilation,
        precision=lax.Precision.HIGHEST,  # it multiplies by ones, and must not round the inputs
    )
    patches = jnp.moveaxis(patches, 1, -1)
    return patches.reshape(*batch, *patches.shape[1:])


def _pad(x: jax.Array, padding: Any, extent: Sequence[int]) -> tuple[jax.Array, Any]:
    """Does the paddings that Flax adds to JAX's; returns what is left for JAX to do."""
    modes = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}
    if padding in modes:
        causal = padding == "CAUSAL"
        widths = [(e - 1, 0) if causal else ((e - 1) // 2, e // 2) for e in extent]
        return jnp.pad(x, [(0, 0), *widths, (0, 0)], mode=modes[padding]), "VALID"
    if isinstance(padding, str):
        return x, padding
    sides = [padding] * len(extent) if isinstance(padding, int) else padding
    return x, [(side, side) if isinstance(side, int) else tuple(side) for side in sides]
