"""Element-wise and per-tensor methods once more, in float64 NumPy, from their published formulas.

Like `reference.py`; kernels are [in, out], everything else is taken by its last axis.
"""

import numpy as np
from reference import added, along_experts, deltas, spread, stacked, wide


def rows_of(name, x):
    """One row for each output of a kernel; a vector is one row."""
    if name.endswith("kernel"):
        return x.T
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(-1, x.shape[-1])


def back(name, rows, shape):
    return rows.T if name.endswith("kernel") else rows.reshape(shape)


def per_leaf(base, experts, merge):
    """Merges leaf by leaf: (name, deltas [experts, ...], base's leaf) -> merged delta."""
    taus, origin = deltas(base, experts), wide(base)
    return added(base, {n: merge(n, stacked(taus, n), origin[n]) for n in base})


# Sparse -------------------------------------------------------------------------------------------


def band(x, density, top):
    """Of a flat array, what is ranked behind the top and before the rest."""
    order = np.argsort(-abs(x), kind="stable")
    first = int(x.size * top)
    kept = np.zeros(x.size, bool)
    kept[order[first : first + int(x.size * density)]] = True
    return np.where(kept, x, 0.0)


def breadcrumbs(base, experts, density=0.2, top=0.1, scaling=0.4, weights=1.0, scope="row"):
    weights = spread(weights, len(experts))

    def one(name, tau):
        if scope == "tensor":
            room = (tau.size - int(tau.size * density)) / tau.size if tau.size else 0.0
            return band(tau.ravel(), density, min(top, room)).reshape(tau.shape)
        rows = [band(row, density, top) for row in rows_of(name, tau)]
        return back(name, np.array(rows).reshape(rows_of(name, tau).shape), tau.shape)

    def merge(name, taus, _):
        several = zip(weights, taus, strict=True)
        return scaling * sum(w * one(name, tau) for w, tau in several)

    return per_leaf(base, experts, merge)


def localize_and_stitch(base, experts, density=0.05):
    taus = deltas(base, experts)
    thresholds = []
    for tau in taus:
        every = np.sort(np.concatenate([abs(x).ravel() for x in tau.values()]))[::-1]
        thresholds.append(every[max(1, int(every.size * density)) - 1])

    def merge(name, values, _):
        masks = abs(values) >= along_experts(np.array(thresholds), values)
        return (masks * values).sum(0) / np.maximum(masks.sum(0), 1)

    return per_leaf(base, experts, merge)


def stitched(base, experts, masks):
    def merge(n, taus, origin):
        several = np.stack([mask[n] for mask in masks])
        shares = several / np.maximum(several.sum(0), 1)
        return (shares * taus).sum(0)

    return per_leaf(base, experts, merge)


def della(base, experts, masks, density, spread, scaling, weights):
    """With masks that were drawn elsewhere; the probability is linear in the rank within a row."""

    def merge(n, taus, origin):
        several = []
        for tau, mask, mean, weight in zip(taus, masks, density, weights, strict=True):
            rows = rows_of(n, tau)
            ranks = np.argsort(np.argsort(abs(rows), axis=-1, kind="stable"), axis=-1)
            probability = mean - spread + 2 * spread * ranks / (rows.shape[-1] - 1)
            several.append(weight * tau * mask[n] / back(n, probability, tau.shape))
        sign = np.where(sum(several) >= 0, 1, -1)
        agree = np.stack([x * sign > 0 for x in several])
        mass = sum(weight * kept for weight, kept in zip(weights, agree, strict=True))
        return scaling * (several * agree).sum(0) / np.where(mass == 0, 1, mass)

    return per_leaf(base, experts, merge)


def pcb(base, experts, density=0.05, weights=1.2, between="normalized", clip=0.01):
    taus, count = deltas(base, experts), len(experts)
    weights = spread(weights, count)[:, None]
    flat = np.stack([np.concatenate([tau[n].ravel() for n in base]) for tau in taus])
    size = flat.shape[1]
    ordered = np.sort(abs(flat), axis=1)
    low, high = ordered[:, [int(size * clip)]], ordered[:, [int(size * (1 - clip) - 1)]]
    magnitude = np.clip(abs(flat), low, high)
    scaled = (magnitude - low) / (high - low)
    signed = np.sign(flat) * scaled
    agreement = {
        "normalized": lambda: np.tanh(flat * signed.sum(0)),
        "raw": lambda: np.tanh(flat * flat.sum(0)),
        "pairs": lambda: np.tanh(signed[:, None] * signed[None]).sum(1),
    }[between]()
    score = np.exp(count * scaled**2) * agreement
    threshold = np.sort(score, axis=1)[:, [int(size * (1 - density))]]
    share = np.maximum(score - threshold, 0) / (score.max(1, keepdims=True) - threshold)
    merged = (weights * np.sign(flat) * magnitude * share).sum(0) / np.maximum(share.sum(0), 1e-12)
    parts = np.split(merged, np.cumsum([np.size(base[n]) for n in base])[:-1])
    return added(base, {n: p.reshape(base[n].shape) for n, p in zip(base, parts, strict=True)})


# Element by element -------------------------------------------------------------------------------


def magmax(base, experts, scaling=0.5):
    def merge(name, taus, _):
        # The last of equal magnitudes.
        place = len(taus) - 1 - abs(taus[::-1]).argmax(0)
        return scaling * np.take_along_axis(taus, place[None], axis=0)[0]

    return per_leaf(base, experts, merge)


def ram_plus(base, experts, epsilon=1e-5, gain=0.1, limit=0.2, scope="model"):
    taus, count = deltas(base, experts), len(experts)
    active = {n: abs(stacked(taus, n)) > epsilon for n in base}

    def factors(names):
        shared, unique = np.zeros(count), np.zeros(count)
        for n in names:
            overlap = active[n].sum(0)
            for i in range(count):
                shared[i] += (active[n][i] & (overlap >= 2)).sum()
                unique[i] += (active[n][i] & (overlap == 1)).sum()
        ratio = np.where(unique > 0, shared / np.maximum(unique, 1), limit)
        return 1 + gain * np.minimum(ratio, limit)

    def merge(name, values, _):
        overlap = active[name].sum(0)
        kept = values * active[name]
        amplified = along_experts(factors(base if scope == "model" else [name]), values) * kept
        return np.where(overlap == 1, amplified.sum(0), kept.sum(0) / np.maximum(overlap, 1))

    return per_leaf(base, experts, merge)


def ram(base, experts, epsilon=1e-5):
    return ram_plus(base, experts, epsilon, gain=0.0)


def nearswap(base, experts, t=0.01):
    return per_leaf(
        base,
        experts,
        lambda name, taus, _: np.clip(t / np.maximum(abs(taus[0]), 1e-6), 0, 1) * taus[0],
    )


# Weighted by what changed -------------------------------------------------------------------------


def _shares(changes, power):
    with np.errstate(all="ignore"):
        powered = changes**power
        return np.where(powered.sum(0) > 0, powered / powered.sum(0), 1 / len(changes))


def _norms(taus):
    return np.sqrt((taus.reshape(len(taus), -1) ** 2).sum(1))


def varm(base, experts):
    def merge(name, taus, _):
        return (along_experts(_shares(_norms(taus), 2), taus) * taus).sum(0)

    return per_leaf(base, experts, merge)


def delta_guided(base, experts, power=1.0, by="element"):
    def merge(name, taus, _):
        if by == "element":
            return (_shares(abs(taus), power) * taus).sum(0)
        means = abs(taus).reshape(len(taus), -1).mean(1) if taus[0].size else np.ones(len(taus))
        return (along_experts(_shares(means, power), taus) * taus).sum(0)

    return per_leaf(base, experts, merge)


def frobenius_weighted(base, experts, power=1.0):
    def merge(name, taus, _):
        if not name.endswith("kernel"):
            return taus.mean(0)
        return (along_experts(_shares(_norms(taus), power), taus) * taus).sum(0)

    return per_leaf(base, experts, merge)


def sce(base, experts, density=0.1):
    def merge(name, taus, _):
        if density < 1:
            variance = taus.var(0).ravel()
            count = int(density * (variance > 0).sum())
            kept = np.zeros(variance.size, bool)
            kept[np.argsort(-variance, kind="stable")[:count]] = True
            taus = taus * kept.reshape(taus[0].shape)
        energy = (taus.reshape(len(taus), -1) ** 2).sum(1)
        weights = energy / energy.sum() if energy.sum() else np.full(len(taus), 1 / len(taus))
        sign = np.where(taus.sum(0) >= 0, 1, -1)
        share = (np.sign(taus) == sign) * along_experts(weights, taus)
        return (share * taus).sum(0) / np.where(share.sum(0) == 0, 1.0, share.sum(0))

    return per_leaf(base, experts, merge)


def nan(base, experts, of="weights"):
    models = [wide(e) for e in experts] if of == "weights" else deltas(base, experts)
    inverse = np.array([1 / np.sqrt(sum((x**2).sum() for x in m.values())) for m in models])
    share = inverse / inverse.sum() * len(experts) / 2
    return per_leaf(base, experts, lambda n, taus, _: (along_experts(share, taus) * taus).sum(0))


def metrics_weighted(base, experts, metrics=1.0, power=1.0, by="loss"):
    values = spread(metrics, len(experts))
    weights = values**-power if by == "loss" else values**power
    weights = weights / weights.sum()
    trees = [wide(e) for e in experts]
    return {n: sum(w * tree[n] for w, tree in zip(weights, trees, strict=True)) for n in trees[0]}


def widen(base, experts, ratio=1.0, value=1.0):
    def scores(significance, above):
        powered = np.exp(significance)
        return np.where(above, value, powered / powered.sum(0))

    def scores_of_ranks(changes):
        places = np.argsort(np.argsort(changes, kind="stable"), kind="stable")
        size = places.shape[1]
        return scores(places / size, 2 * places > ratio * (size - 1))

    def merge(name, taus, origin):
        if origin.ndim < 2:
            sizes = abs(taus)
            means = along_experts(sizes.reshape(len(taus), -1).mean(1), sizes)
            return (scores(sizes, sizes > ratio * means) * taus).sum(0)
        # One row for each input of a kernel.
        lengths = np.sqrt(((origin + taus) ** 2).sum(-1)), np.sqrt((origin**2).sum(-1))
        cosine = ((origin + taus) * origin).sum(-1) / (lengths[0] * lengths[1])
        by_length = scores_of_ranks(abs(lengths[0] - lengths[1]))
        by_direction = scores_of_ranks(1 - cosine)
        return (((by_length + by_direction) / 2)[..., None] * taus).sum(0)

    return per_leaf(base, experts, merge)


# On the sphere ------------------------------------------------------------------------------------


def _arc(a, b, t):
    cosine = np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
    angle = np.arccos(cosine)
    if np.sin(angle) < 1e-8:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(base, experts, weights=1.0, scope="tensor", of="deltas"):
    first, second = spread(weights, 2)
    t = second / (first + second)
    origin = wide(base) if of == "deltas" else {n: np.zeros_like(x) for n, x in wide(base).items()}

    def merge(name, taus, _):
        if not taus[0].size or not taus.any():
            return taus[0]
        if scope == "tensor":
            return _arc(taus[0].ravel(), taus[1].ravel(), t).reshape(taus[0].shape)
        a, b = (rows_of(name, tau) for tau in taus)
        if scope == "column" and len(a) > 1:
            return back(
                name,
                np.array([_arc(x, y, t) for x, y in zip(a.T, b.T, strict=True)]).T,
                taus[0].shape,
            )
        return back(
            name, np.array([_arc(x, y, t) for x, y in zip(a, b, strict=True)]), taus[0].shape
        )

    return per_leaf(origin, experts, merge)


def multislerp(base, experts, weights=1.0, normalize=True):
    weights = spread(weights, len(experts))
    weights = weights / weights.sum() if normalize else weights

    def merge(name, taus, _):
        norms = _norms(taus)
        if not norms.all():
            return (along_experts(weights, taus) * taus).sum(0) * (0 if not norms.any() else np.nan)
        mean = (along_experts(weights / norms, taus) * taus).sum(0)
        return mean / np.linalg.norm(mean) * (weights * norms).sum()

    return per_leaf(base, experts, merge)


def karcher(base, experts, weights=1.0, iterations=10, tolerance=1e-5):
    """The iteration on the vectors themselves, not on coefficients."""
    weights = spread(weights, len(experts)) / spread(weights, len(experts)).sum()
    trees, merged = [wide(e) for e in experts], {}
    for n in trees[0]:
        values = stacked(trees, n).reshape(len(trees), -1)
        norms = np.linalg.norm(values, axis=1)
        if not norms.any():
            merged[n] = values[0].reshape(trees[0][n].shape)
            continue
        units = values / norms[:, None]
        x = weights @ units
        x = x / np.linalg.norm(x)
        for _ in range(iterations):
            cosine = np.clip(units @ x, -1, 1)
            angle = np.arccos(cosine)
            pull = np.where(
                angle >= tolerance, weights * angle / np.sin(np.maximum(angle, 1e-9)), 0
            )
            tangent = pull @ (units - cosine[:, None] * x)
            size = np.linalg.norm(tangent)
            if size < tolerance:
                break
            x = np.cos(size) * x + np.sin(size) * tangent / size
            x = x / np.linalg.norm(x)
        merged[n] = ((weights * norms).sum() * x).reshape(trees[0][n].shape)
    return merged


def model_stock(base, experts, scope="tensor", angle="cosine", clip=False):
    count = len(experts)

    def factor(vectors):
        if not vectors.any():
            return 0.0
        cosines = []
        for i in range(count):
            for j in range(i):
                product = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
                cosines.append(vectors[i] @ vectors[j] / product if product else 0.0)
        c = np.mean(cosines)
        if angle == "degrees":
            c = np.cos(np.deg2rad(np.rad2deg(np.arccos(np.clip(cosines, -1, 1))).mean()))
        t = count * c / (1 + (count - 1) * c)
        return np.clip(t, 0, 1) if clip else t

    def merge(name, taus, _):
        if scope == "tensor":
            return factor(taus.reshape(count, -1)) * taus.mean(0)
        rows = np.stack([rows_of(name, tau) for tau in taus])
        merged = [factor(rows[:, j]) * rows[:, j].mean(0) for j in range(rows.shape[1])]
        return back(name, np.array(merged).reshape(rows[0].shape), taus[0].shape)

    return per_leaf(base, experts, merge)


def arcee_fusion(base, experts):
    def softmax(x):
        powered = np.exp(x - x.max(-1, keepdims=True))
        return powered / powered.sum(-1, keepdims=True) + 1e-8

    def one(name, tau, origin):
        rows, under = rows_of(name, tau), rows_of(name, origin)
        p, q = softmax(under + rows), softmax(under)
        importance = abs(rows) * (p * np.log(p / q)).sum(-1, keepdims=True)
        ordered = np.sort(importance.ravel())
        q1, q2, q3 = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
        kept = np.where(importance >= q2 + 1.5 * (q3 - q1), rows, 0.0)
        return back(name, kept, tau.shape)

    return per_leaf(
        base, experts, lambda name, taus, origin: sum(one(name, tau, origin) for tau in taus)
    )


# Running ------------------------------------------------------------------------------------------


def ema(base, experts, decay=0.9):
    trees = [wide(e) for e in experts]
    merged = trees[0]
    for tree in trees[1:]:
        merged = {n: decay * merged[n] + (1 - decay) * tree[n] for n in tree}
    return merged


def window_average(base, experts, length=5):
    trees = [wide(e) for e in experts[-length:]]
    return {n: stacked(trees, n).mean(0) for n in trees[0]}


# Norms --------------------------------------------------------------------------------------------


def norms_of(trees, order, scope, name):
    def norm(x):
        return abs(x).sum() if order == "l1" else (x**2).sum()

    totals = [
        sum(norm(x) for x in tree.values()) if scope == "model" else norm(tree[name])
        for tree in trees
    ]
    return np.array(totals) if order == "l1" else np.sqrt(totals)


def equal_norms(base, experts, order="l2", scope="model"):
    taus, merged = deltas(base, experts), {}
    for n in base:
        norms = norms_of(taus, order, scope, n)
        factors = np.where(norms > 0, norms.mean() / np.where(norms > 0, norms, 1), 0)
        merged[n] = (along_experts(factors, stacked(taus, n)) * stacked(taus, n)).sum(0)
    return added(base, merged)


def match_norm(base, experts, order="l2", scope="model"):
    taus, merged = deltas(base, experts), {}
    whole = {n: stacked(taus, n).sum(0) for n in base}
    for n in base:
        (norm,) = norms_of([whole], order, scope, n)
        merged[n] = whole[n] * (norms_of(taus, order, scope, n).mean() / norm if norm else 0.0)
    return added(base, merged)


# Fixed numbers of models --------------------------------------------------------------------------


def passthrough(base, experts, scale=1.0):
    return {n: scale * np.float64(x) for n, x in experts[0].items()}


def chat_vector(base, experts, scaling=1.0):
    return per_leaf(base, experts, lambda n, taus, _: taus[0] + scaling * taus[1])


def analogy(base, experts, scaling=1.0):
    return per_leaf(base, experts, lambda n, taus, _: taus[2] + scaling * (taus[1] - taus[0]))
