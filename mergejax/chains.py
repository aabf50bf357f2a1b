"""Chains of stages: how they are joined, branched, put into other coordinates, and expanded."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mergejax.core import Stage
from mergejax.errors import MergeError, did_you_mean, raise_all

ROLES = frozenset({"kernel", "convolution", "embedding", "norm", "bias", "vector", "other"})


@jax.tree_util.register_pytree_node_class
class Chain:
    """Stages, methods, branches and coordinate systems, applied one after the other."""

    def __init__(self, items: Sequence["Node"]):
        self.items = tuple(items)

    def __or__(self, other: "Node") -> "Chain":
        return chain(self, other)

    def __repr__(self) -> str:
        return "|".join(repr(item) for item in self.items)

    def tree_flatten(self):
        return list(self.items), None

    @classmethod
    def tree_unflatten(cls, _, items):
        return cls(items)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that the chain's stages read."""
        found = (need for stage in walk(self) for need in stage.factory.needs)
        return tuple(dict.fromkeys(found))


@jax.tree_util.register_pytree_node_class
class Branch:
    """Different chains for different leaves; `choose` names the chain of a leaf."""

    def __init__(self, label: str, choose: Callable[[Any], str], branches: Mapping[str, Chain]):
        self.label, self.choose, self.branches = label, choose, dict(branches)

    def __repr__(self) -> str:
        return f"{self.label}({', '.join(f'{k}={v!r}' for k, v in self.branches.items())})"

    def tree_flatten(self):
        return list(self.branches.values()), (self.label, self.choose, tuple(self.branches))

    @classmethod
    def tree_unflatten(cls, auxiliary, chains):
        label, choose, names = auxiliary
        return cls(label, choose, dict(zip(names, chains, strict=True)))


@jax.tree_util.register_pytree_node_class
class Within:
    """A chain that runs in other coordinates; the way back is kept per leaf."""

    def __init__(self, coordinates: Stage, inner: Chain):
        self.coordinates, self.inner = coordinates, inner

    def __repr__(self) -> str:
        return f"within({self.coordinates!r}, {self.inner!r})"

    def tree_flatten(self):
        return [self.coordinates, self.inner], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


Node = Stage | Chain | Branch | Within


def walk(node: Node) -> Iterator[Stage]:
    """All stages of a chain, those of every branch and coordinate system included."""
    match node:
        case Stage(kind="method"):
            yield from walk(node.build())
        case Stage():
            yield node
        case Chain():
            yield from (stage for item in node.items for stage in walk(item))
        case Branch():
            yield from (stage for item in node.branches.values() for stage in walk(item))
        case Within():
            yield node.coordinates
            yield from walk(node.inner)


def reduces(node: Node) -> bool:
    """Whether a chain makes one model of its experts, rather than one for each.

    Example:
        >>> import mergejax as mj
        >>> reduces(mj.ties()), reduces(mj.drop())
        (True, False)
    """
    kinds = {stage.kind for stage in walk(node)}
    return bool(kinds & {"reduce", "fold"}) and "restore" not in kinds


def chain(*items: Node) -> Chain:
    """Joins stages and methods into one chain.

    Args:
        *items: stages (`mj.trim(0.2)`), named methods (`mj.ties()`) or chains, applied in order.

    Returns:
        A chain, which `mj.merge` applies to a base and its experts.

    Raises:
        MergeError: an item is no stage.

    Example:
        >>> import mergejax as mj
        >>> mj.chain(mj.drop(0.8), mj.ties(density=0.3))
        drop(rate=0.8)|ties(density=0.3)
    """
    if not items:
        raise MergeError("chain() is empty; give at least one stage, such as ties()")
    for item in items:
        if not isinstance(item, Node):
            raise MergeError(
                f"chain() takes stages and chains, such as trim(0.2) or ties(), not {item!r}"
            )
    flat = [part for item in items for part in (item.items if isinstance(item, Chain) else [item])]
    return Chain(flat)


def by_stats(*, otherwise: Node, **known: Node) -> Branch:
    """One chain for the leaves that have a statistic, another for those that have none.

    Args:
        otherwise: the chain for leaves with none of the statistics.
        **known: chains by the statistic that a leaf must have; the first one counts.

    Returns:
        A node to put into a chain.

    Example:
        >>> import mergejax as mj
        >>> mj.by_stats(gram=mj.gram_solve(), otherwise=mj.mean())
        by_stats(gram=gram_solve(), otherwise=mean())
    """
    branches = {name: chain(node) for name, node in {**known, "otherwise": otherwise}.items()}
    return Branch("by_stats", _HasStatistic(tuple(known)), branches)


@dataclasses.dataclass(frozen=True)
class _HasStatistic:
    needs: tuple[str, ...]

    def __call__(self, info: Any) -> str:
        return next((need for need in self.needs if need in info.stats), "otherwise")


@dataclasses.dataclass(frozen=True)
class _HasRole:
    roles: tuple[str, ...]

    def __call__(self, info: Any) -> str:
        return info.role if info.role in self.roles else "otherwise"


def by_role(*, otherwise: Node, **roles: Node) -> Branch:
    """Different chains for leaves of different roles.

    Args:
        otherwise: the chain for all roles that are not named.
        **roles: chains by role: kernel, convolution, embedding, norm, bias, vector, other.

    Returns:
        A node to put into a chain. Whole-model quantities that a branch measures cover the
        leaves of that branch only.

    Raises:
        MergeError: an unknown role.

    Example:
        >>> import mergejax as mj
        >>> mj.chain(mj.by_role(kernel=mj.ties(0.1), otherwise=mj.mean()), mj.scale(0.7))
        by_role(kernel=ties(density=0.1), otherwise=mean())|scale(scaling=0.7)
    """
    raise_all(
        [f"by_role: no role is called '{r}', {did_you_mean(r, ROLES)}" for r in set(roles) - ROLES]
    )
    branches = {name: chain(node) for name, node in {**roles, "otherwise": otherwise}.items()}
    return Branch("by_role", _HasRole(tuple(roles)), branches)


def within(coordinates: Stage, inner: Node) -> Within:
    """Runs a chain in other coordinates and takes its result back.

    Args:
        coordinates: a stage declared with `@coordinates`: its two functions lead there,
            (ds, leaf) -> (ds', context), and back, (x, context, leaf) -> x.
        inner: the chain that runs on ds'.

    Returns:
        A node to put into a chain.

    Example:
        >>> import mergejax as mj
        >>> mj.within(mj.canonical_matrix(), mj.ties(0.1))
        within(canonical_matrix(), ties(density=0.1))
    """
    return Within(coordinates, chain(inner))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stage"], meta_fields=["path", "role"]
)
@dataclasses.dataclass(frozen=True)
class Placed:
    """A stage at its place in an expanded chain.

    Attributes:
        path: where it stands in the chain; what a stage measured is kept under its path.
        stage: the stage.
        role: 'apply', or 'enter' and 'leave' for the two ends of a coordinate system.
    """

    path: str
    stage: Stage
    role: str = "apply"


def expand(node: Node, info: Any, path: str = "") -> list[Placed]:
    """The stages that one leaf goes through, methods and branches resolved."""
    match node:
        case Stage(kind="method"):
            return expand(node.build(), info, path)
        case Stage():
            return [Placed(path, node)]
        case Chain():
            return [
                p for i, item in enumerate(node.items) for p in expand(item, info, f"{path}/{i}")
            ]
        case Branch():
            name = node.choose(info)
            return expand(node.branches[name], info, f"{path}/{name}")
    enter = Placed(f"{path}/in", node.coordinates, "enter")
    leave = Placed(f"{path}/out", node.coordinates, "leave")
    return [enter, *expand(node.inner, info, f"{path}/inner"), leave]


def reduction(placed: Sequence[Placed]) -> int:
    """Where the experts are reduced to one: an index, or the length where they are not."""
    kinds = [p.stage.kind if p.role == "apply" else "" for p in placed]
    return next((i for i, kind in enumerate(kinds) if kind in ("reduce", "fold")), len(placed))
