"""Experts of mixtures: aligned, grouped by their routing, merged, compressed."""

import numpy as np
import pytest

from mergejax import MergeError, alignment

E, D, F = 6, 5, 8


def layer(seed, same=False):
    """Gated experts with biases; all permuted copies of one if `same`."""
    rng = np.random.default_rng(seed)
    count = 1 if same else E
    into = {n: rng.normal(size=(count, D, F)) for n in ("gate", "up")}
    into["up_bias"] = rng.normal(size=(count, F))
    out = {"down": rng.normal(size=(count, F, D))}
    if same:
        order = np.stack([rng.permutation(F) for _ in range(E)])
        into = {n: np.stack([x[0][..., p] for p in order]) for n, x in into.items()}
        out = {"down": np.stack([out["down"][0][p] for p in order])}
    return into, out


def apply(into, out, router, x, table=None):
    """Top-2 of a gated mixture, float64."""
    scores = x @ router
    chosen = np.argsort(-scores, axis=1)[:, :2]
    total = np.zeros_like(x)
    for t, experts in enumerate(chosen):
        share = np.exp(scores[t, experts] - scores[t, experts].max())
        for e, weight in zip(experts, share / share.sum(), strict=True):
            i = e if table is None else table[e]
            hidden = np.tanh(x[t] @ into["gate"][i]) * (x[t] @ into["up"][i] + into["up_bias"][i])
            total[t] += weight * (hidden @ out["down"][i])
    return total


def test_permuted_copies_merge_in_any_groups_without_changing_the_function():
    into, out = layer(0, same=True)
    rng = np.random.default_rng(1)
    router, x = rng.normal(size=(D, E)), rng.normal(size=(20, D))
    wanted = apply(into, out, router, x)
    moved_in, moved_out, _ = alignment.align_experts(into, out)
    np.testing.assert_allclose(apply(moved_in, moved_out, router, x), wanted, atol=1e-13)
    found = alignment.routing(x @ router, top=2)
    for average in (1, 2, 4):
        (groups,) = alignment.group_experts([found], average)
        assert len(set(groups.tolist())) == average
        parts = [alignment.merge_experts(a, groups, found.usage) for a in (moved_in, moved_out)]
        assert parts[0]["gate"].shape == (average, D, F)
        np.testing.assert_allclose(apply(*parts, router, x, groups), wanted, atol=1e-13)


def test_usage_and_likeness_are_those_of_the_unmasked_choices():
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(4, 7, E)), rng.integers(0, 2, (4, 7))
    found = alignment.routing(logits, top=2, mask=mask)
    kept = logits[mask == 1]
    counts = np.zeros(E)
    for row in kept:
        counts[np.argsort(row)[-2:]] += 1
    np.testing.assert_allclose(found.usage, counts / counts.sum())
    for i in range(E):
        for j in range(E):
            a, b = kept[:, i], kept[:, j]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found.likeness[i, j] == pytest.approx(cosine, abs=1e-12)


def test_groups_of_all_layers_add_up_and_follow_usage():
    rng = np.random.default_rng(3)
    layers = [alignment.routing(rng.normal(size=(200, E)) + rng.normal(size=E)) for _ in range(4)]
    groups = alignment.group_experts(layers, average=2.5, keep=[1])
    sizes = [len(set(g.tolist())) for g in groups]
    assert sum(sizes) == round(2.5 * 3) + E
    assert sizes[1] == E
    assert min(sizes) >= 1
    leaders = []
    for number, (found, assigned) in enumerate(zip(layers, groups, strict=True)):
        own = [int(np.flatnonzero(assigned == g)[found.usage[assigned == g].argmax()])
               for g in range(sizes[number])]  # fmt: skip
        leaders += [(number, e) for e in own]
    # Whoever leads is used at least as much as anyone who follows, but for the first of a layer.
    first = {(n, int(found.usage.argmax())) for n, found in enumerate(layers)}
    followers = [layers[n].usage[e] for n in (0, 2, 3) for e in range(E) if (n, e) not in leaders]
    leading = [layers[n].usage[e] for n, e in leaders if n != 1 and (n, e) not in first]
    assert min(leading, default=1) >= max(followers)
    whole = alignment.group_experts(layers, average=E)
    assert all(g.tolist() == list(range(E)) for g in whole)


def test_experts_join_the_leader_they_are_most_like_and_weigh_by_usage():
    usage = np.array([0.4, 0.1, 0.1, 0.3, 0.1, 0.0])
    likeness = np.eye(E)
    likeness[1, 3] = likeness[2, 0] = likeness[4, 3] = likeness[5, 0] = 0.5
    (groups,) = alignment.group_experts([alignment.Routing(usage, likeness)], average=2)
    assert groups.tolist() == [0, 1, 0, 1, 1, 0]
    into, _ = layer(2)
    merged = alignment.merge_experts(into, groups, usage)["gate"]
    np.testing.assert_allclose(
        merged[0], (0.4 * into["gate"][0] + 0.1 * into["gate"][2]) / 0.5, rtol=1e-12
    )
    unused = alignment.merge_experts(into, groups, np.where(groups == 1, 0, usage))["gate"]
    np.testing.assert_allclose(unused[1], into["gate"][[1, 3, 4]].mean(0), rtol=1e-12)


def test_low_rank_and_rest_add_up_and_pruning_takes_the_least_important_columns():
    rng = np.random.default_rng(0)
    matrices = {n: rng.normal(size=(6, 9)).astype(np.float32) for n in "ab"}
    split = alignment.low_rank_and_rest(matrices["a"], rank=2)
    singular = np.linalg.svd(np.float64(matrices["a"]), compute_uv=False)
    np.testing.assert_allclose(split.left @ split.right + split.rest, matrices["a"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(split.rest, 2), singular[2], rtol=1e-5)
    np.testing.assert_allclose(split.left.T @ split.left, split.right @ split.right.T, atol=1e-5)
    importance = {n: abs(rng.normal(size=(6, 9))) for n in "ab"}
    pruned = alignment.prune(matrices, importance, keep=1 / 3)
    means = np.concatenate([importance[n].mean(0) for n in "ab"])
    kept = np.concatenate([abs(pruned[n]).max(0) > 0 for n in "ab"])
    assert sorted(np.flatnonzero(kept)) == sorted(np.argsort(means)[-6:])
    assert alignment.kept_share(550, 1000, 0.1) == pytest.approx(0.1 + 0.9 * 0.1**3)


def test_what_cannot_be_merged_is_one_sentence():
    into, out = layer(0)
    for call, said in {
        lambda: alignment.routing(np.zeros((0, 3))): "there are no tokens",
        lambda: alignment.routing(np.full((2, 3), np.nan)): "not finite",
        lambda: alignment.routing(np.zeros((2, 3)), top=4): "from 1 to the 3 experts, not 4",
        lambda: alignment.align_experts({"up": into["up"][:2]}, out): "6 experts with 8 units",
        lambda: alignment.group_experts([alignment.Routing(np.ones(3) / 3, np.eye(3))], 4): "not 4",
        lambda: alignment.merge_experts(into, [0, 2, 0, 2, 0, 2], np.ones(6)): "group 1 has no",
        lambda: alignment.merge_experts(into, [0, 0], np.ones(2)): "one for each expert",
        lambda: alignment.low_rank_and_rest(np.ones((3, 2)), 3): "from 1 to 2, not 3",
        lambda: alignment.prune({}, {}, 2): r"keep must be in \[0, 1\]",
    }.items():
        with pytest.raises(MergeError, match=said):
            call()
