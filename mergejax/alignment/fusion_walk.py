"""The walk through two models from group to group, each of which gets a map of its units."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import linalg

from mergejax.alignment.activations import input_labels, similarity
from mergejax.alignment.assignment import pieces, units
from mergejax.alignment.maps import Maps, carry
from mergejax.alignment.sinkhorn import coupling
from mergejax.alignment.structure import Symmetries, groups_of
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.leaves import STATISTIC, LeafInfo, as_matrix, describe, is_floating

Couple = Callable[[np.ndarray, float], np.ndarray]  # (distances, epsilon) -> transport


def begin(
    symmetries: Symmetries,
    own: Symmetries,
    reference: Tree,
    params: Tree,
    joint: Mapping[str, Any] | None,
    epsilon: float | None,
    couple: Couple = coupling,
) -> "Walk":
    """A walk through two models that was not started, see `optimal_transport`."""
    walk = Walk(symmetries, own, *_leaves(symmetries, own, reference, params), couple=couple)
    if joint is not None:
        walk.listen(joint)
    walk.epsilon = epsilon if epsilon is not None else (0.06 if joint is None else 0.08)
    return walk


def _leaves(
    symmetries: Symmetries, own: Symmetries, reference: Tree, params: Tree
) -> tuple[list[LeafInfo], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The leaves that count, of both models; refuses networks of different structure."""
    ours, theirs = (
        leaves_by_name(tree, owner)[0]
        for tree, owner in ((reference, "the reference"), (params, "the model"))
    )
    problems = [
        f"{kind} '{name}' is only in one of the two models; transport needs networks of one kind, "
        "only their widths may differ"
        for kind, a, b in (
            ("leaf", ours, theirs),
            ("group", symmetries.groups, own.groups),
        )
        for name in (*(set(a) - set(b)), *(set(b) - set(a)))
    ]
    problems += [
        f"leaf '{name}' has axes {symmetries.axes.get(name)} in the reference and "
        f"{own.axes.get(name)} in the model; transport needs networks of one kind"
        for name in {*symmetries.axes, *own.axes}
        if symmetries.axes.get(name) != own.axes.get(name)
    ]
    problems += [
        f"leaf '{name}' of {owner} has values that are not finite; nothing can be matched to it"
        for owner, tree in (("the reference", ours), ("the model", theirs))
        for name, x in tree.items()
        if is_floating(x.dtype) and not np.isfinite(np.asarray(x, np.float32)).all()
    ]
    raise_all(problems)
    infos = [
        info
        for info in describe({n: (tuple(x.shape), x.dtype) for n, x in ours.items()})
        if info.name in own.axes and is_floating(info.dtype) and info.role != STATISTIC
    ]
    sides = [{i.name: np.asarray(t[i.name], np.float64) for i in infos} for t in (ours, theirs)]
    return infos, sides[0], sides[1]


@dataclasses.dataclass
class Walk:
    """Two models, and the maps found so far."""

    symmetries: Symmetries
    own: Symmetries
    infos: list[LeafInfo]
    reference: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]
    epsilon: float = 0.0
    couple: Couple = coupling
    maps: Maps = dataclasses.field(default_factory=lambda: Maps({}, {}))
    heard: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def solve(self, name: str) -> np.ndarray:
        """Finds the map of a group and of those inside; the cost for each pair of outer units."""
        group = self.own.groups[name]
        inside = [n for n, one in self.own.groups.items() if one.within[-1:] == (name,)]
        total = self.heard.get(name)
        if total is None and not inside:
            total = self.by_weights(name)
        for child in inside:
            found, k = self.solve(child), len(group.within)
            # [outer, own, outer, own] → [outer, outer, own, own]
            order = [*range(k), *range(k + 1, 2 * k + 1), k, 2 * k + 1]
            found = found.transpose(order) ** 2
            total = found if total is None else total + found
        assert total is not None
        distances = np.sqrt(np.maximum(total, 0))
        largest = max(float(distances.max()), 1e-30)
        found = self.couple(distances / largest, self.epsilon)
        self.set(name, found * found.shape[-2], found * found.shape[-1])
        return (found * distances).sum((-2, -1))

    def set(self, name: str, reads: np.ndarray, writes: np.ndarray) -> None:
        """Notes the maps of a group."""
        self.maps = Maps({**self.maps.reads, name: reads}, {**self.maps.writes, name: writes})

    def evidence(self, name: str) -> tuple[bool, float]:
        """Whether activations tell of a group, and the share of incoming weights that are tied."""
        total = tied = 0
        inside = {n for n, one in self.own.groups.items() if name in one.within}
        for info in self.infos:
            here = {n for axis in self.own.axes[info.name] for n in groups_of(axis)}
            if here & {name, *inside}:
                known = {n for n in here if n in self.maps.writes or self.own.groups[n].fixed}
                total += info.size
                tied += info.size * (here - known <= {name, *inside})
        return name in self.heard, tied / max(total, 1)

    def by_weights(self, name: str) -> np.ndarray:
        """Squared distances of weights, [outer..., outer of the reference..., own, reference's]."""
        rows: dict[bool, list[list[np.ndarray]]] = {True: [], False: []}
        within = self.own.groups[name].within
        sizes = {n: group.size for n, group in self.symmetries.groups.items()}
        wide = sizes | {n: g.size for n, g in self.own.groups.items() if n not in self.maps.writes}
        for info in self.infos:
            axes, letters = self.own.axes[info.name], info.layout or "o" * len(info.shape)
            here = {n for axis in axes for n in groups_of(axis)}
            if name not in here:
                continue
            moved = carry(self.own, self.maps, axes, info.layout, self.moved[info.name])
            cut = zip(
                pieces(axes, wide, moved),
                pieces(axes, sizes, self.reference[info.name]),
                strict=True,
            )
            places = [i for i, axis in enumerate(axes) if name in groups_of(axis)]
            for (labels, ours), (_, theirs) in cut:
                others = {n for n in labels if n is not None} - {name, *within}
                known = all(n in self.maps.writes or self.own.groups[n].fixed for n in others)
                if labels.count(name) != 1 or not known:
                    continue
                place = labels.index(name)
                both = [units((labels, x), place, name, within)[0] for x in (ours, theirs)]
                rows[letters[places[0]] == "i"].append(both)
        # What comes in, as in the paper; what goes out only where nothing is known of that.
        chosen = rows[False] or rows[True]
        if not chosen:
            raise MergeError(
                f"optimal_transport: nothing is known of group '{name}' given the others; pass "
                "`joint` (mj.collect.joint_gram), or pin the group"
            )
        a, b = (np.concatenate([pair[k] for pair in chosen], axis=-1) for k in (0, 1))
        a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30) for x in (a, b))
        flat_a, flat_b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
        cosine = np.einsum("anr,bmr->abnm", flat_a, flat_b, optimize=True)
        return (2 - 2 * cosine).reshape(*a.shape[:-2], *b.shape[:-2], a.shape[-2], b.shape[-2])

    def listen(self, joint: Mapping[str, Any]) -> None:
        """Squared distances of standardised activations, summed over the layers that read them."""
        for name, q in joint.items():
            if name not in self.reference:
                raise MergeError(
                    f"joint Gram matrix of '{name}': no leaf that is aligned has this name, "
                    f"{did_you_mean(name, self.reference)}"
                )
            kernels = self.reference[name], self.moved[name]
            labels: tuple[str | None, ...] = ()
            grids = []
            for one, kernel in zip((self.symmetries, self.own), kernels, strict=True):
                labels, places = input_labels(one, name, kernel, "flax")
                grids.append(places)
            count = grids[0].size
            if len(q) != count + grids[1].size + 1:
                raise MergeError(
                    f"joint Gram matrix of '{name}' has {len(q)} rows, expected "
                    f"{count + grids[1].size + 1}; collect it again with these two models"
                )
            found = similarity(
                np.asarray(q, np.float64), "correlation", slice(count), slice(count, -1)
            )
            chosen = found[np.ix_(grids[0].ravel(), grids[1].ravel())]
            grid = chosen.reshape(*grids[0].shape, *grids[1].shape)
            for group in {n for n in labels if n is not None}:
                distance = self._distance(group, labels, grid)
                if distance is not None:
                    self.heard[group] = self.heard.get(group, np.zeros(())) + distance

    def listen_to_outputs(self, joint: Mapping[str, Any], groups: Sequence[str]) -> None:
        """Squared distances of the standardised outputs of layers, for groups that these write."""
        for info in self.infos:
            written = self.own.axes[info.name][-1]
            if info.name not in joint or written not in groups or not info.layout.endswith("o"):
                continue
            kernels = [
                np.asarray(as_matrix(jnp.asarray(side[info.name]), info.layout)[0], np.float64)
                for side in (self.reference, self.moved)
            ]
            q = np.asarray(joint[info.name], np.float64)
            both = linalg.block_diag(*kernels, [[1.0]])
            count = kernels[0].shape[1]
            found = similarity(both.T @ q @ both, "correlation", slice(count), slice(count, -1))
            self.heard[str(written)] = 2 - 2 * found.T

    def _distance(self, group: str, labels: Any, grid: np.ndarray) -> np.ndarray | None:
        within = self.own.groups[group].within
        kept = {group, *within}
        if any(n is not None and n not in kept for n in labels) or not kept <= set(labels):
            return None
        rank = len(labels)
        theirs = list(range(rank))
        ours = [i if labels[i] is None else i + rank for i in range(rank)]
        outer = [labels.index(n) for n in within]
        place = labels.index(group)
        output = [*(i + rank for i in outer), *outer, place + rank, place]
        count = int(np.prod([grid.shape[i] for i in range(rank) if labels[i] is None]))
        return 2 * count - 2 * np.einsum(grid, [*theirs, *ours], output)
