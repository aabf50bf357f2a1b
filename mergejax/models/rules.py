"""Where PyTorch keeps what a Flax model keeps: one table per architecture, for both directions.

The Flax module itself says which leaves there are and of what shape. A table adds how PyTorch calls
each module, and the rest follows from the leaf: a `kernel` is a `weight` with its output axis
first, a `scale` and an `embedding` are a `weight` as it is, `mean` and `var` are running
statistics. So a table is a dozen names, and there is nothing to keep in step.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict as Config

from mergejax.errors import MergeError, did_you_mean, raise_all
from mergejax.leaves import name_of

Shape = tuple[int, ...]
Names = Mapping[str, str | tuple[str, ...]]
Has = Callable[[str], bool]
_WEIGHTS = {
    "kernel": ("weight",),
    "embedding": ("weight",),
    "scale": ("weight", "gamma"),  # gamma and beta are TensorFlow's, in old files
    "bias": ("bias", "beta"),
    "mean": ("running_mean",),
    "var": ("running_var",),
}
COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm, which Flax does not count


def words(*names: str) -> Callable[[Config], dict[str, Any]]:
    """Example inputs of that many sequences of tokens, for shapes alone."""
    return lambda _: {name: jax.ShapeDtypeStruct((1, 4), jnp.int32) for name in names}


_one_text = words("input_ids")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model that can be built in Flax, and its names in PyTorch.

    Attributes:
        module: makes the Flax module from the settings.
        names: PyTorch's module or parameter -> ours; '{}' stands for a number. Spellings that are
            read but not written follow behind ' | '. Several of ours are equal parts of one of
            PyTorch's, along its output axis.
        settings: what is read from config.json, and what holds where it does not say.
        inputs: example inputs by name, for shapes.
        body: prefix of the body's names, which files may leave out, or add to a bare body.
        tied: PyTorch's names that repeat others -> those.
        unused: regular expressions of buffers that Flax does not need.
        straight: regular expression of PyTorch's modules that store [in, out] as Flax does.
        vocabulary: PyTorch's name of the leaf with one row for each token.
        only: settings that other values of would need another module.
        optional: settings that are true where a file has a certain module, by PyTorch's name.
    """

    module: Callable[[Config], nn.Module]
    names: Names
    settings: Mapping[str, Any]
    inputs: Callable[[Config], Mapping[str, Any]] = _one_text
    body: str = ""
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = (r"(^|\.)position_ids$", r"(^|\.)rotary_emb\.inv_freq$")
    straight: str = "$^"
    vocabulary: str = ""
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Place(NamedTuple):
    """Where PyTorch keeps one leaf.

    Attributes:
        name: PyTorch's.
        axes: of PyTorch's tensor, in the order of the leaf's axes.
        part, parts: the leaf is one of so many equal parts along PyTorch's axis axes[-1].
        spellings: other names for it.
    """

    name: str
    axes: tuple[int, ...]
    part: int = 0
    parts: int = 1
    spellings: tuple[str, ...] = ()

    def shape(self, leaf: Shape) -> Shape:
        """The shape of PyTorch's tensor for the leaf's."""
        sizes = dict(zip(self.axes, leaf, strict=True))
        if self.axes:
            sizes[self.axes[-1]] *= self.parts
        return tuple(sizes[axis] for axis in range(len(leaf)))


def under(torch: str, flax: str, names: Names) -> dict[str, str | tuple[str, ...]]:
    """A table of names below a prefix each.

    Example:
        >>> under('bert', 'body', {'pooler.dense | pool': 'pooler'})
        {'bert.pooler.dense | bert.pool': 'body/pooler'}
    """

    def ours(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{flax}/{name}" if isinstance(name, str) else tuple(f"{flax}/{n}" for n in name)

    return {
        " | ".join(f"{torch}.{name}" for name in theirs.split(" | ")): ours(name)
        for theirs, name in names.items()
    }


def places(architecture: Architecture, leaves: Mapping[str, Shape]) -> dict[str, Place]:
    """Where PyTorch keeps each leaf of a Flax model.

    Args:
        architecture: its table of names.
        leaves: shapes by name, 'params/block_0/mlp_in/kernel'.

    Raises:
        MergeError: leaves that the table does not name.
    """
    table: dict[str, tuple[str, int, int]] = {}
    for theirs, ours in architecture.names.items():
        several = (ours,) if isinstance(ours, str) else ours
        table |= {name: (theirs, part, len(several)) for part, name in enumerate(several)}
    found, unnamed = {}, []
    for leaf, shape in leaves.items():
        path = leaf.partition("/")[2]
        module, _, last = path.rpartition("/")
        numbers = re.findall(r"\d+", path)
        whole, outer = (re.sub(r"\d+", "{}", name) for name in (path, module))
        if whole not in table and outer not in table:
            unnamed.append(leaf)
            continue
        theirs, part, parts = table.get(whole) or table[outer]
        suffixes = ("",) if whole in table else tuple(f".{name}" for name in _WEIGHTS[last])
        stems = theirs.format(*numbers * (theirs.count(" | ") + 1)).split(" | ")
        straight = last != "kernel" or re.search(architecture.straight, stems[0])
        rank = len(shape)
        axes = tuple(range(rank)) if straight else (*range(2, rank), 1, 0)
        names = [stem + suffix for stem in stems for suffix in suffixes]
        found[leaf] = Place(names[0], axes, part, parts, tuple(names[1:]))
    raise_all([f"the table of names has no rule for {grouped(unnamed)}"] if unnamed else [])
    return found


def leaf_shapes(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of a module's leaves by name; nothing is computed."""
    given: dict[str, Any] = {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), **given))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): tuple(leaf.shape) for path, leaf in leaves}


def settings_of(
    architecture: Architecture, config: Mapping[str, Any], has: Has | None = None
) -> Config:
    """The settings that a module is built from.

    Args:
        architecture: which settings there are.
        config: config.json.
        has: whether the weights have a module, by PyTorch's name, for modules that are optional.

    Raises:
        MergeError: values for which there is no module.
    """
    optional = architecture.optional if has else {}
    given = {**config, **{name: has(marker) for name, marker in optional.items() if has}}
    if "id2label" in config:
        given["num_labels"] = len(config["id2label"])
    raise_all(
        [
            f"the config has {name}={config[name]!r}, and only {wanted!r} can be built"
            for name, wanted in architecture.only.items()
            if config.get(name, wanted) != wanted
        ]
    )
    return Config(_filled(architecture.settings, given))


def _filled(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Given values where there are any; tables inside tables are filled likewise."""
    return {
        name: _filled(x, given.get(name) or {}) if isinstance(x, Mapping) else given.get(name, x)
        for name, x in settings.items()
    }


def grouped(names: Iterable[str]) -> str:
    """All names, those that differ by numbers as one.

    Example:
        >>> grouped(['h.0.b', 'h.1.b', 'h.2.b', 'h.4.b', 'w'])
        "'h.{0-2,4}.b', 'w'"
    """
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(n) for n in re.findall(r"(?<![a-z_\d])\d+", name)]
        groups.setdefault(re.sub(r"(?<![a-z_\d])\d+", "{}", name), []).append(numbers)
    said = []
    for template, rows in groups.items():
        columns = [_ranges(sorted(set(column))) for column in zip(*rows, strict=True)]
        said.append("'" + template.format(*columns) + "'")
    return ", ".join(said)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    if len(numbers) == 1:
        return str(numbers[0])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return "{" + ",".join(texts) + "}"


def choose(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    """What a setting's value stands for.

    Raises:
        MergeError: an unknown value.
    """
    if value not in known:
        raise MergeError(f"the config has {name}={value!r}, {did_you_mean(str(value), known)}")
    return known[value]
