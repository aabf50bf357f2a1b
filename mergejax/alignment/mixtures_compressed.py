"""Merged experts as a low-rank product and a sparse rest, pruned while it is trained (MC-SMoE).

Merge, Then Compress (Li et al., 2024, arXiv:2310.01334).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mergejax.errors import MergeError


class Split(NamedTuple):
    """A matrix as left @ right + rest: [in, rank], [rank, out], [in, out]."""

    left: np.ndarray
    right: np.ndarray
    rest: np.ndarray


def low_rank_and_rest(matrix: Any, rank: int) -> Split:
    r"""The best product of a rank, halved between its factors, and what is left of a matrix.

    .. math:: W=U\Sigma V^\top,\quad L=U\sqrt{\Sigma_{:r}},\quad R=\sqrt{\Sigma_{:r}}V^\top,\quad
              S=W-LR

    Raises:
        MergeError: a rank beyond the matrix.

    Example:
        >>> float(abs(low_rank_and_rest(np.ones((3, 2)), rank=1).rest).max()) < 1e-15
        True
    """
    matrix = np.asarray(matrix)
    if not 1 <= rank <= min(matrix.shape):
        raise MergeError(
            f"low_rank_and_rest: rank must be from 1 to {min(matrix.shape)}, not {rank}"
        )
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    left, right = u[:, :rank] * root, root[:, None] * v[:rank]
    parts = left, right, matrix - left @ right
    return Split(*(x.astype(matrix.dtype) for x in parts))


def kept_share(step: int, steps: int, final: float, warmup: int = 100, rest: int = 400) -> float:
    """The share of units that pruning keeps at a step: a cubic fall from 1 to `final`.

    Args:
        step: from 0.
        steps: of the whole training.
        final: the share in the end.
        warmup: steps before anything is pruned.
        rest: steps at the end that prune no more.

    Example:
        >>> [round(kept_share(step, 1000, 0.1), 2) for step in (0, 350, 1000)]
        [1.0, 0.21, 0.1]
    """
    if step <= warmup:
        return 1.0
    if step > steps - rest:
        return final
    return final + (1 - final) * (1 - (step - warmup) / (steps - warmup - rest)) ** 3


def prune(
    rests: Mapping[str, Any], importance: Mapping[str, Any], keep: float
) -> dict[str, np.ndarray]:
    """Sets the output columns of least importance to zero, over all rests together.

    Args:
        rests: matrices [in, out], the sparse parts of `low_rank_and_rest`.
        importance: arrays like them, such as a running mean of |weight times gradient|; of a
            column its mean counts.
        keep: the share of all columns that stay.

    Raises:
        MergeError: a share outside [0, 1].

    Example:
        >>> found = prune({'a': np.ones((1, 2))}, {'a': np.array([[3.0, 1.0]])}, keep=0.5)
        >>> found['a'].tolist()
        [[1.0, 0.0]]
    """
    if not 0 <= keep <= 1:
        raise MergeError(f"prune: keep must be in [0, 1], not {keep}")
    means = {name: np.asarray(x, np.float64).mean(0) for name, x in importance.items()}
    every = np.sort(np.concatenate(list(means.values())))
    gone = round((1 - keep) * len(every))
    cut = every[gone - 1] if gone else -np.inf
    return {name: np.asarray(x) * (means[name] > cut)[None] for name, x in rests.items()}
