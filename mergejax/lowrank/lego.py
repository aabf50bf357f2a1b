"""LoRA-LEGO: cluster the rank units of all adapters, one unit per cluster."""

import zlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mergejax.errors import raise_all
from mergejax.lowrank.factors import Adapter, Factors
from mergejax.lowrank.methods import adapter_method, refuse_traced
from mergejax.lowrank.units import balanced_units


def cluster_up_to_sign(
    units: np.ndarray, count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """k-means (k-means++ and Lloyd) where a unit and its negative are the same.

    Args:
        units: [n, d] float64.
        count: of clusters, at most n.
        random: chooses the first centres.

    Returns:
        The centres [count, d] and the cluster of each unit [n].
    """
    squares = np.sum(units**2, 1)

    def distances(centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        products = units @ centers.T
        apart = squares[:, None] + np.sum(centers**2, 1)[None, :] - 2 * np.abs(products)
        return np.maximum(apart, 0), np.where(products < 0, -1.0, 1.0)

    chosen = [int(random.integers(len(units)))]
    while len(chosen) < count:
        nearest = distances(units[chosen])[0].min(1)
        nearest[chosen] = 0
        rest = nearest if nearest.sum() > 0 else ~np.isin(np.arange(len(units)), chosen)
        chosen.append(int(random.choice(len(units), p=rest / rest.sum())))
    centers, labels = units[chosen], np.full(len(units), -1)
    for _ in range(100):
        apart, signs = distances(centers)
        before, labels = labels, apart.argmin(1)
        if np.array_equal(before, labels):
            break
        turned = units * np.take_along_axis(signs, labels[:, None], 1)
        for cluster in range(count):
            members = labels == cluster
            # A cluster that lost all its units takes the one that is farthest from its centre.
            farthest = units[apart.min(1).argmax()]
            centers[cluster] = turned[members].mean(0) if members.any() else farthest
    return centers, labels


@adapter_method
def lego(adapters: Sequence[Adapter], rank: int, seed: int = 0) -> dict[str, Factors]:
    r"""Merges adapters by clustering their rank units.

    .. math:: u_{i\rho}=[A_i[:,\rho];\,s_iB_i[\rho,:]],\qquad
        \{c_1,\ldots,c_r\}=kmeans\{u_{i\rho}\},\qquad
        c_k \leftarrow c_k\,\frac{mean_{u\in k}\|u\|}{\|c_k\|}

    Each centre is one unit of the result. A unit stands for the product of its two sides, so their
    norms are made equal and the sign is left open before clustering.

    Args:
        adapters: one per expert.
        rank: r, the number of clusters; with as many as there are units, the result is the sum.
        seed: of the first centres.

    Returns:
        An adapter of the chosen rank.

    Raises:
        MergeError: more clusters than units, or than a leaf's matrix has ranks.

    Example:
        >>> adapter = {'q': Factors(jnp.eye(2), jnp.diag(jnp.asarray([3.0, 1.0])))}
        >>> merged = lego([adapter, adapter], rank=2)['q']
        >>> print((merged.down @ merged.up).round(4))
        [[3. 0.]
         [0. 1.]]

    LoRA-LEGO (Zhao et al., 2025, arXiv:2409.16167). No code of the authors' was at hand: the
    balance of the sides and the sign are of this library, and of their two rescalings only that of
    the norms is built. Rank units are those of the given factors, which a product does not fix.
    """
    refuse_traced("lego", adapters)
    problems, merged = [], {}
    for name in adapters[0]:
        units = [balanced_units(adapter[name]) for adapter in adapters]
        downs, ups = (np.concatenate([np.asarray(u[i], np.float64) for u in units]) for i in (0, 1))
        if rank > len(downs):
            problems.append(
                f"lego(rank={rank}) is above the {len(downs)} rank units that the adapters have of "
                f"leaf '{name}'; choose a smaller one"
            )
        elif rank < len(downs):
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            whole = np.concatenate([downs, ups], 1)
            centers, labels = cluster_up_to_sign(whole, rank, random)
            lengths, own = np.linalg.norm(whole, axis=1), np.linalg.norm(centers, axis=1)
            members = np.bincount(labels, minlength=rank)
            wanted = np.bincount(labels, lengths, rank) / np.maximum(members, 1)
            centers *= np.where(own > 0, wanted / np.where(own > 0, own, 1), 0)[:, None]
            downs, ups = np.split(centers, [downs.shape[1]], axis=1)
        down, up = jnp.asarray(downs.T, jnp.float32), jnp.asarray(ups, jnp.float32)
        merged[name] = Factors(down, up, jnp.float32(1))
    raise_all(problems)
    return merged
