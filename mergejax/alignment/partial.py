"""Units that are kept apart: which ones, how many, and how wide the merged network becomes."""

from collections.abc import Mapping, Sequence

import numpy as np

from mergejax.alignment.permutations import identity
from mergejax.alignment.structure import Symmetries, groups_of, movable
from mergejax.alignment.weights import Matching
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.leaves import describe

Ratios = float | Mapping[str, float]


def keep_apart(
    symmetries: Symmetries, matchings: Sequence[Matching], ratios: Ratios
) -> list[dict[str, np.ndarray]]:
    r"""Joins the best matched units and keeps the others of every expert apart.

    Of n matched units, the :math:`n - \lfloor rn\rfloor` with the largest scores are joined; the
    others follow, one block per expert: [joined | own units of the first | of the second | ...].
    A head, or any other unit with units of its own within, is kept apart with all of them.

    Args:
        symmetries: of the experts.
        matchings: of every expert but the first, to the first.
        ratios: r in [0, 1], the share of units that is kept apart: one number for all groups that
            can be widened, or a dict by group (others 0).

    Returns:
        Permutations for all experts, -1 where an expert lacks a unit.

    Raises:
        MergeError: ratios out of range, an unknown group, or one that cannot be widened.

    Example:
        >>> from mergejax import alignment
        >>> group = alignment.Symmetries({'h': alignment.Group(3)}, {'b': ('h',)})
        >>> order, score = np.array([2, 0, 1]), np.array([3.0, 1.0, 2.0])
        >>> match = alignment.Matching({'h': order}, {'h': score}, 0.0, 1)
        >>> [p['h'].tolist() for p in keep_apart(group, [match], 1 / 3)]
        [[0, 2, 1, -1], [2, 1, -1, 0]]

    PLeaS (Nasery et al., 2025, arXiv:2407.02447), step 2, with exact counts.
    """
    shares = check_ratios(symmetries, ratios)
    several = [
        identity(symmetries),
        *({**identity(symmetries), **m.permutations} for m in matchings),
    ]
    for name, ratio in shares.items():
        n, apart = symmetries.groups[name].size, _units(symmetries, name, ratio)
        if not apart:
            continue
        score = sum(np.asarray(m.scores[name], np.float64) for m in matchings)
        order = np.argsort(-np.asarray(score), kind="stable")
        joined, own = np.sort(order[: n - apart]), np.sort(order[n - apart :])
        inside = [n for n, group in symmetries.groups.items() if name in group.within]
        for k, permutations in enumerate(several):
            blocks = np.full((len(several), apart), -1, np.int32)
            blocks[k] = permutations[name][own]
            permutations[name] = np.concatenate([permutations[name][joined], blocks.ravel()])
            for inner in inside:  # every place, own or empty, keeps what lies within its unit
                places = np.concatenate([joined, np.tile(own, len(several))])
                axis = symmetries.groups[inner].within.index(name)
                permutations[inner] = np.take(permutations[inner], places, axis)
    return several


def _units(symmetries: Symmetries, name: str, ratio: float) -> int:
    """How many units of a group a ratio keeps apart."""
    return int(np.floor(ratio * symmetries.groups[name].size + 1e-9))


def check_ratios(symmetries: Symmetries, ratios: Ratios) -> dict[str, float]:
    """Ratios by group; one number is for every group that can be widened."""
    widening = [name for name in movable(symmetries) if symmetries.groups[name].widens]
    if isinstance(ratios, Mapping):
        problems = [
            f"ratio of '{name}': "
            + (
                "a norm or a softmax lies over its units, or they lie within others, so it "
                "cannot be widened; leave it out"
                if name in symmetries.groups
                else f"no group has this name, {did_you_mean(name, widening)}"
            )
            for name in ratios
            if name not in widening
        ]
        shares = {name: float(ratio) for name, ratio in ratios.items()}
    else:
        problems, shares = [], dict.fromkeys(widening, float(ratios))
        if ratios and not widening:
            problems.append("no group of the model can be widened; take ratio 0")
    problems += [
        f"ratio of '{name}' is {ratio}, the share of units kept apart must be in [0, 1]"
        for name, ratio in shares.items()
        if not 0 <= ratio <= 1
    ]
    raise_all(problems)
    return shares


def cost(
    symmetries: Symmetries,
    params: Tree,
    ratios: Ratios,
    experts: int = 2,
    uses: Mapping[str, float] | None = None,
) -> float:
    r"""Multiplications of the merged network, relative to one expert.

    A kernel between groups with ratios :math:`r_1, r_2` has :math:`1 + r_1 + r_2 - r_1r_2` times as
    many weights that are not zero, for two experts.

    Args:
        symmetries: of the experts.
        params: one expert, or its shapes.
        ratios: as for `keep_apart`.
        experts: number N of networks.
        uses: by kernel, how often its weights are applied to one example, such as the pixels of a
            convolution's output; without it every weight counts once.

    Returns:
        The share, from 1 to N.

    Raises:
        MergeError: as `keep_apart`; a kernel that `uses` does not name.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries(
        ...     {'h': alignment.Group(4)}, {'a/kernel': (None, 'h'), 'b/kernel': ('h', None)})
        >>> params = {'a/kernel': np.ones((2, 4)), 'b/kernel': np.ones((4, 2))}
        >>> cost(mlp, params, 0.5)
        1.5
    """
    shares = check_ratios(symmetries, ratios)
    leaves, _ = leaves_by_name(params, "the model")
    whole = merged = 0.0
    infos = describe({n: (tuple(x.shape), x.dtype) for n, x in leaves.items()})
    kernels = [info for info in infos if info.role in ("kernel", "convolution")]
    times = dict.fromkeys((info.name for info in kernels), 1.0) if uses is None else uses
    missing = [f"uses: kernel '{i.name}' is not named" for i in kernels if i.name not in times]
    raise_all(missing)
    for info in kernels:
        size = info.size * times[info.name]
        axes = symmetries.axes.get(info.name, ())
        apart = [
            _units(symmetries, name, shares.get(name, 0.0)) / symmetries.groups[name].size
            for axis in axes
            for name in groups_of(axis)
        ]
        joined = float(np.prod([1 - r for r in apart]))
        whole += size
        # A weight is there once if both ends are joined, else once for each expert.
        merged += size * (joined + experts * (1 - joined))
    return merged / whole


def ratios_for(
    symmetries: Symmetries,
    params: Tree,
    budget: float,
    *,
    scores: Mapping[str, np.ndarray] | None = None,
    experts: int = 2,
    uses: Mapping[str, float] | None = None,
    step: float = 0.05,
) -> dict[str, float]:
    """Shares of units to keep apart so that the merged network costs at most `budget` times one.

    Without scores all groups get the same share. With scores, steps go where the badly matched
    similarity that is kept apart is largest for its cost.

    Args:
        symmetries: of the experts.
        params: one expert, or its shapes.
        budget: at least 1, at most the number of experts; compute relative to one expert.
        scores: by group, of a `Matching`.
        experts: number of networks.
        uses: as for `cost`.
        step: of the shares.

    Returns:
        Ratios by group for `keep_apart`.

    Raises:
        MergeError: a budget below 1, above the number of experts, or one that cannot be reached as
            too few groups can be widened.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries(
        ...     {'h': alignment.Group(4)}, {'a/kernel': (None, 'h'), 'b/kernel': ('h', None)})
        >>> params = {'a/kernel': np.ones((2, 4)), 'b/kernel': np.ones((4, 2))}
        >>> ratios_for(mlp, params, budget=1.5)
        {'h': 0.5}

    PLeaS (Nasery et al., 2025, arXiv:2407.02447) solves a quadratic programme with tables of
    accuracies that were not published; this is greedy on the scores instead.
    """
    if not 1 <= budget <= experts:
        raise MergeError(
            f"ratios_for: a budget of {budget} cannot be met; {experts} experts cost from 1 "
            f"(all joined) to {experts} (none)"
        )
    names = list(check_ratios(symmetries, 0.0))

    def spent(ratios: Ratios) -> float:
        return cost(symmetries, params, ratios, experts, uses)

    most = spent(dict.fromkeys(names, 1.0))
    if budget > most + 1e-9 and budget < experts:
        raise MergeError(
            f"ratios_for: a budget of {budget} cannot be used up: with every group apart that "
            f"can be widened the network costs {most:.3g}; give a smaller one"
        )
    steps = round(1 / step)
    if scores is None:
        even = [dict.fromkeys(names, i / steps) for i in range(steps + 1)]
        fitting = [r for r in even if spent(r) <= budget + 1e-9]
        return max(fitting, key=spent)  # the first of those that keep the same units apart
    ratios = dict.fromkeys(names, 0.0)
    strides = {n: max(step, 1 / symmetries.groups[n].size) for n in names}  # at least a unit
    while True:
        now = spent(ratios)
        options = []
        for name in names:
            if ratios[name] > 1 - strides[name] / 2:
                continue
            wider = {**ratios, name: min(ratios[name] + strides[name], 1.0)}
            more = spent(wider)
            if more <= budget + 1e-9:
                options.append((_lost(scores[name], wider[name]) / (more - now + 1e-12), name))
        if not options:
            return ratios
        name = max(options)[1]
        ratios[name] = min(ratios[name] + strides[name], 1.0)


def _lost(scores: np.ndarray, ratio: float) -> float:
    """How far the next units to be kept apart are from the best matched one, as a share."""
    ordered = np.sort(np.asarray(scores, np.float64).ravel())
    place = min(int(ratio * len(ordered)), len(ordered) - 1)
    best = max(abs(ordered).max(), 1e-30)
    return float((ordered[-1] - ordered[place]) / best + 1e-6)
