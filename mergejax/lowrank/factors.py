"""Low-rank deltas as factors, and algebra on them that never forms the dense matrix."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import hyper
from mergejax.core import Array
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.leaves import as_matrix, describe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    r"""A delta of low rank, :math:`\Delta = s\,A\,B` in the canonical [in, out] view of a kernel.

    Attributes:
        down: A, [in, rank].
        up: B, [rank, out].
        scale: s; LoRA's is :math:`\alpha/r`, that of rsLoRA :math:`\alpha/\sqrt r`.

    Example:
        >>> Factors(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5).rank
        2
    """

    down: Array
    up: Array
    scale: Any = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[-1]


Adapter = Mapping[str, Factors]


def folded(factors: Factors) -> tuple[Array, Array]:
    """Both factors in float32, the scale in the second."""
    down, up = (jnp.asarray(x).astype(jnp.float32) for x in (factors.down, factors.up))
    return down, jnp.asarray(factors.scale).astype(jnp.float32) * up


@jax.jit
def product(factors: Factors) -> Array:
    """The dense delta of one leaf, [in, out] float32."""
    return jnp.matmul(*folded(factors), precision="highest")


def dense(adapter: Adapter) -> dict[str, Array]:
    """The dense deltas of an adapter, which any method of the library merges.

    Args:
        adapter: factors by leaf name.

    Returns:
        [in, out] float32 by leaf name.

    Example:
        >>> import mergejax as mj
        >>> adapters = [{'q': Factors(jnp.full((2, 1), x), jnp.ones((1, 2)))} for x in (1.0, 3.0)]
        >>> base = {'q': jnp.zeros((2, 2))}
        >>> print(mj.merge('average()', base, [dense(adapter) for adapter in adapters])['q'])
        [[2. 2.]
         [2. 2.]]
    """
    check_adapters([adapter])
    return {name: product(factors) for name, factors in adapter.items()}


def apply(
    base: Tree,
    adapter: Adapter,
    *,
    layout: str = "flax",
    layouts: Mapping[str, str] | None = None,
) -> Tree:
    """The base with an adapter's deltas added to its kernels.

    Args:
        base: tree of arrays.
        adapter: factors by leaf name.
        layout: of the base's kernels, 'flax' ([in, out]) or 'torch' ([out, in]).
        layouts: regular expressions on leaf names and the layout to take instead.

    Returns:
        A tree like the base, computed in float32 and rounded once to the base's types.

    Raises:
        MergeError: factors that do not chain, a leaf that the base lacks, or whose shape differs.

    Example:
        >>> base = {'dense': {'kernel': jnp.zeros((2, 2)), 'bias': jnp.zeros(2)}}
        >>> adapter = {'dense/kernel': Factors(jnp.ones((2, 1)), jnp.ones((1, 2)), 0.5)}
        >>> print(apply(base, adapter)['dense']['kernel'])
        [[0.5 0.5]
         [0.5 0.5]]
    """
    check_adapters([adapter])
    leaves, back = leaves_by_name(base, "the base")
    specs = {name: (tuple(x.shape), x.dtype) for name, x in leaves.items()}
    infos = {info.name: info for info in describe(specs, style=layout, layouts=layouts)}
    raise_all(
        [
            f"the base has no leaf '{name}', which the adapter changes, {did_you_mean(name, specs)}"
            for name in adapter
            if name not in specs
        ]
    )
    problems = []
    for name, factors in adapter.items():
        try:
            matrix, restore = as_matrix(jnp.asarray(leaves[name]), infos[name].layout)
        except MergeError as error:
            problems.append(f"leaf '{name}': {error}")
            continue
        shape = (factors.down.shape[0], factors.up.shape[-1])
        if matrix.shape != shape:
            problems.append(
                f"leaf '{name}' of the adapter is {shape} [in, out], but the base's is "
                f"{matrix.shape}; check the base and its layout"
            )
            continue
        changed = matrix.astype(jnp.float32) + product(factors)
        leaves[name] = restore(changed.astype(matrix.dtype))
    raise_all(problems)
    return back(leaves)


def check_adapters(adapters: Any) -> None:
    """Refuses adapters whose factors do not chain or that do not fit each other.

    Raises:
        MergeError: with every leaf that is wrong, and whose it is.
    """
    if isinstance(adapters, Mapping) or not isinstance(adapters, Sequence) or not adapters:
        raise MergeError("adapters must be a list of mappings from leaf names to Factors, [a, b]")
    problems = []
    for i, adapter in enumerate(adapters):
        problems += [
            f"adapter {i} has no leaf '{name}', which another has; merge adapters of one "
            "configuration"
            for name in dict.fromkeys(n for other in adapters for n in other)
            if name not in adapter
        ]
        for name, factors in adapter.items():
            problems += _problems(f"leaf '{name}' of adapter {i}", factors)
    raise_all(problems)
    for name in adapters[0]:
        shapes = [(a[name].down.shape[0], a[name].up.shape[1]) for a in adapters]
        problems += [
            f"leaf '{name}' of adapter {i} is {shape} [in, out], expected {shapes[0]} as in "
            "adapter 0; merge adapters of one model"
            for i, shape in enumerate(shapes)
            if shape != shapes[0]
        ]
    raise_all(problems)


def _problems(label: str, factors: Any) -> list[str]:
    if not isinstance(factors, Factors):
        return [f"{label} is {type(factors).__name__}, not Factors; wrap it in Factors(down, up)"]
    down, up = np.shape(factors.down), np.shape(factors.up)
    if len(down) != 2 or len(up) != 2 or down[1] != up[0] or 0 in down + up:
        return [
            f"{label} has factors of shapes {down} and {up}, which do not chain; pass [in, rank] "
            "and [rank, out]"
        ]
    if hyper.is_traced(factors):
        return []
    numbers = [np.asarray(x).astype(np.float32) for x in jax.tree.leaves(factors)]
    bad = sum(int((~np.isfinite(x)).sum()) for x in numbers)
    message = f"{label} has {bad} non-finite values (NaN or Inf); repair it or leave it out"
    return [message] if bad else []


@jax.jit
def concatenated(several: Sequence[Factors], weights: Any) -> Factors:
    """The weighted sum of products as one product, scales and weights folded into `up`."""
    pairs = [folded(factors) for factors in several]
    ups = [jnp.asarray(w, jnp.float32) * up for w, (_, up) in zip(weights, pairs, strict=True)]
    downs = [down for down, _ in pairs]
    return Factors(jnp.concatenate(downs, 1), jnp.concatenate(ups, 0), jnp.float32(1))


@jax.jit
def product_svd(factors: Factors) -> tuple[Array, Array, Array]:
    """The thin SVD of a product by QR of its factors and an SVD of the small core.

    Returns:
        U [in, k], the singular values [k] in falling order, Vᵀ [k, out], k <= rank.
    """
    with jax.default_matmul_precision("highest"):
        down, up = folded(factors)
        left, above = jnp.linalg.qr(down)
        right, below = jnp.linalg.qr(up.T)
        u, values, vt = jnp.linalg.svd(above @ below.T, full_matrices=False)
        return left @ u, values, vt @ right.T


def balanced(u: Array, values: Array, vt: Array, rank: int) -> Factors:
    """Factors of the leading part of an SVD, both of one size; zeros where the rank is less."""
    root = jnp.sqrt(values[:rank])
    missing = rank - root.size
    down = jnp.pad(u[:, :rank] * root[None, :], ((0, 0), (0, max(missing, 0))))
    up = jnp.pad(root[:, None] * vt[:rank], ((0, max(missing, 0)), (0, 0)))
    return Factors(down, up, jnp.float32(1))


def refactor(adapter: Adapter, rank: int) -> tuple[dict[str, Factors], dict[str, float]]:
    r"""The best factors of a chosen rank for every leaf, and what they lose.

    .. math:: \min_{rank\,\Delta'\le r}\|\Delta-\Delta'\|_F,\qquad
        error=\sqrt{\textstyle\sum_{j>r}\sigma_j^2}\,\Big/\sqrt{\textstyle\sum_j\sigma_j^2}

    Args:
        adapter: factors by leaf name.
        rank: r of the result; a leaf of lower rank is padded with zeros.

    Returns:
        The adapter, balanced and with scale 1, and the relative error of each leaf, 0 for a zero
        delta.

    Raises:
        MergeError: a rank above a leaf's, or below one.

    Example:
        >>> adapter = {'q': Factors(jnp.diag(jnp.asarray([4.0, 3.0])), jnp.eye(2))}
        >>> small, errors = refactor(adapter, rank=1)
        >>> small['q'].rank, round(errors['q'], 4)
        (1, 0.6)
    """
    check_adapters([adapter])
    check_rank("refactor", rank, adapter)
    small, errors = {}, {}
    for name, factors in adapter.items():
        u, values, vt = product_svd(factors)
        small[name] = balanced(u, values, vt, rank)
        lost, whole = (float(jnp.linalg.norm(x)) for x in (values[rank:], values))
        errors[name] = lost / whole if whole > 0 else 0.0
    return small, errors


def check_rank(label: str, rank: Any, adapter: Adapter) -> None:
    """Refuses a rank that some leaf's matrix cannot have.

    Raises:
        MergeError: with every such leaf.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MergeError(f"{label}(rank=...) must be an integer of at least 1, not {rank!r}")
    shapes = {name: (f.down.shape[0], f.up.shape[1]) for name, f in adapter.items()}
    raise_all(
        [
            f"{label}(rank={rank}) is above the rank {min(shape)} that leaf '{name}' of shape "
            f"{shape} can have; choose a smaller one"
            for name, shape in shapes.items()
            if rank > min(shape)
        ]
    )
