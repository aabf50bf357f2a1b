"""Adapters that are stored as pairs NAME:down and NAME:up, as cloneofsimo/lora writes them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergejax.errors import raise_all, some
from mergejax.lowrank.factors import Factors


def from_pairs(
    state: Mapping[str, Any], *, scale: float = 1.0, ignore: str | Sequence[str] = ()
) -> dict[str, Factors]:
    r"""An adapter from tensors NAME:down ([rank, in]) and NAME:up ([out, rank]).

    .. math:: \Delta W = s\,\mathrm{up}\,\mathrm{down}

    Args:
        state: arrays by name, such as 'unet:0:down' and 'unet:0:up'.
        scale: s; the format has none, its programs take 1.
        ignore: regular expressions of other tensors to leave out, such as learned tokens, '^<s'.

    Returns:
        Factors by NAME.

    Raises:
        MergeError: a tensor that is no factor, one without its other half, shapes that do not
            chain, a pattern without a match.

    Example:
        >>> import numpy as np
        >>> state = {'unet:0:down': np.ones((1, 3)), 'unet:0:up': np.ones((2, 1))}
        >>> factors = from_pairs(state)['unet:0']
        >>> factors.down.shape, factors.up.shape
        ((3, 1), (1, 2))
    """
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    idle = [p for p in patterns if not any(re.search(p, name) for name in state)]
    problems = [f"ignore='{pattern}' matches no tensor of the adapter" for pattern in idle]
    pairs: dict[str, dict[str, Any]] = {}
    others = []
    for name, x in state.items():
        layer, _, side = name.rpartition(":")
        if any(re.search(pattern, name) for pattern in patterns):
            continue
        if side in ("down", "up") and layer and len(x.shape) == 2:
            pairs.setdefault(layer, {})[side] = x
        else:
            others.append(name)
    if others:
        problems.append(
            f"{some(others)} are no factors NAME:down or NAME:up of two axes; leave them out by "
            "ignore, or merge them by themselves"
        )
    adapter = {}
    for layer, pair in pairs.items():
        if len(pair) < 2:
            problems.append(f"'{layer}' has no :{'up' if 'down' in pair else 'down'}; load it too")
        elif pair["down"].shape[0] != pair["up"].shape[1]:
            problems.append(
                f"'{layer}' has down {tuple(pair['down'].shape)} and up {tuple(pair['up'].shape)}, "
                "whose ranks differ; load both from one file"
            )
        else:
            adapter[layer] = Factors(pair["down"].T, pair["up"].T, scale)
    raise_all(problems)
    return adapter
