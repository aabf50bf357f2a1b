"""The study of merged experts, on a tiny transformer."""

import jax
import numpy as np
import pytest

from mergejax import alignment, fit
from mergejax.alignment_studies import mixture, moe, networks, recovery
from mergejax.data.task import Split

MODEL = mixture.Transformer(layers=1, width=8, experts=4, units=6, classes=3)
RNG = np.random.default_rng(0)
IMAGES = RNG.random((250, 8, 8, 1), np.float32)


@pytest.fixture(scope="module")
def full():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES[:1])["params"]
    return jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32) / 3, shapes)


def logits(params, groups):
    return networks.logits(MODEL, {"params": mixture.grown(params, groups)}, IMAGES)


def test_experts_that_are_permuted_copies_merge_to_the_network_itself(full):
    twins = dict(full)
    for layer in mixture.mixtures(full):
        order = np.stack([RNG.permutation(6) for _ in range(4)])
        own = full[layer]
        twins[layer] = {
            **own,
            "up": np.stack([own["up"][0][:, p] for p in order]),
            "up_bias": np.stack([own["up_bias"][0][p] for p in order]),
            "down": np.stack([own["down"][0][p] for p in order]),
        }
    wanted = logits(twins, {layer: np.arange(4) for layer in mixture.mixtures(full)})
    found = moe.routings(MODEL, twins, IMAGES)
    errors = {}
    for method, params, groups in moe.merges(twins, found, average=2):
        assert sum(len(params[layer]["up"]) for layer in groups) == 2
        errors[method] = abs(logits(params, groups) - wanted).max()
    assert errors["M-SMoE"] < 1e-5
    assert min(errors["M-SMoE, not aligned"], errors["average of neighbours"]) > 1e-3


def test_no_token_goes_to_an_expert_that_was_dropped(full):
    found = moe.routings(MODEL, full, IMAGES)
    ((params, groups),) = [
        (p, g) for m, p, g in moe.merges(full, found, 2) if m == "most used experts"
    ]
    routed = moe.routings(MODEL, mixture.grown(params, groups), IMAGES)
    for layer, own in groups.items():
        used = np.flatnonzero(routed[layer].usage)
        assert set(own[used].tolist()) == set(own.tolist())
        assert len(used) == len(set(own.tolist()))
        assert routed[layer].usage.sum() == pytest.approx(1)


def test_compressed_experts_start_where_they_were_and_end_sparse(full):
    groups = {layer: np.arange(4) for layer in mixture.mixtures(full)}
    start = recovery.split(full, rank=2)
    np.testing.assert_allclose(logits(start, groups), logits(full, groups), atol=1e-5)
    assert moe.size(full) == sum(x.size for x in jax.tree.leaves(full))
    labels = logits(full, groups).argmax(1).astype(np.int32)
    settings = fit.Settings(steps=6, learning_rate=1e-3, batch=8)
    found = recovery.train(
        MODEL, start, groups, full, Split(IMAGES, labels), settings, [0], keep=0.25
    )
    columns = np.concatenate([abs(x).max(1).ravel() > 0 for x in recovery.rests(found).values()])
    assert columns.sum() == round(0.25 * len(columns))
    factors = sum(
        found[layer][name].left.size + found[layer][name].right.size
        for layer in groups for name in ("up", "down")
    )  # fmt: skip
    kept = sum(int(np.count_nonzero(x)) for x in recovery.rests(found).values())
    dense = 4 * 2 * 8 * 6
    assert moe.size(found) == moe.size(full) - dense + factors + kept
    one = alignment.low_rank_and_rest(full["mixture_0"]["up"][1], 2)
    np.testing.assert_allclose(start["mixture_0"]["up"].rest[1], one.rest)
