"""Fused projections taken apart before merging and put together again behind it.

Spectral methods see another matrix where query, key and value are one kernel than where they are
three, so the layout is part of a result and can be chosen here.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from mergejax.errors import raise_all
from mergejax.leaves import unmatched

Style = Literal["flax", "torch"]
PARTS = "abcdefgh"  # letters, because numbers in names stand for blocks


def split_fused(
    model: Mapping[str, Any], patterns: Mapping[str, int], *, layout: Style = "flax"
) -> dict[str, Any]:
    """Takes fused projections apart along their output axis.

    Args:
        model: arrays by leaf name.
        patterns: regular expressions on leaf names and the number of equal parts, for instance
            {'in_proj_(weight|bias)': 3}.
        layout: 'flax' (kernels [in, out]) or 'torch' ([out, in]).

    Returns:
        Arrays by leaf name; 'a/qkv/kernel' becomes 'a/qkv/part_a/kernel', 'a/qkv/part_b/kernel',
        and so on, in the order of the parts.

    Raises:
        MergeError: a pattern that matches no leaf, or an axis that has no equal parts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> parts = mj.split_fused({'qkv/kernel': jnp.zeros((4, 12))}, {'qkv': 3})
        >>> {name: x.shape for name, x in parts.items()}['qkv/part_b/kernel']
        (4, 4)
    """
    problems = [f"split_fused: {p}" for p in unmatched(list(patterns), list(model))]
    split: dict[str, Any] = {}
    for name, x in model.items():
        parts = next((n for pattern, n in patterns.items() if re.search(pattern, name)), 1)
        axis = x.ndim - 1 if layout == "flax" else 0
        if parts == 1:
            split[name] = x
        elif not 1 < parts <= len(PARTS) or x.ndim == 0 or x.shape[axis] % parts:
            problems.append(
                f"split_fused: leaf '{name}' of shape {tuple(x.shape)} has no {parts} equal parts "
                f"along its output axis {axis}; change the number or the pattern"
            )
        else:
            pieces = jnp.split(jnp.asarray(x), parts, axis=axis)
            split |= {_part(name, i): piece for i, piece in enumerate(pieces)}
    raise_all(problems)
    return split


def fuse(model: Mapping[str, Any], *, layout: Style = "flax") -> dict[str, Any]:
    """Puts together what `split_fused` took apart.

    Args:
        model: arrays by leaf name, with parts 'a/part_a/kernel', 'a/part_b/kernel', ...
        layout: as for `split_fused`.

    Returns:
        Arrays by leaf name, each at the place of its first part.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> model = {'qkv/kernel': jnp.arange(12.0).reshape(2, 6)}
        >>> mj.fuse(mj.split_fused(model, {'qkv': 3}))['qkv/kernel'].shape
        (2, 6)
    """
    fused: dict[str, list[Any]] = {}
    for name, x in model.items():
        fused.setdefault(re.sub(r"(^|(?<=[/.]))part_[a-h][/.]", "", name), []).append(x)

    def whole(several: list[Any]) -> Any:
        axis = several[0].ndim - 1 if layout == "flax" else 0
        return several[0] if len(several) == 1 else jnp.concatenate(several, axis=axis)

    return {name: whole(several) for name, several in fused.items()}


def _part(name: str, index: int) -> str:
    place = max(name.rfind("/"), name.rfind("."))
    mark = name[place] if place >= 0 else "/"
    return f"{name[: place + 1]}part_{PARTS[index]}{mark}{name[place + 1 :]}"
