"""Merging with statistics of data, restated in NumPy, float64, from the papers' formulas.

Models are {leaf name: array}; kernels are [in, out]. Statistics are lists of such dicts.
"""

import numpy as np


def wide(x):
    return np.asarray(x, np.float64)


def deltas_of(base, experts, name):
    return [wide(expert[name]) - wide(base[name]) for expert in experts]


def spread(weights, count):
    return np.broadcast_to(np.asarray(weights, np.float64), (count,))


def pseudo(matrix, right):
    return np.linalg.pinv(matrix, rcond=1e-10, hermitian=True) @ right


def lot(base, experts, stats, scaling=1.2, weights=1.0):
    merged, weights = {}, spread(weights, len(experts))
    for name in base:
        taus = deltas_of(base, experts, name)
        if name in stats["gram"][0]:
            grams = [w * wide(g[name]) for w, g in zip(weights, stats["gram"], strict=True)]
            right = sum(g @ t for g, t in zip(grams, taus, strict=True))
            tau = pseudo(sum(grams), right)
        elif name in stats["norm_square"][0]:
            energy = [w * wide(s[name]) for w, s in zip(weights, stats["norm_square"], strict=True)]
            mass = np.maximum(sum(energy), 1e-300)
            tau = sum(s * t for s, t in zip(energy, taus, strict=True)) / mass
        else:
            tau = np.mean(taus, axis=0)
        merged[name] = wide(base[name]) + scaling * tau
    return merged


def cat(
    base,
    experts,
    stats,
    scaling=0.4,
    directions=4,
    penalty=5.0,
    norm_count=4,
    norm_penalty=10.0,
    bias_count=4,
):
    merged = {}
    for name in base:
        taus = deltas_of(base, experts, name)
        if name in stats["gram"][0]:
            taus = _projected(taus, [wide(g[name]) for g in stats["gram"]], directions, penalty)
        elif name in stats["norm_square"][0]:
            squares = [wide(s[name]) for s in stats["norm_square"]]
            scores = [
                sum(taus[i] ** 2 * (s - norm_penalty * squares[i]) for i in _others(taus, k))
                for k, s in enumerate(squares)
            ]
            taus = _masked(taus, scores, norm_count, keep_norm=True)
        elif name.endswith("bias"):
            scores = [sum(taus[i] ** 2 for i in _others(taus, k)) for k in range(len(taus))]
            taus = _masked(taus, scores, bias_count, keep_norm=False)
        merged[name] = wide(base[name]) + scaling * sum(taus)
    return merged


def _others(taus, k):
    return [i for i in range(len(taus)) if i != k]


def _projected(taus, grams, directions, penalty):
    bases = []
    for k in range(len(taus)):
        quadratic = sum(
            taus[i].T @ (grams[k] - penalty * grams[i]) @ taus[i] for i in _others(taus, k)
        )
        values, vectors = np.linalg.eigh((quadratic + quadratic.T) / 2)
        chosen = [j for j in np.argsort(-values) if values[j] > 1e-9 * np.abs(values).max()]
        bases.append(vectors[:, chosen if directions < 0 else chosen[:directions]])
    trimmed = []
    for i, tau in enumerate(taus):
        for k in _others(taus, i):
            shorter = tau - tau @ bases[k] @ bases[k].T
            norm = np.linalg.norm(shorter)
            tau = shorter * (np.linalg.norm(tau) / norm if norm else 1)
        trimmed.append(tau)
    return trimmed


def _masked(taus, scores, count, keep_norm):
    trimmed = []
    for i, tau in enumerate(taus):
        for k in _others(taus, i):
            shorter = tau.copy()
            for j in np.argsort(-scores[k].ravel())[:count]:
                if scores[k].ravel()[j] > 0:
                    shorter.ravel()[j] = 0
            norm = np.linalg.norm(shorter)
            tau = shorter * (np.linalg.norm(tau) / norm if keep_norm and norm else 1)
        trimmed.append(tau)
    return trimmed


def mats(base, experts, stats, operator="gram", scaling=0.3, shrink=1.0):
    """The system itself, solved densely from the start: what the iterations converge to."""
    merged = {}
    need = {"kfac": "output_gram"}.get(operator, operator)
    for name in base:
        taus = deltas_of(base, experts, name)
        tau = np.mean(taus, axis=0)
        if name in stats[need][0]:
            operators = [_operator(stats, name, i, operator, shrink) for i in range(len(taus))]
            start = scaling * sum(taus).ravel()
            right = sum(c @ (t.ravel() - start) for c, t in zip(operators, taus, strict=True))
            tau = (start + pseudo(sum(operators), right)).reshape(tau.shape)
        merged[name] = wide(base[name]) + tau
    return merged


def _operator(stats, name, i, operator, shrink):
    """The matrix that acts on the delta's elements, row by row."""
    if operator == "fisher":
        return np.diag(np.maximum(wide(stats["fisher"][i][name]), 1e-8).ravel())
    if operator == "block_fisher":
        return wide(stats["block_fisher"][i][name])
    gram = shrunk(wide(stats["gram"][i][name]), shrink)
    if operator == "gram":
        columns = int(np.shape(stats["output_gram"][i][name])[0])
        return np.kron(gram, np.eye(columns))
    return np.kron(gram, shrunk(wide(stats["output_gram"][i][name]), shrink))


def shrunk(gram, alpha):
    return alpha * gram + (1 - alpha) * np.diag(np.diag(gram))


def anchored(anchor, taus, grams, ridge):
    """Ridge regression around an anchor, Gram matrices of Frobenius norm 1."""
    grams = [g / np.linalg.norm(g) if np.any(g) else g for g in grams]
    right = sum(g @ (t - anchor) for g, t in zip(grams, taus, strict=True))
    return anchor + pseudo(sum(grams) + ridge * np.eye(len(anchor)), right)


def bayesian(base, experts, stats, ridge=1.0, scaling=1.0, anchor_scaling=0.3, data_free=False):
    merged = {}
    for name in base:
        taus = deltas_of(base, experts, name)
        tau = anchor_scaling * sum(taus)
        if name.endswith("kernel") and np.size(base[name]):
            given = [t @ t.T for t in taus] if data_free else [wide(g[name]) for g in stats["gram"]]
            tau = scaling * anchored(tau, taus, given, ridge)
        merged[name] = wide(base[name]) + tau
    return merged
