"""How adapters are merged: the table, its string language, and the methods without optimisation."""

import functools
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax import api, hyper, varying
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.hyper import Scaling, Weights
from mergejax.language import read_call
from mergejax.lowrank.factors import (
    Adapter,
    Factors,
    balanced,
    check_adapters,
    check_rank,
    concatenated,
    folded,
    product_svd,
)

METHODS: dict[str, Callable[..., dict[str, Factors]]] = {}
_PER_ADAPTER = ("weights", "logits")  # parameters that may be lists, one number per adapter


def adapter_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declares a way to merge adapters: checks what it is given, and makes it a word of `merge`."""
    label = function.__name__
    hints = typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def checked(adapters: Sequence[Adapter], *args: Any, **options: Any) -> Any:
        arguments = hyper.bind(function, (adapters, *args), options)
        check_adapters(adapters)
        problems = []
        for name, value in arguments.items():
            if name == "rank":
                check_rank(label, value, adapters[0])
            if hyper.interval_of(hints.get(name)) is not None:
                count = len(adapters) if name in _PER_ADAPTER else 1
                problems += _list_problems(f"{label}({name}=...)", value, adapters[0], count)
        raise_all(problems)
        with jax.default_matmul_precision("highest"):
            return function(**arguments)

    METHODS[label] = checked
    return checked


def _list_problems(label: str, value: Any, adapter: Adapter, count: int) -> list[str]:
    if isinstance(value, varying.ByDepth):
        return [f"{label} cannot depend on the depth of an adapter's leaf; use by_name({{...}})"]
    if isinstance(value, varying.ByName):
        problems = [
            f"{label}: pattern '{pattern}' of by_name matches no leaf"
            for pattern in value.unmatched(list(adapter))
        ]
        nested = value.values.values()
        return problems + [p for v in nested for p in _list_problems(label, v, adapter, count)]
    shape = jnp.shape(jnp.asarray(value))
    if len(shape) == 0 or shape == (count,):
        return []
    wanted = f"there are {count} adapters" if count > 1 else "it takes one"
    return [f"{label} has {shape[0]} numbers, but {wanted}"]


def numbers_at(value: Any, name: str, count: int) -> Any:
    """A hyper-parameter at one leaf: one number per adapter, float32."""
    return jnp.broadcast_to(jnp.asarray(varying.resolve(value, name, 0.0), jnp.float32), (count,))


def refuse_traced(label: str, adapters: Sequence[Adapter]) -> None:
    """Refuses tracers in a method that looks at values.

    Raises:
        MergeError: an adapter is traced.
    """
    if hyper.is_traced(adapters):
        raise MergeError(f"{label} looks at values; call it outside jit, vmap and grad")


def merge_coordinates(
    label: str, host: Any, coordinates: Sequence[dict[str, jax.Array]], seed: int = 0
) -> dict[str, jax.Array]:
    """Merges coordinates of the experts, by leaf name, with any method of the library.

    Args:
        label: the method for adapters that asks.
        host: a chain or a text.
        coordinates: one mapping per expert.
        seed: of the host's random numbers.

    Raises:
        MergeError: what the host refuses, or a host that does not reduce the experts.
    """
    zero = jax.tree.map(jnp.zeros_like, coordinates[0])
    merged = api.merge(host, zero, coordinates, seed=seed)
    if isinstance(merged, list):
        raise MergeError(
            f"{label}(host={host!r}) gives one model per expert; choose a host that reduces them, "
            "such as ties()"
        )
    return merged


def merge(method: str, adapters: Sequence[Adapter]) -> dict[str, Factors]:
    """Merges adapters with a method in the string language.

    Args:
        method: a name with its hyper-parameters, such as
            'knots(host="ties(density=0.2)", scaling=0.6)' or 'svd(rank=8)'.
        adapters: factors by leaf name, one mapping per expert; ranks may differ.

    Returns:
        One adapter, float32.

    Raises:
        MergeError: a text that cannot be read, an unknown name, or what the method refuses.

    Example:
        >>> adapters = [{'q': Factors(jnp.full((2, 1), x), jnp.ones((1, 2)))} for x in (1.0, 3.0)]
        >>> merge('svd(rank=1, weights=[0.5, 0.5])', adapters)['q'].rank
        1
    """
    name, arguments, named = read_call(method)
    if name not in METHODS:
        raise MergeError(
            f"no method for adapters is called '{name}', {did_you_mean(name, METHODS)}"
        )
    return METHODS[name](adapters, *arguments, **named)


@adapter_method
def concatenate(adapters: Sequence[Adapter], weights: Weights = 1.0) -> dict[str, Factors]:
    r"""The weighted sum of the deltas, exactly, by putting the factors side by side.

    .. math:: \Delta=\sum_i w_i s_iA_iB_i = [A_1, \ldots, A_N]\,[w_1s_1B_1; \ldots; w_Ns_NB_N]

    Args:
        adapters: one per expert; the ranks add up.
        weights: w, a number, one per adapter, or `by_name({...})` of these.

    Returns:
        An adapter; on the dense deltas this is `total(weights)`.

    Example:
        >>> adapters = [{'q': Factors(jnp.ones((2, r)), jnp.ones((r, 2)))} for r in (1, 2)]
        >>> merged = concatenate(adapters, weights=[2, 1])['q']
        >>> merged.rank, print(merged.down @ merged.up)
        [[4. 4.]
         [4. 4.]]
        (3, None)
    """
    return {
        name: concatenated(
            [adapter[name] for adapter in adapters], numbers_at(weights, name, len(adapters))
        )
        for name in adapters[0]
    }


@adapter_method
def svd(
    adapters: Sequence[Adapter], rank: int, weights: Weights = 1.0, scaling: Scaling = 1.0
) -> dict[str, Factors]:
    r"""The best adapter of a chosen rank for the weighted sum of the deltas.

    .. math:: \Delta = \lambda\,trunc_r\Big(\sum_i w_i s_i A_iB_i\Big)

    by QR of the concatenated factors and the SVD of their small core; the dense matrix is never
    formed.

    Args:
        adapters: one per expert.
        rank: r of the result.
        weights: w, a number or one per adapter.
        scaling: :math:`\lambda`.

    Returns:
        An adapter; `refactor` reports what a truncation loses.

    Raises:
        MergeError: a rank above a leaf's.

    Example:
        >>> adapters = [{'q': Factors(jnp.eye(2), jnp.diag(jnp.asarray(d)))}
        ...             for d in ([3.0, 0.0], [1.0, 1.0])]
        >>> merged = svd(adapters, rank=1)['q']
        >>> print((merged.down @ merged.up).round(4) + 0.0)
        [[4. 0.]
         [0. 0.]]
    """
    merged = {}
    for name, factors in concatenate(adapters, weights=weights).items():
        u, values, vt = product_svd(factors)
        best = balanced(u, values, vt, rank)
        merged[name] = Factors(best.down, numbers_at(scaling, name, 1)[0] * best.up, best.scale)
    return merged


@adapter_method
def cat(adapters: Sequence[Adapter], logits: Scaling = 0.0) -> dict[str, Factors]:
    r"""LoRA Soups: adapters concatenated with weights that are positive and add up to one.

    .. math:: \Delta=\sum_i w_i s_iA_iB_i,\qquad w=softmax(v)

    Args:
        adapters: one per expert.
        logits: v; equal ones, as by default, are the static form with weights 1/N. Learned ones
            are a list with one number per adapter, by leaf in `by_name({...})`.

    Returns:
        An adapter, of the sum of the ranks.

    Example:
        >>> adapters = [{'q': Factors(jnp.full((1, 1), x), jnp.ones((1, 1)))} for x in (1.0, 3.0)]
        >>> merged = cat(adapters)['q']
        >>> print(merged.down @ merged.up)
        [[2.]]

    LoRA Soups, CAT (Prabhakar et al., 2025, arXiv:2410.13025).
    """
    return {
        name: concatenated(
            [adapter[name] for adapter in adapters],
            jax.nn.softmax(numbers_at(logits, name, len(adapters))),
        )
        for name in adapters[0]
    }


@adapter_method
def linear(adapters: Sequence[Adapter], logits: Scaling = 0.0) -> dict[str, Factors]:
    r"""Adds up the factors themselves, which is not the sum of the deltas.

    .. math:: \Delta=\Big(\sum_i A_i\Big)\Big(\sum_i w_i s_iB_i\Big),\qquad w=softmax(v)

    with cross terms between adapters; `cat` has none.

    Args:
        adapters: one per expert, of one rank.
        logits: v, a number or one per adapter, by leaf in `by_name({...})`.

    Returns:
        An adapter of the experts' rank.

    Raises:
        MergeError: ranks that differ.

    Example:
        >>> adapters = [{'q': Factors(jnp.full((1, 1), x), jnp.ones((1, 1)))} for x in (1.0, 3.0)]
        >>> merged = linear(adapters)['q']
        >>> print(merged.down @ merged.up)
        [[4.]]

    The linear mode that LoRA Soups (Prabhakar et al., 2025, arXiv:2410.13025) compares with.
    """
    raise_all(
        [
            f"linear: leaf '{name}' has ranks {ranks}, but factors of one rank are added; refactor "
            "the adapters first"
            for name in adapters[0]
            if len(set(ranks := [adapter[name].rank for adapter in adapters])) > 1
        ]
    )
    merged = {}
    for name in adapters[0]:
        pairs = [folded(adapter[name]) for adapter in adapters]
        weights = jax.nn.softmax(numbers_at(logits, name, len(adapters)))
        up = jnp.einsum("n,nro->ro", weights, jnp.stack([up for _, up in pairs]))
        down = jnp.stack([down for down, _ in pairs]).sum(0)
        merged[name] = Factors(down, up, jnp.float32(1))
    return merged
