"""Merges the weights of several fine-tuned neural networks into one, in JAX."""

import importlib
import importlib.util
import os
from typing import Any

from mergejax.errors import MergeError as MergeError
from mergejax.errors import did_you_mean
from mergejax.version import __version__ as __version__

# SciPy's OpenBLAS, by which JAX decomposes matrices on CPUs, keeps its threads spinning behind each
# call, and XLA's share their processors: RegMean takes twice as long. It reads this when loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 clock cycles, the least

# Where each name lives. They are imported when they are used: JAX takes a second, Flax another,
# and a command line that only has to say what is wrong with a path needs neither.
_PLACES = {
    "merge": "api",
    "stream": "api",
    "merge_checkpoints": "checkpoints.merge",
    "by_role": "chains",
    "by_stats": "chains",
    "chain": "chains",
    "within": "chains",
    "continual": "one_by_one",
    "coordinates": "core",
    "each": "core",
    "fold": "core",
    "joint": "core",
    "method": "core",
    "reduce": "core",
    "restore": "core",
    "refine": "core",
    "fuse": "fused",
    "split_fused": "fused",
    "by_depth": "varying",
    "by_name": "varying",
    "METHODS": "registry",
    "PIECES": "registry",
    "parse": "language",
    "register": "registry",
    "search_groups": "outer",
    "simplex_points": "outer",
    "greedy_soup": "soups",
    "stack_layers": "stacking",
    "average_checkpoints": "checkpoints.average",
    "Block": "block_by_block",
    "sequential": "block_by_block",
}
_PACKAGES = (
    "alignment",
    "collect",
    "compress",
    "hyper",
    "lowrank",
    "models",
    "quantize",
    "representation",
)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        found = getattr(importlib.import_module(f"mergejax.{_PLACES[name]}"), name)
        globals()[name] = found
        return found
    if name.startswith("__"):
        raise AttributeError(f"mergejax has no '{name}'")
    if importlib.util.find_spec(f"mergejax.{name}") is not None:
        return importlib.import_module(f"mergejax.{name}")
    registry = importlib.import_module("mergejax.registry")
    if name in registry.METHODS:
        return registry.METHODS[name].make
    if name in registry.PIECES:
        return registry.PIECES[name]
    raise AttributeError(f"mergejax has no '{name}', {did_you_mean(name, __dir__())}")


def __dir__() -> list[str]:
    registry = importlib.import_module("mergejax.registry")
    return sorted({*globals(), *_PLACES, *_PACKAGES, *registry.METHODS, *registry.PIECES})
