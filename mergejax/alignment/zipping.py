"""ZipIt: features of several networks merged greedily, across networks and within each."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.alignment.activations import input_labels, similarity
from mergejax.alignment.assignment import check_structure
from mergejax.alignment.maps import Maps
from mergejax.alignment.structure import Symmetries, check
from mergejax.alignment.verify import verified
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, raise_all, some


def zip_units(
    symmetries: Symmetries,
    experts: Sequence[Tree],
    joint: Mapping[str, Any],
    *,
    share: float = 0.5,
    discount: float = 0.3,
    within: float = 0.125,
    groups: Collection[str] | None = None,
) -> list[Maps]:
    r"""Maps of every expert to merged features, which may come from one expert alone.

    The n features of all N experts stand beside each other, with their correlations C on the same
    data. Again and again the two that are most alike are merged, and

    .. math:: C_{i\cdot} \leftarrow \alpha\min(C_{i\cdot}, C_{j\cdot})

    until :math:`(1-r)nN` are left. Each is the mean of its members, and passes on what all of them
    do: with the maps, `transport` and `mean()` give the zipped network.

    Args:
        symmetries: of the experts.
        experts: at least two, of one structure.
        joint: of `mj.collect.joint_gram(model, experts, batches)`.
        share: r, of the features that are merged away; 1 - 1/N keeps the width.
        discount: :math:`\alpha` in [0, 1], against large clusters; 0 lets no feature of an expert
            join a cluster that has one of it.
        within: share of its part of the merges that an expert may have within itself.
        groups: to be zipped; by default all that can be permuted.

    Returns:
        `Maps` of every expert.

    Raises:
        MergeError: numbers out of range; experts of different structure; Gram matrices that are
            not finite; groups that no layer reads, that lie within others, or
            under a norm whose width would change: align those first and leave them out.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries({'h': alignment.Group(2)}, {'kernel': ('h', None)})
        >>> q = np.array([[1.0, 2.0, 2.0, 1.0, 1.0], [2.0, 0.0, 0.0, 2.0, 1.0],
        ...               [1.0, 1.0, 1.0, 1.0, 1.0]])  # a a | b b | 1: b has the units swapped
        >>> joint, w = {'kernel': q.T @ q / 3}, {'kernel': np.array([[1.0], [3.0]])}
        >>> _, maps = zip_units(mlp, [w, w], joint)
        >>> alignment.transport(mlp, maps, w)['kernel'].tolist()
        [[3.0], [1.0]]

    ZipIt (Stoica et al., 2024, arXiv:2305.03053), without its factor N / (N + 1e-5). Zipping only
    the first layers, with a head each, is `groups`.
    """
    check(symmetries, experts[0])
    first, *others = (leaves_by_name(x, f"expert {i}")[0] for i, x in enumerate(experts))
    for other in others:
        check_structure(first, other)
    verified(symmetries, experts[0])
    found = _correlations(symmetries, experts[0], joint, len(experts))
    chosen = [n for n, g in symmetries.groups.items() if not g.fixed] if groups is None else groups
    problems = [
        f"zip_units: {name} is {value}, expected a number in [0, 1]"
        for name, value in (("share", share), ("discount", discount), ("within", within))
        if not 0 <= value <= 1
    ]
    impossible = [name for name in chosen if name not in found]
    if impossible:
        problems.append(
            f"zip_units: {some(impossible)} cannot be zipped, as no layer reads these units one by "
            "one; align them first (activation_matching) and name the others in `groups`"
        )
    keeps = abs(share - (1 - 1 / len(experts))) < 1e-9
    rigid = [name for name in chosen if not symmetries.groups[name].widens and not keeps]
    if rigid:
        problems.append(
            f"zip_units: a norm or softmax lies over {some(rigid)}, whose width has to stay; take "
            f"share={1 - 1 / len(experts):.4g}"
        )
    raise_all(problems)
    maps: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in experts]
    for name in chosen:
        members = _clusters(found[name], len(experts), share, discount, within)
        for k, (reads, writes) in enumerate(maps):
            own = np.split(members, len(experts))[k]
            reads[name], writes[name] = own, own * len(experts) / members.sum(0)
    return [Maps(*pair) for pair in maps]


def _correlations(
    symmetries: Symmetries, expert: Tree, joint: Mapping[str, Any], count: int
) -> dict[str, np.ndarray]:
    """By group, between the units of all experts, the mean over all layers that read them."""
    leaves, _ = leaves_by_name(expert, "the first expert")
    total: dict[str, np.ndarray] = {}
    seen: dict[str, int] = {}
    for name, q in joint.items():
        if name not in symmetries.axes:
            continue
        labels, places = input_labels(symmetries, name, np.asarray(leaves[name]), "flax")
        named = [n for n in labels if n is not None]
        if len(named) != 1 or symmetries.groups[named[0]].within:
            continue
        if len(q) != count * places.size + 1:
            raise MergeError(
                f"joint Gram matrix of '{name}' has {len(q)} rows, expected "
                f"{count * places.size + 1} of {count} experts; collect it again with these"
            )
        if not np.isfinite(np.asarray(q)).all():
            raise MergeError(
                f"joint Gram matrix of '{name}' is not finite; check the models and the data for "
                "NaN and Inf, and collect it again"
            )
        whole = similarity(np.asarray(q, np.float64), "correlation", slice(-1), slice(-1))
        place = labels.index(named[0])
        units = np.moveaxis(places, place, 0).reshape(places.shape[place], -1)
        for rows in units.T:
            index = np.concatenate([rows + k * places.size for k in range(count)])
            total[named[0]] = total.get(named[0], np.zeros(())) + whole[np.ix_(index, index)]
        seen[named[0]] = seen.get(named[0], 0) + units.shape[1]
    return {name: one / seen[name] for name, one in total.items()}


def _clusters(
    correlation: np.ndarray, experts: int, share: float, discount: float, within: float
) -> np.ndarray:
    """Members of each merged feature, [experts · n, features]."""
    count = len(correlation)
    origin = np.repeat(np.arange(experts), count // experts)
    members, alive = np.eye(count), np.ones(count, bool)
    alike = np.where(np.eye(count, dtype=bool), -np.inf, correlation)
    away = int(share * count + 1e-9)
    left = np.full(experts, int(within * away / experts + 1e-9))
    allowed = origin[:, None] != origin[None]
    for _ in range(away):
        same = (origin[:, None] == origin[None]) & (left > 0)[origin][:, None]
        options = np.where(allowed | same, alike, -np.inf)
        i, j = sorted(np.unravel_index(int(options.argmax()), options.shape))
        if not np.isfinite(options[i, j]):
            break
        if origin[i] == origin[j]:
            left[origin[i]] -= 1
        members[:, i] += members[:, j]
        alive[j] = False
        row = (discount or 1) * np.minimum(alike[i], alike[j])
        if not discount:
            row[np.isin(origin, origin[members[:, i] > 0])] = -np.inf
        alike[i], alike[:, i] = row, row
        alike[j], alike[:, j] = -np.inf, -np.inf
        alike[i, i] = -np.inf
    return members[:, alive]
