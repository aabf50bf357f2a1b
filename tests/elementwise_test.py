"""Element-wise and per-tensor methods against their restatements in `reference_elementwise.py`."""

import functools

import jax
import numpy as np
import pytest
import reference_elementwise as reference
import trees
from restated import ids, merged_and_restated

import mergejax as mj


def whole(function):
    """Restatements of this file need nothing but the models."""
    return lambda tree, base, experts, stats, **options: function(base, experts, **options)


def piece(function, **options):
    """A restatement of a chain whose options are in its text."""
    return whole(functools.partial(function, **options))


def stitched(tree, base, experts, stats):
    masks = [{n: np.float64(m) for n, m in mask.items()} for mask in stats["mask"]]
    return reference.stitched(base, experts, masks)


# Experts, a method that takes the options itself or a whole chain, its restatement, the options.
CASES = [
    (3, "breadcrumbs", whole(reference.breadcrumbs), {}),
    (
        2,
        "breadcrumbs",
        whole(reference.breadcrumbs),
        {"density": 0.5, "top": 0.2, "scaling": 1.3, "weights": [1, -0.5]},
    ),
    (
        2,
        "breadcrumbs",
        whole(reference.breadcrumbs),
        {"density": 0.9, "top": 0.2, "scope": "tensor", "scaling": 1.0},
    ),
    (3, "localize_and_stitch", whole(reference.localize_and_stitch), {"density": 0.3}),
    (2, "localize_and_stitch", whole(reference.localize_and_stitch), {"density": 1.0}),
    (3, "pcb", whole(reference.pcb), {}),
    (3, "pcb", whole(reference.pcb), {"density": 0.2, "weights": [0.8, 1.0, 1.3]}),
    (4, "pcb", whole(reference.pcb), {"density": 0.3, "between": "raw", "clip": 0.0001}),
    (2, "pcb", whole(reference.pcb), {"density": 0.5, "between": "pairs", "clip": 0.05}),
    (3, "magmax", whole(reference.magmax), {}),
    (3, "ram", whole(reference.ram), {"epsilon": 0.02}),
    (3, "ram_plus", whole(reference.ram_plus), {"epsilon": 0.02, "gain": 0.4, "limit": 3.0}),
    (3, "ram_plus", whole(reference.ram_plus), {"epsilon": 0.03, "gain": 0.2, "scope": "tensor"}),
    (1, "nearswap", whole(reference.nearswap), {"t": 0.02}),
    (3, "varm", whole(reference.varm), {}),
    (3, "delta_guided", whole(reference.delta_guided), {}),
    (3, "delta_guided", whole(reference.delta_guided), {"power": 2.5, "by": "mean"}),
    (3, "frobenius_weighted", whole(reference.frobenius_weighted), {}),
    (3, "frobenius_weighted", whole(reference.frobenius_weighted), {"power": 0.0}),
    (3, "sce", whole(reference.sce), {}),
    (4, "sce", whole(reference.sce), {"density": 0.5}),
    (3, "sce", whole(reference.sce), {"density": 1.0}),
    (3, "nan", whole(reference.nan), {}),
    (3, "nan", whole(reference.nan), {"of": "deltas"}),
    (3, "metrics_weighted", whole(reference.metrics_weighted), {"metrics": [0.5, 1, 2]}),
    (
        3,
        "metrics_weighted",
        whole(reference.metrics_weighted),
        {"metrics": [50, 60, 71], "power": 4.0, "by": "score"},
    ),
    (3, "widen", whole(reference.widen), {}),
    (2, "widen", whole(reference.widen), {"ratio": 1.5, "value": 0.8}),
    (2, "nuslerp", whole(reference.nuslerp), {"weights": [3, 1]}),
    (2, "nuslerp", whole(reference.nuslerp), {"weights": [1, 4], "scope": "row"}),
    (2, "nuslerp", whole(reference.nuslerp), {"scope": "column"}),
    (2, "nuslerp", whole(reference.nuslerp), {"weights": [1, 2], "of": "weights"}),
    (3, "multislerp", whole(reference.multislerp), {"weights": [0.5, 0.3, 0.4]}),
    (2, "multislerp", whole(reference.multislerp), {"normalize": False, "weights": [1, 0.3]}),
    (3, "karcher", whole(reference.karcher), {}),
    (4, "karcher", whole(reference.karcher), {"weights": [1, 2, 3, 4], "iterations": 3}),
    (3, "model_stock", whole(reference.model_stock), {}),
    (2, "model_stock", whole(reference.model_stock), {"scope": "row", "clip": True}),
    (3, "model_stock", whole(reference.model_stock), {"angle": "degrees"}),
    (1, "arcee_fusion", whole(reference.arcee_fusion), {}),
    (4, "ema", whole(reference.ema), {"decay": 0.6}),
    (4, "window_average", whole(reference.window_average), {"length": 3}),
    (2, "window_average", whole(reference.window_average), {"length": 3}),
    (3, "equal_norms()|total()", piece(reference.equal_norms), {}),
    (
        3,
        "equal_norms(order='l1', scope='tensor')|total()",
        piece(reference.equal_norms, order="l1", scope="tensor"),
        {},
    ),
    (1, "passthrough", whole(reference.passthrough), {"scale": 0.7}),
    (2, "chat_vector", whole(reference.chat_vector), {"scaling": 0.6}),
    (3, "analogy", whole(reference.analogy), {"scaling": 0.6}),
    (3, "localize_and_stitch_trained", stitched, {}),
    (3, "total()|match_norm()", piece(reference.match_norm), {}),
    (
        3,
        "total()|match_norm(order='l1', scope='tensor')",
        piece(reference.match_norm, order="l1", scope="tensor"),
        {},
    ),
]
SHAPES = {
    "block_0": {"dense": {"kernel": (5, 7), "bias": (7,)}},
    "block_1": {"dense": {"kernel": (5, 7), "bias": (7,)}},
    "out": {"kernel": (5, 7)},
}


def drawn(count, seed=0, step=0.1):
    """Models without equal magnitudes, so that rounding cannot change a rank; some did not move."""
    rng = np.random.default_rng(seed)
    base = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=trees.is_shape
    )

    def tune(x):
        return np.float32(x + step * rng.normal(size=x.shape) * (rng.random(x.shape) < 0.9))

    return base, [jax.tree.map(tune, base) for _ in range(count)]


@pytest.mark.parametrize(("count", "method", "restated", "options"), CASES, ids=ids(CASES))
def test_equals_its_restatement(count, method, restated, options):
    got, expected = merged_and_restated(drawn(count), method, restated, options)
    trees.close(got, expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("step", [1e-3, 1e-4])
@pytest.mark.parametrize(
    ("count", "method", "restated", "options"),
    [case for case in CASES if case[1] in ("widen", "karcher")],
)
def test_small_changes_are_told_apart_from_roundings(count, method, restated, options, step):
    """Of fine-tuned models lengths and directions agree to nearly all their digits."""
    got, expected = merged_and_restated(drawn(count, step=step), method, restated, options)
    trees.close(got, expected, rtol=0, atol=5e-7)


def test_widen_of_inputs_without_weights():
    """A token that was unused has no direction; its length counts."""
    base = {"kernel": np.float32([[0, 0], [3, 4], [6, 8]])}
    one = {"kernel": np.float32([[9, 12], [3, 4], [6, 8]])}
    other = {"kernel": np.float32([[0, 0], [4, 3], [0, 0]])}
    shares = lambda a, b: np.exp(a / 3) / (np.exp(a / 3) + np.exp(b / 3))
    merged = mj.merge("widen()", base, [one, other])["kernel"] - base["kernel"]
    # By length the first expert's inputs are in places 2, 0, 1 and the other's in 0, 1, 2; by
    # direction in 0, 1, 2 and 0, 2, 1.
    expected = [(1 + 0.5) / 2 * np.float64([9, 12]), (shares(1, 0) + 1) / 2 * np.float64([1, -1])]
    np.testing.assert_allclose(merged[:2], expected, rtol=1e-6)
    np.testing.assert_allclose(merged[2], (1 + shares(1, 2)) / 2 * np.float64([-6, -8]), rtol=1e-6)


# DELLA's draws ------------------------------------------------------------------------------------


def merged_by_seed(method, base, expert, layout, count=4000):
    """[count, ...] merges of one kernel."""

    @jax.jit
    def several(seeds):
        one = lambda seed: mj.merge(method, base, [expert], layout=layout, seed=seed)["w"]
        return jax.lax.map(one, seeds)

    return np.asarray(several(np.arange(count, dtype=np.uint32)))


@pytest.mark.parametrize("layout", ["flax", "torch"])
def test_della_keeps_by_the_rank_within_the_inputs_of_an_output(layout):
    kernel = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    expert = {"w": kernel if layout == "flax" else np.ascontiguousarray(kernel.T)}
    base = {"w": np.zeros_like(expert["w"])}
    draws = {}
    for rescale in ("none", "inverse"):
        method = f"drop_by_rank(density=0.6, spread=0.35, rescale='{rescale}')|total()"
        found = merged_by_seed(method, base, expert, layout)
        draws[rescale] = found if layout == "flax" else found.transpose(0, 2, 1)
    ranks = np.argsort(np.argsort(abs(kernel), axis=0), axis=0)
    probability = 0.6 - 0.35 + 2 * 0.35 * ranks / 5
    spread = 5 * np.sqrt(probability * (1 - probability) / 4000)
    assert (abs((draws["none"] != 0).mean(0) - probability) <= spread).all()
    deviation = 5 * abs(kernel) * np.sqrt((1 - probability) / probability / 4000)
    assert (abs(draws["inverse"].mean(0) - kernel) <= deviation).all()


def test_della_is_its_restatement_behind_its_own_masks():
    """The masks are read off the first stage, whose draws are those of the whole method."""
    base, experts = drawn(3)
    options = {"density": [0.5, 0.7, 0.6], "spread": 0.3}
    drop = mj.drop_by_rank(**options, rescale="none")
    dropped = [trees.flat(x) for x in mj.merge(drop, base, experts, seed=3)]
    weights = [1.0, 2.0, 0.5]
    got = mj.merge(mj.della(**options, scaling=0.8, weights=weights), base, experts, seed=3)
    flat, several = trees.flat(base), [trees.flat(expert) for expert in experts]
    masks = [{n: x[n] != flat[n] for n in flat} for x in dropped]
    expected = reference.della(flat, several, masks, scaling=0.8, weights=weights, **options)
    trees.close(got, expected, rtol=5e-6, atol=5e-6)


def test_della_without_a_spread_is_dare():
    base, (expert,) = drawn(1)
    della = mj.merge("drop_by_rank(density=0.3, spread=0.0)|total()", base, [expert], seed=7)
    dare = mj.merge("drop(rate=0.7)|total()", base, [expert], seed=7)
    trees.close(della, dare, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("density", "spread"), [(0.1, 0.1), (0.9, 0.2), ([0.5, 0.05], 0.06)])
def test_della_refuses_probabilities_outside_the_unit_interval(density, spread):
    with pytest.raises(mj.MergeError, match=r"leave \(0, 1\]; choose a spread below"):
        mj.della(density, spread)


def test_pcb_leaves_alone_what_competes_nowhere_and_is_linear_in_its_weights():
    base, experts = drawn(3)
    once, twice = (mj.merge(f"pcb(density=0.1, weights={w})", base, experts) for w in (0.75, 1.5))
    flat = trees.flat(base)
    moved = {n: x - flat[n] for n, x in trees.flat(once).items()}
    trees.close(twice, {n: flat[n] + 2 * x for n, x in moved.items()}, rtol=1e-6, atol=1e-6)
    size = sum(x.size for x in flat.values())
    assert 0 < sum(np.count_nonzero(x) for x in moved.values()) <= 3 * (int(0.1 * size) + 1)
