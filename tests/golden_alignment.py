"""Translations of methods that align networks; see `golden_translation.py`."""

import numpy as np
from golden_case import Case, Translation, Untranslatable

import mergejax as mj
from mergejax.alignment import Group, Matching, Symmetries


def _rebasin(case: Case):
    """Weight matching on hand-written symmetries, then the mean."""
    take = case.parameters.take
    sweeps = take("max_iter")
    # What follows only says how the networks and the visiting order were drawn.
    for name in ("key", "planted", "noise"):
        take(name)
    axes = {name: tuple(own) for name, own in case.facts["axes_to_perm"].items()}
    reference, moved = case.experts
    symmetries = Symmetries(_groups(axes, reference), axes)

    def result():
        found = mj.alignment.weight_matching(symmetries, reference, moved, sweeps=sweeps)
        stats = mj.alignment.statistics(symmetries, [{}, found.permutations], case.experts)
        return {
            "perm": found.permutations,
            "permuted": mj.alignment.apply(symmetries, found.permutations, moved),
            "expected": mj.merge(mj.permute() | mj.mean(), None, case.experts, stats=stats),
        }

    return Translation(None, None, case.experts, result=result)


def _groups(axes, params):
    return {
        name: Group(int(np.shape(params[leaf])[i]))
        for leaf, own in axes.items()
        for i, name in enumerate(own)
        if name is not None
    }


def _pleas(case: Case):
    """Partial merging; the peer's activations are a matrix of costs here."""
    take = case.parameters.take
    kind = take("matching", choices=("weights", "activations_inner", "activations_cdist"))
    ratios = take("ratios")
    take("noise_between_the_networks")
    symmetries = _symmetries(case)

    def result():
        matching = _matching(case, symmetries, kind)
        if not isinstance(ratios, dict):
            shares = dict.fromkeys(symmetries.groups, ratios)
        else:
            shares = ratios
        orders = mj.alignment.keep_apart(symmetries, [matching], shares)
        stats = mj.alignment.statistics(symmetries, orders, case.experts)
        options = {"stats": stats, "layout": "torch"}
        joined = mj.merge(mj.permute() | mj.join(), None, case.experts, **options)
        found = {"perm": matching.permutations, **_blocks(orders, matching)}
        if "partial" not in case.tensors:
            return {**found, "expected": joined}
        shared = mj.alignment.regression(_joint(case), stats, case.experts, layout="torch")
        regressed = mj.merge(mj.pleas(ridge=0.0), None, case.experts, shared=shared, **options)
        return {**found, "partial": joined, "expected": regressed}

    return Translation(None, None, case.experts, result=result)


def _pleas_regressed(case: Case):
    """The peer runs Adam to convergence; the minimum is ours in closed form."""
    take = case.parameters.take
    take("least_squares", choices=("Adam, full batch, cosine schedule to 0",))
    take("steps"), take("lr")
    take("merging", choices=("perm_gradmask",))
    return _pleas(case)


def _symmetries(case):
    axes = {name: [None] * np.ndim(x) for name, x in case.experts[0].items()}
    for group, places in case.facts["spec"].items():
        for place in places:
            leaf, axis = place.rsplit(":", 1)
            axes[leaf][int(axis)] = group
    axes = {name: tuple(own) for name, own in axes.items()}
    return Symmetries(_groups(axes, case.experts[0]), axes)


def _matching(case, symmetries, kind):
    """By weights; or the best assignment for the peer's recorded similarities of activations."""
    if kind == "weights":
        return mj.alignment.weight_matching(symmetries, *case.experts)
    costs = {name: np.asarray(cost) for name, cost in case.tensors["cost"].items()}
    permutations = {name: mj.alignment.assign(cost) for name, cost in costs.items()}
    scores = {n: np.take_along_axis(costs[n], p[:, None], 1)[:, 0] for n, p in permutations.items()}
    return Matching(permutations, scores, 0.0, 1)


def _blocks(orders, matching):
    """The units of each network that are joined and kept apart, under the peer's names."""
    found = {f"block_{kind}{k}": {} for kind in ("merged", "separate") for k in (0, 1)}
    for group in matching.permutations:
        first, second = (np.asarray(order[group]) for order in orders)
        both = (first >= 0) & (second >= 0)
        for k, own in enumerate((first, second)):
            found[f"block_merged{k}"][group] = own[both]
            found[f"block_separate{k}"][group] = own[~both & (own >= 0)]
    return found


def _joint(case):
    """Joint Gram matrices of a multilayer perceptron with ReLU, in float64."""
    layers = sorted(name for name in case.experts[0] if name.endswith(".weight"))
    rows = [np.asarray(case.tensors["inputs"]["x"], np.float64)] * 2
    if any(np.ndim(case.experts[0][name]) != 2 for name in layers):
        raise Untranslatable("least squares of a convolution")
    grams = {}
    for name in layers:
        q = np.hstack([*rows, np.ones((len(rows[0]), 1))])
        grams[name] = q.T @ q / len(q)
        bias = name.replace("weight", "bias")
        models = zip(rows, case.experts, strict=True)
        outputs = [z @ np.asarray(m[name], np.float64).T + np.asarray(m[bias]) for z, m in models]
        rows = [np.maximum(z, 0) for z in outputs]
    return grams


TRANSLATIONS = {
    "git_rebasin (weight matching)": _rebasin,
    "pleas (partial merge)": _pleas,
    "pleas (matching + least squares)": _pleas_regressed,
}
