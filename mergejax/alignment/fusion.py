"""Transformer Fusion: units of a network transported to those of another one, softly or hard."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.alignment.fusion_walk import Couple, begin
from mergejax.alignment.maps import Maps
from mergejax.alignment.places import apart, in_order
from mergejax.alignment.sinkhorn import coupling
from mergejax.alignment.structure import Symmetries, check, groups_of, movable
from mergejax.alignment.verify import verified
from mergejax.door import Tree
from mergejax.errors import MergeError, did_you_mean
from mergejax.leaves import LeafInfo


def optimal_transport(
    symmetries: Symmetries,
    reference: Tree,
    params: Tree,
    *,
    joint: Mapping[str, Any] | None = None,
    own: Symmetries | None = None,
    epsilon: float | None = None,
    couple: Couple = coupling,
) -> Maps:
    r"""Maps of a model's units to those of a reference, which may have another width.

    Of every group, with T the optimal transport between its units on the distances D,

    .. math:: U = n_0 T,\qquad M = n_1 T,\qquad
        D_{ij} = \|a_i - b_j\| / \max_{kl}\|a_k - b_l\|

    where a and b are the units' standardised activations on the same data, or, without data, their
    incoming weights, of length one and already mapped on the other side. Groups are taken from the
    inputs onwards. Heads are compared by the cost of transport inside them, and every pair of
    heads has its own map inside; queries and keys share one, and so does a whole residual stream:
    only then does the map leave the function of a permuted copy as it is.

    Args:
        symmetries: of the reference.
        reference: the anchor, whose widths count.
        params: the model to be moved, see `transport`.
        joint: of `mj.collect.joint_gram(model, [reference, params], batches)`; groups that no layer
            reads (queries and keys) are compared by weights.
        own: symmetries of the model that is moved, where its widths differ; the groups must be
            called the same.
        epsilon: of the entropy; by default 0.08 with data, 0.06 without, as the authors take; 0 for
            hard transport.
        couple: (distances [..., n, m], epsilon) -> T of sum one, such as `ott_coupling`.

    Returns:
        `Maps`.

    Raises:
        MergeError: networks of different structure, values that are not finite, a group of which
            nothing is known.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries({'h': alignment.Group(2)}, {'in/kernel': (None, 'h')})
        >>> a, b = ({'in': {'kernel': np.eye(2)[order]}} for order in ([0, 1], [1, 0]))
        >>> maps = optimal_transport(mlp, a, b, epsilon=0.0)
        >>> alignment.transport(mlp, maps, b)['in']['kernel'].tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Transformer Fusion with Optimal Transport (Imfeld et al., 2024, arXiv:2310.05719). Two maps
    instead of one (the published one scales outgoing weights by the ratio of widths), heads kept
    apart, one map for queries and keys, one for the residual stream whatever the layer.
    """
    own = own or symmetries
    check(symmetries, reference)
    check(own, params)
    verified(symmetries, reference)
    walk = begin(symmetries, own, reference, params, joint, epsilon, couple)
    roots = [n for n in movable(own) if all(own.groups[o].fixed for o in own.groups[n].within)]
    while roots:
        name = max(roots, key=walk.evidence)
        walk.solve(name)
        roots.remove(name)
    return walk.maps


def layerwise_transport(
    symmetries: Symmetries,
    reference: Tree,
    params: Tree,
    stream: str,
    *,
    residual: str | Sequence[Any] = "mean",
    joint: Mapping[str, Any] | None = None,
    own: Symmetries | None = None,
    epsilon: float | None = None,
    couple: Couple = coupling,
) -> tuple[Symmetries, Maps]:
    r"""Transport with a map of the residual stream for every layer, as it was published.

    The layers are taken in the order of the model's program. One that writes into the stream has a
    map B of its outputs, and where they are added to the stream, what reads it from there on has

    .. math:: T_i = (1 - w_i) T_{i-1} + w_i B_i,\qquad T_0 = B_0

    so a copy of the reference with its units permuted is not carried back exactly, unless the maps
    agree: `optimal_transport`, with one map for the whole stream, does that.

    Args:
        symmetries: of the reference, derived from the model.
        reference: the anchor, whose widths count.
        params: the model to be moved.
        stream: the group of the residual stream.
        residual: 'mean' (w = 1/2), 'branch' (w = 1; published as no_resid), 'stream' (w = 0;
            only_resid), 'identity' (T is the identity behind every sum; resid_as_identity), or a
            weight for each sum: numbers (weighted_scalar) or arrays, one number for each unit of
            the reference (weighted_matrix).
        joint, own, epsilon, couple: as for `optimal_transport`; outputs are compared through the
            layers' inputs.

    Returns:
        Symmetries in which every place of the stream has its own group, and `Maps`, both for
        `transport`. With other widths the symmetries are those of the model that is moved.

    Raises:
        MergeError: as `optimal_transport`; an unknown stream, a layer that leads from the stream
            to itself, another number of weights than sums.

    Example:
        >>> import jax.numpy as jnp
        >>> from mergejax import alignment
        >>> names = ('in/kernel', 'up/kernel', 'down/kernel', 'head/kernel')
        >>> def net(p, x):
        ...     x = x @ p[names[0]]
        ...     return (x + jnp.tanh(x @ p[names[1]]) @ p[names[2]]) @ p[names[3]]
        >>> shapes = (2, 5), (5, 6), (6, 5), (5, 3)
        >>> a = {n: np.random.default_rng(0).normal(size=s) for n, s in zip(names, shapes)}
        >>> found = alignment.symmetries(net, a, jnp.ones((4, 2)))
        >>> cut, maps = layerwise_transport(found, a, a, 'down/kernel:1', epsilon=0.0)
        >>> alignment.transport(cut, maps, a)['up/kernel'].tolist() == a['up/kernel'].tolist()
        True

    Transformer Fusion with Optimal Transport (Imfeld et al., 2024, arXiv:2310.05719), with two maps
    for every place, heads kept apart and one map for all embeddings.
    """
    own = own or symmetries
    check(symmetries, reference)
    check(own, params)
    verified(symmetries, reference)
    if stream not in symmetries.groups:
        raise MergeError(
            f"layerwise_transport: no group is called '{stream}', "
            f"{did_you_mean(stream, symmetries.groups)}"
        )
    order = in_order(symmetries, reference)
    infos = begin(symmetries, own, reference, params, None, epsilon).infos
    places = _places(symmetries, {info.name: info for info in infos}, order, stream)
    weights = _weights(residual, len(places) - 1)
    written, read = [stream], [stream]
    for writers, readers in places[1:]:
        symmetries, own = (apart(one, stream, writers) for one in (symmetries, own))
        written.append(f"{stream}|{writers[0]}")
        if readers:
            symmetries, own = (apart(one, stream, readers) for one in (symmetries, own))
        read.append(f"{stream}|{readers[0]}" if readers else "")
    walk = begin(symmetries, own, reference, params, joint, epsilon, couple)
    if joint is not None:
        walk.listen_to_outputs(joint, written)
    now = Maps({}, {})
    for leaf in order:
        for name in _roots(own, leaf):
            if name in walk.maps.writes or name in read[1:]:
                continue
            walk.solve(name)
            if name not in written:
                continue
            place = written.index(name)
            found = Maps({stream: walk.maps.reads[name]}, {stream: walk.maps.writes[name]})
            now = _mixed(now, found, weights[place - 1]) if place else found
            if place and read[place]:
                walk.set(read[place], now.reads[stream], now.writes[stream])
    return own, walk.maps


def _roots(symmetries: Symmetries, leaf: str) -> list[str]:
    """The groups over a leaf that are solved with all that lies within them."""
    names = dict.fromkeys(n for axis in symmetries.axes.get(leaf, ()) for n in groups_of(axis))
    groups = symmetries.groups
    return [
        n for n in movable(symmetries)
        if n in names and all(groups[o].fixed for o in groups[n].within)
    ]  # fmt: skip


def _places(
    symmetries: Symmetries, infos: Mapping[str, LeafInfo], order: Sequence[str], stream: str
) -> list[tuple[list[str], list[str]]]:
    """For every layer that writes into the stream its leaves, and those that read behind it."""
    places: list[tuple[list[str], list[str]]] = []
    for leaf in order:
        sides = [
            (infos[leaf].layout or "o" * len(infos[leaf].shape))[i]
            for i, axis in enumerate(symmetries.axes.get(leaf, ()))
            if leaf in infos and stream in groups_of(axis)
        ]
        if not sides:
            continue
        if len(set(sides)) > 1:
            raise MergeError(
                f"layerwise_transport: layer '{leaf}' leads from the stream to itself, so there is "
                "no place between; take optimal_transport"
            )
        kernel = infos[leaf].role in ("kernel", "convolution")
        if (kernel and sides[0] == "o") or not places:
            places.append(([leaf], []))
        elif leaf.rpartition("/")[0] == places[-1][0][0].rpartition("/")[0] and not kernel:
            places[-1][0].append(leaf)
        else:
            places[-1][1].append(leaf)
    return places


def _weights(residual: str | Sequence[Any], sums: int) -> list[Any]:
    """Of the branch in every sum; None for the identity."""
    words = {"mean": 0.5, "branch": 1.0, "stream": 0.0, "identity": None}
    if isinstance(residual, str):
        if residual not in words:
            raise MergeError(
                f"layerwise_transport: residual is '{residual}', {did_you_mean(residual, words)}; "
                "or give a weight for each sum"
            )
        return [words[residual]] * sums
    if len(residual) != sums:
        raise MergeError(
            f"layerwise_transport: residual has {len(residual)} weights, the stream has {sums} sums"
        )
    return [np.asarray(weight, np.float64) for weight in residual]


def _mixed(stream: Maps, branch: Maps, weight: Any) -> Maps:
    def mixed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        if weight is None:
            return {name: np.eye(*x.shape) for name, x in new.items()}
        return {name: (1 - weight) * old[name] + weight * x for name, x in new.items()}

    return Maps(mixed(stream.reads, branch.reads), mixed(stream.writes, branch.writes))
