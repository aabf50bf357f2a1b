"""Units of one network merged: duplicates go without a trace, the nearest two go first."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergejax import MergeError, alignment


class Net(nn.Module):
    """Convolution, flatten, dense; widths may change."""

    channels: int
    hidden: int
    act: str = "tanh"

    @nn.compact
    def __call__(self, x):
        act = {"tanh": jnp.tanh, "relu": nn.relu}[self.act]
        x = act(nn.Conv(self.channels, (2, 2))(x))
        x = act(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


X = np.random.default_rng(0).normal(size=(4, 3, 3, 2)).astype(np.float32)


def doubled(params, units):
    """Every unit twice, with half of its outgoing weights each, in mixed order."""
    order = {n: np.random.default_rng(1).permutation(np.repeat(np.arange(k), 2))
             for n, k in units.items()}  # fmt: skip
    c, h = order["channels"], order["hidden"]
    first, second, last = (params[n] for n in ("Conv_0", "Dense_0", "Dense_1"))
    rows = second["kernel"].reshape(9, -1, second["kernel"].shape[1])[:, c] / 2
    return {
        "Conv_0": {"kernel": first["kernel"][..., c], "bias": first["bias"][c]},
        "Dense_0": {
            "kernel": rows.reshape(-1, rows.shape[-1])[:, h],
            "bias": second["bias"][h],
        },
        "Dense_1": {"kernel": last["kernel"][h] / 2, "bias": last["bias"]},
    }


def made(channels, hidden, act="tanh"):
    model = Net(channels, hidden, act)
    params = model.init(jax.random.key(0), X)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)
    return model, params


@pytest.mark.parametrize(("act", "rule"), [("tanh", "mean_in"), ("relu", "sum_in")])
def test_duplicates_go_first_and_without_a_trace(act, rule):
    small, params = made(3, 5, act)
    wide = doubled(params, {"channels": 3, "hidden": 5})
    big = Net(6, 10, act)
    wanted = small.apply({"params": params}, X)
    np.testing.assert_allclose(big.apply({"params": wide}, X), wanted, rtol=1e-5, atol=1e-6)
    found = alignment.symmetries(lambda p, x: big.apply({"params": p}, x), wide, X)
    merged = alignment.merge_features(found, wide, threshold=1e-6, rule=rule)
    assert sorted(len(set(g.tolist())) for g in merged.groups.values()) == [3, 5]
    assert jax.tree.map(np.shape, merged.params) == jax.tree.map(np.shape, params)
    np.testing.assert_allclose(
        small.apply({"params": merged.params}, X), wanted, rtol=1e-5, atol=1e-6
    )
    half = alignment.merge_features(found, wide, threshold=1e-6, most=0.2)
    assert sorted(len(set(g.tolist())) for g in half.groups.values()) == [5, 8]


def test_nothing_is_merged_at_a_threshold_of_zero():
    model, params = made(3, 5)
    found = alignment.symmetries(lambda p, x: model.apply({"params": p}, x), params, X)
    merged = alignment.merge_features(found, params, threshold=0)
    jax.tree.map(np.testing.assert_array_equal, merged.params, params)


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_the_nearest_two_are_merged_first_as_the_formulas_say(threshold):
    rng = np.random.default_rng(3)
    into, out = rng.normal(size=(3, 12)), rng.normal(size=(12, 2))
    tree = {"a": {"kernel": into}, "b": {"kernel": out}}
    symmetries = alignment.Symmetries(
        {"h": alignment.Group(12)}, {"a/kernel": (None, "h"), "b/kernel": ("h", None)}
    )
    sets = [{i} for i in range(12)]
    weights = np.concatenate([into.T, out], axis=1)
    limit = threshold * max(np.linalg.norm(a - b) for a in weights for b in weights)
    while len(sets) > 1:
        means = [weights[list(s)].mean(0) for s in sets]
        pairs = {(i, j): np.linalg.norm(means[i] - means[j])
                 for j in range(len(sets)) for i in range(j)}  # fmt: skip
        (i, j), least = min(pairs.items(), key=lambda pair: pair[1])
        if least > limit:
            break
        sets[i] |= sets.pop(j)
    sets.sort(key=min)
    assert 1 < len(sets) < 12
    found = alignment.merge_features(symmetries, tree, threshold=threshold)
    for g, members in enumerate(sets):
        chosen = sorted(members)
        assert np.flatnonzero(found.groups["h"] == g).tolist() == chosen
        np.testing.assert_allclose(
            found.params["a"]["kernel"][:, g], into[:, chosen].mean(1), rtol=1e-12
        )
        np.testing.assert_allclose(found.params["b"]["kernel"][g], out[chosen].sum(0), rtol=1e-12)


def test_what_cannot_be_merged_is_one_sentence():
    symmetries = alignment.Symmetries({"h": alignment.Group(2)}, {"b": ("h",)})
    for params, options, said in (
        ({"b": np.ones(2)}, {"threshold": 2}, r"threshold must be in \[0, 1\], not 2"),
        ({"b": np.ones(2)}, {"rule": "max"}, "rule must be 'mean_in' or 'sum_in'"),
        ({"b": np.array([1, np.nan])}, {}, "group 'h' are not finite"),
        ({"b": np.ones(3)}, {}, "'b'"),
    ):
        with pytest.raises(MergeError, match=said):
            alignment.merge_features(symmetries, params, **options)
