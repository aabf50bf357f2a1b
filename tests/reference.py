"""Every method once more, in float64 NumPy, from its published formulas.

Models are flat dicts of arrays; `experts` is a list of them. Nothing here is shared with the
library. Thresholds come from a sort, linear systems from a pseudo-inverse, OPCM from its recursion.
"""

import numpy as np


def wide(model):
    return {name: np.asarray(x).astype(np.float64) for name, x in model.items()}


def deltas(base, experts):
    base = wide(base)
    return [{name: wide(expert)[name] - base[name] for name in base} for expert in experts]


def added(base, merged):
    return {name: wide(base)[name] + merged[name] for name in base}


def spread(values, count):
    """One number per expert from a number or a list."""
    return np.broadcast_to(np.asarray(values, np.float64), (count,))


def stacked(trees, name):
    return np.stack([tree[name] for tree in trees])


def along_experts(weights, x):
    return weights.reshape(-1, *[1] * (x.ndim - 1))


# Averages and task arithmetic ---------------------------------------------------------------------


def linear(base, experts, weights=1.0, normalize=True):
    weights = spread(weights, len(experts))
    if normalize:
        weights = weights / weights.sum()
    trees = [wide(expert) for expert in experts]
    return {n: sum(w * tree[n] for w, tree in zip(weights, trees, strict=True)) for n in trees[0]}


def task_arithmetic(base, experts, scaling=0.3, weights=1.0):
    taus = deltas(base, experts)
    weights = spread(weights, len(experts))
    merged = {
        n: scaling * sum(w * tau[n] for w, tau in zip(weights, taus, strict=True)) for n in base
    }
    return added(base, merged)


# TIES ---------------------------------------------------------------------------------------------


def kept_of(magnitudes, density, cut):
    """Which of a flat array of magnitudes are kept."""
    size = magnitudes.size
    if size == 0 or density == 1:
        return np.ones(size, bool)
    ascending = np.sort(magnitudes)
    if cut == "exact":
        order = np.argsort(-magnitudes, kind="stable")
        kept = np.zeros(size, bool)
        kept[order[: max(1, int(size * density))]] = True
        return kept
    nth = size - int(size * density) if cut == "published" else int(size * (1 - density))
    return magnitudes >= ascending[max(nth, 1) - 1]


def trimmed(tau, density, scope, cut):
    names = list(tau)
    if scope == "tensor":
        return {
            n: tau[n] * kept_of(abs(tau[n]).ravel(), density, cut).reshape(tau[n].shape)
            for n in names
        }
    kept = kept_of(np.concatenate([abs(tau[n]).ravel() for n in names]), density, cut)
    parts = np.split(kept, np.cumsum([tau[n].size for n in names])[:-1])
    return {n: tau[n] * part.reshape(tau[n].shape) for n, part in zip(names, parts, strict=True)}


def elected(taus, sign, zero):
    """The sign of every element of the merged model, +1 or -1 or 0."""
    names = list(taus[0])
    voters = {n: stacked(taus, n) if sign == "mass" else np.sign(stacked(taus, n)) for n in names}
    signs = {n: np.sign(voters[n].sum(0)) for n in names}
    draw = 1.0 if zero == "plus" else np.sign(sum(signs[n].sum() for n in names))
    return {n: np.where(signs[n] == 0, draw, signs[n]) for n in names}


def ties_delta(
    taus,
    density=0.2,
    weights=1.0,
    scope="model",
    cut="published",
    sign="mass",
    zero="majority",
    reduction="mean",
):
    densities, weights = spread(density, len(taus)), spread(weights, len(taus))
    taus = [trimmed(tau, k, scope, cut) for tau, k in zip(taus, densities, strict=True)]
    taus = [{n: w * x for n, x in tau.items()} for w, tau in zip(weights, taus, strict=True)]
    signs = elected(taus, sign, zero)
    merged = {}
    for n, s in signs.items():
        values = stacked(taus, n)
        agree = np.where(s > 0, values > 0, values < 0)
        chosen = np.where(agree, values, 0.0)
        if reduction == "sum":
            merged[n] = chosen.sum(0)
        elif reduction == "max":
            merged[n] = s * abs(chosen).max(0)
        else:
            mass = (agree * along_experts(weights, values)).sum(0)
            merged[n] = chosen.sum(0) / np.where(abs(mass) < 1e-8, 1.0, mass)
    return merged


def ties(base, experts, scaling=1.0, **options):
    merged = ties_delta(deltas(base, experts), **options)
    return added(base, {n: scaling * x for n, x in merged.items()})


# DARE ---------------------------------------------------------------------------------------------


def dropped(taus, masks, rate, rescale):
    """Deltas with given masks, 1 = kept."""
    rates = spread(rate, len(taus))
    result = []
    for tau, mask, p in zip(taus, masks, rates, strict=True):
        result.append({})
        for n, x in tau.items():
            kept = x * (np.asarray(mask[n]) != 0)
            before, after = abs(x).sum(), abs(kept).sum()
            factor = 1.0
            if rescale == "inverse" and p < 1:
                factor = 1 / (1 - p)
            if rescale == "norm" and before >= 1e-7 and after >= 1e-7:
                factor = before / after
            result[-1][n] = factor * kept
    return result


def dare(base, experts, masks, rate=0.9, scaling=0.3, rescale="inverse"):
    taus = dropped(deltas(base, experts), masks, rate, rescale)
    return added(base, {n: scaling * stacked(taus, n).sum(0) for n in base})


# LiNeS --------------------------------------------------------------------------------------------


def lines_factors(blocks, alpha, beta):
    """`blocks`: leaf name -> block index, or None outside the blocks."""
    count = 1 + max((b for b in blocks.values() if b is not None), default=0)
    return {
        n: alpha if b is None else alpha + beta * b / max(count - 1, 1) for n, b in blocks.items()
    }


def lines(base, experts, blocks, alpha=0.1, beta=0.9):
    taus, factors = deltas(base, experts), lines_factors(blocks, alpha, beta)
    return added(base, {n: factors[n] * stacked(taus, n).sum(0) for n in base})


def lines_multi_task(base, experts, blocks, beta=0.5, host=None):
    taus = deltas(base, experts)
    merged = {n: stacked(taus, n).sum(0) for n in base} if host is None else host(taus)
    above = sum(abs(stacked(taus, n).sum(0)).sum() for n in base) / len(experts)
    below = sum(abs(merged[n]).sum() for n in base)
    factors = lines_factors(blocks, above / below if below else 0.0, beta)
    return added(base, {n: factors[n] * merged[n] for n in base})


# SLERP --------------------------------------------------------------------------------------------


def slerp(base, experts, t=0.5):
    first, second = (wide(expert) for expert in experts)
    merged = {}
    for n, a in first.items():
        b = second[n]
        norms = np.linalg.norm(a), np.linalg.norm(b)
        cosine = 1.0
        if min(norms) > 1e-8:
            cosine = np.clip(np.vdot(a / norms[0], b / norms[1]), -1, 1)
        if abs(cosine) > 0.9995:
            merged[n] = (1 - t) * a + t * b
        else:
            angle = np.arccos(cosine)
            merged[n] = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return merged


# Fisher -------------------------------------------------------------------------------------------


def fisher(base, experts, fishers, weights=1.0, floor=1e-3, floor_rule="relative", normalize=True):
    weights = spread(weights, len(experts)).copy()
    fishers = [wide(f) for f in fishers]
    flats = [np.concatenate([x.ravel() for x in f.values()]) for f in fishers]
    floored = []
    for i, (f, flat) in enumerate(zip(fishers, flats, strict=True)):
        norm = np.sqrt((flat**2).sum())
        if normalize and floor_rule == "added":
            weights[i] /= norm + floor
        elif normalize:
            weights[i] = weights[i] / norm if norm else 0.0
        lowest = {"relative": floor * flat.mean(), "maximum": floor, "first": floor}
        if floor_rule == "added":
            floored.append({n: x + floor for n, x in f.items()})
        elif floor_rule == "first" and i > 0:
            floored.append(f)
        else:
            floored.append({n: np.maximum(x, lowest[floor_rule]) for n, x in f.items()})
    merged = {}
    for n in experts[0]:
        values, f = stacked([wide(e) for e in experts], n), stacked(floored, n)
        share = f * along_experts(weights, f)
        whole = share.sum(0)
        mean = (share * values).sum(0) / np.where(whole > 0, whole, 1.0)
        merged[n] = np.where(whole > 0, mean, values.mean(0))
    return merged


# RegMean ------------------------------------------------------------------------------------------


def regmean(base, experts, grams, shrink=0.9, weights=1.0):
    """Kernels are [in, out]; leaves without a Gram matrix are averaged."""
    weights, trees = spread(weights, len(experts)), [wide(e) for e in experts]
    merged = {}
    for n in trees[0]:
        mean = stacked(trees, n).mean(0)
        merged[n] = mean
        if n in grams[0]:
            left, right = 0.0, 0.0
            for w, tree, gram in zip(weights, trees, grams, strict=True):
                g = np.asarray(gram[n], np.float64)
                g = w * (shrink * g + (1 - shrink) * np.diag(np.diag(g)))
                left, right = left + g, right + g @ (tree[n] - mean)
            merged[n] = mean + np.linalg.pinv(left, rcond=1e-10, hermitian=True) @ right
    return merged


# OPCM ---------------------------------------------------------------------------------------------


def opcm(base, experts, kernels, alpha=0.5, zero_diagonal=False):
    """The recursion in (D, lambda) of the paper; `kernels` names the leaves that are projected."""
    taus = deltas(base, experts)

    def norm(tree):
        return np.sqrt(sum((x**2).sum() for x in tree.values()))

    merged, factor, norms = taus[0], 1.0, [norm(taus[0])]
    for tau in taus[1:]:
        norms.append(norm(tau))
        total = {}
        for n in base:
            new = _projected(merged[n], tau[n], alpha, zero_diagonal) if n in kernels else tau[n]
            total[n] = factor * merged[n] + new
        factor = norm(total) / np.mean(norms) if norm(total) else 0.0
        merged = {n: x / factor if factor else x for n, x in total.items()}
    return added(base, merged)


def _projected(merged, tau, alpha, zero_diagonal):
    if not merged.any():
        return tau
    left, values, right = np.linalg.svd(merged)
    real = int((values > 1e-6 * values[0]).sum())
    above = np.cumsum(values) / values.sum() > alpha
    rank = real if alpha >= 1 or not above.any() else int(np.argmax(above))
    inner = left.T @ tau @ right.T
    inner[:rank, :rank] = 0
    if zero_diagonal:
        inner[np.arange(real), np.arange(real)] = 0
    return left @ inner @ right
