"""Workers on a graph that merge their neighbours' networks into their own units (DIMAT).

Every worker has a device and a network. Networks travel along the edges by collectives, a worker
compares its neighbours' units with its own on its own data, and averages what it has aligned; in
between everyone trains alone.

DIMAT: Decentralized Iterative Merging-And-Training (Saadati et al., 2024, arXiv:2404.08079).
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from mergejax import api
from mergejax.alignment.activations import activation_matching, input_labels
from mergejax.alignment.stats import statistics
from mergejax.alignment.structure import Symmetries
from mergejax.collect import joint_gram_sums
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, did_you_mean

WORKERS = "workers"  # the axis of the mesh
PER_WORKER = PartitionSpec(WORKERS)
GRAPHS = ("ring", "torus", "complete")
Senders = tuple[tuple[int, ...], ...]


def mesh_of(count: int) -> Mesh:
    """So many CPU devices, one for each worker.

    Raises:
        MergeError: JAX has started with fewer.
    """
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise MergeError(
            f"there are {len(devices)} CPU devices for {count} workers; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before Python starts"
        )
    return Mesh(np.array(devices[:count]), (WORKERS,), axis_types=(AxisType.Auto,))


def senders(graph: str, workers: int) -> Senders:
    """Who sends to whom: permutations of the workers, worker i receives from p[i].

    Args:
        graph: 'ring' (two neighbours), 'torus' (four, on the most nearly square grid; fewer where
            opposite ones coincide) or 'complete' (all).
        workers: how many.

    Returns:
        One permutation for every neighbour that a worker has. All are weighed alike, 1 / (their
        number + 1), which is doubly stochastic.

    Raises:
        MergeError: an unknown graph; fewer than two workers.

    Example:
        >>> senders('ring', 4)
        ((1, 2, 3, 0), (3, 0, 1, 2))
        >>> [len(senders(graph, 9)) for graph in ('ring', 'torus', 'complete')]
        [2, 4, 8]
    """
    if graph not in GRAPHS:
        raise MergeError(f"there is no graph '{graph}', {did_you_mean(graph, GRAPHS)}")
    if workers < 2:
        raise MergeError(f"a graph of {workers} workers has no edges; give at least two")
    grid = np.arange(workers)[None]
    shifts = {"ring": [(0, -1), (0, 1)], "complete": [(0, -i) for i in range(1, workers)]}
    if graph == "torus":
        rows = max(n for n in range(1, int(workers**0.5) + 1) if workers % n == 0)
        grid = grid.reshape(rows, -1)
        shifts["torus"] = [(0, -1), (0, 1), (-1, 0), (1, 0)]
    orders = [tuple(np.roll(grid, s, (0, 1)).ravel().tolist()) for s in shifts[graph]]
    return tuple(order for order in dict.fromkeys(orders) if order != tuple(range(workers)))


def receive(own: Tree, edges: Senders) -> list[Tree]:
    """The neighbours' networks; to be called by every worker inside `shard_map`."""
    several = [[(sender, i) for i, sender in enumerate(order)] for order in edges]
    return [
        jax.tree.map(lambda x, p=pairs: jax.lax.ppermute(x, WORKERS, p), own)  # type: ignore[misc]
        for pairs in several
    ]


def merge_neighbours(
    symmetries: Symmetries, model: Any, workers: Tree, batches: Any, edges: Senders, mesh: Mesh
) -> Tree:
    r"""One exchange of DIMAT: everyone averages its neighbours' networks, aligned to its own.

    .. math:: \theta_i\leftarrow\frac1{|N_i|+1}\Big(\theta_i+\sum_{j\in N_i}P_{j\to i}\theta_j\Big)

    with :math:`P_{j\to i}` the activation matching of network j to network i on worker i's data.
    All merges are of the networks before the exchange.

    Args:
        symmetries: of the networks.
        model: as for `mj.collect.joint_gram`.
        workers: the networks, every leaf [workers, ...].
        batches: what each worker measures on, [workers, n, ...]; no labels. The published code
            takes the data of all workers, which no worker has.
        edges: of `senders`.
        mesh: of `mesh_of`.

    Returns:
        A tree like `workers`. BatchNorm's statistics are averaged; measure them anew with
        `reestimate`.

    Raises:
        MergeError: as `activation_matching`.

    DIMAT (Saadati et al., 2024, arXiv:2404.08079), with uniform weights.
    """
    first = jax.tree.map(lambda x: x[0], workers)
    read = frozenset(_read(symmetries, first))
    received, joint = _meet(workers, batches, model, edges, mesh, read)
    own, received, joint = jax.tree.map(np.asarray, (workers, received, joint))
    merged = []
    for i in range(mesh.size):
        mine, *others = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (own, *received))
        orders = [
            activation_matching(
                symmetries, mine, other, {n: q[i] for n, q in one.items()}
            ).permutations
            for other, one in zip(others, joint, strict=True)
        ]
        stats = statistics(symmetries, [{}, *orders], [mine, *others])
        merged.append(api.merge("permute()|mean()", None, [mine, *others], stats=stats))
    return jax.tree.map(lambda *xs: np.stack(xs), *merged)


def _read(symmetries: Symmetries, params: Tree) -> list[str]:
    """The kernels whose inputs are units that may be permuted."""
    return [
        name
        for name, x in leaves_by_name(params, "the first worker")[0].items()
        if name in symmetries.axes
        and x.ndim > 1
        and any(input_labels(symmetries, name, x, "flax")[0])
    ]


@functools.partial(jax.jit, static_argnames=("model", "edges", "mesh", "read"))
def _meet(
    workers: Tree, batches: Any, model: Any, edges: Senders, mesh: Mesh, read: frozenset[str]
) -> tuple[list[Tree], list[dict[str, jax.Array]]]:
    """For each neighbour of every worker its network, and joint Gram matrices with it."""

    def each(workers: Tree, batches: Any) -> Any:
        own, batch = jax.tree.map(lambda x: x[0], (workers, batches))
        received = receive(own, edges)
        joint = []
        for other in received:
            sums = joint_gram_sums(model, [own, other], batch)
            joint.append({n: q / q[-1, -1] for n, (q, _) in sums.items() if n in read})
        return jax.tree.map(lambda x: x[None], (received, joint))

    return jax.shard_map(each, mesh=mesh, in_specs=(PER_WORKER, PER_WORKER), out_specs=PER_WORKER)(
        workers, batches
    )


def average_neighbours(workers: Tree, edges: Senders, mesh: Mesh) -> Tree:
    """The plain average with the neighbours' networks, unit by unit (gossip).

    Args:
        workers, edges, mesh: as for `merge_neighbours`.

    Returns:
        A tree like `workers`.
    """
    return _gossip(workers, edges, mesh)


@functools.partial(jax.jit, static_argnames=("edges", "mesh"))
def _gossip(workers: Tree, edges: Senders, mesh: Mesh) -> Tree:
    def each(own: Tree) -> Tree:
        several = [own, *receive(own, edges)]
        return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]) / len(xs), *several)

    return jax.shard_map(each, mesh=mesh, in_specs=PER_WORKER, out_specs=PER_WORKER)(workers)
