"""Workers on graphs that merge their neighbours' networks, on four CPU devices."""

import jax
import ml_collections
import numpy as np
import pytest

import mergejax as mj
from mergejax import alignment
from mergejax.alignment_studies import dimat, networks, workers
from mergejax.data.task import Split

COUNT = 4
RNG = np.random.default_rng(0)
IMAGES = RNG.random((COUNT, 50, 2, 2, 1), np.float32)
MODEL = networks.Perceptron((6, 5), 3)
APPLY = networks.function(MODEL)


def drawn(seed):
    variables = jax.jit(MODEL.init)(jax.random.key(seed), IMAGES[0, :1])
    return jax.tree.map(lambda x: np.asarray(x + 0.1, np.float32), variables)


def stacked(several):
    return jax.tree.map(lambda *xs: np.stack(xs), *several)


def one(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.fixture(scope="module")
def symmetries():
    return alignment.symmetries(APPLY.__wrapped__, drawn(0), IMAGES[0, :2])


def test_permuted_copies_agree_after_one_exchange(symmetries):
    a = drawn(0)
    orders = [alignment.random(symmetries, seed) for seed in range(COUNT)]
    nets = stacked([alignment.apply(symmetries, order, a) for order in orders])
    edges, mesh = alignment.senders("ring", COUNT), alignment.mesh_of(COUNT)
    merged = alignment.merge_neighbours(symmetries, APPLY, nets, IMAGES, edges, mesh)
    averaged = alignment.average_neighbours(nets, edges, mesh)
    for i in range(COUNT):
        # Every worker keeps its own order of units.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
            one(merged, i),
            one(nets, i),
        )
    wanted = APPLY(a, IMAGES[0])
    assert abs(APPLY(one(averaged, 0), IMAGES[0]) - wanted).max() > 1e-2


def test_an_exchange_is_each_neighbours_alignment_on_ones_own_data(symmetries):
    nets = stacked([drawn(seed) for seed in range(COUNT)])
    edges, mesh = alignment.senders("ring", COUNT), alignment.mesh_of(COUNT)
    merged = alignment.merge_neighbours(symmetries, APPLY, nets, IMAGES, edges, mesh)
    own, several = one(nets, 2), []
    for sender in (1, 3):
        pair = [own, one(nets, sender)]
        joint = mj.collect.joint_gram(APPLY, pair, [IMAGES[2]])
        order = alignment.activation_matching(symmetries, *pair, joint).permutations
        several.append(alignment.apply(symmetries, order, pair[1]))
    wanted = jax.tree.map(lambda x, y, z: (x + y + z) / 3, own, *several)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one(merged, 2), wanted)


@pytest.mark.parametrize(
    ("graph", "count", "degree"),
    [("ring", 2, 1), ("ring", 5, 2), ("torus", 8, 3), ("torus", 9, 4), ("complete", 6, 5)],
)
def test_graphs_are_regular_and_undirected(graph, count, degree):
    orders = alignment.senders(graph, count)
    assert len(orders) == degree
    mixing = np.eye(count)
    for order in orders:
        assert sorted(order) == list(range(count))
        mixing[np.arange(count), order] += 1
    assert mixing.max() == 1  # no neighbour twice, and nobody is its own
    np.testing.assert_array_equal(mixing, mixing.T)
    assert (np.linalg.matrix_power(mixing, count) > 0).all()  # connected


def test_gossip_is_the_mixing_matrix():
    values = RNG.normal(size=(COUNT, 3)).astype(np.float32)
    edges = alignment.senders("ring", COUNT)
    found = alignment.average_neighbours({"w": values}, edges, alignment.mesh_of(COUNT))
    mixing = (np.eye(COUNT) + sum(np.eye(COUNT)[list(order)] for order in edges)) / 3
    np.testing.assert_allclose(found["w"], mixing @ values, atol=1e-6)


def test_what_cannot_be_a_graph_is_one_sentence():
    for call, said in (
        (lambda: alignment.senders("rign", 4), "no graph 'rign', did you mean 'ring'"),
        (lambda: alignment.senders("ring", 1), "1 workers has no edges"),
        (lambda: alignment.mesh_of(64), "CPU devices for 64 workers; set XLA_FLAGS="),
    ):
        with pytest.raises(mj.MergeError, match=said):
            call()


@pytest.mark.parametrize("runs", [0, 2])
def test_every_example_has_one_worker(runs):
    labels = np.repeat(np.arange(8), 10).astype(np.int32)
    split = Split(np.arange(80.0)[:, None], labels)
    parts = workers.divided(split, COUNT, runs, seed=3)
    assert sorted(np.concatenate([p.inputs[:, 0] for p in parts]).tolist()) == list(range(80))
    assert all((split.labels[p.inputs[:, 0].astype(int)] == p.labels).all() for p in parts)
    assert max(len(set(p.labels.tolist())) for p in parts) <= (2 if runs else 8)


def test_without_training_one_start_never_changes():
    split = Split(IMAGES.reshape(-1, 2, 2, 1), RNG.integers(0, 3, COUNT * 50).astype(np.int32))
    parts = workers.divided(split, COUNT, 0, seed=0)
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "training": {"perceptron": {"start": 1, "steps": 1, "learning_rate": 0.0, "batch": 2}},
            "alignment": {"rounds": 2, "examples": 20},
        }
    )
    records = []
    for method, graph in (("alone", ""), ("average, one start", "ring")):
        found = dimat.run(MODEL, method, graph, parts, split, config)
        assert len(set(found["merged"] + found["trained"])) == 1, method
        assert len(found["merged"]) == len(found["trained"]) == 2
        records.append({"split": "IID", "method": method, "graph": graph, **found})
    rows = dimat.table(records).splitlines()
    first, last, trained = rows[-1].split("|")[3:6]
    assert first == last == trained
    assert len(dimat.picture(records).axes) == 1
