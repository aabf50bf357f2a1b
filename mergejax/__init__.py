"""Merges the weights of several fine-tuned neural networks into one, in JAX."""

import importlib
from typing import Any

from mergejax.api import merge as merge
from mergejax.api import stream as stream
from mergejax.chains import by_role as by_role
from mergejax.chains import by_stats as by_stats
from mergejax.chains import chain as chain
from mergejax.chains import within as within
from mergejax.continual import continual as continual
from mergejax.core import coordinates as coordinates
from mergejax.core import each as each
from mergejax.core import fold as fold
from mergejax.core import joint as joint
from mergejax.core import method as method
from mergejax.core import reduce as reduce
from mergejax.core import refine as refine
from mergejax.errors import MergeError as MergeError
from mergejax.errors import did_you_mean
from mergejax.hyper import by_depth as by_depth
from mergejax.hyper import by_name as by_name
from mergejax.registry import METHODS as METHODS
from mergejax.registry import PIECES as PIECES
from mergejax.registry import parse as parse
from mergejax.registry import register as register
from mergejax.soups import greedy_soup as greedy_soup
from mergejax.stacking import stack_layers as stack_layers
from mergejax.version import __version__ as __version__

# Not everybody needs them, and the collectors import Flax, which takes a second.
_PACKAGES = ("collect", "compress", "lowrank")


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return METHODS[name].make
    if name in PIECES:
        return PIECES[name]
    if name in _PACKAGES:
        return importlib.import_module(f"mergejax.{name}")
    raise AttributeError(f"mergejax has no '{name}', {did_you_mean(name, __dir__())}")


def __dir__() -> list[str]:
    return sorted({*globals(), *METHODS, *PIECES, *_PACKAGES})
