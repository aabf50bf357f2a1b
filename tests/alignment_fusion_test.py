"""Units transported to another network's: optimal transport, heads, other widths, zipping."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import trees
from alignment_models import make
from scipy.optimize import linear_sum_assignment

import mergejax as mj
from mergejax import MergeError, alignment
from mergejax.alignment.sinkhorn import coupling


class Net(nn.Module):
    first: int = 6
    second: int = 5

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.first)(x))
        x = nn.tanh(nn.Dense(self.second)(x))
        return nn.Dense(3)(x)


X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
FIRST, SECOND = "params/Dense_0/kernel:1", "params/Dense_1/kernel:1"


def net(seed, model=None):
    model = model or Net()
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return params, alignment.symmetries(model.apply, params, X)


def doubled(params):
    """Every hidden unit twice, in mixed order, each with half of the outgoing weights."""
    rng = np.random.default_rng(3)
    a, b = (rng.permutation(np.repeat(np.arange(n), 2)) for n in (6, 5))
    one, two, three = (params["params"][f"Dense_{i}"] for i in range(3))
    return {"params": {
        "Dense_0": {"kernel": one["kernel"][:, a], "bias": one["bias"][a]},
        "Dense_1": {"kernel": two["kernel"][a][:, b] / 2, "bias": two["bias"][b]},
        "Dense_2": {"kernel": three["kernel"][b] / 2, "bias": three["bias"]},
    }}  # fmt: skip


def test_entropic_coupling_is_sinkhorns_in_float64():
    distances = np.random.default_rng(0).uniform(size=(2, 5, 3))
    found = coupling(distances, 0.2)
    for one, got in zip(distances, found, strict=True):
        kernel, v = np.exp(-one / 0.2), np.ones(3)
        for _ in range(500):
            u = 1 / 5 / (kernel @ v)
            v = 1 / 3 / (kernel.T @ u)
        np.testing.assert_allclose(got, u[:, None] * kernel * v, atol=1e-6)


def test_transport_by_another_solver():
    a, found = net(0)
    b, _ = net(1)
    asked = []

    def couple(distances, epsilon):
        asked.append((distances.shape, epsilon))
        return coupling(distances, epsilon)

    maps = alignment.optimal_transport(found, a, b, epsilon=0.1, couple=couple)
    usual = alignment.optimal_transport(found, a, b, epsilon=0.1)
    trees.close(maps.writes, usual.writes, rtol=0, atol=0)
    assert asked == [((6, 6), 0.1), ((5, 5), 0.1)]
    with pytest.raises(MergeError, match=r"ott_coupling: epsilon is 0.0, expected above 0"):
        alignment.ott_coupling(np.ones((2, 2)), 0.0)


def test_coupling_of_ott_is_ours():
    pytest.importorskip("ott", reason="ott-jax is an optional solver")
    distances = np.random.default_rng(0).uniform(size=(2, 5, 3))
    got, ours = alignment.ott_coupling(distances, 0.2), coupling(distances, 0.2)
    np.testing.assert_allclose(got, ours, atol=1e-3 / 3)  # it stops when sums are met to 1e-3


def test_exact_coupling_is_an_assignment_of_copies():
    rng = np.random.default_rng(1)
    for n, m in ((4, 4), (6, 3)):
        distances = rng.uniform(size=(n, m))
        copies = np.repeat(distances, n // m, axis=1)
        least = copies[linear_sum_assignment(copies)].sum() / n
        found = coupling(distances, 0.0)
        np.testing.assert_allclose((found * distances).sum(), least, atol=1e-9)
        np.testing.assert_allclose(found.sum(1), 1 / n, atol=1e-9)
        # Entropy is at most log(nm), so it moves the cost by at most that times epsilon.
        soft = (coupling(distances, 0.01, 2000) * distances).sum() - least
        assert -1e-5 < soft < 0.01 * np.log(n * m)


STREAM = "params/Conv_0/kernel:3"


@pytest.fixture(scope="module")
def vits():
    """(symmetries, a vision transformer, a permuted twin, joint Gram matrices of both)."""
    apply_fn, a, example = make("vit")
    symmetries = alignment.symmetries(apply_fn, a, example)
    twin = alignment.apply(symmetries, alignment.random(symmetries, 3), a)
    images = jax.random.normal(jax.random.key(5), (16, 12, 12, 3))
    return symmetries, a, twin, mj.collect.joint_gram(apply_fn, [a, twin], [images])


@pytest.mark.parametrize("evidence", ["weights", "activations"])
def test_a_permuted_transformer_is_carried_back(vits, evidence):
    symmetries, a, twin, joint = vits
    maps = alignment.optimal_transport(
        symmetries, a, twin, joint=joint if evidence == "activations" else None, epsilon=0.0
    )
    trees.close(alignment.transport(symmetries, maps, twin), a, atol=1e-6)


@pytest.mark.parametrize("evidence", ["weights", "activations"])
@pytest.mark.parametrize("residual", ["mean", "branch", "stream", [0.3, 0.6, 0.1, 0.9]])
def test_maps_of_every_layer_carry_a_permuted_transformer_back(vits, residual, evidence):
    symmetries, a, twin, joint = vits
    cut, maps = alignment.layerwise_transport(
        symmetries, a, twin, STREAM, residual=residual, epsilon=0.0,
        joint=joint if evidence == "activations" else None,
    )  # fmt: skip
    trees.close(alignment.transport(cut, maps, twin), a, atol=1e-6)


def test_residual_maps_are_mixtures_of_stream_and_branch(vits):
    symmetries, a, twin, joint = vits
    columns = np.linspace(0, 1, 12)  # a weight for each unit
    block = "params/MultiHeadDotProductAttention_0/out/kernel"
    names = [STREAM, f"{STREAM}|{block}", f"{STREAM}|params/LayerNorm_1/scale"]
    for residual, weight in (("mean", 0.5), ([columns, 0.0, 0.0, 0.0], columns)):
        _, maps = alignment.layerwise_transport(
            symmetries, a, twin, STREAM, residual=residual, joint=joint
        )
        stream, branch, behind = (maps.writes[name] for name in names)
        np.testing.assert_allclose(behind, stream * (1 - weight) + branch * weight, atol=1e-12)
        assert abs(stream - branch).max() > 1e-3
    _, maps = alignment.layerwise_transport(
        symmetries, a, twin, STREAM, residual="identity", joint=joint
    )
    np.testing.assert_array_equal(maps.reads[names[2]], np.eye(12))


def test_queries_may_have_maps_of_their_own(vits):
    symmetries, a, twin, _ = vits
    shared = "params/MultiHeadDotProductAttention_0/key/kernel:2"
    layer = "params/MultiHeadDotProductAttention_0/query"
    own = alignment.apart(symmetries, shared, [f"{layer}/kernel", f"{layer}/bias"])
    maps = alignment.optimal_transport(own, a, twin, epsilon=0.0)
    trees.close(alignment.transport(own, maps, twin), a, atol=1e-6)
    soft = alignment.optimal_transport(own, a, twin)
    assert abs(soft.reads[shared] - soft.reads[f"{shared}|{layer}/kernel"]).max() > 1e-3
    with pytest.raises(MergeError, match=r"'params/pos' has no axis of group"):
        alignment.apart(symmetries, shared, ["params/pos"])
    with pytest.raises(MergeError, match=r"the stream has 4 sums"):
        alignment.layerwise_transport(symmetries, a, twin, STREAM, residual=[0.5])
    with pytest.raises(MergeError, match=r"did you mean 'mean'"):
        alignment.layerwise_transport(symmetries, a, twin, STREAM, residual="meen")
    with pytest.raises(MergeError, match=r"no group is called 'stream'"):
        alignment.layerwise_transport(symmetries, a, twin, "stream")
    with pytest.raises(MergeError, match=r"written by hand"):
        alignment.layerwise_transport(own, a, twin, STREAM)


def test_a_network_with_every_unit_twice_is_carried_to_itself():
    a, symmetries = net(1)
    wide, own = doubled(a), net(1, Net(12, 10))[1]
    by_width = {6: Net(), 12: Net(12, 10)}

    def apply_fn(params, x):
        return by_width[params["params"]["Dense_0"]["bias"].shape[0]].apply(params, x)

    for joint in (None, mj.collect.joint_gram(apply_fn, [a, wide], [X])):
        maps = alignment.optimal_transport(symmetries, a, wide, own=own, joint=joint, epsilon=0.0)
        trees.close(alignment.transport(own, maps, wide), a, atol=1e-6)


def test_soft_fusion_restated_layer_by_layer():
    (a, symmetries), (b, _) = net(1), net(2)
    maps = alignment.optimal_transport(symmetries, a, b)
    found = alignment.transport(symmetries, maps, b)["params"]
    carried = np.eye(4)
    for i in range(2):
        ours, theirs = (
            np.vstack([inner(p["params"][f"Dense_{i}"]["kernel"].astype(float)),
                       p["params"][f"Dense_{i}"]["bias"].astype(float)[None]])
            for p, inner in ((b, lambda w: carried.T @ w), (a, lambda w: w))  # noqa: B023
        )  # fmt: skip
        one, two = (w / np.linalg.norm(w, axis=0) for w in (ours, theirs))
        distances = np.sqrt(((one[:, :, None] - two[:, None]) ** 2).sum(0))
        kernel, v = np.exp(-distances / distances.max() / 0.06), np.ones(distances.shape[1])
        for _ in range(500):
            u = 1 / len(kernel) / (kernel @ v)
            v = 1 / len(v) / (kernel.T @ u)
        carried = u[:, None] * kernel * v * len(kernel)
        np.testing.assert_allclose(found[f"Dense_{i}"]["kernel"], ours[:-1] @ carried, atol=2e-4)
        np.testing.assert_allclose(found[f"Dense_{i}"]["bias"], ours[-1] @ carried, atol=2e-4)


def test_transport_by_permutation_matrices_is_apply():
    for name in ("moe", "joined", "scanned", "vgg"):
        apply_fn, a, example = make(name)
        symmetries = alignment.symmetries(apply_fn, a, example)
        permutations = alignment.random(symmetries, 2)
        matrices = {}
        for group, p in permutations.items():
            outer = symmetries.groups[group].within
            one = np.eye(p.shape[-1])[p].swapaxes(-1, -2)
            if outer and not symmetries.groups[outer[0]].fixed:
                one = np.einsum("ab,bij->abij", np.eye(len(p))[permutations[outer[0]]].T, one)
            elif outer:
                one = np.broadcast_to(one[:, None], (len(p), *one.shape))
            matrices[group] = one
        moved = alignment.transport(symmetries, alignment.Maps(matrices, matrices), a)
        trees.close(moved, alignment.apply(symmetries, permutations, a), atol=0)


def test_networks_that_cannot_be_transported_are_told():
    a, symmetries = net(1)
    wide, own = net(1, Net(12, 10))
    with pytest.raises(MergeError, match=r"axis 1 of leaf 'params/Dense_0/kernel' has length 12"):
        alignment.optimal_transport(symmetries, a, wide)
    bad = jax.tree.map(np.array, wide)
    bad["params"]["Dense_1"]["bias"][0] = np.nan
    with pytest.raises(MergeError, match=r"'params/Dense_1/bias' of the model .* not finite"):
        alignment.optimal_transport(symmetries, a, bad, own=own)
    joint = {"params/Dense_1/kernel": np.eye(13)}
    with pytest.raises(MergeError, match=r"'params/Dense_1/kernel' has 13 rows, expected 19"):
        alignment.optimal_transport(symmetries, a, wide, own=own, joint=joint)
    with pytest.raises(MergeError, match=r"'Dense_1': no leaf"):
        alignment.optimal_transport(symmetries, a, wide, own=own, joint={"Dense_1": np.eye(13)})
    maps = alignment.optimal_transport(symmetries, a, wide, own=own)
    with pytest.raises(MergeError, match=r"maps.reads\['params/Dense_0/kernel:1'\] has shape"):
        alignment.transport(symmetries, maps, a)


def test_zipping_finds_permuted_twins_and_units_that_occur_twice():
    """Each with another budget within a network; the features are merged without a trace."""
    a, symmetries = net(1)
    twin = alignment.apply(symmetries, alignment.random(symmetries, 4), a)
    joint = mj.collect.joint_gram(Net().apply, [a, twin], [X])
    maps = alignment.zip_units(symmetries, [a, twin], joint, within=0.0, discount=0.0)
    several = [alignment.transport(symmetries, *one) for one in zip(maps, (a, twin), strict=True)]
    trees.close(mj.merge("mean()", None, several), a, atol=1e-6)

    wide, own = doubled(a), net(1, Net(12, 10))[1]
    other = alignment.apply(own, alignment.random(own, 4), wide)
    joint = mj.collect.joint_gram(Net(12, 10).apply, [wide, other], [X])
    maps = alignment.zip_units(own, [wide, other], joint, share=0.75, within=1.0, discount=1.0)
    several = [alignment.transport(own, *one) for one in zip(maps, (wide, other), strict=True)]
    small = mj.merge("mean()", None, several)
    np.testing.assert_allclose(Net().apply(small, X), Net().apply(a, X), atol=1e-4)


@pytest.mark.parametrize(("discount", "within"), [(1.0, 1.0), (0.5, 0.34), (0.0, 0.0)])
def test_zipping_restated_with_sets(discount, within):
    (a, symmetries), (b, _) = net(1), net(2)
    joint = mj.collect.joint_gram(Net().apply, [a, b], [X])
    maps = alignment.zip_units(
        symmetries, [a, b], joint, discount=discount, within=within, groups=[FIRST]
    )
    layers = [p["params"]["Dense_0"] for p in (a, b)]
    rows = np.hstack([np.tanh(X @ p["kernel"] + p["bias"]) for p in layers]).astype(float)
    alike = {frozenset((i, j)): c for (i, j), c in np.ndenumerate(np.corrcoef(rows.T)) if i != j}
    budget = dict.fromkeys((0, 1), int(within * 3))
    clusters = {i: {i} for i in range(12)}
    while len(clusters) > 6:
        options = {
            pair: c for pair, c in alike.items()
            if len({i // 6 for i in pair}) == 2 or budget[min(pair) // 6] > 0
        }  # fmt: skip
        i, j = sorted(max(options, key=options.get))
        budget[i // 6] -= i // 6 == j // 6
        clusters[i] |= clusters.pop(j)
        for k in set(clusters) - {i}:
            pair, gone = frozenset((i, k)), frozenset((j, k))
            if pair in alike and gone in alike:
                alike[pair] = (discount or 1) * min(alike[pair], alike[gone])
            if not discount and {m // 6 for m in clusters[k]} & {m // 6 for m in clusters[i]}:
                alike.pop(pair, None)
        alike = {pair: c for pair, c in alike.items() if j not in pair}
    expected = [sorted(clusters[i]) for i in sorted(clusters)]
    reads = np.vstack([one.reads[FIRST] for one in maps])
    assert [np.flatnonzero(column).tolist() for column in reads.T] == expected
    counts = np.array([len(members) for members in expected])
    np.testing.assert_allclose(np.vstack([m.writes[FIRST] for m in maps]), 2 * reads / counts)


def test_zipping_says_what_it_cannot_do():
    apply_fn, a, example = make("vit")
    symmetries = alignment.symmetries(apply_fn, a, example)
    joint = mj.collect.joint_gram(apply_fn, [a, a], [example])
    with pytest.raises(MergeError, match=r"cannot be zipped, as no layer reads(.|\n)*share=0.5"):
        alignment.zip_units(symmetries, [a, a], joint, share=0.25)
    with pytest.raises(MergeError, match=r"discount is 2"):
        alignment.zip_units(symmetries, [a, a], joint, discount=2, groups=[])
