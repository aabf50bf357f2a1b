"""A recorded case of another implementation, its parameters and what they are translated to."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import mergejax as mj

NOT_BUILT = "method not built yet: "
LEFT_OUT = "left out of a golden comparison"

REQUIRED = object()


class NotBuilt(Exception):
    """A form of a method that this library does not have yet."""


class Untranslatable(Exception):
    """A parameter or a value that this library has no word for."""


class Parameters:
    """A case's hyper-parameters, each to be taken exactly once."""

    def __init__(self, given: Mapping[str, Any], label: str = ""):
        self.left, self.label = dict(given), label

    def __contains__(self, name):
        return name in self.left

    def take(self, name, default=REQUIRED, choices=None):
        if name not in self.left and default is REQUIRED:
            raise Untranslatable(f"{self.label} has no parameter '{name}'")
        value = self.left.pop(name, default)
        if choices is not None and value not in choices:
            raise Untranslatable(f"{self.label}: {name}={value!r}, translated are {choices}")
        return value

    def finish(self):
        if self.left:
            raise Untranslatable(f"{self.label}: nothing translates {self.left}")


@dataclasses.dataclass
class Case:
    """A recorded case: its JSON, and its tensors by prefix and name."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]

    def __post_init__(self):
        self.method = self.facts["method"]
        self.parameters = Parameters(self.facts["hyperparameters"], self.method)

    def numbered(self, prefix):
        """The trees PREFIX0, PREFIX1, ... in order."""
        several = []
        while f"{prefix}{len(several)}" in self.tensors:
            several.append(dict(self.tensors[f"{prefix}{len(several)}"]))
        return several

    @property
    def base(self):
        return dict(self.tensors["base"])

    @property
    def experts(self):
        return self.numbered("expert")

    @property
    def layout(self):
        return "torch" if self.facts["layout"].startswith("PyTorch") else "flax"


class Draw(NamedTuple):
    """A method that drops at random, taken apart.

    Attributes:
        rates: fraction that is dropped, for each expert.
        rescale: see `mj.drop`.
        host: the method behind it.
        stage: what draws masks of our own, given how they are rescaled; None for `mj.drop`.
    """

    rates: Sequence[float]
    rescale: str
    host: Any
    stage: Callable[[str], Any] | None = None

    def given(self):
        """With recorded masks."""
        return mj.chain(mj.drop_given(rate=list(self.rates), rescale=self.rescale), self.host)

    def random(self):
        """With masks of our own."""
        return mj.chain(self.dropped(self.rescale), self.host)

    def dropped(self, rescale):
        """Masks of our own, and nothing behind them."""
        stage = self.stage or (lambda rescale: mj.drop(rate=list(self.rates), rescale=rescale))
        return stage(rescale)


@dataclasses.dataclass
class Translation:
    """The arguments of `mj.merge`, and for a random method what it is made of."""

    method: Any
    base: Any
    experts: list
    stats: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    draw: "Draw | None" = None
    result: Callable[[], Any] | None = None  # trees by prefix, where `mj.merge` does not merge


def several(value, count, label):
    """One number per expert, from such a list or from one number."""
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise Untranslatable(f"{label}: {len(values)} values for {count} models")
    return values


def exactly(names):
    return [f"^{re.escape(name)}$" for name in names]


def given_masks(case, rates):
    masks = case.numbered("mask")
    if not masks and not any(rates):
        masks = [{} for _ in rates]
    if len(masks) != len(rates):
        raise Untranslatable(f"{len(masks)} masks for {len(rates)} experts, whose draws are random")
    for mask, rate, expert in zip(masks, rates, case.experts, strict=True):
        if missing := sorted(set(expert) - set(mask)):
            if rate > 0:
                raise Untranslatable(f"no mask for {missing}")
            mask.update({name: np.ones(expert[name].shape, np.uint8) for name in missing})
    return masks
