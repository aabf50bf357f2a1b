"""Fisher information by per-example gradients: its diagonal, and whole for small leaves."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.collect.labels import check
from mergejax.collect.per_example import floating, mean_over_examples
from mergejax.collect.statistics import Statistics
from mergejax.collect.streaming import Mask, Progress, as_function
from mergejax.errors import MergeError, raise_all
from mergejax.leaves import unmatched


def fisher(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    estimator: Literal["exact", "sampled", "empirical"] = "exact",
    labels: Callable[[Any], Any] | None = None,
    mask: Mask | None = None,
    key: jax.Array | None = None,
    microbatch: int = 8,
    progress: Progress | None = None,
) -> Statistics:
    """Diagonal of the Fisher information of a classifier, one number per parameter.

    With p = softmax(logits) and the gradient of one example's log p_c(x_n), squared before any
    averaging:

        exact      F_j = 1/N Σ_n Σ_c p_c(x_n) (∂_j log p_c(x_n))²
        sampled    F_j = 1/N Σ_n (∂_j log p_y(x_n))²,  y drawn once from p(x_n)
        empirical  F_j = 1/N Σ_n (∂_j log p_y(x_n))²,  y the label of the data

    Of a sequence, log p is the sum over its tokens, weighted by the mask (0 for padding and for a
    prompt): one gradient, squared once, divided by the number of sequences.

    One example costs a forward pass and as many backward passes as there are classes (exact) or
    one. Gradients are cast to float32 before they are squared. Memory is a few times
    `microbatch` copies of the parameters.

    Args:
        model: a function (params, batch) -> logits [examples, classes] in which examples do not
            influence each other (running statistics in use, dropout off); or, but in the exact
            form, logits [examples, tokens, classes] of sequences. Or a linen or NNX model
            that is called on the batch. Linen models and functions under `jax.jit` are compiled
            once for all experts, other functions once a call, as they may depend on what has
            changed since.
        params: the expert's parameters, a tree of arrays; for an NNX model its `nnx.Param` state,
            or None for the model's own.
        batches: any iterable of batches: arrays, or trees of arrays, with the examples along the
            first axis; each new number of examples compiles once more.
        estimator: 'exact', 'sampled' or 'empirical'.
        labels: batch -> integer classes [examples], or [examples, tokens]; needed by 'empirical'.
        mask: batch -> weight of each example [examples] or token [examples, tokens], 0 for padding.
        key: `jax.random.key`, needed by 'sampled'; the draw of an example depends on the key and
            on its position in the data alone, not on the batches.
        microbatch: examples whose gradients are held at once.
        progress: called as progress(done, total, 'fisher') after each batch; total is 0 where
            `batches` has no length.

    Returns:
        {leaf name: F float32 of the leaf's shape, at least 0, in the unit of 1 / parameter²}, of
        the leaves with a gradient; a dictionary that knows the number of its examples
        (`mj.collect.Statistics`).

    Raises:
        MergeError: an unknown estimator, a missing key or labels, no batch, labels out of range,
            logits that are not [examples, classes], a result that is not finite.

    Example:
        >>> inputs = jnp.array([[1.0], [2.0]])
        >>> params = {'kernel': jnp.zeros((1, 2))}  # p = 1/2, so F = mean x² / 4
        >>> fisher(lambda p, x: x @ p['kernel'], params, [inputs])['kernel'].round(3).tolist()
        [[0.625, 0.625]]

    Source: Merging Models with Fisher-Weighted Averaging, 2022, arXiv:2111.09832.
    """
    check("fisher", estimator, key, labels, microbatch)
    function, params = as_function(model, params)
    return mean_over_examples(
        "fisher",
        jnp.square,
        list(floating(params)),
        function,
        params,
        batches,
        (estimator, labels, key),
        mask,
        microbatch,
        progress,
    )


def block_fisher(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    estimator: Literal["exact", "sampled", "empirical"] = "exact",
    labels: Callable[[Any], Any] | None = None,
    mask: Mask | None = None,
    key: jax.Array | None = None,
    largest: int = 256,
    exclude: str | Sequence[str] = (),
    microbatch: int = 8,
    progress: Progress | None = None,
) -> Statistics:
    r"""The whole Fisher information of every small leaf: which of its elements act together.

    .. math:: F=\frac1N\sum_n\sum_c p_c(x_n)\,g_{nc}g_{nc}^\top,\qquad
        g_{nc}=vec\,\partial\log p_c(x_n)/\partial leaf

    with the leaf flattened row by row, in the exact form; the other estimators are those of
    `fisher`, whose result is the diagonal of this one.

    Args:
        model: as for `fisher`.
        params: as for `fisher`.
        batches: as for `fisher`.
        estimator: as for `fisher`.
        labels: as for `fisher`.
        mask: as for `fisher`.
        key: as for `fisher`.
        largest: leaves with more elements are left out; a leaf of n takes n² numbers, and while it
            is collected `microbatch` times as many.
        exclude: regular expressions (`re.search` on leaf names) of leaves to leave out.
        microbatch: examples whose matrices are held at once.
        progress: called as progress(done, total, 'block_fisher') after each batch.

    Returns:
        {leaf name: F [n, n] float32, symmetric and positive semi-definite}.

    Raises:
        MergeError: what `fisher` refuses; a pattern that matches no leaf; no leaf left.

    Example:
        >>> params = {'bias': jnp.zeros(2)}
        >>> found = block_fisher(lambda p, x: x + p['bias'][None], params, [jnp.zeros((3, 2))])
        >>> found['bias'].round(3).tolist()  # p = 1/2: diag(p) - p pᵀ
        [[0.25, -0.25], [-0.25, 0.25]]

    Source: MaTS, Merging by Matching Models in Task Parameter Subspaces, 2024, arXiv:2312.04339.
    """
    check("block_fisher", estimator, key, labels, microbatch)
    function, params = as_function(model, params)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    sizes = {name: int(np.size(leaf)) for name, leaf in floating(params).items()}
    raise_all([f"block_fisher: {problem}" for problem in unmatched(exclude, list(sizes))])
    names = [
        name
        for name, size in sizes.items()
        if 0 < size <= largest and not any(re.search(pattern, name) for pattern in exclude)
    ]
    if not names:
        raise MergeError(
            f"block_fisher: no leaf has at most largest={largest} elements and is not excluded; "
            f"the smallest of {len(sizes)} has {min(sizes.values(), default=0)}"
        )
    return mean_over_examples(
        "block_fisher",
        _outer,
        names,
        function,
        params,
        batches,
        (estimator, labels, key),
        mask,
        microbatch,
        progress,
    )


def _outer(gradient):
    return gradient.ravel()[:, None] * gradient.ravel()[None, :]
