"""Spectral methods restated in float64 NumPy from their formulas, one kernel at a time.

Every function takes the experts' deltas of one kernel, matrices [out, in], and returns the merged
delta. Experts whose delta is zero are left out where the method says so.
"""

import numpy as np


def svd(x):
    left, values, right = np.linalg.svd(x, full_matrices=False)
    return left, values, right.T


def polar(x):
    left, values, right = svd(x)
    rank = int((values > 1e-6 * max(values[0], 1e-300)).sum())
    return left[:, :rank] @ right[:, :rank].T


def truncated(x, rank):
    left, values, right = svd(x)
    return (left[:, :rank] * values[:rank]) @ right[:, :rank].T


def nonzero(taus):
    return [tau for tau in taus if tau.any()]


def mean_value(values, largest):
    return values[values > 1e-6 * largest].mean()


def cover(taus, ranks):
    """The leading singular triplets of all experts, side by side."""
    parts = [svd(tau) for tau in taus]
    left = np.hstack([u[:, :r] for (u, _, _), r in zip(parts, ranks, strict=True)])
    values = np.concatenate([s[:r] for (_, s, _), r in zip(parts, ranks, strict=True)])
    right = np.hstack([v[:, :r] for (_, _, v), r in zip(parts, ranks, strict=True)])
    return left, values, right


def tsv(taus):
    taus = nonzero(taus)
    rank = min(taus[0].shape) // len(taus)
    left, values, right = cover(taus, [rank] * len(taus))
    return polar(left) @ np.diag(values) @ polar(right).T


def r_tsvm(taus, outlier_weight=2.0):
    taus = nonzero(taus)
    dense = np.array([(tau != 0).mean() for tau in taus])
    weighed = []
    for tau in taus:
        size = abs(tau)
        outlier = size > size.mean() + 3 * size.std()
        weighed.append(np.where(outlier, outlier_weight * tau, tau))
    ranks = np.floor(min(taus[0].shape) * dense / dense.sum() + 1e-4).astype(int)
    left, values, right = cover(weighed, ranks)
    return polar(left) @ np.diag(values) @ polar(right).T


def iso_c(taus):
    total = sum(taus)
    _, values, _ = svd(total)
    return mean_value(values, values[0]) * polar(total)


def iso_cts(taus, common=0.8):
    taus = nonzero(taus)
    size, count = min(taus[0].shape), len(taus)
    own = round((size - int(common * size)) / count)
    left, values, right = svd(sum(taus))
    shared = size - own * count
    basis = left[:, :shared]
    parts = [svd(tau - basis @ basis.T @ tau) for tau in taus]
    lefts = np.hstack([*(u[:, :own] for u, _, _ in parts), basis])
    rights = np.hstack([*(v[:, :own] for _, _, v in parts), right[:, :shared]])
    spectrum = np.concatenate([*(s[:own] for _, s, _ in parts), values[:shared]])
    return mean_value(spectrum, values[0]) * polar(lefts) @ polar(rights).T


def cart(taus, density=0.16, scaling=2.3):
    mean = sum(taus) / len(taus)
    rank = int(density * min(mean.shape))
    return mean + scaling * sum(truncated(tau - mean, rank) for tau in taus)


def svc(merged, taus, alpha=1.0):
    left, values, right = svd(merged)
    factors = np.zeros_like(values)
    for r in range(int((values > 1e-6 * values[0]).sum())):
        shared = values[r] * right[:, r]
        counts = []
        for tau in taus:
            response = left[:, r] @ tau
            below = response @ response
            counts.append(max(alpha, shared @ response / below) if below else alpha)
        factors[r] = len(taus) / sum(counts)
    return (left * (factors * values)) @ right.T


def boosted(merged, beta=0.01):
    left, values, right = svd(merged)
    reached = np.cumsum(values) / values.sum() >= beta
    floor = values[np.argmax(reached)] if beta < 1 and reached.any() else 0.0
    lifted = np.where(values > 1e-6 * values[0], np.maximum(values, floor), 0.0)
    return (left * lifted) @ right.T
