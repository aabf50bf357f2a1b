"""Merging by optimisation and by filters, restated in float64 NumPy from the formulas.

As in `reference_spectral.py` a function takes the experts' deltas of one kernel, [out, in].
"""

import numpy as np
from reference_spectral import cover, nonzero, polar, svd, truncated


def adam(gradient, x, learning_rate, steps):
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, steps + 1):
        slope = gradient(x)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        ahead, size = first / (1 - 0.9**step), second / (1 - 0.999**step)
        x = x - learning_rate * ahead / (np.sqrt(size) + 1e-8)
    return x


def descent(gradient, x, learning_rate, momentum, steps):
    velocity = np.zeros_like(x)
    for _ in range(steps):
        velocity = momentum * velocity + gradient(x)
        x = x - learning_rate * velocity
    return x


# WUDI ---------------------------------------------------------------------------------------------


def wudi(taus, steps=300, learning_rate=1e-5, power=2):
    taus = nonzero(taus)
    weights = [2 / np.linalg.norm(tau) ** power for tau in taus]

    def gradient(x):
        return sum(w * (x - tau) @ tau.T @ tau for w, tau in zip(weights, taus, strict=True))

    return adam(gradient, sum(taus), learning_rate, steps)


def opt_merge(taus, steps=300, learning_rate=1e-4, momentum=0.9):
    taus = nonzero(taus)
    rank = min(taus[0].shape) // len(taus)
    targets = [truncated(tau, rank) for tau in taus]
    weights = [1 / (tau**2).sum() for tau in taus]

    def gradient(x):
        several = zip(weights, targets, strict=True)
        return sum(2 * w * (x - target) @ target.T @ target for w, target in several)

    return descent(gradient, sum(taus) / len(taus), learning_rate, momentum, steps)


def around_mean(taus, steps=300, learning_rate=1e-5):
    taus = nonzero(taus)
    rank, mean = min(taus[0].shape) // len(taus), sum(taus) / len(taus)
    weights = [1 / (tau**2).sum() for tau in taus]
    readers = [truncated(tau, rank) for tau in taus]
    targets = [mean + truncated(tau - mean, rank) for tau in taus]

    def gradient(x):
        several = zip(weights, targets, readers, strict=True)
        return sum(2 * w * (x - target) @ reader.T @ reader for w, target, reader in several)

    return adam(gradient, sum(taus), learning_rate, steps)


def normal_equation(taus):
    """C and D of the optimum X C = D."""
    grams = [tau.T @ tau / (tau**2).sum() for tau in taus]
    return sum(grams), sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))


def started(taus, start):
    return {"sum": sum(taus), "mean": sum(taus) / len(taus), "zero": 0 * taus[0]}[start]


def filtered(taus, start, share):
    taus = nonzero(taus)
    gram, right = normal_equation(taus)
    begin = started(taus, start)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[::-1], 1e-8), vectors[:, ::-1]
    f = share(values)
    kept = begin - begin @ (vectors * f) @ vectors.T
    return kept + right @ (vectors * (f / values)) @ vectors.T


def swudi(taus, time=300.0, density=0.65, start="sum"):
    def share(values):
        count = int((len(values) * density + 0.999) // 1)
        return np.where(np.arange(len(values)) < count, 1 - np.exp(-values * time), 0.0)

    return filtered(taus, start, share)


def aswudi(taus, start="sum"):
    def share(values):
        count = int(np.ceil(np.sqrt(values).sum() ** 2 / values.sum()))
        return np.where(np.arange(len(values)) < count, 1.0, 0.0)

    return filtered(taus, start, share)


# DC-Merge -----------------------------------------------------------------------------------------


def dc_merge(taus, density=0.001):
    taus = nonzero(taus)
    size, count = min(taus[0].shape), len(taus)
    rank = size // count
    left, _, right = cover(taus, [rank] * count)
    left, right = polar(left), polar(right)
    cores = []
    for tau in taus:
        core = left.T @ truncated(tau, rank) @ right
        kept = max(1, int(density * size * size))
        threshold = np.sort(abs(core).ravel())[::-1][min(kept, core.size) - 1]
        cores.append(np.where(abs(core) >= threshold, core, 0.0))
    cores = np.stack(cores)
    sign = np.sign(cores.sum(0))
    agree = (np.sign(cores) == sign) & (cores != 0)
    merged = (cores * agree).sum(0) / np.maximum(agree.sum(0), 1)
    blocks = np.kron(np.eye(count), np.ones((rank, rank)))
    return left @ (merged * blocks) @ right.T


# DOGE-TA ------------------------------------------------------------------------------------------


def doge_masks(trees, density):
    """For each expert, the largest values over all its leaves."""
    masks = []
    for tree in trees:
        flat = np.sort(abs(np.concatenate([x.ravel() for x in tree.values()])))[::-1]
        threshold = flat[min(int(density * flat.size), flat.size - 1)]
        masks.append({n: abs(x) >= threshold for n, x in tree.items()})
    return masks


def doge(taus, masks, scaling=0.07, subspace=6, steps=400, learning_rate=1e-4):
    pairs = [(tau, mask) for tau, mask in zip(taus, masks, strict=True) if tau.any()]
    taus = [tau for tau, _ in pairs]
    factors = [scaling / np.linalg.norm(tau) for tau in taus]
    size = min(taus[0].shape)
    lefts = np.hstack([svd(tau)[0][:, : size // len(taus)] for tau in taus])
    basis = svd(lefts)[0][:, : size // subspace]

    def gradient(x):
        move = sum(f * (tau + x) for f, tau in zip(factors, taus, strict=True))
        slope = 0
        for tau in taus:
            inner = (tau * (tau - move)).sum(1, keepdims=True)
            slope = slope - 2 * sum(factors) * inner * tau
        return slope - basis @ basis.T @ slope

    shared = adam(gradient, 0 * taus[0], learning_rate, steps)
    return sum(f * (tau + shared) * mask for f, (tau, mask) in zip(factors, pairs, strict=True))


# DOP ----------------------------------------------------------------------------------------------


def dop_weights(tau, epsilon=0.99999):
    """What the two terms of a side's loss weigh its outputs and its inputs with."""
    left, values, right = svd(tau)
    kept = int(np.searchsorted(np.cumsum(values) / values.sum(), epsilon))
    squared = values[:kept] ** 2
    return (left[:, :kept] * squared) @ left[:, :kept].T, (right[:, :kept] * squared) @ right[
        :, :kept
    ].T


def dop_loss(x, tau, epsilon=0.99999):
    outputs, inputs = dop_weights(tau, epsilon)
    moved = x - tau
    return np.sum(moved * (outputs @ moved)) + np.sum(moved * (moved @ inputs))


def dop(taus, alpha=0.8, decay=0.999, epsilon=0.99999, steps=200, learning_rate=1e-4):
    merged = taus[0]
    for tau in taus[1:]:
        merged = _dop_pair(merged, tau, alpha, decay, epsilon, steps, learning_rate)
    return merged


def _dop_pair(first, second, alpha, decay, epsilon, steps, learning_rate):
    sides = [(tau, *dop_weights(tau, epsilon)) for tau in (first, second)]
    state = {"alpha": alpha}

    def gradient(x):
        slopes, losses = [], []
        for tau, outputs, inputs in sides:
            slope = outputs @ (x - tau) + (x - tau) @ inputs
            losses.append(np.sum((x - tau) * slope))
            slopes.append(2 * slope)
        a, b = (slope / loss for slope, loss in zip(slopes, losses, strict=True))
        gamma = np.sum(b * (b - a)) / np.sum((a - b) ** 2)
        gamma = 0.999 if gamma >= 1 else 0.001 if gamma <= 0 else gamma
        state["alpha"] = decay * state["alpha"] + (1 - decay) * gamma
        return state["alpha"] * slopes[0] + (1 - state["alpha"]) * slopes[1]

    return adam(gradient, (first + second) / 2, learning_rate, steps)


# Trust region -------------------------------------------------------------------------------------


def trust_region(trees, scaling=0.3, quantile=0.99):
    """Takes and returns deltas by leaf."""

    def conflict(name):
        pairs = [(a, b) for a in trees for b in trees if a is not b]
        return sum(abs(a[name]) * abs(b[name]) for a, b in pairs)

    flat = np.sort(np.concatenate([conflict(n).ravel() for n in trees[0]]))
    threshold = flat[min(int(flat.size * quantile), flat.size - 1)]
    return {
        n: scaling * sum(tree[n] for tree in trees) * (conflict(n) < threshold) for n in trees[0]
    }
