"""What collectors return: means by leaf name, with what they are means over."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.errors import MergeError, raise_all, some


class Statistics(dict[str, Any]):
    """Means by leaf name that remember over how many rows, so that several add up.

    It is a dictionary of float32 arrays; to JAX, too, where what it remembers is left behind.

    Attributes:
        kind: 'gram', 'fisher', ...: the name under which methods ask for it.
        rows: by leaf name the number of rows or examples, or their weight where there was a mask;
            float64, scalar or one for each of the stacked layers.
        data: what the data are called, once told (see `save`).
        model: SHA-256 of the model that ran, once told.

    Example:
        >>> found = Statistics('gram', {'kernel': np.eye(2)}, {'kernel': 5})
        >>> found['kernel'].tolist(), float(found.rows['kernel'])
        ([[1.0, 0.0], [0.0, 1.0]], 5.0)
    """

    def __init__(
        self,
        kind: str,
        means: Mapping[str, Any],
        rows: Mapping[str, Any],
        data: tuple[str, ...] = (),
        model: str | None = None,
    ):
        super().__init__(means)
        self.kind, self.data, self.model = kind, data, model
        self.rows = {name: np.asarray(rows[name], np.float64) for name in means}

    def under(self, prefix: str) -> "Statistics":
        """The part whose leaf names begin with 'prefix/', by what follows.

        Example:
            >>> found = Statistics('gram', {'body/kernel': np.eye(2)}, {'body/kernel': 5})
            >>> list(found.under('body'))
            ['kernel']
        """
        names = {
            name.removeprefix(f"{prefix}/"): name for name in self if name.startswith(f"{prefix}/")
        }
        means, rows = ({to: x[of] for to, of in names.items()} for x in (self, self.rows))
        return Statistics(self.kind, means, rows)


def _flatten(found: Statistics) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.DictKey(name), x) for name, x in found.items()], tuple(found)


def _unflatten(names: tuple[str, ...], leaves: Any) -> Any:
    return dict(zip(names, leaves, strict=True))


jax.tree_util.register_pytree_with_keys(Statistics, _flatten, _unflatten)


def add(*several: Statistics) -> Statistics:
    r"""The statistics of all data together, from those of its parts.

    .. math:: S=\sum_i n_iS_i\,/\,\sum_in_i

    with n the rows of each leaf, in float64: the same, within a rounding to float32, as collecting
    from all data at once.

    Args:
        several: of one kind and one model, on different data.

    Returns:
        Statistics like them.

    Raises:
        MergeError: none, other kinds, models, leaves or shapes, or the same data twice.

    Example:
        >>> parts = [Statistics('gram', {'k': np.full((1, 1), x)}, {'k': n})
        ...          for x, n in ((1.0, 30), (4.0, 10))]
        >>> whole = add(*parts)
        >>> whole['k'].tolist(), float(whole.rows['k'])
        ([[1.75]], 40.0)
    """
    raise_all(_differences(several))
    first = several[0]
    means, rows = {}, {}
    for name in first:
        counts = [part.rows[name] for part in several]
        rows[name] = np.sum(counts, axis=0)
        mean = np.zeros(np.shape(first[name]))
        for part, count in zip(several, counts, strict=True):
            share = np.divide(count, rows[name], where=rows[name] > 0, out=np.zeros(count.shape))
            # Rows have the axes of the stacked layers, which come first.
            mean += np.asarray(part[name]) * share.reshape(
                *share.shape, *[1] * (mean.ndim - share.ndim)
            )
        means[name] = mean.astype(np.float32)
    data = tuple(text for part in several for text in part.data)
    return Statistics(first.kind, means, rows, data, first.model)


def _differences(several: tuple[Statistics, ...]) -> list[str]:
    if not several:
        return ["add: there are no statistics to add; pass at least one"]
    first = several[0]
    problems = []
    for part in several[1:]:
        if part.kind != first.kind:
            problems.append(f"add: '{part.kind}' does not add to '{first.kind}'; add one kind")
            continue
        if None not in (part.model, first.model) and part.model != first.model:
            problems.append(
                f"add: '{first.kind}' is of two models (SHA-256 {first.model[:12]}..., "  # type: ignore[index]
                f"{part.model[:12]}...); add statistics of one model, and merge several"  # type: ignore[index]
            )
        shapes = [{n: np.shape(x) for n, x in found.items()} for found in (first, part)]
        other = sorted(dict(shapes[0].items() ^ shapes[1].items()))
        if other:
            problems.append(
                f"add: {some(other)} is missing or of another shape in one of the parts; collect "
                "them with the same options"
            )
    texts = [text for part in several for text in part.data]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        problems.append(f"add: the data {some(twice)} are in several parts; add each once")
    return problems


def means(
    kind: str,
    sums: Mapping[str, tuple[Any, Any]],
    what: str = "inputs",
    idle: bool = False,
    form: Callable[[Any], Any] = lambda total: total,
) -> Statistics:
    """Means of sums over rows, checked.

    Args:
        kind: of the statistics.
        sums: (Σ [..., features, features] or [..., features], Σ weights [...]) by leaf name, where
            the first axes are those of stacked layers.
        what: was summed, in words.
        idle: whether a mean over no row is 0, rather than an error.
        form: makes an array of what was summed, if that is none.

    Returns:
        The means, float32.

    Raises:
        MergeError: sums that are not finite, leaves all of whose rows have weight 0.

    Example:
        >>> means('gram', {'kernel': (jnp.full((1, 1), 6.0), jnp.float32(3))})
        {'kernel': Array([[2.]], dtype=float32)}
    """
    empty = [name for name, (_, count) in sums.items() if not (np.asarray(count) > 0).all()]
    if empty and not idle:
        raise MergeError(
            f"{kind}: every row of {some(empty)} has weight 0; give batches with unmasked rows"
        )
    found = {name: _mean(form, total, count) for name, (total, count) in sums.items()}
    broken = [name for name, (_, finite) in found.items() if not finite]
    if broken:
        raise MergeError(
            f"{kind}: the {what} of {len(broken)} of {len(sums)} layers are not finite, the "
            f"first is '{broken[0]}'; check the data and the expert's parameters"
        )
    counts = {name: count for name, (_, count) in sums.items()}
    return Statistics(kind, {name: mean for name, (mean, _) in found.items()}, counts)


@functools.partial(jax.jit, static_argnums=0)
def _mean(form: Callable[[Any], Any], total: Any, count: Any) -> tuple[jax.Array, jax.Array]:
    total = form(total)
    axes = jnp.ndim(total) - jnp.ndim(count)
    mean = total / jnp.reshape(jnp.where(count > 0, count, 1), (*jnp.shape(count), *[1] * axes))
    return mean, jnp.isfinite(mean).all()
