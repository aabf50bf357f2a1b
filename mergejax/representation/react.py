"""ReACT: one linear map behind a merged model, in closed form for any preference between tasks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mergejax.core import Array
from mergejax.errors import MergeError, raise_all
from mergejax.linalg.solve import safe_solve
from mergejax.linalg.spectral import highest

Tree = Any


class Corrections(NamedTuple):
    """What every preference's map is made of, by task; all maps act as z ↦ z A.

    Attributes:
        weights: C [tasks, D, D].
        sums: C A [tasks, D, D], with A each task's own map.
    """

    weights: Array
    sums: Array


@highest()
def correction(
    merged: Sequence[Array], experts: Sequence[Array], *, beta: float = 0.1, relative: bool = True
) -> Corrections:
    r"""Learns for each task how the merged model's representations become its expert's.

    .. math:: A_t=C_t^{-1}(Z_t^\top Y_t+\beta R_t),\qquad C_t=Z_t^\top Z_t+\beta I

    the minimum of :math:`\|Z_tA-Y_t\|^2+\beta\|A-R_t\|^2` with :math:`R_t` the rotation (or
    reflection) that takes :math:`Z_t` nearest to :math:`Y_t`.

    Args:
        merged: Z_t [n_t, D] of each task, the merged model's final representations of its
            unlabelled calibration inputs, before any normalisation and before the head.
        experts: Y_t [n_t, D], the expert's, of the same inputs.
        beta: :math:`\beta`.
        relative: whether C_t and :math:`Z_t^\top Y_t` are means over the examples and
            :math:`\beta` is relative to their mean diagonal, so that neither the number of
            examples nor the scale of the representations matters; False is the paper's form.

    Returns:
        What `correct` takes.

    Raises:
        MergeError: tasks without examples, shapes that do not fit, values that are not finite.

    Example:
        >>> z = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> found = correction([z], [z @ jnp.asarray([[0.0, 1.0], [-1.0, 0.0]])])  # a rotation
        >>> correct(found, [1.0]).round(3).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]

    From parameter to representation (Wu et al., 2026, arXiv:2511.10943).
    """
    _check(merged, experts)
    if not beta >= 0:
        raise MergeError(f"correction(beta={beta}) must be at least 0")
    weights, sums = [], []
    for z, y in zip(merged, experts, strict=True):
        count = len(z) if relative else 1
        z, y = jnp.asarray(z, jnp.float32), jnp.asarray(y, jnp.float32)
        gram, cross = z.T @ z / count, z.T @ y / count
        strength = beta * (jnp.trace(gram) / len(gram) if relative else 1.0)
        weights.append(gram + strength * jnp.eye(len(gram), dtype=gram.dtype))
        sums.append(cross + strength * rotation(cross))
    return Corrections(jnp.stack(weights), jnp.stack(sums))


@highest()
def rotation(cross: Array) -> Array:
    r"""The orthogonal R that brings Z R nearest to Y, of :math:`Z^\top Y=U\Sigma V^\top`: U V^T.

    Example:
        >>> rotation(jnp.asarray([[0.0, 2.0], [1.0, 0.0]])).round(3).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    left, _, right = jnp.linalg.svd(cross)
    return left @ right


@highest()
def correct(found: Corrections, preference: Sequence[float] | Array) -> Array:
    r"""The map for a preference between tasks.

    .. math:: A_p=\Big(\sum_tp_tC_t\Big)^{-1}\sum_tp_tC_tA_t

    the exact minimum of :math:`\sum_tp_t(\|Z_tA-Y_t\|^2+\beta\|A-R_t\|^2)`.

    Args:
        found: of `correction`.
        preference: p [tasks], at least 0 and not all 0; only its direction matters.

    Returns:
        A_p [D, D], for representations in rows: z ↦ z A_p.

    Raises:
        MergeError: a preference that is no such vector.

    Example:
        >>> z = jnp.eye(2)
        >>> found = correction([z, z], [z, 3 * z], beta=0.0)
        >>> correct(found, [0.5, 0.5]).round(3).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    p = np.asarray(preference, np.float32)
    if p.shape != found.weights.shape[:1] or not (p >= 0).all() or not 0 < p.sum() < np.inf:
        raise MergeError(
            f"the preference {p.tolist()} must hold one number of at least 0 for each of the "
            f"{len(found.weights)} tasks, not all of them 0"
        )
    shares = jnp.asarray(p / p.sum())
    whole = jnp.einsum("t,tij->ij", shares, found.weights)
    # Around the identity: what the data leave open passes through as it is.
    middle = jnp.eye(len(whole), dtype=whole.dtype)
    right = jnp.einsum("t,tij->ij", shares, found.sums) - whole
    return middle + safe_solve(whole, right)


@highest()
def absorb(head: Tree, correction: Array) -> Tree:
    """A linear head behind the corrected representation, as a head of the uncorrected one.

    Args:
        head: kernel [D, classes] and whatever else, such as a bias.
        correction: A [D, D] of `correct`.

    Returns:
        The head with the kernel A @ kernel.

    Example:
        >>> head = {'kernel': jnp.ones((2, 1)), 'bias': jnp.zeros(1)}
        >>> absorb(head, 2 * jnp.eye(2))['kernel'].ravel().tolist()
        [2.0, 2.0]
    """
    return {**head, "kernel": correction @ head["kernel"]}


def front(scores: Any) -> np.ndarray:
    """Which of several settings no other one beats in every task: the Pareto front.

    Args:
        scores: [settings, tasks], more is better.

    Returns:
        bool [settings].

    Example:
        >>> front([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5], [0.5, 0.5]]).tolist()
        [True, True, False, True]
    """
    scores = np.asarray(scores)
    at_least = (scores[None, :, :] >= scores[:, None, :]).all(axis=2)
    better = (scores[None, :, :] > scores[:, None, :]).any(axis=2)
    return ~(at_least & better).any(axis=1)


def _check(merged: Sequence[Any], experts: Sequence[Any]) -> None:
    problems = []
    if not merged or len(merged) != len(experts):
        problems.append(
            f"there are representations of {len(merged)} tasks by the merged model and of "
            f"{len(experts)} by experts; give both of every task"
        )
    widths = {np.shape(x)[-1:] for x in (*merged, *experts)}
    for i, (z, y) in enumerate(zip(merged, experts, strict=False)):
        if np.ndim(z) != 2 or np.shape(z) != np.shape(y):
            problems.append(
                f"task {i}: the merged model's representations have shape {np.shape(z)} and the "
                f"expert's {np.shape(y)}, expected [examples, features] for both"
            )
        elif not len(z):
            problems.append(f"task {i} has no examples; collect representations of at least one")
        elif not np.isfinite(np.asarray(z)).all() or not np.isfinite(np.asarray(y)).all():
            problems.append(f"task {i}: representations are not finite; check its inputs")
    if not problems and len(widths) > 1:
        problems.append(f"tasks have representations of {len(widths)} widths; expected one")
    raise_all(problems)
