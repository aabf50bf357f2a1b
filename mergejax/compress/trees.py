"""From models to deltas, and from packed deltas to models."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mergejax.compress.packed import Packed, decode, float32
from mergejax.door import Tree, check_alike, leaves_by_name, merged_buffer
from mergejax.errors import MergeError, some
from mergejax.leaves import is_counter, is_floating


def deltas(base: Tree, experts: Sequence[Tree]) -> list[dict[str, np.ndarray]]:
    """The experts' differences from the base, float32 by leaf name.

    Args:
        base: tree of arrays.
        experts: trees like it. Integers and booleans must be the base's and are left out.

    Returns:
        One mapping per expert, for `encode`.

    Raises:
        MergeError: leaves that differ in name, shape or type, or integers that differ.

    Example:
        >>> deltas({'w': np.zeros(2, np.float32)}, [{'w': np.ones(2, np.float32)}])[0]['w']
        array([1., 1.], dtype=float32)
    """
    reference, _ = leaves_by_name(base, "the base")
    named = [leaves_by_name(tree, f"expert {i}")[0] for i, tree in enumerate(experts)]
    check_alike(reference, named, [f"expert {i}" for i in range(len(named))])
    found: list[dict[str, np.ndarray]] = [{} for _ in named]
    for name, origin in reference.items():
        if not is_floating(origin.dtype):
            merged_buffer(name, [origin, *(tree[name] for tree in named)], is_counter(name))
            continue
        for own, tree in zip(found, named, strict=True):
            own[name] = float32(tree[name]) - float32(origin)
    return found


def restore(base: Tree, packed: Packed) -> list[Tree]:
    """The base with each of the packed deltas added.

    Args:
        base: tree of arrays; leaves that have no delta are kept.
        packed: see `encode`.

    Returns:
        Trees like the base, one per expert, rounded once to the base's types.

    Raises:
        MergeError: leaves that the base lacks, or of another shape.

    Example:
        >>> import mergejax as mj
        >>> base = {'w': np.ones(2, np.float32)}
        >>> packed = mj.compress.encode('bit_delta()', [{'w': np.float32([1, 2])}])
        >>> restore(base, packed)[0]['w']
        Array([2., 3.], dtype=float32)
    """
    leaves, back = leaves_by_name(base, "the base")
    shapes = {name: tuple(x.shape) for name, x in leaves.items()}
    found = decode(packed)
    wrong = [name for name, x in found[0].items() if shapes.get(name) != x.shape]
    if wrong:
        raise MergeError(
            f"the packed deltas have leaves {some(wrong)} that the base lacks or has in another "
            "shape; take the base that they were encoded with"
        )
    models = []
    for delta in found:
        changed = {
            name: (jnp.asarray(leaves[name]).astype(jnp.float32) + x).astype(leaves[name].dtype)
            for name, x in delta.items()
        }
        models.append(back({**leaves, **changed}))
    return models
