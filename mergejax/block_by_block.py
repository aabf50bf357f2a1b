"""Merges block by block, where a block's statistics depend on the blocks merged before it."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx, serialization

from mergejax import collect
from mergejax.api import merge
from mergejax.collect.streaming import nnx_parts
from mergejax.errors import MergeError, raise_all, some
from mergejax.language import as_chain

Tree = Any


class Block(NamedTuple):
    """One step of a model.

    Attributes:
        leaves: names at the top of the parameters that the step owns.
        apply: (the parameters under these names, inputs) -> the inputs of the next step; or an NNX
            module that has these names and no other, called on the inputs.
        calibrated: whether statistics are collected here; where not, these leaves are merged as the
            method merges leaves without them.
    """

    leaves: tuple[str, ...]
    apply: Callable[[Any, Any], Any] | nnx.Module
    calibrated: bool = True


def sequential(
    method: Any,
    blocks: Sequence[Block],
    base: Tree | None,
    experts: Sequence[Tree],
    batches: Sequence[Iterable[Any]],
    *,
    names: Sequence[str] | None = None,
    seed: Any = 0,
    dtype: Any = None,
) -> Tree:
    r"""Merges a model block by block, each with Gram matrices seen behind the merged blocks.

    With h_k the data of expert k, and for each block in turn:

    .. math:: S_k = statistic(\theta_k^{block}, h_k),\quad
        \theta^{block} = method(\theta_1^{block}, \ldots; S),\quad
        h_k \leftarrow block(\theta^{block}, h_k)

    So the inputs that enter a block come from the merged blocks before it, and those inside a
    block from the expert's own layers. With `mj.regmean(shrink=0.95)` this is RegMean++. With
    `mj.featcal()` the statistics compare the merged model, as it is without them, on h_k with the
    expert on its own inputs, which are then carried along as well. Statistics of one block are
    alive at a time, and the inputs of one block for all data.

    Numbers that a method measures of the whole model are measured of each block here.

    Args:
        method: a method or its string; may read 'gram', 'affine_gram', 'drift', 'norm_moments'.
        blocks: the model's steps in order; together they own every leaf once.
        base: the common start, nested dictionaries of arrays or an NNX state, or None where the
            method needs none.
        experts: trees like base.
        batches: for each expert an iterable of its task's inputs to the first block.
        names: of the experts; see `mj.merge`.
        seed: of random methods.
        dtype: of the result; see `mj.merge`.

    Returns:
        The merged tree, nested dictionaries (`nnx.replace_by_pure_dict` puts them into a state).

    Raises:
        MergeError: blocks that leave out or share leaves, not one iterable per expert, an expert
            without batches, a method that needs other statistics, and what `mj.merge` and
            `mj.collect.gram` refuse.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, mergejax as mj
        >>> apply = lambda params, x: nn.Dense(1).apply({'params': params['dense']}, x)
        >>> leaf = lambda x: {'dense': {'kernel': jnp.asarray([[x]]), 'bias': jnp.zeros(1)}}
        >>> data = [[jnp.asarray([[3.0]])], [jnp.asarray([[1.0]])]]
        >>> blocks = [mj.Block(('dense',), apply)]
        >>> merged = mj.sequential(mj.regmean(), blocks, None, [leaf(0.0), leaf(1.0)], data)
        >>> print(merged['dense']['kernel'].round(3))  # (9 · 0 + 1 · 1) / 10
        [[0.1]]

    Source: RegMean++, 2025, arXiv:2508.03121; FeatCal, 2026, arXiv:2605.13030. Leaves without a
    Gram matrix are averaged by RegMean in every block, also behind the last one, where the authors'
    code for CLIP keeps the base's.
    """
    several = [_nested(expert) for expert in experts]
    start = None if base is None else _nested(base)
    chain = as_chain(method)
    models = {f"expert {i}": tree for i, tree in enumerate(several)}
    known = models if start is None else {"the base": start, **models}
    _check(chain.needs, blocks, known, several, batches)
    inputs = [list(each) for each in batches]
    empty = [str(i) for i, each in enumerate(inputs) if not each]
    if empty:
        raise MergeError(
            f"sequential: there is no batch for expert {', '.join(empty)}; give each expert an "
            "iterable of at least one batch"
        )
    own = inputs  # what reaches a block in the experts
    merged: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        parts = [_part(tree, block) for tree in several]
        before = None if start is None else _part(start, block)
        run = _runner(block)
        nothing: Mapping[str, Any] = {need: [{}] * len(parts) for need in chain.needs}
        merge_with = functools.partial(
            merge, chain, before, parts, names=names, seed=seed, dtype=dtype
        )
        found = nothing
        if block.calibrated:
            plain = merge_with(stats=nothing) if set(chain.needs) & set(_OF_MERGED) else None
            student = None if plain is None else run.params(plain)
            sights = [
                Sight(run.params(part), student, each, mine)
                for part, each, mine in zip(parts, inputs, own, strict=True)
            ]
            found = {
                need: [COLLECTED[need](run.model, see) for see in sights] for need in chain.needs
            }
        result = merge_with(stats=found)
        merged |= result
        if number + 1 < len(blocks):
            inputs = [[run.call(result, batch) for batch in each] for each in inputs]
            if "drift" in chain.needs:
                pairs = zip(parts, own, strict=True)
                own = [[run.call(part, batch) for batch in each] for part, each in pairs]
    return merged


class _Runner(NamedTuple):
    """A block as collectors take it: a model, its parameters from a part, and a compiled call."""

    model: Any
    params: Callable[[Tree], Any]
    call: Callable[[Tree, Any], Any]


def _runner(block: Block) -> _Runner:
    if not isinstance(block.apply, nnx.Module):
        apply = jax.jit(block.apply)
        return _Runner(apply, lambda part: part, apply)
    build, state = nnx_parts(block.apply, None)

    def params(part: Tree) -> Any:
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, nnx.restore_int_paths(part))
        return filled

    return _Runner(block.apply, params, jax.jit(lambda part, x: build(params(part))(x)))


class Sight(NamedTuple):
    """What a statistic of one block and one expert is collected from.

    Attributes:
        expert: the expert's block.
        merged: the block merged without statistics, for those that look at it.
        inputs: that reach the block behind the merged blocks, a list of batches.
        own: that reach it in the expert.
    """

    expert: Tree
    merged: Tree
    inputs: list[Any]
    own: list[Any]


_OF_MERGED = ("drift", "norm_moments")
COLLECTED: Mapping[str, Callable[[Any, Sight], Any]] = {
    "gram": lambda apply, see: collect.gram(apply, see.expert, see.inputs),
    "affine_gram": lambda apply, see: collect.affine_gram(apply, see.expert, see.inputs),
    "drift": lambda apply, see: collect.drift(
        apply, see.merged, see.expert, list(zip(see.inputs, see.own, strict=True))
    ),
    "norm_moments": lambda apply, see: collect.norm_moments(apply, see.merged, see.inputs),
}


def _nested(tree: Tree) -> dict[str, Any]:
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return serialization.to_state_dict(pure)


def _part(tree: Tree, block: Block) -> Tree:
    return {name: tree[name] for name in block.leaves}


def _check(
    needs: Sequence[str],
    blocks: Sequence[Block],
    models: Mapping[str, Tree],
    experts: Sequence[Tree],
    batches: Sequence[Iterable[Any]],
) -> None:
    problems = []
    if not experts:
        problems.append("sequential: there is no expert to merge; pass at least one")
    elif len(experts) != len(batches):
        problems.append(
            f"sequential: {len(experts)} experts and {len(batches)} iterables of batches; pass one "
            "for each expert"
        )
    for name in (need for need in needs if need not in COLLECTED):
        problems.append(
            f"sequential: the method needs the statistic '{name}', but block by block only "
            f"{some(list(COLLECTED))} are collected; merge with mj.merge and stats"
        )
    owned = [name for block in blocks for name in block.leaves]
    twice = sorted({name for name in owned if owned.count(name) > 1})
    if twice:
        problems.append(f"sequential: {some(twice)} belong to several blocks; name each once")
    for label, tree in models.items():
        lost = [name for name in tree if name not in owned]
        absent = [name for name in owned if name not in tree]
        if lost:
            problems.append(
                f"sequential: {some(lost)} of {label} belong to no block; name them in the "
                "leaves of a block"
            )
        if absent:
            problems.append(f"sequential: {label} has no {some(absent)}, which a block names")
    raise_all(problems)
